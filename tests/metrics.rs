//! A run's records: metrics.jsonl, and the event file, read here by its published format alone.
//! tools/metrics_check.py reads the same folder with TensorBoard's own reader.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::assert_names;
use diffusion_sharpening::bench::training_curves::{Args, run};
use diffusion_sharpening::train::metrics::Recorder;
use image::{Rgb, RgbImage};
use serde_json::Value;

/// CRC-32C bit by bit (RFC 3720, appendix B.4), masked as TFRecord has it.
fn masked(data: &[u8]) -> u32 {
    let crc = !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| {
            (c >> 1) ^ if c & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    });
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn frames(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let (mut rest, mut found) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        let (length, tail) = rest.split_at(8);
        let (sum, tail) = tail.split_at(4);
        assert_eq!(u32::from_le_bytes(sum.try_into().unwrap()), masked(length));
        let (data, tail) = tail.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        let (sum, tail) = tail.split_at(4);
        assert_eq!(u32::from_le_bytes(sum.try_into().unwrap()), masked(data));
        found.push(data.to_vec());
        rest = tail;
    }
    found
}

/// A protobuf field's contents.
#[derive(Clone, Debug, PartialEq)]
enum Field {
    Number(u64),
    Double(f64),
    Float(f32),
    Bytes(Vec<u8>),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

/// A message's fields by number.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let size = match key & 7 {
            0 => {
                found.push((key >> 3, Field::Number(varint(&mut bytes))));
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        let (data, rest) = bytes.split_at(size);
        bytes = rest;
        found.push((
            key >> 3,
            match key & 7 {
                1 => Field::Double(f64::from_le_bytes(data.try_into().unwrap())),
                5 => Field::Float(f32::from_le_bytes(data.try_into().unwrap())),
                _ => Field::Bytes(data.to_vec()),
            },
        ));
    }
    found
}

fn field(message: &[u8], number: u64) -> Option<Field> {
    fields(message).into_iter().find(|(n, _)| *n == number).map(|(_, field)| field)
}

fn bytes(message: &[u8], number: u64) -> Vec<u8> {
    match field(message, number) {
        Some(Field::Bytes(bytes)) => bytes,
        other => panic!("field {number} is {other:?}"),
    }
}

/// A number that is left out is 0.
fn number(message: &[u8], of: u64) -> u64 {
    match field(message, of) {
        Some(Field::Number(number)) => number,
        None => 0,
        other => panic!("field {of} is {other:?}"),
    }
}

/// The values of an event's summary, by tag.
fn summary(event: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let values = fields(&bytes(event, 5)).into_iter().map(|(n, value)| match value {
        Field::Bytes(value) if n == 1 => value,
        other => panic!("field {n} is {other:?}"),
    });
    values.map(|value| (String::from_utf8(bytes(&value, 1)).unwrap(), value)).collect()
}

fn event_files(dir: &Path) -> Vec<PathBuf> {
    let all = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<PathBuf> =
        all.filter(|p| p.to_string_lossy().contains("events.out.tfevents.")).collect();
    files.sort();
    files
}

