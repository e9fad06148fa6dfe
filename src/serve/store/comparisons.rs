//! Rows of comparisons; their arms are generations.

use rusqlite::{Connection, OptionalExtension, Row, named_params};

use super::rows::{self, Filter, Json, New, pattern};
use super::{Lasting, Store, failed, schema};
use crate::Result;
use crate::serve::compare::{Arm, CompareRequest};

/// A comparison as it is recorded.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub id: String,
    pub created_ms: i64,
    pub client: String,
    pub prompt: String,
    pub request: CompareRequest,
    pub arms: Vec<Arm>,
}

impl Comparison {
    pub fn insert(&self, db: &Connection) -> rusqlite::Result<()> {
        db.prepare_cached(
            "INSERT INTO comparison (id, created_ms, client, prompt, request, arms)
             VALUES (:id, :created, :client, :prompt, :request, :arms)",
        )?
        .execute(named_params! {
            ":id": self.id,
            ":created": self.created_ms,
            ":client": self.client,
            ":prompt": self.prompt,
            ":request": Json(&self.request),
            ":arms": Json(&self.arms),
        })?;
        Ok(())
    }

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            created_ms: row.get("created_ms")?,
            client: row.get("client")?,
            prompt: row.get("prompt")?,
            request: row.get::<_, Json<_>>("request")?.0,
            arms: row.get::<_, Json<_>>("arms")?.0,
        })
    }
}

impl Store {
    /// Records an accepted comparison with the generations of its arms, as [`Store::accept`].
    ///
    /// # Errors
    /// The history cannot be written; nothing has changed then.
    pub fn accept_comparison(&self, comparison: &Comparison, arms: &[New]) -> Result<()> {
        let accept = |db: &mut Connection| {
            schema::lasting(db, Lasting::Machine)?;
            let transaction = db.transaction()?;
            comparison.insert(&transaction)?;
            arms.iter().try_for_each(|new| new.insert(&transaction))?;
            transaction.commit()
        };
        accept(&mut self.db()).map_err(failed)
    }

    /// Forgets a comparison that was not admitted after all, and its arms.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn forget_comparison(&self, arms: &[New]) -> Result<()> {
        let db = self.db();
        arms.iter().try_for_each(|new| rows::delete(&db, &new.id)).map_err(failed)?;
        prune(&db).map_err(failed)
    }

    /// # Errors
    /// The history cannot be read.
    pub fn comparison(&self, id: &str) -> Result<Option<Comparison>> {
        get(&self.db(), id).map_err(failed)
    }

    /// Comparisons that the filter's text, client and place let through, the newest first.
    ///
    /// # Errors
    /// The history cannot be read.
    pub fn comparisons(&self, filter: &Filter) -> Result<Vec<Comparison>> {
        list(&self.db(), filter).map_err(failed)
    }
}

pub fn get(db: &Connection, id: &str) -> rusqlite::Result<Option<Comparison>> {
    db.prepare_cached("SELECT * FROM comparison WHERE id = ?1")?
        .query_row([id], Comparison::read)
        .optional()
}

pub fn list(db: &Connection, filter: &Filter) -> rusqlite::Result<Vec<Comparison>> {
    let (before_ms, before_id) = match &filter.before {
        Some((ms, id)) => (Some(*ms), Some(id)),
        None => (None, None),
    };
    db.prepare_cached(
        r"SELECT * FROM comparison
          WHERE (:before_ms IS NULL OR (created_ms, id) < (:before_ms, :before_id))
            AND (:text IS NULL OR prompt LIKE :text ESCAPE '\')
            AND (:client IS NULL OR client = :client)
          ORDER BY created_ms DESC, id DESC LIMIT :limit",
    )?
    .query_map(
        named_params! {
            ":before_ms": before_ms,
            ":before_id": before_id,
            ":text": filter.text.as_deref().map(pattern),
            ":client": filter.client,
            ":limit": filter.limit as i64,
        },
        Comparison::read,
    )?
    .collect()
}

/// Removes comparisons of which no arm is left that ever ran.
pub fn prune(db: &Connection) -> rusqlite::Result<()> {
    db.prepare_cached(
        "DELETE FROM comparison WHERE NOT EXISTS
             (SELECT 1 FROM generation WHERE generation.comparison = comparison.id)",
    )?
    .execute([])?;
    Ok(())
}
