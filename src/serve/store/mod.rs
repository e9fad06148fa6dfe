//! What outlives the process: generations in SQLite, images as files named by
//! their content. Survives `kill -9` at any moment: what is unfinished then is
//! listed again by [`Store::unfinished`].

mod comparisons;
mod files;
mod rows;
mod schema;
mod votes;

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;

pub use comparisons::Comparison;
pub use files::{Image, Name};
pub use rows::{Filter, Listed, New, Record, State, now};

pub use votes::{Ballot, Voted};

use super::vote::token;
use crate::util::{self, Locked};
use crate::{Error, Result};
use files::Files;

/// How much a write must survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// The end of the process.
    Process,
    /// The end of the machine's power.
    Machine,
}

/// The folder of one server: `history.sqlite`, `images/` and `lock`.
pub struct Store {
    db: Mutex<Connection>,
    files: Files,
    /// Finished generations that are kept.
    keep: u64,
    /// What ballots are signed with.
    secret: String,
    /// Held until the store is closed.
    lock: Locked,
}

impl Store {
    /// Opens the store in `folder`, making or updating what is there.
    ///
    /// # Errors
    /// The folder cannot be written, another server has it, or its history was written by a
    /// newer version.
    pub fn open(folder: &Path, keep: u64) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, e))?;
        let path = folder.join("lock");
        let lock = File::create(&path).map_err(|e| Error::file(&path, e))?;
        let lock = lock_for_one(lock, folder)?;
        let path = folder.join("history.sqlite");
        let fail = |message: String| Error::file(&path, message);
        let mut db = Connection::open(&path).map_err(|e| fail(e.to_string()))?;
        schema::prepare(&mut db).map_err(fail)?;
        let files = Files::open(&folder.join("images"))?;
        // Before anybody writes: the lock is held.
        match files.sweep(&rows::files(&db).map_err(|e| fail(e.to_string()))?) {
            Ok(0) => {}
            Ok(files) => tracing::info!(files, "removed what an earlier process had left"),
            Err(error) => tracing::warn!(%error, "what an earlier process had left stays"),
        }
        let secret = votes::secret(&db, "ballots", &token::secret()?).map_err(failed)?;
        Ok(Self { db: Mutex::new(db), files, keep, secret, lock })
    }

    /// Lets another server have the folder; for when nobody writes any more.
    ///
    /// Threads of the HTTP server can have their share of the store for moments after that has
    /// ended, so that it is not dropped yet.
    pub fn close(&self) {
        self.lock.release();
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        // A transaction that a panic interrupts is rolled back when it is dropped.
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an accepted generation; it lasts when this returns.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn accept(&self, new: &New) -> Result<()> {
        let db = self.db();
        schema::lasting(&db, Lasting::Machine).and_then(|()| new.insert(&db)).map_err(failed)
    }

    /// Forgets a generation that was not admitted after all.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn forget(&self, id: &str) -> Result<()> {
        rows::delete(&self.db(), id).map_err(failed)
    }

    /// Notes that a thread begins with it.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn start(&self, id: &str) -> Result<()> {
        rows::start(&self.db(), id).map_err(failed)
    }

    /// Puts it back as if no thread had begun with it.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn requeue(&self, id: &str) -> Result<()> {
        rows::requeue(&self.db(), id).map_err(failed)
    }

    /// Stores images and answer of a generation, in one step for whoever reads. One that was not
    /// accepted before (a synchronous one) is given as `new`. Then the oldest beyond what is kept
    /// are removed.
    ///
    /// # Errors
    /// Images or history cannot be written; the history has not changed then.
    pub fn complete(
        &self,
        id: &str,
        new: Option<&New>,
        images: &[Image],
        answer: &str,
        lasting: Lasting,
    ) -> Result<()> {
        // Under the lock: a file that is there already may be another one's that is being removed.
        let mut db = self.db();
        for image in images {
            self.files.put(image, lasting)?;
        }
        let complete = |db: &mut Connection| {
            schema::lasting(db, lasting)?;
            let transaction = db.transaction()?;
            if let Some(new) = new {
                new.insert(&transaction)?;
            }
            rows::complete(&transaction, id, answer, images)?;
            transaction.commit()
        };
        complete(&mut db).map_err(failed)?;
        self.prune(&mut db);
        Ok(())
    }

    /// Ends a generation without a result: failed with `problem`, or cancelled.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn end(&self, id: &str, state: State, problem: &str) -> Result<()> {
        let mut db = self.db();
        rows::end(&db, id, state, problem).map_err(failed)?;
        self.prune(&mut db);
        Ok(())
    }

    /// Makes room, as far as that goes.
    fn prune(&self, db: &mut Connection) {
        match rows::prune(db, self.keep).and_then(|pruned| {
            if pruned.is_some() {
                comparisons::prune(db)?;
            }
            Ok(pruned.unwrap_or_default())
        }) {
            Ok(orphans) => self.discard(&orphans),
            Err(error) => tracing::warn!(%error, "old generations were not removed"),
        }
    }

    /// One generation with its request, and its answer or problem where it has ended.
    ///
    /// # Errors
    /// The history cannot be read.
    pub fn get(&self, id: &str) -> Result<Option<Record>> {
        rows::get(&self.db(), id).map_err(failed)
    }

    /// Generations that `filter` lets through, the newest first.
    ///
    /// # Errors
    /// The history cannot be read.
    pub fn list(&self, filter: &Filter) -> Result<Vec<Listed>> {
        rows::list(&self.db(), filter).map_err(failed)
    }

    /// What a server that ended had accepted and not finished, in the order of acceptance.
    ///
    /// # Errors
    /// The history cannot be read.
    pub fn unfinished(&self) -> Result<Vec<Record>> {
        rows::unfinished(&self.db()).map_err(failed)
    }

    /// Removes a finished generation and the images that only it has; false if there is none.
    ///
    /// # Errors
    /// The history cannot be written.
    pub fn remove(&self, id: &str) -> Result<bool> {
        // The lock is held until the files are gone, as in `complete`.
        let mut db = self.db();
        let Some(orphans) = rows::remove(&mut db, id).map_err(failed)? else { return Ok(false) };
        comparisons::prune(&db).map_err(failed)?;
        self.discard(&orphans);
        Ok(true)
    }

    /// Removes files that no generation has; one that cannot be removed is in nobody's way.
    fn discard(&self, orphans: &[Name]) {
        for name in orphans {
            if let Err(error) = self.files.remove(name) {
                tracing::warn!(%error, "an image stays");
            }
        }
    }

    /// The bytes of an image file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn image(&self, name: &Name) -> Result<Option<Vec<u8>>> {
        self.files.get(name)
    }

    /// The bytes of image files that are there.
    ///
    /// # Errors
    /// One is not, or cannot be read.
    pub fn images(&self, names: &[Name]) -> Result<Vec<Vec<u8>>> {
        let read = |name: &Name| {
            self.image(name)?.ok_or_else(|| Error::file(name.as_str(), "is not there any more"))
        };
        names.iter().map(read).collect()
    }
}

