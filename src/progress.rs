//! Progress of long work: a bar on a terminal, a plain line now and then elsewhere. Both say the
//! rate since the beginning and the time left at that rate.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{bar:30} {percent:>3}%  {msg}, {elapsed} gone";

/// When a plain line is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    Time(Duration),
    /// So many units of work; 0 counts as 1.
    Units(u64),
}

/// Shows how far some work is, on standard error.
pub struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    every: Every,
    work: Work,
    start: Instant,
    last_line: Instant,
    last_units: u64,
}

/// What is counted.
#[derive(Clone, Copy, Debug)]
struct Work {
    /// In the singular, as it stands before an s: `step`.
    unit: &'static str,
    /// Done before this process began.
    before: u64,
    done: u64,
    total: u64,
}

impl Progress {
    /// Work of `total` units, one of them called `unit`, of which an earlier process has done
    /// `before`. With `quiet` there is neither bar nor line.
    #[must_use]
    pub fn new(unit: &'static str, before: u64, total: u64, every: Every, quiet: bool) -> Self {
        let before = before.min(total);
        let bar = (!quiet && before < total && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(total).with_position(before);
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        let (start, work) = (Instant::now(), Work { unit, before, done: before, total });
        Self { bar, quiet, every, work, start, last_line: start, last_units: before }
    }

    /// `done` units are done, those before this process included. `message` begins the line.
    pub fn show(&mut self, done: u64, message: &str) {
        self.work.done = done.min(self.work.total);
        let gone = self.start.elapsed();
        if let Some(bar) = &self.bar {
            bar.set_position(self.work.done);
            bar.set_message(format!("{message}, {}", self.work.pace(gone)));
        } else if !self.quiet && self.is_due() {
            self.last_line = Instant::now();
            self.last_units = self.work.done;
            eprintln!("{}", self.work.line(message, gone));
        }
    }

    /// Prints a line of its own, above the bar where there is one; also when quiet.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn is_due(&self) -> bool {
        match self.every {
            Every::Time(time) => self.last_line.elapsed() >= time,
            // The last one is shown, wherever it falls.
            Every::Units(units) => {
                self.work.done >= self.last_units + units.max(1)
                    || (self.work.done == self.work.total && self.last_units < self.work.total)
            }
        }
    }
}

impl Work {
    fn pace(&self, gone: Duration) -> String {
        let done = self.done.saturating_sub(self.before);
        let rate = done as f64 / gone.as_secs_f64().max(1e-9);
        let left = if done == 0 {
            "time left unknown".to_owned()
        } else {
            let seconds = (self.total - self.done) as f64 / rate;
            format!("{} left", HumanDuration(Duration::from_secs_f64(seconds.min(1e9))))
        };
        let unit = self.unit;
        // Slow work is told by the time of one unit.
        let rate = if rate > 0.0 && rate < 1.0 {
            format!("{:.1} s/{unit}", 1.0 / rate)
        } else {
            format!("{rate:.1} {unit}s/s")
        };
        format!("{rate}, {left}")
    }

    fn line(&self, message: &str, gone: Duration) -> String {
        let percent = 100.0 * self.done as f64 / self.total.max(1) as f64;
        format!("{message}, {percent:.0}% of the {}s, {}", self.unit, self.pace(gone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(before: u64, done: u64) -> Work {
        Work { unit: "forward", before, done, total: 900 }
    }

    #[test]
    fn lines_carry_rate_and_time_left() {
        let half_a_minute = Duration::from_secs(30);
        assert_eq!(
            work(0, 300).line("3/9 cells", half_a_minute),
            "3/9 cells, 33% of the forwards, 10.0 forwards/s, 60 seconds left"
        );
        assert_eq!(
            work(0, 1).line("0/9 cells", half_a_minute),
            "0/9 cells, 0% of the forwards, 30.0 s/forward, 7 hours left"
        );
        assert!(work(0, 0).line("0/9 cells", Duration::ZERO).ends_with("time left unknown"));
    }

    /// What an earlier process did makes this one no faster.
    #[test]
    fn a_resumed_run_counts_its_own_rate() {
        let line = work(600, 660).line("x", Duration::from_secs(30));
        assert_eq!(line, "x, 73% of the forwards, 2.0 forwards/s, 2 minutes left");
        assert!(work(600, 600).line("x", Duration::from_secs(30)).ends_with("unknown"));
    }

    #[test]
    fn lines_come_by_units_or_by_time() {
        let mut progress = Progress::new("step", 4, 10, Every::Units(3), true);
        let mut due = |done| {
            progress.work.done = done;
            let is = progress.is_due();
            if is {
                progress.last_units = done;
            }
            is
        };
        let shown: Vec<u64> = (5..=10).filter(|&step| due(step)).collect();
        assert_eq!(shown, [7, 10]);
        progress.every = Every::Time(Duration::from_secs(3600));
        assert!(!progress.is_due());
        progress.every = Every::Time(Duration::ZERO);
        assert!(progress.is_due());
    }
}
