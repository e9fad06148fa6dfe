//! How sets of images are named.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::data::scenes::Split;
use crate::data::source::{as_text, path, scenes, write_path};
use crate::{Error, Result};

const FIELD: &str = "images";

/// Where captioned images come from. Written `scenes:SPLIT:COUNT[:SEED]` or
/// `PATH[?image=NAME&caption=NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// The first `count` of the endless stream `seed` of a split's scenes.
    Scenes { split: Split, count: usize, seed: u64 },
    /// A folder or a file, with the columns that do not have one of the usual names.
    Path { path: PathBuf, image: Option<String>, caption: Option<String> },
}

impl FromStr for ImageSource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(scenes) = scenes(FIELD, text) {
            let (split, numbers) = scenes?;
            let (count, seed) = match numbers[..] {
                [count] => (count, 0),
                [count, seed] => (count, seed),
                _ => return Err(Error::invalid(FIELD, "expected scenes:SPLIT:COUNT[:SEED]")),
            };
            return Ok(Self::Scenes { split, count: count as usize, seed });
        }
        let (path, [image, caption]) = path(FIELD, text, ["image", "caption"])?;
        Ok(Self::Path { path, image, caption })
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scenes { split, count, seed: 0 } => write!(f, "scenes:{split}:{count}"),
            Self::Scenes { split, count, seed } => write!(f, "scenes:{split}:{count}:{seed}"),
            Self::Path { path, image, caption } => {
                write_path(f, path, [("image", image), ("caption", caption)])
            }
        }
    }
}

as_text!(ImageSource);
