//! Generations that this process has accepted: what each has done so far, for
//! whoever waits for it or watches it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::problem::Problem;
use super::store::{New, State, now};
use crate::diffusion::cost::Units;
use crate::engine::CancelToken;

/// Events kept for watchers that come late or come back.
const EVENTS: usize = 1024;
/// How long an ended generation's events are kept.
const REPLAY: Duration = Duration::from_secs(60);
/// The most ended generations whose events are kept.
const ENDED: usize = 256;

/// Who stopped a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoppedBy {
    /// The client left before its answer.
    Leaving,
    /// A request to cancel it.
    Request,
    /// The server, which is ending.
    Shutdown,
}

/// In which state a synchronous generation was when its client left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Queued,
    Running,
}

/// One event of a generation, as it is sent.
#[derive(Clone, Debug)]
pub struct Event {
    /// Counts without gaps: from 1, or from far above what an earlier process has counted.
    pub id: u64,
    pub name: &'static str,
    /// JSON in one line.
    pub data: Arc<str>,
}

/// How a generation ended.
#[derive(Clone, Debug)]
pub enum End {
    Completed(Done),
    Problem(Problem),
}

/// A finished generation.
#[derive(Clone, Debug)]
pub struct Done {
    /// The answer's JSON with images as addresses only.
    pub linked: Arc<str>,
    /// The same with the images' bytes, while somebody waits for it.
    pub inline: Option<Arc<[u8]>>,
    pub queue_seconds: f64,
    pub seconds: f64,
}

struct Inner {
    state: State,
    events: VecDeque<Event>,
    next: u64,
    waiters: usize,
    stopped_by: Option<StoppedBy>,
    stopped_at: Option<Instant>,
    /// When something was heard of it last.
    heard: Instant,
    end: Option<(End, Instant)>,
}

impl Inner {
    fn append(&mut self, name: &'static str, data: Arc<str>) {
        let id = self.next;
        self.next += 1;
        self.heard = Instant::now();
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { id, name, data });
    }
}

/// A generation from its acceptance to a while after its end.
pub struct Live {
    pub id: String,
    /// What was asked for, by whom, and its plan.
    pub new: New,
    /// It outlives its client and this process.
    pub durable: bool,
    pub cancel: CancelToken,
    /// U-Net forwards done so far.
    pub spent_f: AtomicU64,
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

impl Live {
    #[must_use]
    pub fn new(new: New, durable: bool) -> Arc<Self> {
        Self::counting_from(1, new, durable)
    }

    /// One that an earlier process accepted. The ids of its events begin above those of every
    /// process before this one, as fewer than a million are sent in a second.
    #[must_use]
    pub fn resumed(new: New) -> Arc<Self> {
        let seconds = u64::try_from(now() / 1000).unwrap_or(0);
        Self::counting_from(1 + (seconds << 20), new, true)
    }

