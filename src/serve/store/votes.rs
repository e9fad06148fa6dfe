//! Rows of ballots: a ballot that has a choice is a vote, and stays when its images are removed.

use rusqlite::{Connection, OptionalExtension, Row, named_params, params};

use super::rows::{Json, now};
use super::{Lasting, Store, failed, schema};
use crate::Result;
use crate::engine::request::Resolved;
use crate::serve::compare::CompareRequest;
use crate::serve::vote::pairs::{Arm, Match, Met, Past, Shown, Side, contract_name, player};
use crate::serve::vote::{Choice, Purpose, Vote};

/// Arms that pairs are made of: those of the newest comparisons.
const ARMS: i64 = 2_000;
/// The most votes that a table is made of: the newest.
const VOTES: i64 = 100_000;

/// A ballot with the time at which it was given.
#[derive(Clone, Debug, PartialEq)]
pub struct Ballot {
    pub id: String,
    pub created_ms: i64,
    pub voter: String,
    pub shown: Shown,
    pub choice: Option<Choice>,
}

fn named<T: Copy>(
    row: &Row<'_>,
    column: &str,
    all: &[T],
    name: fn(T) -> &'static str,
) -> rusqlite::Result<Option<T>> {
    let text: Option<String> = row.get(column)?;
    Ok(text.and_then(|text| all.iter().copied().find(|one| name(*one) == text)))
}

fn side(row: &Row<'_>, side: &str) -> rusqlite::Result<Side> {
    let of = |column: &str| format!("{side}_{column}");
    Ok(Side {
        generation: row.get(of("generation").as_str())?,
        player: row.get(of("player").as_str())?,
        position: row.get::<_, i64>(of("position").as_str())?.try_into().unwrap_or(0),
        file: row.get(of("file").as_str())?,
    })
}

impl Ballot {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let purpose = named(row, "purpose", &Purpose::ALL, Purpose::name)?;
        Ok(Self {
            id: row.get("id")?,
            created_ms: row.get("created_ms")?,
            voter: row.get("voter")?,
            shown: Shown {
                prompt: row.get("prompt")?,
                contract: row.get("contract")?,
                purpose: purpose.ok_or(rusqlite::Error::InvalidQuery)?,
                repeats: row.get("repeats")?,
                left: side(row, "left")?,
                right: side(row, "right")?,
            },
            choice: named(row, "choice", &Choice::ALL, Choice::name)?,
        })
    }

    pub fn insert(&self, db: &Connection) -> rusqlite::Result<()> {
        let Shown { prompt, contract, purpose, repeats, left, right } = &self.shown;
        db.prepare_cached(
            "INSERT INTO ballot
                 (id, created_ms, voter, prompt, contract, purpose, repeats,
                  left_generation, left_player, left_position, left_file,
                  right_generation, right_player, right_position, right_file)
             VALUES (:id, :created, :voter, :prompt, :contract, :purpose, :repeats,
                  :lg, :lp, :ln, :lf, :rg, :rp, :rn, :rf)",
        )?
        .execute(named_params! {
            ":id": self.id,
            ":created": self.created_ms,
            ":voter": self.voter,
            ":prompt": prompt,
            ":contract": contract,
            ":purpose": purpose.name(),
            ":repeats": repeats,
            ":lg": left.generation,
            ":lp": left.player,
            ":ln": left.position as i64,
            ":lf": left.file,
            ":rg": right.generation,
            ":rp": right.player,
            ":rn": right.position as i64,
            ":rf": right.file,
        })?;
        Ok(())
    }
}

/// What came of a vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voted {
    Counted,
    /// The ballot had been used.
    Used,
    /// The voter has voted on the same with another ballot.
    Again,
    /// The voter has all votes of the day, of which the first ballot was given then.
    TooMany(i64),
}

impl Store {
    /// What ballots are signed with.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// What a ballot for `voter` is chosen from: comparisons of `client` or of everybody, how often
    /// players met, and the voter's votes with their times. Ballots of before `expired` that nobody
    /// used are removed.
    ///
    /// # Errors
    /// The history cannot be read.
    #[expect(clippy::type_complexity, reason = "three lists")]
    pub fn pool(
        &self,
        client: Option<&str>,
        voter: &str,
        expired: i64,
    ) -> Result<(Vec<Match>, Met, Vec<(i64, Past)>)> {
        let db = self.db();
        let read = || -> rusqlite::Result<_> {
            expire(&db, expired)?;
            Ok((matches(&db, client)?, met(&db)?, of_voter(&db, voter)?))
        };
        read().map_err(failed)
    }

