//! Blind votes on images that cost the same, and what they say.

pub mod davidson;
pub mod leaderboard;
pub mod pairs;
pub mod tables;
pub mod token;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a voter says of two images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    Left,
    Right,
    Tie,
    BothBad,
}

impl Choice {
    pub const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Tie, Self::BothBad];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
            Self::Tie => "tie",
            Self::BothBad => "both-bad",
        }
    }

    /// The same of the images with their sides changed.
    #[must_use]
    pub fn mirrored(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
            other => other,
        }
    }

    /// 1 for the left image, -1 for the right one, 0 for neither.
    #[must_use]
    pub fn sign(self) -> i32 {
        match self {
            Self::Left => 1,
            Self::Right => -1,
            Self::Tie | Self::BothBad => 0,
        }
    }
}

/// Why a pair was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Two players.
    Pair,
    /// A pair that the voter has seen, with its sides changed.
    Repeat,
    /// Two images of one player.
    Same,
}

impl Purpose {
    pub const ALL: [Self; 3] = [Self::Pair, Self::Repeat, Self::Same];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Repeat => "repeat",
            Self::Same => "same",
        }
    }
}

/// A vote.
#[derive(Clone, Debug, PartialEq)]
pub struct Vote {
    pub ballot: String,
    pub voter: String,
    pub prompt: String,
    pub purpose: Purpose,
    /// The ballot that a repeat repeats.
    pub repeats: Option<String>,
    /// Methods with their adapters.
    pub left: String,
    pub right: String,
    /// Of [`Purpose::Same`]: whether the left image is the one with the lower seed.
    pub first_is_left: bool,
    pub choice: Choice,
}
