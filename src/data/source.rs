//! How sources of data are written: `scenes:SPLIT:…`, or a path with the columns that are not
//! found by themselves, `PATH?KEY=NAME&KEY=NAME`.

use std::path::PathBuf;

use super::scenes::Split;
use crate::{Error, Result};

const SCENES: &str = "scenes:";

/// The split and the numbers of `scenes:SPLIT:NUMBER[:NUMBER]`; `None` for other sources.
pub(super) fn scenes(field: &str, text: &str) -> Option<Result<(Split, Vec<u64>)>> {
    let rest = text.strip_prefix(SCENES)?;
    let mut parts = rest.split(':');
    let read = |parts: &mut std::str::Split<char>| {
        let split = parts.next().unwrap_or_default().parse()?;
        let number = |part: &str| {
            let message = format!("expected a number in '{text}', got '{part}'");
            part.parse().map_err(|_| Error::invalid(field, message))
        };
        Ok((split, parts.map(number).collect::<Result<_>>()?))
    };
    Some(read(&mut parts))
}

/// The path and the values of `keys` where they are given.
pub(super) fn path<const N: usize>(
    field: &str,
    text: &str,
    keys: [&str; N],
) -> Result<(PathBuf, [Option<String>; N])> {
    let mut values = [const { None }; N];
    let (path, options) = text.split_once('?').unwrap_or((text, ""));
    if path.is_empty() {
        return Err(Error::invalid(field, "missing: give a path or scenes:SPLIT:COUNT"));
    }
    for option in options.split('&').filter(|o| !o.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let place = keys.iter().position(|k| *k == key).map(|i| &mut values[i]);
        match place {
            Some(place) if place.is_none() && !value.is_empty() => *place = Some(value.to_owned()),
            Some(_) => {
                return Err(Error::invalid(field, format!("'{key}' needs one name: {key}=NAME")));
            }
            None => return Err(Error::unknown(field, "option", key, keys)),
        }
    }
    Ok((path.into(), values))
}

/// Writes what [`path`] reads.
pub(super) fn write_path<const N: usize>(
    f: &mut std::fmt::Formatter<'_>,
    path: &std::path::Path,
    options: [(&str, &Option<String>); N],
) -> std::fmt::Result {
    write!(f, "{}", path.display())?;
    let given = options.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
    for (i, (key, value)) in given.enumerate() {
        write!(f, "{}{key}={value}", if i == 0 { '?' } else { '&' })?;
    }
    Ok(())
}

/// Serialises a type by its `Display` and reads it by its `FromStr`.
macro_rules! as_text {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text: String = serde::Deserialize::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(super) use as_text;
