//! The tables, by versions: a history is brought up to date when it is opened.

use rusqlite::Connection;
use rusqlite_migration::{M, Migrations};

use super::Lasting;

/// Never changed once released; a new version is a new line.
const VERSIONS: [M<'_>; 2] = [
    M::up(
        "CREATE TABLE comparison (
         id TEXT PRIMARY KEY NOT NULL,
         created_ms INTEGER NOT NULL,
         client TEXT NOT NULL,
         prompt TEXT NOT NULL,
         request TEXT NOT NULL,
         arms TEXT NOT NULL
     ) STRICT;
     CREATE INDEX comparison_age ON comparison (created_ms, id);
     CREATE TABLE generation (
         id TEXT PRIMARY KEY NOT NULL,
         state TEXT NOT NULL
             CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
         created_ms INTEGER NOT NULL,
         started_ms INTEGER,
         finished_ms INTEGER,
         starts INTEGER NOT NULL DEFAULT 0,
         client TEXT NOT NULL,
         comparison TEXT REFERENCES comparison (id) ON DELETE SET NULL,
         request TEXT NOT NULL,
         resolved TEXT NOT NULL,
         planned TEXT NOT NULL,
         prompt TEXT NOT NULL,
         model TEXT NOT NULL,
         adapter TEXT,
         method TEXT NOT NULL,
         answer TEXT,
         problem TEXT
     ) STRICT;
     CREATE INDEX generation_age ON generation (created_ms, id);
     CREATE INDEX generation_comparison ON generation (comparison)
         WHERE comparison IS NOT NULL;
     CREATE INDEX generation_unfinished ON generation (created_ms, id)
         WHERE state IN ('queued', 'running');
     CREATE INDEX generation_finished ON generation (finished_ms, id)
         WHERE state NOT IN ('queued', 'running');
     CREATE TABLE image (
         generation TEXT NOT NULL REFERENCES generation (id) ON DELETE CASCADE,
         position INTEGER NOT NULL,
         file TEXT NOT NULL,
         PRIMARY KEY (generation, position)
     ) STRICT, WITHOUT ROWID;
     CREATE INDEX image_file ON image (file);",
    ),
    M::up(
        "CREATE TABLE secret (
         name TEXT PRIMARY KEY NOT NULL,
         value TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE ballot (
         id TEXT PRIMARY KEY NOT NULL,
         created_ms INTEGER NOT NULL,
         voter TEXT NOT NULL,
         prompt TEXT NOT NULL,
         contract TEXT NOT NULL,
         purpose TEXT NOT NULL CHECK (purpose IN ('pair', 'repeat', 'same')),
         repeats TEXT,
         left_generation TEXT NOT NULL,
         left_player TEXT NOT NULL,
         left_position INTEGER NOT NULL,
         left_file TEXT NOT NULL,
         right_generation TEXT NOT NULL,
         right_player TEXT NOT NULL,
         right_position INTEGER NOT NULL,
         right_file TEXT NOT NULL,
         choice TEXT CHECK (choice IN ('left', 'right', 'tie', 'both-bad')),
         voted_ms INTEGER
     ) STRICT;
     CREATE INDEX ballot_voter ON ballot (voter, created_ms);
     CREATE INDEX ballot_open ON ballot (created_ms) WHERE choice IS NULL;
     CREATE INDEX ballot_voted ON ballot (voted_ms) WHERE choice IS NOT NULL;",
    ),
];

/// Sets a connection up and brings its tables up to date.
///
/// # Errors
/// What is wrong with the file, in words.
pub fn prepare(db: &mut Connection) -> Result<(), String> {
    let set = |db: &Connection| -> rusqlite::Result<()> {
        db.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        db.pragma_update(None, "foreign_keys", true)
    };
    set(db).map_err(|e| e.to_string())?;
    Migrations::from_slice(&VERSIONS).to_latest(db).map_err(|e| match e {
        rusqlite_migration::Error::MigrationDefinition(
            rusqlite_migration::MigrationDefinitionError::DatabaseTooFarAhead,
        ) => "was written by a newer version of this program".to_owned(),
        other => other.to_string(),
    })
}

/// Says what the next transaction must survive. In WAL mode `NORMAL` outlives the process,
/// `FULL` a loss of power as well.
pub fn lasting(db: &Connection, lasting: Lasting) -> rusqlite::Result<()> {
    let level = match lasting {
        Lasting::Process => "NORMAL",
        Lasting::Machine => "FULL",
    };
    db.pragma_update(None, "synchronous", level)
}
