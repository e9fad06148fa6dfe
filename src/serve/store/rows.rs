//! Rows of the history.

use std::collections::HashSet;
use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, named_params, params};
use serde::{Deserialize, Serialize};

use super::{Image, Name};
use crate::diffusion::cost::Units;
use crate::engine::Planned;
use crate::engine::request::{GenerateRequest, Resolved};

/// Milliseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Where a generation is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Queued,
    Running,
    Completed,
    Failed,
    Cancelled,
}

impl State {
    pub const ALL: [Self; 5] =
        [Self::Queued, Self::Running, Self::Completed, Self::Failed, Self::Cancelled];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Nothing about it changes any more.
    #[must_use]
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ToSql for State {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.name().into())
    }
}

impl FromSql for State {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let text = value.as_str()?;
        Self::ALL.into_iter().find(|state| state.name() == text).ok_or(FromSqlError::InvalidType)
    }
}

/// A JSON value in a TEXT column.
pub struct Json<T>(pub T);

impl<T: Serialize> ToSql for Json<T> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        serde_json::to_string(&self.0)
            .map(ToSqlOutput::from)
            .map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))
    }
}

impl<T: for<'a> Deserialize<'a>> FromSql for Json<T> {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        serde_json::from_str(value.as_str()?).map(Self).map_err(FromSqlError::other)
    }
}

/// A generation as it is accepted.
#[derive(Clone, Debug)]
pub struct New {
    pub id: String,
    pub created_ms: i64,
    /// Whom it counts for when clients share the server.
    pub client: String,
    /// Of which it is an arm.
    pub comparison: Option<String>,
    pub request: GenerateRequest,
    pub planned: Planned,
}

impl New {
    pub fn insert(&self, db: &Connection) -> rusqlite::Result<()> {
        let resolved = &self.planned.resolved;
        db.prepare_cached(
            "INSERT INTO generation
                 (id, state, created_ms, client, comparison, request, resolved, planned, prompt, model,
                  adapter, method)
             VALUES
                 (:id, 'queued', :created, :client, :comparison, :request, :resolved, :planned, :prompt, :model,
                  :adapter, :method)",
        )?
        .execute(named_params! {
            ":id": self.id,
            ":created": self.created_ms,
            ":client": self.client,
            ":comparison": self.comparison,
            ":request": Json(&self.request),
            ":resolved": Json(resolved),
            ":planned": Json(self.planned.cost),
            ":prompt": resolved.prompt,
            ":model": resolved.model,
            ":adapter": resolved.adapter,
            ":method": resolved.method_name(),
        })?;
        Ok(())
    }
}

/// A generation as it is recorded.
#[derive(Clone, Debug)]
pub struct Record {
    pub id: String,
    pub state: State,
    pub created_ms: i64,
    pub started_ms: Option<i64>,
    pub finished_ms: Option<i64>,
    /// How often a thread began with it.
    pub starts: u32,
    pub client: String,
    pub comparison: Option<String>,
    pub request: GenerateRequest,
    pub resolved: Resolved,
    pub planned: Units,
    /// The answer's JSON, with images as addresses.
    pub answer: Option<String>,
    /// The problem's JSON.
    pub problem: Option<String>,
}

impl Record {
    const COLUMNS: &'static str = "id, state, created_ms, started_ms, finished_ms, starts, client, \
         comparison, request, resolved, planned, answer, problem";

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            state: row.get("state")?,
            created_ms: row.get("created_ms")?,
            started_ms: row.get("started_ms")?,
            finished_ms: row.get("finished_ms")?,
            starts: row.get("starts")?,
            client: row.get("client")?,
            comparison: row.get("comparison")?,
            request: row.get::<_, Json<_>>("request")?.0,
            resolved: row.get::<_, Json<_>>("resolved")?.0,
            planned: row.get::<_, Json<_>>("planned")?.0,
            answer: row.get("answer")?,
            problem: row.get("problem")?,
        })
    }
}

pub fn start(db: &Connection, id: &str) -> rusqlite::Result<()> {
    db.prepare_cached(
        "UPDATE generation SET state = 'running', started_ms = ?2, starts = starts + 1
         WHERE id = ?1 AND state IN ('queued', 'running')",
    )?
    .execute(params![id, now()])?;
    Ok(())
}

