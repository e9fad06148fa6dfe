//! A generation in one file that can be run again: a tar archive with what was
//! asked for, every effective value, the answer, the images and their hashes.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::request::{GenerateRequest, ImageFormat, ModelRef, Resolved};
use crate::util::sha256;
use crate::{Error, Result};

/// Of the layout of the archive.
const FORMAT: u32 = 1;
const MANIFEST: &str = "bundle.json";
const ANSWER: &str = "answer.json";
const IMAGES: &str = "images/";
const PREVIEWS: &str = "previews/";
/// What reading refuses to exceed: files, bytes of one,
const MOST_FILES: usize = 1100;
const MOST_BYTES: u64 = 256 << 20;
/// and bytes in all.
const MOST_IN_ALL: u64 = 1 << 30;

/// What a bundle says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    pub id: String,
    /// Milliseconds since 1970.
    pub created_ms: i64,
    pub request: GenerateRequest,
    pub resolved: Resolved,
    pub model: ModelRef,
    /// Of the server that gave it: program, system, device.
    pub environment: BTreeMap<String, String>,
    /// SHA-256 of every other file.
    pub files: BTreeMap<String, String>,
}

/// A bundle's contents.
#[derive(Clone, Debug, PartialEq)]
pub struct Bundle {
    pub manifest: Manifest,
    /// As the server answered.
    pub answer: Value,
    /// Image files in order.
    pub images: Vec<Vec<u8>>,
    /// PNG files of previews, in the order of the answer's trace.
    pub previews: Vec<Vec<u8>>,
}

/// What a bundle is made of, before its hashes.
#[derive(Clone, Debug)]
pub struct Contents {
    pub id: String,
    pub created_ms: i64,
    pub request: GenerateRequest,
    pub resolved: Resolved,
    pub environment: BTreeMap<String, String>,
    pub answer: Value,
    pub images: Vec<Vec<u8>>,
    pub previews: Vec<Vec<u8>>,
}

fn broken(message: impl std::fmt::Display) -> Error {
    Error::invalid("bundle", message.to_string())
}

impl Bundle {
    /// # Errors
    /// The answer does not name its model.
    pub fn new(contents: Contents) -> Result<Self> {
        let Contents { id, created_ms, request, resolved, environment, answer, images, previews } =
            contents;
        let model = ModelRef::deserialize(&answer["model"]).map_err(broken)?;
        let mut files = BTreeMap::from([(ANSWER.to_owned(), sha256(&text(&answer)?))]);
        for (name, bytes) in pictures(resolved.output_format, &images, &previews) {
            files.insert(name, sha256(bytes));
        }
        let manifest = Manifest {
            format: FORMAT,
            id,
            created_ms,
            request,
            resolved,
            model,
            environment,
            files,
        };
        Ok(Self { manifest, answer, images, previews })
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// `into`'s.
    pub fn write(&self, into: impl Write) -> Result<()> {
        let mut archive = tar::Builder::new(into);
        let seconds = u64::try_from(self.manifest.created_ms / 1000).unwrap_or(0);
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(seconds);
            archive.append_data(&mut header, name, bytes).map_err(broken)
        };
        add(MANIFEST, &serde_json::to_vec_pretty(&self.manifest).map_err(broken)?)?;
        add(ANSWER, &text(&self.answer)?)?;
        let format = self.manifest.resolved.output_format;
        for (name, bytes) in pictures(format, &self.images, &self.previews) {
            add(&name, bytes)?;
        }
        archive.into_inner().and_then(|mut into| into.flush()).map_err(broken)
    }

    /// Reads an archive, whoever made it: only plain files with known names and the hashes that
    /// the manifest has, within limits.
    ///
    /// # Errors
    /// `Error::Invalid` on "bundle" says what is wrong with it.
    pub fn read(from: impl Read) -> Result<Self> {
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut in_all = 0;
        let mut archive = tar::Archive::new(from);
        for entry in archive.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            if entry.header().entry_type() != tar::EntryType::Regular || !known(&name) {
                return Err(broken(format!("'{name}' does not belong to one")));
            }
            let size = entry.size();
            in_all = size.saturating_add(in_all);
            if size > MOST_BYTES || in_all > MOST_IN_ALL || files.len() == MOST_FILES {
                return Err(broken(format!(
                    "more than {MOST_FILES} files, {MOST_BYTES} bytes in one or {MOST_IN_ALL} in \
                     all"
                )));
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(broken)?;
            if bytes.len() as u64 != size {
                return Err(broken(format!("{name} is cut off")));
            }
            if files.insert(name.clone(), bytes).is_some() {
                return Err(broken(format!("{name} is there twice")));
            }
        }
        let mut take =
            |name: &str| files.remove(name).ok_or_else(|| broken(format!("{name} is missing")));
        let manifest: Manifest = serde_json::from_slice(&take(MANIFEST)?)
            .map_err(|e| broken(format!("{MANIFEST}: {e}")))?;
        if manifest.format != FORMAT {
            let format = manifest.format;
            return Err(broken(format!("has format {format}; this program knows {FORMAT}")));
        }
        let mut checked = |name: &str| {
            let bytes = take(name)?;
            match manifest.files.get(name) {
                Some(hash) if *hash == sha256(&bytes) => Ok(bytes),
                _ => Err(broken(format!("{name} has not the hash that {MANIFEST} says"))),
            }
        };
        let answer = serde_json::from_slice(&checked(ANSWER)?)
            .map_err(|e| broken(format!("{ANSWER}: {e}")))?;
        let mut all = |folder: &str, format| {
            let listed = manifest.files.keys().filter(|name| name.starts_with(folder)).count();
            (0..listed).map(|i| checked(&picture(folder, i, format))).collect::<Result<Vec<_>>>()
        };
        let images = all(IMAGES, manifest.resolved.output_format)?;
        let previews = all(PREVIEWS, ImageFormat::Png)?;
        if manifest.files.len() != 1 + images.len() + previews.len() {
            return Err(broken(format!("{MANIFEST} lists what does not belong to one")));
        }
        if let Some(name) = files.keys().next() {
            return Err(broken(format!("{MANIFEST} does not list {name}")));
        }
        Ok(Self { manifest, answer, images, previews })
    }
}

