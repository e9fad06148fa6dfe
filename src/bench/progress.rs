//! Progress of a sweep. Counts U-Net forwards, which time follows.

use std::time::Duration;

use crate::progress::{Every, Progress};

const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows how far a sweep is.
pub struct Ticker {
    shown: Progress,
    cells: usize,
    cells_done: usize,
    forwards_done: u64,
}

impl Ticker {
    /// A ticker over `cells` cells that cost `forwards` together.
    #[must_use]
    pub fn new(cells: usize, forwards: u64, quiet: bool) -> Self {
        let shown = Progress::new("forward", 0, forwards, Every::Time(LINE_EVERY), quiet);
        let mut ticker = Self { shown, cells, cells_done: 0, forwards_done: 0 };
        ticker.within(0);
        ticker
    }

    /// The running cell has spent `f` forwards.
    pub fn within(&mut self, f: u64) {
        let cells = format!("{}/{} cells", self.cells_done, self.cells);
        self.shown.show(self.forwards_done + f, &cells);
    }

    /// A cell that was predicted to cost `f` forwards is done.
    pub fn cell_done(&mut self, f: u64) {
        self.cells_done += 1;
        self.forwards_done += f;
        self.within(0);
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.shown.finish();
    }
}
