//! Webdataset shards: tar files in which the files of an example share their name up to its
//! first dot (Text-to-Image-2M: `KEY.jpg` and `KEY.txt` or `KEY.json`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::decode::decode;
use super::fingerprint::Fingerprint;
use super::folder::IMAGE;
use super::{Example, ImageTextSet, below, no_column};
use crate::data::table::{Column, json_text, text};
use crate::{Error, Result};

/// Tar files are made of blocks of so many bytes.
const BLOCK: u64 = 512;

/// Where a member's bytes lie in its shard.
#[derive(Clone, Copy)]
struct Place {
    at: u64,
    bytes: u64,
}

#[derive(Default)]
struct Member {
    shard: usize,
    key: String,
    image: Option<Place>,
    plain: Option<Place>,
    json: Option<Place>,
    /// A shard that ends too soon has a row that says so.
    broken: Option<String>,
}

pub(super) struct Shards {
    root: PathBuf,
    shards: Vec<PathBuf>,
    members: Vec<Member>,
    /// The key of the JSON files that holds the caption.
    caption: Option<String>,
    fingerprint: String,
}

impl Shards {
    pub fn open(
        root: &Path,
        shards: Vec<PathBuf>,
        image: &Option<String>,
        caption: &Option<String>,
    ) -> Result<Self> {
        no_column(root, "image", image)?;
        let mut fingerprint = Fingerprint::new("tar").text(caption.as_deref().unwrap_or_default());
        let mut members = Vec::new();
        for (i, shard) in shards.iter().enumerate() {
            fingerprint = fingerprint.text(&below(root, shard)).file(shard);
            index(i, shard, &mut members)?;
        }
        // What has neither image nor caption is no example: a shard's notes, say.
        members.retain(|m| m.broken.is_some() || m.image.is_some() || m.plain.or(m.json).is_some());
        let (root, caption) = (root.to_path_buf(), caption.clone());
        Ok(Self { root, shards, members, caption, fingerprint: fingerprint.finish() })
    }

    fn bytes(&self, shard: usize, place: Place) -> Result<Vec<u8>> {
        let path = &self.shards[shard];
        let failed = |e: std::io::Error| Error::file(path, e);
        let mut file = File::open(path).map_err(failed)?;
        file.seek(SeekFrom::Start(place.at)).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(place.bytes).read_to_end(&mut bytes).map_err(failed)?;
        if (bytes.len() as u64) < place.bytes {
            return Err(Error::file(path, "ends within a file"));
        }
        Ok(bytes)
    }

    /// The JSON file is asked where a key is given or there is no text file.
    fn caption(&self, member: &Member) -> Result<Result<String, String>> {
        let read = |place| self.bytes(member.shard, place);
        Ok(match (member.plain, member.json) {
            (Some(place), _) if self.caption.is_none() => text(&read(place)?).map(str::to_owned),
            (_, Some(place)) => serde_json::from_slice(&read(place)?)
                .map_err(|e| e.to_string())
                .and_then(|row| json_text(&row, Column::caption(&self.caption))),
            _ => Err("has no caption".into()),
        })
    }
}

fn index(shard: usize, path: &Path, members: &mut Vec<Member>) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::file(path, e))?;
    let length = file.metadata().map_err(|e| Error::file(path, e))?.len();
    let mut archive = tar::Archive::new(file);
    let entries = archive.entries_with_seek().map_err(|e| Error::file(path, e))?;
    let mut places: HashMap<String, usize> = HashMap::new();
    let rest = |reason: String| {
        let (key, broken) = ("(the rest)".into(), Some(reason));
        Member { shard, key, broken, ..Member::default() }
    };
    let mut end = 0;
    for entry in entries {
        let named = entry.and_then(|entry| {
            let path = entry.path()?.to_string_lossy().into_owned();
            let place = Place { at: entry.raw_file_position(), bytes: entry.size() };
            Ok((entry.header().entry_type().is_file(), path, place))
        });
        let (is_file, name, place) = match named {
            Ok(named) => named,
            Err(e) => {
                members.push(rest(e.to_string()));
                return Ok(());
            }
        };
        end = place.at + place.bytes.next_multiple_of(BLOCK);
        let folders = name.rfind('/').map_or(0, |i| i + 1);
        let Some(dot) = name[folders..].find('.').filter(|_| is_file) else { continue };
        let (key, rest) = (&name[..folders + dot], &name[folders + dot + 1..]);
        let at = *places.entry(key.to_owned()).or_insert_with(|| {
            members.push(Member { shard, key: key.to_owned(), ..Member::default() });
            members.len() - 1
        });
        let member = &mut members[at];
        match rest.to_lowercase().as_str() {
            "txt" => member.plain = Some(place),
            "json" => member.json = Some(place),
            extension if IMAGE.contains(&extension) => member.image = Some(place),
            _ => {}
        }
    }
    // Two blocks of zeros end an archive; one is enough to tell that nothing was cut off.
    if length < end + BLOCK {
        members.push(rest("the archive has no end: it was not copied whole".into()));
    }
    Ok(())
}

impl ImageTextSet for Shards {
    fn summary(&self) -> String {
        let (rows, shards) = (self.members.len(), self.shards.len());
        format!("{rows} examples in {shards} tar shards of {}", self.root.display())
    }

    fn len(&self) -> usize {
        self.members.len()
    }

    fn name(&self, index: usize) -> String {
        let member = &self.members[index];
        format!("{}/{}", below(&self.root, &self.shards[member.shard]), member.key)
    }

    fn example(&self, index: usize) -> Result<Example> {
        let member = &self.members[index];
        let name = self.name(index);
        let failed = |e: String| Error::file(&self.shards[member.shard], format!("{name}: {e}"));
        if let Some(reason) = &member.broken {
            return Err(failed(reason.clone()));
        }
        let place = member.image.ok_or_else(|| failed("has no image".into()))?;
        let caption = self.caption(member)?.map_err(failed)?;
        let bytes = self.bytes(member.shard, place)?;
        let image = decode(&bytes).map_err(|e| failed(e.to_string()))?;
        Ok(Example { name, caption, image })
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
