//! Progress of a training run.

use crate::progress::{Every, Progress};

/// What a step's line says beside how far the run is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Glance {
    pub loss: Option<f64>,
    /// Mean reward of the step's trajectories.
    pub reward: Option<f64>,
    /// Groups that were skipped, since the run began.
    pub skipped: u64,
}

/// Shows how far a run is.
pub struct RunProgress {
    shown: Progress,
    steps: u64,
}

impl RunProgress {
    /// A run of `steps` steps that goes on after `from_step`.
    #[must_use]
    pub fn new(from_step: u64, steps: u64, every: Every, quiet: bool) -> Self {
        Self { shown: Progress::new("step", from_step, steps, every, quiet), steps }
    }

    /// Step number `step`, counted from 1, is done.
    pub fn step(&mut self, step: u64, glance: &Glance) {
        self.shown.show(step, &message(step, self.steps, glance));
    }

    /// Prints a line of its own, such as where a checkpoint was written.
    pub fn say(&self, line: &str) {
        self.shown.say(line);
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.shown.finish();
    }
}

fn message(step: u64, steps: u64, glance: &Glance) -> String {
    let mut parts = vec![format!("step {step}/{steps}")];
    parts.extend(glance.loss.map(|loss| format!("loss {loss:.4}")));
    parts.extend(glance.reward.map(|reward| format!("reward {reward:.3}")));
    if glance.skipped > 0 {
        parts.push(format!("{} skipped", glance.skipped));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_what_the_step_has() {
        let whole = Glance { loss: Some(0.123_46), reward: Some(0.5), skipped: 3 };
        let expected = "step 7/20, loss 0.1235, reward 0.500, 3 skipped";
        assert_eq!(message(7, 20, &whole), expected);
        assert_eq!(message(7, 20, &Glance::default()), "step 7/20");
    }
}
