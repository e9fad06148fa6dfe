//! Progress of a sweep: a bar with rate and time left on a terminal, a plain
//! line every ten seconds elsewhere. Counts U-Net forwards, which time follows.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows how far a sweep is.
pub struct Ticker {
    bar: Option<ProgressBar>,
    quiet: bool,
    cells: usize,
    cells_done: usize,
    forwards: u64,
    forwards_done: u64,
    /// Forwards of the running cell.
    within: u64,
    start: Instant,
    last_line: Instant,
}

impl Ticker {
    /// A ticker over `cells` cells that cost `forwards` together.
    #[must_use]
    pub fn new(cells: usize, forwards: u64, quiet: bool) -> Self {
        let bar = (!quiet && cells > 0 && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(forwards);
            let template = "{bar:30} {percent:>3}%  {msg}  {per_sec}, {elapsed} gone, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.with_key(
                    "per_sec",
                    |state: &indicatif::ProgressState, w: &mut dyn std::fmt::Write| {
                        let _ = write!(w, "{:.1} forwards/s", state.per_sec());
                    },
                ));
            }
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        let now = Instant::now();
        let ticker = Self {
            bar,
            quiet,
            cells,
            cells_done: 0,
            forwards,
            forwards_done: 0,
            within: 0,
            start: now,
            last_line: now,
        };
        ticker.show_bar();
        ticker
    }

    /// The running cell has spent `f` forwards.
    pub fn within(&mut self, f: u64) {
        self.within = f;
        self.show();
    }

    /// A cell that was predicted to cost `f` forwards is done.
    pub fn cell_done(&mut self, f: u64) {
        self.cells_done += 1;
        self.forwards_done += f;
        self.within = 0;
        self.show();
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn done(&self) -> u64 {
        (self.forwards_done + self.within).min(self.forwards)
    }

    fn show_bar(&self) {
        if let Some(bar) = &self.bar {
            bar.set_position(self.done());
            bar.set_message(format!("{}/{} cells", self.cells_done, self.cells));
        }
    }

    fn show(&mut self) {
        self.show_bar();
        if self.bar.is_some() || self.quiet || self.last_line.elapsed() < LINE_EVERY {
            return;
        }
        self.last_line = Instant::now();
        eprintln!(
            "{}",
            line(self.cells_done, self.cells, self.done(), self.forwards, self.start.elapsed())
        );
    }
}

fn line(cells_done: usize, cells: usize, done: u64, forwards: u64, gone: Duration) -> String {
    let rate = done as f64 / gone.as_secs_f64().max(1e-9);
    let left = if done == 0 {
        "time left unknown".to_owned()
    } else {
        let seconds = forwards.saturating_sub(done) as f64 / rate;
        format!("{} left", HumanDuration(Duration::from_secs_f64(seconds.min(1e9))))
    };
    let percent = 100.0 * done as f64 / forwards.max(1) as f64;
    format!(
        "{cells_done}/{cells} cells, {percent:.0}% of the forwards, {rate:.1} forwards/s, {left}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_carry_rate_and_time_left() {
        assert_eq!(
            line(3, 9, 300, 900, Duration::from_secs(30)),
            "3/9 cells, 33% of the forwards, 10.0 forwards/s, 60 seconds left"
        );
        assert!(line(0, 9, 0, 900, Duration::ZERO).ends_with("time left unknown"));
    }
}
