//! `ds-bench sweep-merge`: joins the folders of a sharded sweep, or writes the
//! tables and plots of one folder again.

use std::path::{Path, PathBuf};

use super::cell;
use super::manifest::{self, Manifest};
use super::report;
use super::sweep::CELLS;
use crate::util::write_atomic;
use crate::{Error, Result};

/// Join the folders of a sharded sweep into one, with tables and plots.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Folders written by `nfe-sweep --shard i/n`.
    #[arg(required = true, value_name = "DIR")]
    pub shards: Vec<PathBuf>,
    /// Folder to write; without it, the reports of the one folder given are written again.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// When the folders belong to different sweeps or a file cannot be read or written.
pub fn run(args: &Args) -> Result<()> {
    match (&args.out, args.shards.as_slice()) {
        (None, [one]) => report::write(one),
        (None, _) => Err(Error::invalid("out", "several folders need --out for the joined one")),
        (Some(out), shards) => merge(shards, out),
    }
}

fn merge(shards: &[PathBuf], out: &Path) -> Result<()> {
    let mut joined: Option<Manifest> = None;
    let mut lines = Vec::new();
    for dir in shards {
        let mut manifest = Manifest::read(dir)?
            .ok_or_else(|| Error::file(dir.join(manifest::FILE), "no sweep in this folder"))?;
        manifest.config.shard = None;
        match &mut joined {
            None => joined = Some(manifest),
            Some(first) if first.config == manifest.config => {
                first.command = format!("{}\n{}", first.command, manifest.command);
            }
            Some(_) => {
                return Err(Error::file(
                    dir.join(manifest::FILE),
                    format!("another sweep than the one in {}", shards[0].display()),
                ));
            }
        }
        lines.extend(cell::read_lines(&dir.join(CELLS))?);
    }
    let joined = joined.ok_or_else(|| Error::invalid("shards", "no folder given"))?;
    if out.join(CELLS).exists() {
        return Err(Error::file(out.join(CELLS), "already there; take another --out"));
    }
    joined.write(out)?;
    write_atomic(&out.join(CELLS), &lines)?;
    report::write(out)
}
