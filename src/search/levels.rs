//! Steps of a sampler at which a search branches or breeds.

use crate::{Error, Result};

/// Levels of 50 steps as those of `steps` steps; those that fall together are one.
pub fn of_50(levels: &[u64], steps: u64) -> Vec<u64> {
    let mut levels: Vec<u64> = levels.iter().map(|level| level * steps / 50).collect();
    levels.dedup();
    levels
}

/// Checks that levels ascend from 0 and lie below `steps`; there may be none.
///
/// # Errors
/// `Error::Invalid` on "method.levels".
pub fn checked(levels: Vec<u64>, steps: u64) -> Result<Vec<u64>> {
    let ascending = levels.windows(2).all(|pair| pair[0] < pair[1]);
    let first = levels.first().is_none_or(|level| *level == 0);
    if ascending && first && levels.last().is_none_or(|level| *level < steps) {
        return Ok(levels);
    }
    Err(refused(&levels, steps))
}

/// As [`checked`], with one level at least.
///
/// # Errors
/// `Error::Invalid` on "method.levels".
pub fn some_checked(levels: Vec<u64>, steps: u64) -> Result<Vec<u64>> {
    if levels.is_empty() { Err(refused(&levels, steps)) } else { checked(levels, steps) }
}

fn refused(levels: &[u64], steps: u64) -> Error {
    let message = format!("{levels:?} are not steps below {steps} that ascend from 0");
    Error::invalid("method.levels", message)
}