fn lines(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn steps(dir: &Path) -> Vec<u64> {
    lines(dir).iter().map(|line| line["step"].as_u64().unwrap()).collect()
}

fn scalars(pairs: &[(&str, f64)]) -> BTreeMap<String, f64> {
    pairs.iter().map(|(tag, value)| ((*tag).to_owned(), *value)).collect()
}

fn picture() -> RgbImage {
    RgbImage::from_fn(6, 4, |x, y| Rgb([40 * x as u8, 60 * y as u8, 200]))
}

/// The folder stays in the target folder for tools/metrics_check.py.
#[test]
fn everything_is_in_the_event_file() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("metrics");
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    let mut recorder = Recorder::open(&dir, 0).unwrap();
    recorder.text(0, "config", "rank = 16\n[data]\nname = \"scenes\"\n").unwrap();
    recorder.image(0, "validation/0", &picture()).unwrap();
    recorder
        .record(1, &scalars(&[("gap", f64::NAN), ("loss", 0.1), ("reward/mean", 2.5)]))
        .unwrap();
    let odd = [("loss", f64::NAN), ("gap", f64::INFINITY), ("large", -1e300)];
    recorder.record(300, &scalars(&odd)).unwrap();
    recorder.flush().unwrap();
    // A run that goes on after step 1.
    let mut recorder = Recorder::open(&dir, 1).unwrap();
    recorder.record(2, &scalars(&[("loss", 0.05)])).unwrap();
    drop(recorder);

    let files = event_files(&dir);
    assert_eq!(files.len(), 2, "{files:?}");
    let events = frames(&files[0]);
    assert_eq!(events.len(), 6);
    assert_eq!(bytes(&events[0], 3), b"brain.Event:2");
    assert_eq!(number(&bytes(&events[1], 7), 1), 1);
    let Some(Field::Double(time)) = field(&events[0], 1) else { panic!("no time") };
    assert!((1.7e9..1e10).contains(&time), "{time}");
    assert_eq!(events.iter().map(|e| number(e, 2)).collect::<Vec<_>>(), [0, 0, 0, 0, 1, 300]);

    let config = &summary(&events[2])["config"];
    assert_eq!(bytes(&bytes(&bytes(config, 9), 1), 1), b"text");
    let tensor = bytes(config, 8);
    assert_eq!(number(&tensor, 1), 7);
    assert_eq!(number(&bytes(&bytes(&tensor, 2), 2), 1), 1);
    assert_eq!(bytes(&tensor, 8), b"    rank = 16\n    [data]\n    name = \"scenes\"\n");

    let image = bytes(&summary(&events[3])["validation/0"], 4);
    assert_eq!([1, 2, 3].map(|n| number(&image, n)), [4, 6, 3]);
    let decoded = image::load_from_memory(&bytes(&image, 4)).unwrap().to_rgb8();
    assert_eq!(decoded, picture());

    let float = |event: &[u8], tag: &str| match field(&summary(event)[tag], 2) {
        Some(Field::Float(value)) => value,
        other => panic!("{tag} is {other:?}"),
    };
    assert_eq!(float(&events[4], "loss"), 0.1);
    assert_eq!(float(&events[4], "reward/mean"), 2.5);
    assert!(float(&events[5], "loss").is_nan() && float(&events[5], "gap").is_nan());
    // Finite, but beyond f32.
    assert_eq!(float(&events[5], "large"), f32::NEG_INFINITY);

    let resumed = frames(&files[1]);
    assert_eq!(resumed.iter().map(|e| number(e, 2)).collect::<Vec<_>>(), [0, 2, 2]);
    assert_eq!(number(&bytes(&resumed[1], 7), 1), 1);

    let lines = lines(&dir);
    assert_eq!(lines.len(), 2);
    let keys: Vec<&str> = lines[0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["step", "time", "gap", "loss", "reward/mean"]);
    assert_eq!((&lines[0]["step"], &lines[0]["loss"]), (&1.into(), &0.1.into()));
    assert!((lines[0]["time"].as_f64().unwrap() - time).abs() < 60.0);
}

#[test]
fn numbers_without_a_word_in_json_are_null() {
    let dir = tempfile::tempdir().unwrap();
    let odd = [("a", f64::NAN), ("b", f64::NEG_INFINITY), ("c", -1e300)];
    Recorder::open(dir.path(), 0).unwrap().record(1, &scalars(&odd)).unwrap();
    let line = &lines(dir.path())[0];
    assert!(line["a"].is_null() && line["b"].is_null());
    assert_eq!(line["c"], -1e300);
}

