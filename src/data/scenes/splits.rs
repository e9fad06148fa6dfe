//! Prompt splits: which captions a model may train on, and which are kept
//! back so that their *combination* of attributes is new to it.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::grammar::Caption;
use super::vocabulary::Category;
use crate::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    Train,
    Validation,
    Test,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Split {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|split| split.name() == text);
        found.ok_or_else(|| Error::unknown("split", "split", text, Self::ALL.map(Self::name)))
    }
}

impl Split {
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }

    /// The split of a caption, by a fixed hash (FNV-1a) of its combination.
    pub fn of(caption: &Caption) -> Self {
        let hash = caption.combination().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        // "a circle and a star": there are few combinations, so a larger share is kept back.
        let (validation, test) =
            if caption.category() == Category::Shape { (15, 25) } else { (6, 10) };
        match (hash >> 16) % 100 {
            bucket if bucket < test => Split::Test,
            bucket if bucket < test + validation => Split::Validation,
            _ => Split::Train,
        }
    }

    fn stream(self) -> u64 {
        match self {
            Split::Train => 0x7472_6169,
            Split::Validation => 0x7661_6c69,
            Split::Test => 0x7465_7374,
        }
    }

    /// Draws one caption of this split.
    pub fn sample(self, category: Category, rng: &mut impl rand::Rng) -> Caption {
        loop {
            let caption = Caption::sample(category, rng);
            if Split::of(&caption) == self {
                return caption;
            }
        }
    }

    /// The first `n` prompts of this split's fixed list: the six categories in
    /// turn, no text twice until a category runs out of new ones.
    pub fn prompts(self, n: usize) -> Vec<Caption> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.stream());
        let mut seen = HashSet::new();
        (0..n)
            .map(|i| {
                let category = Category::ALL[i % Category::ALL.len()];
                let mut caption = self.sample(category, &mut rng);
                for _ in 0..200 {
                    if !seen.contains(&caption) {
                        break;
                    }
                    caption = self.sample(category, &mut rng);
                }
                seen.insert(caption.clone());
                caption
            })
            .collect()
    }
}