    fn counting_from(next: u64, new: New, durable: bool) -> Arc<Self> {
        let deadline = new.request.deadline_ms.and_then(|ms| new.instant_of(ms));
        Arc::new(Self {
            id: new.id.clone(),
            new,
            durable,
            cancel: deadline.map_or_else(CancelToken::default, CancelToken::until),
            spent_f: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                state: State::Queued,
                events: VecDeque::new(),
                next,
                waiters: 0,
                stopped_by: None,
                stopped_at: None,
                heard: Instant::now(),
                end: None,
            }),
            changed: watch::Sender::new(()),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Each change is complete before anything can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells watchers that something happened.
    pub fn push(&self, name: &'static str, data: &Value) {
        self.inner().append(name, data.to_string().into());
        self.changed.send_replace(());
    }

    /// A thread begins with it.
    pub fn started(&self, queue_seconds: f64) {
        let mut inner = self.inner();
        inner.state = State::Running;
        inner.heard = Instant::now();
        drop(inner);
        self.push("started", &json!({ "queue_seconds": queue_seconds }));
    }

    /// What it has spent, and of how much.
    pub fn spent(&self, spent: Units, planned: Units) {
        self.spent_f.store(spent.f, Ordering::Relaxed);
        self.push("step", &json!({ "spent": spent, "planned": planned }));
    }

    /// Ends it and wakes whoever waits. Only the first end counts.
    pub fn end(&self, end: End) {
        let mut inner = self.inner();
        if inner.end.is_some() {
            return;
        }
        let (state, name, data) = match &end {
            End::Completed(done) => (State::Completed, "completed", Arc::clone(&done.linked)),
            End::Problem(problem) => {
                let state = problem.state();
                (state, state.name(), problem.to_json().to_string().into())
            }
        };
        inner.state = state;
        let end = match end {
            End::Completed(done) if inner.waiters == 0 => {
                End::Completed(Done { inline: None, ..done })
            }
            other => other,
        };
        // With its event, so that nobody sees the one without the other.
        inner.append(name, data);
        inner.end = Some((end, Instant::now()));
        drop(inner);
        self.changed.send_replace(());
    }

    /// This process does no more for it: whoever waits is told `problem`, and streams end without
    /// an end of the generation, which the next process goes on with.
    pub fn postpone(&self, problem: Problem) {
        let mut inner = self.inner();
        if inner.end.is_none() {
            inner.state = State::Queued;
            inner.end = Some((End::Problem(problem), Instant::now()));
        }
        drop(inner);
        self.changed.send_replace(());
    }

    /// Asks its thread to stop; the first who asks is remembered.
    pub fn stop(&self, by: StoppedBy) {
        let mut inner = self.inner();
        inner.stopped_by.get_or_insert(by);
        inner.stopped_at.get_or_insert_with(Instant::now);
        drop(inner);
        self.cancel.cancel();
    }

    #[must_use]
    pub fn stopped_by(&self) -> Option<StoppedBy> {
        self.inner().stopped_by
    }

    /// When its thread was told to stop: asked to, or by its deadline.
    #[must_use]
    pub fn told_at(&self) -> Option<Instant> {
        let asked = self.inner().stopped_at;
        asked.or(self.cancel.deadline())
    }

    /// How long nothing has been heard of it, while it runs.
    #[must_use]
    pub fn silence(&self) -> Duration {
        let inner = self.inner();
        if inner.state == State::Running { inner.heard.elapsed() } else { Duration::ZERO }
    }

    #[must_use]
    pub fn state(&self) -> State {
        self.inner().state
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        self.inner().end.as_ref().map(|(end, _)| end.clone())
    }

    /// Whether anybody wants the images' bytes with the answer.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.inner().waiters > 0
    }

    /// The events after `last` that are still kept, and whether none will follow.
    #[must_use]
    pub fn after(&self, last: u64) -> (Vec<Event>, bool) {
        let inner = self.inner();
        let events: Vec<_> = inner.events.iter().filter(|e| e.id > last).cloned().collect();
        (events, inner.end.is_some())
    }

    /// Sees every later change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Waits for its end.
    pub async fn over(&self) -> End {
        let mut changed = self.watch();
        loop {
            if let Some(end) = self.ended() {
                return end;
            }
            // The sender lives as long as this.
            let _ = changed.changed().await;
        }
    }