    /// Records a ballot.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn give(&self, ballot: &Ballot) -> Result<()> {
        let db = self.db();
        schema::lasting(&db, Lasting::Process).and_then(|()| ballot.insert(&db)).map_err(failed)
    }

    /// # Errors
    /// The history cannot be read.
    pub fn ballot(&self, id: &str) -> Result<Option<Ballot>> {
        get(&self.db(), id).map_err(failed)
    }

    /// Records the choice of a ballot that is there, for good. Of one voter `most` ballots are
    /// counted that were given after `since`, and every pair once.
    ///
    /// # Errors
    /// The history cannot be read or written.
    pub fn vote(&self, id: &str, choice: Choice, since: i64, most: u64) -> Result<Voted> {
        let db = self.db();
        schema::lasting(&db, Lasting::Machine)
            .and_then(|()| vote(&db, id, choice, since, most))
            .map_err(failed)
    }

    /// How many votes there are; none is ever removed.
    ///
    /// # Errors
    /// The history cannot be read.
    pub fn vote_count(&self) -> Result<u32> {
        count(&self.db()).map_err(failed)
    }

    /// Votes, those of one contract or all, and the contracts that have any.
    ///
    /// # Errors
    /// The history cannot be read.
    pub fn votes(&self, contract: Option<&str>) -> Result<(Vec<Vote>, Vec<String>)> {
        let db = self.db();
        let read = || Ok((all(&db, contract)?, contracts(&db)?));
        read().map_err(failed)
    }
}

fn get(db: &Connection, id: &str) -> rusqlite::Result<Option<Ballot>> {
    db.prepare_cached("SELECT * FROM ballot WHERE id = ?1")?
        .query_row([id], Ballot::read)
        .optional()
}

/// Notes a choice. That nobody else has the connection makes this one step.
fn vote(
    db: &Connection,
    id: &str,
    choice: Choice,
    since: i64,
    most: u64,
) -> rusqlite::Result<Voted> {
    // A voter may have several ballots at a time, of the same images on either side.
    let (again, today, first): (bool, u32, Option<i64>) = db
        .prepare_cached(
            "SELECT
                 coalesce(sum(
                     other.repeats IS this.repeats
                     AND (other.left_generation, other.left_position,
                          other.right_generation, other.right_position)
                         IN ((this.left_generation, this.left_position,
                              this.right_generation, this.right_position),
                             (this.right_generation, this.right_position,
                              this.left_generation, this.left_position))), 0) > 0,
                 count(CASE WHEN other.created_ms > ?2 THEN 1 END),
                 min(CASE WHEN other.created_ms > ?2 THEN other.created_ms END)
             FROM ballot AS this JOIN ballot AS other ON other.voter = this.voter
             WHERE this.id = ?1 AND other.id <> ?1 AND other.choice IS NOT NULL",
        )?
        .query_row(params![id, since], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let used = |db: &Connection| get(db, id).map(|b| b.is_none_or(|b| b.choice.is_some()));
    Ok(match () {
        () if used(db)? => Voted::Used,
        () if again => Voted::Again,
        () if u64::from(today) >= most => Voted::TooMany(first.unwrap_or(since)),
        () => {
            db.prepare_cached("UPDATE ballot SET choice = ?2, voted_ms = ?3 WHERE id = ?1")?
                .execute(params![id, choice.name(), now()])?;
            Voted::Counted
        }
    })
}

fn count(db: &Connection) -> rusqlite::Result<u32> {
    db.prepare_cached("SELECT count(*) FROM ballot WHERE choice IS NOT NULL")?
        .query_row([], |row| row.get(0))
}

/// How often two players met.
fn met(db: &Connection) -> rusqlite::Result<Met> {
    db.prepare_cached(
        "SELECT min(left_player, right_player), max(left_player, right_player), count(*)
         FROM ballot WHERE choice IS NOT NULL AND purpose = 'pair' GROUP BY 1, 2",
    )?
    .query_map([], |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))?
    .collect()
}

/// Removes ballots without a choice that were given before `before`.
fn expire(db: &Connection, before: i64) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM ballot WHERE choice IS NULL AND created_ms < ?1")?
        .execute([before])?;
    Ok(())
}