fn lock_for_one(lock: File, folder: &Path) -> Result<Locked> {
    util::lock(lock, folder).map_err(|_| {
        Error::file(folder, "another server keeps its history here; give this one --data DIR")
    })
}

fn failed(error: rusqlite::Error) -> Error {
    Error::file("history.sqlite", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::ImageFormat;

    fn new(id: &str, created_ms: i64) -> New {
        New::example(id, created_ms)
    }

    fn image(bytes: &[u8]) -> Image {
        Image { name: Name::of(bytes, ImageFormat::Png), bytes: bytes.to_vec() }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 100).unwrap();
        (folder, store)
    }

    fn complete(store: &Store, id: &str, images: &[Image]) {
        store.complete(id, None, images, "{}", Lasting::Process).unwrap();
    }

    fn ids(store: &Store, filter: &Filter) -> Vec<String> {
        let filter = Filter { limit: 100, ..filter.clone() };
        store.list(&filter).unwrap().into_iter().map(|l| l.id).collect()
    }

    #[test]
    fn what_is_accepted_outlives_the_process() {
        let (folder, store) = store();
        for id in ["a", "b", "c"] {
            store.accept(&new(id, 1)).unwrap();
        }
        store.start("a").unwrap();
        complete(&store, "a", &[image(b"1")]);
        store.start("b").unwrap();
        drop(store);
        let store = Store::open(folder.path(), 100).unwrap();
        let left = store.unfinished().unwrap();
        let seen: Vec<_> = left.iter().map(|r| (r.id.as_str(), r.state, r.starts)).collect();
        assert_eq!(seen, [("b", State::Running, 1), ("c", State::Queued, 0)]);
        let asked = new("b", 1);
        assert_eq!(left[0].request, asked.request);
        assert_eq!(left[0].resolved, asked.planned.resolved);
        assert_eq!(left[0].planned, asked.planned.cost);
        store.requeue("b").unwrap();
        let record = store.get("b").unwrap().unwrap();
        assert_eq!((record.state, record.starts, record.started_ms), (State::Queued, 0, None));
    }

    #[test]
    fn an_end_is_final() {
        let (_folder, store) = store();
        store.accept(&new("a", 1)).unwrap();
        store.end("a", State::Failed, r#"{"detail":"no"}"#).unwrap();
        complete(&store, "a", &[image(b"1")]);
        store.start("a").unwrap();
        store.end("a", State::Cancelled, "{}").unwrap();
        let record = store.get("a").unwrap().unwrap();
        assert_eq!(record.state, State::Failed);
        assert_eq!((record.answer, record.problem), (None, Some(r#"{"detail":"no"}"#.to_owned())));
        assert!(store.accept(&new("a", 2)).is_err(), "an id is taken once");
    }

    #[test]
    fn images_go_with_the_last_generation_that_has_them() {
        let (_folder, store) = store();
        let (one, two) = (image(b"one"), image(b"two"));
        for (id, images) in [("a", vec![one.clone(), two.clone()]), ("b", vec![one.clone()])] {
            store.accept(&new(id, 1)).unwrap();
            complete(&store, id, &images);
        }
        assert_eq!(store.image(&one.name).unwrap().as_deref(), Some(&b"one"[..]));
        assert!(store.remove("a").unwrap());
        assert!(!store.remove("a").unwrap());
        assert!(store.image(&one.name).unwrap().is_some());
        assert!(store.image(&two.name).unwrap().is_none());
        assert!(store.remove("b").unwrap());
        assert!(store.image(&one.name).unwrap().is_none());
    }

    #[test]
    fn the_oldest_finished_ones_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 3).unwrap();
        for i in 0..6_u8 {
            let id = format!("g{i}");
            store.accept(&new(&id, i64::from(i))).unwrap();
            // The first one never ends.
            if i > 0 {
                complete(&store, &id, &[image(&[i])]);
            }
        }
        assert_eq!(ids(&store, &Filter::default()), ["g5", "g4", "g3", "g0"]);
        assert!(store.image(&image(&[2]).name).unwrap().is_none());
        assert!(store.image(&image(&[3]).name).unwrap().is_some());
    }

    #[test]
    fn lists_are_filtered_and_paged() {
        let (_folder, store) = store();
        for (i, id) in ["a", "b", "c", "d"].iter().enumerate() {
            store.accept(&new(id, 10 + i as i64 / 2)).unwrap();
        }
        complete(&store, "b", &[]);
        let all = Filter::default();
        assert_eq!(ids(&store, &all), ["d", "c", "b", "a"]);
        let before =
            |ms: i64, id: &str| Filter { before: Some((ms, id.to_owned())), ..all.clone() };
        assert_eq!(ids(&store, &before(11, "d")), ["c", "b", "a"]);
        assert_eq!(ids(&store, &before(10, "b")), ["a"]);
        let text = |text: &str| Filter { text: Some(text.to_owned()), ..all.clone() };
        assert_eq!(ids(&store, &text("RED_CIRCLE b")), ["b"]);
        // Not a pattern.
        assert_eq!(ids(&store, &text("100% red_circle")).len(), 4);
        assert!(ids(&store, &text("100%circle")).is_empty());
        assert!(ids(&store, &text("red.circle")).is_empty());
        assert!(ids(&store, &text("'; DROP TABLE generation; --")).is_empty());
        let done = Filter { state: Some(State::Completed), ..all.clone() };
        assert_eq!(ids(&store, &done), ["b"]);
        let other = Filter { model: Some("other".to_owned()), ..all };
        assert!(ids(&store, &other).is_empty());
    }

    #[test]
    fn one_server_has_the_folder() {
        let (folder, store) = store();
        let error = Store::open(folder.path(), 1).err().unwrap().to_string();
        assert!(error.contains("--data"), "{error}");
        store.close();
        Store::open(folder.path(), 1).unwrap();
    }

    #[test]
    fn a_history_of_the_future_is_refused() {
        let (folder, store) = store();
        store.db().pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        let error = Store::open(folder.path(), 1).err().unwrap().to_string();
        assert!(error.contains("newer version"), "{error}");
    }

    #[test]
    fn what_is_no_database_is_said() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("history.sqlite"), "not a database, surely").unwrap();
        let error = Store::open(folder.path(), 1).err().unwrap().to_string();
        assert!(error.contains("history.sqlite"), "{error}");
    }
}
