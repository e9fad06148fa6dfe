//! A setting with several values.

use std::convert::Infallible;
use std::ops::Deref;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An array in TOML; words with commas between them as a flag or variable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct List(pub Vec<String>);

impl Deref for List {
    type Target = [String];

    fn deref(&self) -> &[String] {
        &self.0
    }
}

impl FromStr for List {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
        Ok(Self(words.map(str::to_owned).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_parted_by_commas() {
        let list: List = " a, b.c ,,d".parse().unwrap();
        assert_eq!(&*list, ["a", "b.c", "d"]);
        assert_eq!("".parse(), Ok(List::default()));
    }
}
