//! Image files as training data, replays and exports read them, and text in PNG files.

#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;

/// Pixels of the largest image that is decoded here: time, not safety.
const MOST: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let size = image::ImageReader::new(Cursor::new(data))
        .with_guessed_format()
        .ok()
        .and_then(|reader| reader.into_dimensions().ok());
    if size.is_none_or(|(w, h)| u64::from(w) * u64::from(h) > MOST) {
        return;
    }
    let _ = image::load_from_memory(data);
});