/// Names and bytes of all pictures. Previews are PNG, whatever the images are.
fn pictures<'a>(
    format: ImageFormat,
    images: &'a [Vec<u8>],
    previews: &'a [Vec<u8>],
) -> impl Iterator<Item = (String, &'a [u8])> {
    let all = [(IMAGES, format, images), (PREVIEWS, ImageFormat::Png, previews)];
    all.into_iter().flat_map(|(folder, format, files)| {
        let each = files.iter().enumerate();
        each.map(move |(index, bytes)| (picture(folder, index, format), bytes.as_slice()))
    })
}

fn picture(folder: &str, index: usize, format: ImageFormat) -> String {
    format!("{folder}{index}.{}", format.name())
}

fn text(answer: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(answer).map_err(broken)
}

/// Names that files of a bundle may have.
fn known(name: &str) -> bool {
    let picture = |folder: &str, formats: &[&str]| {
        let (number, format) = name.strip_prefix(folder)?.split_once('.')?;
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        (digits && formats.contains(&format)).then_some(())
    };
    let image = || picture(IMAGES, &["png", "jpeg", "webp"]);
    name == MANIFEST || name == ANSWER || image().or_else(|| picture(PREVIEWS, &["png"])).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> Bundle {
        let resolved: Resolved = serde_json::from_value(serde_json::json!({
            "prompt": "a", "negative_prompt": null, "model": "tiny", "adapter": null,
            "method": {"name": "plain"}, "seed": u64::MAX, "width": 8, "height": 8, "steps": 2,
            "guidance_scale": 0.1, "guidance_rescale": 0.0, "solver": "ddim", "n": 2,
            "reward": null, "budget": {}, "output_format": "png",
        }))
        .unwrap();
        Bundle::new(Contents {
            id: "one".to_owned(),
            created_ms: 1_764_259_200_000,
            request: GenerateRequest { prompt: "a".to_owned(), ..GenerateRequest::default() },
            resolved,
            environment: BTreeMap::from([("program".to_owned(), "test".to_owned())]),
            answer: serde_json::json!({"model": {"id": "tiny", "sha256": "ab"}, "trace": []}),
            images: vec![b"first".to_vec(), b"second".to_vec()],
            previews: vec![b"early".to_vec()],
        })
        .unwrap()
    }

    fn bytes(bundle: &Bundle) -> Vec<u8> {
        let mut bytes = Vec::new();
        bundle.write(&mut bytes).unwrap();
        bytes
    }

    #[track_caller]
    fn refused(bytes: &[u8], part: &str) {
        let error = Bundle::read(bytes).unwrap_err().to_string();
        assert!(error.starts_with("bundle: ") && error.contains(part), "{error}");
    }

    fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, bytes) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            // Not `append_data`, which refuses names such as "..".
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            archive.append(&header, *bytes).unwrap();
        }
        archive.into_inner().unwrap()
    }

    #[test]
    fn what_is_written_reads_back() {
        let bundle = bundle();
        assert_eq!(Bundle::read(&bytes(&bundle)[..]).unwrap(), bundle);
    }

    #[test]
    fn what_was_changed_is_noticed() {
        let mut other = bundle();
        other.images[1] = b"another".to_vec();
        refused(&bytes(&other), "images/1.png has not the hash");
        let mut other = bundle();
        other.images.pop();
        refused(&bytes(&other), "images/1.png is missing");
        let mut other = bundle();
        other.previews[0] = b"late".to_vec();
        refused(&bytes(&other), "previews/0.png has not the hash");
        let mut other = bundle();
        other.manifest.format = 9;
        refused(&bytes(&other), "format 9");
        let mut other = bundle();
        other.images.push(b"more".to_vec());
        refused(&bytes(&other), "does not list images/2.png");
        let whole = bytes(&bundle());
        refused(&whole[..700], "");
    }

    #[test]
    fn strange_archives_are_refused() {
        refused(b"", "bundle.json is missing");
        refused(&[7; 4096], "");
        for name in [
            "../bundle.json",
            "/etc/passwd",
            "images/../a.png",
            "images/a.png",
            "images/0.exe",
            "previews/0.jpeg",
        ] {
            refused(&archive(&[(name, b"x")]), "does not belong");
        }
        refused(&archive(&[("answer.json", b"{}"), ("answer.json", b"{}")]), "twice");
        refused(&archive(&[("bundle.json", b"{}")]), "bundle.json: ");
        let many: Vec<String> = (0..1101).map(|i| format!("images/{i}.png")).collect();
        let many: Vec<(&str, &[u8])> = many.iter().map(|name| (name.as_str(), &b""[..])).collect();
        refused(&archive(&many), "more than 1100 files");
        let mut link = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        link.append_link(&mut header, "answer.json", "/etc/passwd").unwrap();
        refused(&link.into_inner().unwrap(), "does not belong");
    }
}
