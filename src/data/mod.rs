//! Prompts, images with captions, and the scene world.

pub mod images;
mod parquet_file;
pub mod prompts;
pub mod scenes;
mod source;
mod table;

/// A row of a data set that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Skipped {
    /// Which: a line, a row or a file.
    pub row: String,
    pub reason: String,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.row, self.reason)
    }
}

/// How many of the rows that were skipped a message names.
const NAMED: usize = 5;

/// "3 of 20 rows cannot be used: line 2: …; line 5: …; …"
pub fn complaint(skipped: &[Skipped], of: usize) -> String {
    let named: Vec<String> = skipped.iter().take(NAMED).map(ToString::to_string).collect();
    let more = if skipped.len() > NAMED { "; …" } else { "" };
    format!("{} of {of} rows cannot be used: {}{more}", skipped.len(), named.join("; "))
}
