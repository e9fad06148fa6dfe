//! TensorBoard's event files: messages in TFRecord's frames.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Cursor, ErrorKind, Write};
use std::path::{Path, PathBuf};

use image::{ImageFormat, RgbImage};
use prost::Message;

use super::proto::{
    Content, DT_STRING, Dim, Event, Image, Metadata, Plugin, SessionLog, SessionStatus, Shape,
    Summary, Tensor, Value, What,
};
use super::unix_seconds;
use crate::{Error, Result};

/// An event file that is being written; it belongs to this process alone.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `dir` for the steps after `from_step`. TensorBoard reads it after those
    /// of earlier processes, and forgets what they say of these steps; with 0, all that they say.
    pub fn create(dir: &Path, from_step: u64) -> Result<Self> {
        let time = unix_seconds();
        let (path, file) = new_file(dir, time as u64)?;
        let mut events = Self { path, file };
        events.write(0, time, What::FileVersion("brain.Event:2".into()))?;
        let first = if from_step == 0 { 0 } else { from_step + 1 };
        let status = SessionStatus::Start.into();
        events.write(first, time, What::SessionLog(SessionLog { status }))?;
        Ok(events)
    }

    pub fn scalars(&mut self, step: u64, time: f64, scalars: &BTreeMap<String, f64>) -> Result<()> {
        let value = |(tag, value): (&String, &f64)| {
            let number = if value.is_finite() { *value as f32 } else { f32::NAN };
            Value { tag: tag.clone(), content: Some(Content::Simple(number)), metadata: None }
        };
        let value = scalars.iter().map(value).collect();
        self.write(step, time, What::Summary(Summary { value }))
    }

    pub fn image(&mut self, step: u64, time: f64, tag: &str, image: &RgbImage) -> Result<()> {
        let mut png = Cursor::new(Vec::new());
        image.write_to(&mut png, ImageFormat::Png).map_err(|e| Error::file(&self.path, e))?;
        let content = Content::Image(Image {
            height: image.height() as i32,
            width: image.width() as i32,
            colorspace: 3,
            encoded: png.into_inner(),
        });
        let value = Value { tag: tag.into(), content: Some(content), metadata: None };
        self.write(step, time, What::Summary(Summary { value: vec![value] }))
    }

    pub fn text(&mut self, step: u64, time: f64, tag: &str, text: &str) -> Result<()> {
        // It is shown as Markdown, where indented lines are a block of code.
        let block: String = text.lines().map(|line| format!("    {line}\n")).collect();
        let content = Content::Tensor(Tensor {
            dtype: DT_STRING,
            shape: Some(Shape { dim: vec![Dim { size: 1 }] }),
            strings: vec![block.into_bytes()],
        });
        let metadata = Some(Metadata { plugin: Some(Plugin { name: "text".into() }) });
        let value = Value { tag: tag.into(), content: Some(content), metadata };
        self.write(step, time, What::Summary(Summary { value: vec![value] }))
    }

    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::file(&self.path, e))
    }

    fn write(&mut self, step: u64, wall_time: f64, what: What) -> Result<()> {
        let event = Event { wall_time, step: step as i64, what: Some(what) };
        let frame = frame(&event.encode_to_vec());
        self.file.write_all(&frame).map_err(|e| Error::file(&self.path, e))
    }
}

/// `events.out.tfevents.SECONDS.ds.PROCESS.NUMBER`, which is not there yet: TensorBoard reads the
/// files of a folder in the order of their names.
fn new_file(dir: &Path, seconds: u64) -> Result<(PathBuf, File)> {
    let mut number = 0;
    loop {
        let name = format!("events.out.tfevents.{seconds:010}.ds.{}.{number}", std::process::id());
        let path = dir.join(name);
        match OpenOptions::new().append(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(Error::file(&path, e)),
        }
    }
}

/// TFRecord: the length, its checksum, the data, their checksum.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut frame = Vec::with_capacity(data.len() + 16);
    frame.extend_from_slice(&length);
    frame.extend_from_slice(&masked(&length).to_le_bytes());
    frame.extend_from_slice(data);
    frame.extend_from_slice(&masked(data).to_le_bytes());
    frame
}

/// CRC-32C, turned and moved as TFRecord has it.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}