/// The votes of one voter, the oldest first.
fn of_voter(db: &Connection, voter: &str) -> rusqlite::Result<Vec<(i64, Past)>> {
    db.prepare_cached(
        "SELECT * FROM ballot WHERE voter = ?1 AND choice IS NOT NULL ORDER BY created_ms, id",
    )?
    .query_map([voter], |row| {
        let Ballot { id, created_ms, shown, choice, .. } = Ballot::read(row)?;
        let choice = choice.ok_or(rusqlite::Error::InvalidQuery)?;
        Ok((created_ms, Past { ballot: id, shown, choice }))
    })?
    .collect()
}

/// All votes, or those under one contract.
fn all(db: &Connection, contract: Option<&str>) -> rusqlite::Result<Vec<Vote>> {
    db.prepare_cached(
        "SELECT * FROM ballot
         WHERE choice IS NOT NULL AND (?1 IS NULL OR contract = ?1)
         ORDER BY voted_ms DESC, id LIMIT ?2",
    )?
    .query_map(params![contract, VOTES], |row| {
        let Ballot { id, voter, shown, choice, .. } = Ballot::read(row)?;
        Ok(Vote {
            ballot: id,
            voter,
            first_is_left: shown.left.position < shown.right.position,
            prompt: shown.prompt,
            purpose: shown.purpose,
            repeats: shown.repeats,
            left: shown.left.player,
            right: shown.right.player,
            choice: choice.ok_or(rusqlite::Error::InvalidQuery)?,
        })
    })?
    .collect()
}

/// Contracts that have votes.
fn contracts(db: &Connection) -> rusqlite::Result<Vec<String>> {
    db.prepare_cached(
        "SELECT DISTINCT contract FROM ballot WHERE choice IS NOT NULL ORDER BY contract",
    )?
    .query_map([], |row| row.get(0))?
    .collect()
}

/// Finished arms of comparisons that have a contract, of `client` or of everybody.
fn matches(db: &Connection, client: Option<&str>) -> rusqlite::Result<Vec<Match>> {
    let mut files = db.prepare_cached(
        "SELECT file FROM image WHERE generation = ?1 AND position < ?2 ORDER BY position",
    )?;
    let mut arms = db.prepare_cached(
        "SELECT comparison.id AS comparison, comparison.prompt AS prompt,
                comparison.request AS request, generation.id AS generation,
                generation.resolved AS resolved
         FROM generation JOIN comparison ON generation.comparison = comparison.id
         WHERE generation.state = 'completed' AND (?1 IS NULL OR comparison.client = ?1)
           AND json_extract(comparison.request, '$.contract') IS NOT NULL
         ORDER BY comparison.created_ms DESC, comparison.id, generation.id LIMIT ?2",
    )?;
    let mut found: Vec<(String, Match)> = Vec::new();
    let mut rows = arms.query(params![client, ARMS])?;
    while let Some(row) = rows.next()? {
        let (comparison, generation): (String, String) =
            (row.get("comparison")?, row.get("generation")?);
        let request = row.get::<_, Json<CompareRequest>>("request")?.0;
        let images = row.get::<_, Json<Resolved>>("resolved")?.0.n;
        let number = generation.rsplit('.').next().and_then(|n| n.parse::<usize>().ok());
        let (Some(contract), Some(arm)) =
            (request.contract, number.and_then(|n| request.arms.get(n)))
        else {
            continue;
        };
        let files = files.query_map(params![generation, images], |row| row.get(0))?;
        let files = files.collect::<rusqlite::Result<_>>()?;
        let arm = Arm { player: player(&request.base, arm), files, generation };
        if found.last().is_none_or(|(id, _)| *id != comparison) {
            let (prompt, contract) = (row.get("prompt")?, contract_name(contract));
            found.push((comparison, Match { prompt, contract, arms: Vec::new() }));
        }
        if let Some((_, last)) = found.last_mut() {
            last.arms.push(arm);
        }
    }
    Ok(found.into_iter().map(|(_, found)| found).collect())
}

/// The secret of this name, `make` when there is none.
pub fn secret(db: &Connection, name: &str, make: &str) -> rusqlite::Result<String> {
    db.prepare_cached("INSERT OR IGNORE INTO secret (name, value) VALUES (?1, ?2)")?
        .execute([name, make])?;
    db.prepare_cached("SELECT value FROM secret WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
}
