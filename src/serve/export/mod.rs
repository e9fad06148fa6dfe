//! A comparison as a folder that opens from a disk, without a server and without a network: a
//! page, its images, the bundles of its arms, everything as JSON, and checksums.

mod bundle;
mod folder;
mod ledger;
mod page;
mod words;

use std::fs::File;
use std::io::Write;

use serde_json::{Value, json};

pub use bundle::bundle;

use super::answer::{self, Answer};
use super::problem::Problem;
use super::server::Shared;
use super::store::{Comparison, Name, Record};
use crate::Error;
use folder::Folder;

/// Of the layout of `data.json`.
const FORMAT: u32 = 1;
const DATA: &str = "data.json";
const STYLE: (&str, &str) = ("export.css", include_str!("../../../static/export.css"));
const SCRIPT: (&str, &str) = ("export.js", include_str!("../../../static/export.js"));

/// A comparison that has ended.
pub struct Export {
    /// What the archive's folder is called.
    pub name: String,
    pub comparison: Comparison,
    pub arms: Vec<Arm>,
}

/// An arm of it.
pub struct Arm {
    /// As `GET /compare/{id}` shows it.
    shown: Value,
    /// Where it ran and was not forgotten.
    record: Option<Record>,
    /// Where it completed.
    answer: Option<Answer>,
}

impl Arm {
    /// # Errors
    /// The history has an answer that this program did not write.
    pub fn new(shown: Value, record: Option<Record>) -> Result<Self, Problem> {
        let text = record.as_ref().and_then(|record| record.answer.as_deref());
        let answer = text.map(serde_json::from_str).transpose().map_err(Problem::internal)?;
        Ok(Self { shown, record, answer })
    }

    fn label(&self) -> &str {
        self.shown["label"].as_str().unwrap_or("")
    }

    fn state(&self) -> &str {
        self.shown["state"].as_str().unwrap_or("")
    }

    /// Why it has no images, where it has none.
    fn reason(&self) -> Option<String> {
        let of = |value: &Value| value.as_str().map(str::to_owned);
        match self.state() {
            "completed" => None,
            "unmet" => {
                of(&self.shown["unmet"]).map(|why| format!("cannot meet the contract: {why}"))
            }
            "forgotten" => Some("was removed from the history".to_owned()),
            state => {
                let detail = of(&self.shown["problem"]["detail"]).unwrap_or_default();
                Some(format!("{state}: {detail}"))
            }
        }
    }

    /// The path of its bundle within the folder.
    fn bundle(&self) -> Option<String> {
        let record = self.record.as_ref().filter(|record| record.answer.is_some())?;
        Some(format!("bundles/{}.tar", record.id))
    }
}

impl Export {
    /// Writes the archive into an unnamed file of the data folder, which is read from its
    /// beginning then. Blocks.
    ///
    /// # Errors
    /// A file of the history cannot be read, or the disk is full.
    pub fn spool(self, shared: &Shared) -> Result<File, Problem> {
        let folder = &shared.settings.data;
        let failed = |e: std::io::Error| Problem::from(Error::file(folder, e));
        let file = tempfile::tempfile_in(folder).map_err(failed)?;
        let mut written = self.write(shared, std::io::BufWriter::new(file))?;
        written.flush().map_err(failed)?;
        let mut file = written.into_inner().map_err(|e| failed(e.into_error()))?;
        std::io::Seek::rewind(&mut file).map_err(failed)?;
        Ok(file)
    }

    fn write<W: Write>(self, shared: &Shared, into: W) -> Result<W, Problem> {
        let failed = |e: std::io::Error| Problem::from(Error::file(&shared.settings.data, e));
        let seconds = u64::try_from(self.comparison.created_ms / 1000).unwrap_or(0);
        let mut folder = Folder::new(into, self.name.clone(), seconds);
        let mut add = |path: &str, bytes: &[u8]| folder.add(path, bytes).map_err(failed);
        add("index.html", page::page(&self).as_bytes())?;
        add(STYLE.0, STYLE.1.as_bytes())?;
        add(SCRIPT.0, SCRIPT.1.as_bytes())?;
        add(DATA, &serde_json::to_vec_pretty(&self.data()).map_err(Problem::internal)?)?;
        for arm in self.arms {
            let result = &arm.shown["result"];
            if arm.answer.is_some() {
                for name in [answer::images(result)?, answer::previews(result)?].concat() {
                    let path = path(&name);
                    if !folder.has(&path) {
                        let bytes = shared.store.images(&[name])?.concat();
                        folder.add(&path, &bytes).map_err(failed)?;
                    }
                }
            }
            if let (Some(path), Some(record)) = (arm.bundle(), arm.record) {
                folder.add(&path, &bundle(shared, record)?).map_err(failed)?;
            }
        }
        folder.finish().map_err(failed)
    }

    /// Everything that is known, with paths within the folder instead of the server's addresses.
    fn data(&self) -> Value {
        let arm = |arm: &Arm| {
            let mut shown = arm.shown.clone();
            if let Some(record) = &arm.record {
                shown["request"] = json!(record.request);
                shown["resolved"] = json!(record.resolved);
                shown["bundle"] = json!(arm.bundle());
            }
            shown.get_mut("result").into_iter().for_each(relative);
            shown
        };
        let Comparison { id, created_ms, prompt, request, .. } = &self.comparison;
        json!({
            "format": FORMAT,
            "program": concat!("diffusion-sharpening ", env!("CARGO_PKG_VERSION")),
            "id": id,
            "created_ms": created_ms,
            "prompt": prompt,
            "contract": request.contract,
            "request": request,
            "arms": self.arms.iter().map(arm).collect::<Vec<_>>(),
        })
    }
}

/// Where an image is within the folder.
fn path(name: &Name) -> String {
    format!("images/{}", name.as_str())
}

/// The path of the image that an address of this server is about.
fn path_of(url: &str) -> Option<String> {
    url.strip_prefix('/').map(str::to_owned)
}

/// Puts paths in the place of an answer's addresses.
fn relative(answer: &mut Value) {
    let change = |part: &mut Value| {
        if let Some(path) = part["url"].as_str().and_then(path_of) {
            part["url"] = path.into();
        }
    };
    if let Some(images) = answer.get_mut("images").and_then(Value::as_array_mut) {
        images.iter_mut().for_each(change);
    }
    if let Some(trace) = answer.get_mut("trace").and_then(Value::as_array_mut) {
        trace.iter_mut().filter_map(|entry| entry.get_mut("preview")).for_each(change);
    }
}