pub fn requeue(db: &Connection, id: &str) -> rusqlite::Result<()> {
    db.prepare_cached(
        "UPDATE generation SET state = 'queued', started_ms = NULL, starts = max(starts - 1, 0)
         WHERE id = ?1 AND state = 'running'",
    )?
    .execute([id])?;
    Ok(())
}

/// Ends it as completed, unless it has ended already.
pub fn complete(db: &Connection, id: &str, answer: &str, images: &[Image]) -> rusqlite::Result<()> {
    let changed = db
        .prepare_cached(
            "UPDATE generation
             SET state = 'completed', finished_ms = ?2, started_ms = coalesce(started_ms, ?2),
                 answer = ?3
             WHERE id = ?1 AND state IN ('queued', 'running')",
        )?
        .execute(params![id, now(), answer])?;
    if changed == 0 {
        return Ok(());
    }
    let mut add = db.prepare_cached("INSERT INTO image VALUES (?1, ?2, ?3)")?;
    for (position, image) in images.iter().enumerate() {
        add.execute(params![id, position as i64, image.name.as_str()])?;
    }
    Ok(())
}

/// Ends it without a result, unless it has ended already.
pub fn end(db: &Connection, id: &str, state: State, problem: &str) -> rusqlite::Result<()> {
    db.prepare_cached(
        "UPDATE generation SET state = ?2, finished_ms = ?3, problem = ?4
         WHERE id = ?1 AND state IN ('queued', 'running')",
    )?
    .execute(params![id, state, now(), problem])?;
    Ok(())
}

pub fn delete(db: &Connection, id: &str) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM generation WHERE id = ?1")?.execute([id])?;
    Ok(())
}

pub fn get(db: &Connection, id: &str) -> rusqlite::Result<Option<Record>> {
    let sql = format!("SELECT {} FROM generation WHERE id = ?1", Record::COLUMNS);
    db.prepare_cached(&sql)?.query_row([id], Record::read).optional()
}

pub fn unfinished(db: &Connection) -> rusqlite::Result<Vec<Record>> {
    let sql = format!(
        "SELECT {} FROM generation WHERE state IN ('queued', 'running') ORDER BY created_ms, id",
        Record::COLUMNS
    );
    db.prepare(&sql)?.query_map([], Record::read)?.collect()
}

/// Which generations are listed.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Words of the prompt, anywhere in it, whatever their case.
    pub text: Option<String>,
    pub model: Option<String>,
    pub adapter: Option<String>,
    pub method: Option<String>,
    pub state: Option<State>,
    /// Only what this one asked for.
    pub client: Option<String>,
    /// Only what is older than this one: `created_ms` and `id`.
    pub before: Option<(i64, String)>,
    pub limit: usize,
}

/// A generation in a list.
#[derive(Clone, Debug)]
pub struct Listed {
    pub id: String,
    pub state: State,
    pub created_ms: i64,
    pub finished_ms: Option<i64>,
    pub comparison: Option<String>,
    pub resolved: Resolved,
    pub planned: Units,
    pub answer: Option<String>,
}

/// Of LIKE, for a text anywhere.
pub fn pattern(text: &str) -> String {
    let escaped = text.replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_");
    format!("%{escaped}%")
}