#[test]
fn a_resumed_run_has_no_step_twice() {
    let dir = tempfile::tempdir().unwrap();
    let run = |from: u64, to: u64| {
        let mut recorder = Recorder::open(dir.path(), from).unwrap();
        for step in from + 1..=to {
            recorder.record(step, &scalars(&[("from", from as f64)])).unwrap();
        }
    };
    run(0, 7);
    run(4, 6);
    assert_eq!(steps(dir.path()), [1, 2, 3, 4, 5, 6]);
    assert_eq!(lines(dir.path())[4]["from"], 4.0);
    // Killed within a line.
    let file = dir.path().join("metrics.jsonl");
    let mut text = std::fs::read_to_string(&file).unwrap();
    text.push_str("{\"step\": 7, \"ti");
    std::fs::write(&file, &text).unwrap();
    run(6, 7);
    assert_eq!(steps(dir.path()), [1, 2, 3, 4, 5, 6, 7]);
    // Killed between a line and its end, and between steps that count.
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.trim_end()).unwrap();
    run(7, 8);
    assert_eq!(steps(dir.path()), [1, 2, 3, 4, 5, 6, 7, 8]);
    // From the beginning.
    run(0, 2);
    assert_eq!(steps(dir.path()), [1, 2]);
    assert_eq!(event_files(dir.path()).len(), 5);
}

#[test]
fn what_cannot_be_recorded_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::open(dir.path(), 0).unwrap();
    recorder.record(0, &scalars(&[("loss", 1.0)])).unwrap();
    recorder.record(3, &scalars(&[("loss", 1.0)])).unwrap();
    let error = recorder.record(3, &scalars(&[("reward", 1.0)])).unwrap_err();
    assert_names(&error.to_string(), &["step", "3"]);
    for tag in ["step", "time"] {
        let error = recorder.record(4, &scalars(&[(tag, 1.0)])).unwrap_err();
        assert_names(&error.to_string(), &["tag", tag]);
    }
    assert_eq!(steps(dir.path()), [0, 3]);
    drop(recorder);
    let error = Recorder::open(dir.path(), 3).unwrap().record(2, &scalars(&[])).unwrap_err();
    assert_names(&error.to_string(), &["step", "2", "3"]);
    let file = dir.path().join("metrics.jsonl");
    std::fs::write(&file, "{\"step\": 1}\n{\"step\"\n{\"step\": 2}\n").unwrap();
    let error = Recorder::open(dir.path(), 2).err().unwrap();
    assert_names(&error.to_string(), &["metrics.jsonl", "line 2"]);
}

#[test]
fn rewards_of_validations_are_drawn_against_updates() {
    let folder = tempfile::tempdir().unwrap();
    let record = |name: &str, steps: &[(u64, f64)]| {
        let dir = folder.path().join(name);
        let mut recorder = Recorder::open(&dir, 0).unwrap();
        for (step, judge) in steps {
            let tags = [("", *judge), ("_error", 0.01), ("_deviation", 0.25)];
            let values = tags.map(|(end, value)| (format!("validation/judge{end}"), value));
            let all = BTreeMap::from(values).into_iter().chain([("cost/f".into(), 8.0)]);
            recorder.record(*step, &all.collect()).unwrap();
        }
        dir
    };
    let out = folder.path().join("drawn");
    let runs = vec![record("first", &[(0, 0.5), (10, 0.6)]), record("second", &[(10, 0.7)])];
    run(&Args { runs, out: out.clone() }).unwrap();
    let table = std::fs::read_to_string(out.join("curves.csv")).unwrap();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(
        lines,
        [
            "run,step,f,seconds,judge,judge_error,judge_deviation",
            "first,0,8,0,0.5,0.01,0.25",
            "first,10,8,0,0.6,0.01,0.25",
            "second,10,8,0,0.7,0.01,0.25",
        ]
    );
    let svg = std::fs::read_to_string(out.join("curves.svg")).unwrap();
    for said in ["first", "second", "judge: mean", "judge: deviation"] {
        assert!(svg.contains(said), "the picture does not say '{said}'");
    }
    let picture = image::open(out.join("curves.png")).unwrap().into_rgb8();
    assert!(picture.pixels().any(|p| p.0 == [0, 114, 178]), "no curve is drawn");

    let empty = record("nothing", &[]);
    let refused = run(&Args { runs: vec![empty], out }).unwrap_err().to_string();
    assert!(refused.contains("metrics.jsonl") && refused.contains("--validate-every"), "{refused}");
}
