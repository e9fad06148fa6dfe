//! Where the value of each setting comes from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::{NAMES, Overrides, Settings};
use crate::{Error, Result};

/// The last that gave a setting its value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Default,
    File(PathBuf),
    Variable(&'static str),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            // Quoted, so that no path can end the comment that this is written into.
            Self::File(path) => write!(f, "file {path:?}"),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag --{}", name.replace('_', "-")),
        }
    }
}

/// The origin of every setting, by its name.
#[derive(Clone, Debug)]
pub struct Origins(BTreeMap<&'static str, Origin>);

impl Origins {
    /// Of what [`Settings::resolve`] makes of `file` and of the program's arguments.
    ///
    /// # Errors
    /// The file is unusable.
    pub fn of(file: Option<&Path>, arguments: &ArgMatches) -> Result<Self> {
        let mut all: BTreeMap<_, _> =
            NAMES.iter().map(|(name, _)| (*name, Origin::Default)).collect();
        if let Some(path) = file {
            for name in Overrides::from_toml_file(path)?.given() {
                all.insert(name, Origin::File(path.to_path_buf()));
            }
        }
        for &(name, variable) in NAMES {
            let origin = match arguments.value_source(name) {
                Some(ValueSource::CommandLine) => Origin::Flag(name),
                Some(ValueSource::EnvVariable) => Origin::Variable(variable),
                _ => continue,
            };
            all.insert(name, origin);
        }
        Ok(Self(all))
    }
}

impl Settings {
    /// The settings as a TOML file that gives them back, each under a comment that says where its
    /// value comes from.
    ///
    /// # Errors
    /// A path that is not UTF-8 cannot be written.
    pub fn to_toml_with(&self, origins: &Origins) -> Result<String> {
        let fail = |e: toml::ser::Error| Error::invalid("settings", e.to_string());
        let values = toml::Table::try_from(self).map_err(fail)?;
        let mut text = String::new();
        for (name, _) in NAMES {
            let one: toml::Table = values
                .get(*name)
                .map(|value| ((*name).to_owned(), value.clone()))
                .into_iter()
                .collect();
            let origin = origins.0.get(name).unwrap_or(&Origin::Default);
            text += &format!("# {origin}\n{}", toml::to_string(&one).map_err(fail)?);
        }
        Ok(text)
    }
}