pub fn list(db: &Connection, filter: &Filter) -> rusqlite::Result<Vec<Listed>> {
    let (before_ms, before_id) = match &filter.before {
        Some((ms, id)) => (Some(*ms), Some(id)),
        None => (None, None),
    };
    let text = filter.text.as_deref().map(pattern);
    db.prepare_cached(
        r"SELECT id, state, created_ms, finished_ms, comparison, resolved, planned, answer FROM generation
          WHERE (:before_ms IS NULL OR (created_ms, id) < (:before_ms, :before_id))
            AND (:text IS NULL OR prompt LIKE :text ESCAPE '\')
            AND (:model IS NULL OR model = :model)
            AND (:adapter IS NULL OR adapter = :adapter)
            AND (:method IS NULL OR method = :method)
            AND (:state IS NULL OR state = :state)
            AND (:client IS NULL OR client = :client)
          ORDER BY created_ms DESC, id DESC LIMIT :limit",
    )?
    .query_map(
        named_params! {
            ":before_ms": before_ms,
            ":before_id": before_id,
            ":text": text,
            ":model": filter.model,
            ":adapter": filter.adapter,
            ":method": filter.method,
            ":state": filter.state,
            ":client": filter.client,
            ":limit": filter.limit as i64,
        },
        |row| {
            Ok(Listed {
                id: row.get("id")?,
                state: row.get("state")?,
                created_ms: row.get("created_ms")?,
                finished_ms: row.get("finished_ms")?,
                comparison: row.get("comparison")?,
                resolved: row.get::<_, Json<_>>("resolved")?.0,
                planned: row.get::<_, Json<_>>("planned")?.0,
                answer: row.get("answer")?,
            })
        },
    )?
    .collect()
}

/// Removes a finished generation; the files that no other one has, or none if there is no such.
pub fn remove(db: &mut Connection, id: &str) -> rusqlite::Result<Option<Vec<Name>>> {
    let transaction = db.transaction()?;
    let files = files_of(&transaction, id)?;
    let removed = transaction
        .prepare_cached(
            "DELETE FROM generation WHERE id = ?1 AND state NOT IN ('queued', 'running')",
        )?
        .execute([id])?;
    let orphans = orphans(&transaction, files)?;
    transaction.commit()?;
    Ok((removed > 0).then_some(orphans))
}

fn files_of(db: &Connection, id: &str) -> rusqlite::Result<Vec<String>> {
    db.prepare_cached("SELECT file FROM image WHERE generation = ?1")?
        .query_map([id], |row| row.get(0))?
        .collect()
}

/// The files that generations have.
pub fn files(db: &Connection) -> rusqlite::Result<HashSet<String>> {
    db.prepare("SELECT DISTINCT file FROM image")?.query_map([], |row| row.get(0))?.collect()
}

/// Of `files`, those that no generation has.
fn orphans(db: &Connection, files: Vec<String>) -> rusqlite::Result<Vec<Name>> {
    let mut used = db.prepare_cached("SELECT 1 FROM image WHERE file = ?1")?;
    let mut orphans = Vec::new();
    for file in files {
        if !used.exists([&file])? {
            orphans.extend(Name::parse(&file));
        }
    }
    Ok(orphans)
}

/// Removes what ended first beyond `keep`; the files that none has any more, or none if nothing
/// was removed.
pub fn prune(db: &mut Connection, keep: u64) -> rusqlite::Result<Option<Vec<Name>>> {
    let keep = i64::try_from(keep).unwrap_or(i64::MAX);
    let over: Vec<String> = db
        .prepare_cached(
            "SELECT id FROM generation WHERE state NOT IN ('queued', 'running')
             ORDER BY finished_ms DESC, id DESC LIMIT -1 OFFSET ?1",
        )?
        .query_map([keep], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    if over.is_empty() {
        return Ok(None);
    }
    let mut files = Vec::new();
    for id in over {
        files.extend(remove(db, &id)?.unwrap_or_default());
    }
    Ok(Some(files))
}

impl New {
    /// The moment `ms` milliseconds after it was accepted; now where that has passed.
    #[must_use]
    pub fn instant_of(&self, ms: u64) -> Option<Instant> {
        let at = self.created_ms.saturating_add_unsigned(ms);
        let left = u64::try_from(at.saturating_sub(now())).unwrap_or(0);
        Instant::now().checked_add(Duration::from_millis(left))
    }
}

#[cfg(test)]
impl New {
    /// One like many.
    pub fn example(id: &str, created_ms: i64) -> Self {
        use crate::diffusion::cost::Budget;
        use crate::engine::request::ImageFormat;
        let prompt = format!("a 100% red_circle {id}");
        let method = serde_json::json!({ "name": "plain" });
        Self {
            id: id.to_owned(),
            created_ms,
            client: "here".to_owned(),
            comparison: None,
            request: GenerateRequest {
                prompt: prompt.clone(),
                seed: Some(u64::MAX),
                ..GenerateRequest::default()
            },
            planned: Planned {
                resolved: Resolved {
                    prompt,
                    negative_prompt: None,
                    model: "tiny".to_owned(),
                    adapter: None,
                    method: method.as_object().unwrap().clone(),
                    seed: u64::MAX,
                    width: 8,
                    height: 8,
                    steps: 2,
                    guidance_scale: 0.1,
                    guidance_rescale: 0.0,
                    solver: "ddim".to_owned(),
                    n: 1,
                    reward: None,
                    budget: Budget::default(),
                    output_format: ImageFormat::Png,
                    digests: false,
                    previews: 0,
                    alone: false,
                },
                cost: Units { f: 4, v: 0, y: 1, l: 0 },
            },
        }
    }
}
