//! What a run measures, step by step: `metrics.jsonl` for programs, and an event file for
//! TensorBoard, side by side in the run's folder.

mod events;
mod jsonl;
mod proto;

use std::collections::BTreeMap;
use std::path::Path;

use image::RgbImage;

use crate::{Error, Result};
use events::EventFile;
use jsonl::Lines;
pub use jsonl::{FILE, read};

/// Writes a run's measurements. What a call has written survives the process; what lies before
/// a [`Recorder::flush`] survives a loss of power.
pub struct Recorder {
    lines: Lines,
    events: EventFile,
}

impl Recorder {
    /// Opens the records in the folder `dir`, which is made where it is not there, of a run that
    /// has done `from_step` steps. What an earlier process recorded of later steps is removed
    /// from `metrics.jsonl` and hidden by TensorBoard. With 0 the run is a new one, and nothing
    /// recorded before counts.
    ///
    /// # Errors
    /// When a file cannot be read or written, or `metrics.jsonl` has a line, other than a last
    /// one that is cut short, which is no record.
    pub fn open(dir: &Path, from_step: u64) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))?;
        Ok(Self { lines: Lines::open(dir, from_step)?, events: EventFile::create(dir, from_step)? })
    }

    /// Records all scalars of a step, by tag. In `metrics.jsonl` that is the object
    /// `{"step": …, "time": unix seconds, tag: value, …}`, where null stands for what is no
    /// finite number; in the event file those become NaN.
    ///
    /// # Errors
    /// When the step is not above all that are recorded, a tag is `step` or `time`, or a file
    /// cannot be written.
    pub fn record(&mut self, step: u64, scalars: &BTreeMap<String, f64>) -> Result<()> {
        let time = unix_seconds();
        self.lines.append(step, time, scalars)?;
        self.events.scalars(step, time, scalars)
    }

    /// Records an image, as PNG, for TensorBoard.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn image(&mut self, step: u64, tag: &str, image: &RgbImage) -> Result<()> {
        self.events.image(step, unix_seconds(), tag, image)
    }

    /// Records a text, such as the run's configuration, for TensorBoard, which shows it in fixed
    /// width, line by line.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        self.events.text(step, unix_seconds(), tag, text)
    }

    /// Has all records on the disk.
    ///
    /// # Errors
    /// When the system cannot write them.
    pub fn flush(&mut self) -> Result<()> {
        self.lines.sync()?;
        self.events.sync()
    }
}

/// Seconds since 1970; 0 where the clock stands before that.
fn unix_seconds() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}