    /// Waits for its end, with the bytes of its images.
    #[must_use]
    pub fn wait(self: &Arc<Self>) -> Waiter {
        self.inner().waiters += 1;
        Waiter(Arc::clone(self))
    }
}

/// Somebody who waits for a generation's end.
pub struct Waiter(Arc<Live>);

impl Waiter {
    pub async fn end(&self) -> End {
        self.0.over().await
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut inner = self.0.inner();
        inner.waiters -= 1;
        if inner.waiters == 0
            && let Some((End::Completed(done), _)) = &mut inner.end
        {
            done.inline = None;
        }
    }
}

/// All generations of this process, by id.
#[derive(Default)]
pub struct Lives(Mutex<BTreeMap<String, Arc<Live>>>);

impl Lives {
    fn map(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Live>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn get(&self, id: &str) -> Option<Arc<Live>> {
        self.map().get(id).cloned()
    }

    /// Takes an id for a new generation; the one that has it, if there is one.
    pub fn claim(&self, live: &Arc<Live>) -> Result<(), Arc<Live>> {
        let mut map = self.map();
        forget_old(&mut map);
        if let Some(there) = map.get(&live.id) {
            return Err(Arc::clone(there));
        }
        map.insert(live.id.clone(), Arc::clone(live));
        Ok(())
    }

    /// Gives the id of a generation back that came to nothing.
    pub fn release(&self, live: &Arc<Live>) {
        let mut map = self.map();
        if map.get(&live.id).is_some_and(|there| Arc::ptr_eq(there, live)) {
            map.remove(&live.id);
        }
    }
}

fn forget_old(map: &mut BTreeMap<String, Arc<Live>>) {
    let ended = |live: &Live| live.inner().end.as_ref().map(|(_, at)| *at);
    let mut all: Vec<(Instant, String)> =
        map.values().filter_map(|live| Some((ended(live)?, live.id.clone()))).collect();
    all.sort();
    // The youngest first.
    for (index, (at, id)) in all.into_iter().rev().enumerate() {
        if at.elapsed() > REPLAY || index >= ENDED {
            map.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::problem::Kind;

    fn live(id: &str) -> Arc<Live> {
        Live::new(New::example(id, 0), true)
    }

    fn done() -> Done {
        Done {
            linked: "{}".into(),
            inline: Some(Arc::from(&b"{}"[..])),
            queue_seconds: 0.0,
            seconds: 0.1,
        }
    }

    #[test]
    fn events_are_numbered_and_the_newest_are_kept() {
        let live = live("a");
        for i in 0..EVENTS as u64 + 10 {
            live.spent(Units { f: i, ..Units::default() }, Units::default());
        }
        let (events, ended) = live.after(0);
        assert_eq!((events.len(), events[0].id, ended), (EVENTS, 11, false));
        assert_eq!(live.after(EVENTS as u64 + 8).0.len(), 2);
        live.end(End::Completed(done()));
        let (last, ended) = live.after(EVENTS as u64 + 10);
        assert_eq!((last.len(), last[0].name, ended), (1, "completed", true));
    }

    #[test]
    fn only_the_first_end_counts() {
        let live = live("a");
        live.end(End::Problem(Problem::new(Kind::Internal, "first")));
        live.end(End::Completed(done()));
        assert_eq!(live.state(), State::Failed);
        assert_eq!(live.after(0).0.len(), 1);
    }

    #[test]
    fn who_stops_it_first_is_remembered() {
        let live = live("a");
        live.stop(StoppedBy::Request);
        live.stop(StoppedBy::Shutdown);
        assert_eq!(live.stopped_by(), Some(StoppedBy::Request));
        assert!(live.cancel.is_cancelled());
        live.end(End::Problem(Problem::new(Kind::Cancelled, "asked to")));
        assert_eq!(live.state(), State::Cancelled);
    }

    #[tokio::test]
    async fn bytes_are_kept_only_while_somebody_waits() {
        let alone = live("a");
        alone.end(End::Completed(done()));
        assert!(matches!(alone.ended(), Some(End::Completed(d)) if d.inline.is_none()));
        let live = live("b");
        let waiter = live.wait();
        live.end(End::Completed(done()));
        assert!(matches!(waiter.end().await, End::Completed(d) if d.inline.is_some()));
        drop(waiter);
        assert!(matches!(live.ended(), Some(End::Completed(d)) if d.inline.is_none()));
    }

    #[test]
    fn an_id_is_taken_once() {
        let lives = Lives::default();
        let first = live("a");
        assert!(lives.claim(&first).is_ok());
        assert!(lives.claim(&live("a")).is_err());
        lives.release(&live("a"));
        assert!(lives.get("a").is_some(), "another one's");
        lives.release(&first);
        assert!(lives.get("a").is_none());
        for i in 0..ENDED + 5 {
            let other = live(&format!("e{i}"));
            lives.claim(&other).unwrap_or_else(|_| panic!("taken"));
            other.end(End::Completed(done()));
        }
        lives.claim(&first).unwrap_or_else(|_| panic!("taken"));
        assert_eq!(lives.map().len(), ENDED + 1);
        assert!(lives.get("e0").is_none(), "the oldest goes first");
    }
}
