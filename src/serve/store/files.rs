//! Image files, named by their content.

use std::collections::HashSet;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::Lasting;
use crate::engine::request::ImageFormat;
use crate::{Error, Result, util};

/// `SHA256.FORMAT` in lower-case hexadecimal digits: nothing else names a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

/// How files begin that are not written yet.
const TEMPORARY: &str = ".tmp";

const FORMATS: [(&str, &str); 3] =
    [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")];

impl Name {
    /// The name of a file with these bytes.
    #[must_use]
    pub fn of(bytes: &[u8], format: ImageFormat) -> Self {
        Self(format!("{}.{}", util::sha256(bytes), format.name()))
    }

    /// The name that `text` is, if it is one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (hex, format) = text.split_once('.')?;
        let digits = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let known = FORMATS.iter().any(|(name, _)| *name == format);
        (hex.len() == 64 && digits && known).then(|| Self(text.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn media_type(&self) -> &'static str {
        let format = self.0.split_once('.').map_or("", |(_, format)| format);
        FORMATS.iter().find(|(name, _)| *name == format).map_or("", |(_, media)| media)
    }
}

/// An image file before it is written.
#[derive(Clone, Debug)]
pub struct Image {
    pub name: Name,
    pub bytes: Vec<u8>,
}

pub struct Files {
    root: PathBuf,
}

impl Files {
    pub fn open(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root).map_err(|e| Error::file(root, e))?;
        Ok(Self { root: root.to_path_buf() })
    }

    /// Two hexadecimal digits of folders, so that no folder grows large.
    fn path(&self, name: &Name) -> PathBuf {
        self.root.join(&name.0[..2]).join(&name.0)
    }

    /// Writes a file whole or not at all; one that is there has the same content.
    pub fn put(&self, image: &Image, lasting: Lasting) -> Result<()> {
        let path = self.path(&image.name);
        if path.exists() {
            return Ok(());
        }
        let fail = |e: std::io::Error| Error::file(&path, e);
        let folder = path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(folder).map_err(fail)?;
        let mut file =
            tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder).map_err(fail)?;
        file.write_all(&image.bytes).map_err(fail)?;
        if lasting == Lasting::Machine {
            file.as_file().sync_all().map_err(fail)?;
        }
        file.persist(&path).map_err(|e| fail(e.error))?;
        if lasting == Lasting::Machine {
            std::fs::File::open(folder).and_then(|f| f.sync_all()).map_err(fail)?;
        }
        Ok(())
    }

    pub fn get(&self, name: &Name) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::file(&path, e)),
        }
    }

    /// Removes what a process that was killed has left: temporary files, and images that are not in
    /// `used`. For whoever has the folder alone. How many there were.
    pub fn sweep(&self, used: &HashSet<String>) -> std::io::Result<usize> {
        let mut removed = 0;
        for folder in std::fs::read_dir(&self.root)? {
            let folder = folder?;
            if !folder.file_type()?.is_dir() {
                continue;
            }
            for file in std::fs::read_dir(folder.path())? {
                let file = file?;
                let name = file.file_name().to_string_lossy().into_owned();
                let left = name.starts_with(TEMPORARY)
                    || Name::parse(&name).is_some() && !used.contains(&name);
                if left {
                    std::fs::remove_file(file.path())?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }

    pub fn remove(&self, name: &Name) -> Result<()> {
        let path = self.path(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::file(&path, e)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_are_names() {
        let name = Name::of(b"abc", ImageFormat::Png);
        assert_eq!(
            name.as_str(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad.png"
        );
        assert_eq!(name.media_type(), "image/png");
        assert_eq!(Name::parse(name.as_str()), Some(name.clone()));
        let hex = "a".repeat(64);
        for wrong in [
            String::new(),
            hex.clone(),
            format!("{hex}."),
            format!("{hex}.gif"),
            format!("{hex}.png.png"),
            format!("{}.png", "A".repeat(64)),
            format!("{}.png", "a".repeat(63)),
            format!("../{}.png", "a".repeat(61)),
            format!("%2e%2e/{}.png", "a".repeat(57)),
            format!("{}\0.png", "a".repeat(63)),
            format!("{}é.png", "a".repeat(62)),
            "..".to_owned(),
        ] {
            assert_eq!(Name::parse(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_nobody_has_is_swept_and_what_is_not_its_own_stays() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::open(folder.path()).unwrap();
        let image =
            |bytes: &[u8]| Image { name: Name::of(bytes, ImageFormat::Png), bytes: bytes.to_vec() };
        let (kept, orphan) = (image(b"kept"), image(b"orphan"));
        files.put(&kept, Lasting::Process).unwrap();
        files.put(&orphan, Lasting::Process).unwrap();
        let place = files.path(&kept.name).parent().unwrap().to_path_buf();
        for stranger in [".tmpAbC123", "notes.txt"] {
            std::fs::write(place.join(stranger), "x").unwrap();
        }
        std::fs::write(folder.path().join("readme"), "x").unwrap();
        let used = HashSet::from([kept.name.as_str().to_owned()]);
        assert_eq!(files.sweep(&used).unwrap(), 2);
        assert!(files.get(&kept.name).unwrap().is_some());
        assert!(files.get(&orphan.name).unwrap().is_none());
        assert!(!place.join(".tmpAbC123").exists());
        assert!(place.join("notes.txt").exists() && folder.path().join("readme").exists());
        assert_eq!(files.sweep(&used).unwrap(), 0);
    }
}
