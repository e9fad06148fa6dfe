//! The bounded queue between HTTP threads and generation threads. It admits
//! work by its planned U-Net forwards, because one search can cost a hundred
//! times a plain image, and shares them fairly between clients.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fair::Fair;
use super::live::Live;
use super::problem::{Kind, Problem};

/// How long to wait for a change where nothing else ends the waiting.
const LONG: Duration = Duration::from_secs(3600);

/// One admitted request.
pub struct Job {
    pub live: Arc<Live>,
    pub enqueued: Instant,
}

impl Job {
    fn planned_f(&self) -> u64 {
        self.live.new.planned.cost.f
    }
}

struct Active {
    planned_f: u64,
    live: Arc<Live>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    running: BTreeMap<String, Active>,
    fair: Fair,
    /// Nothing more is admitted.
    closed: bool,
    /// Workers end once nothing waits.
    finished: bool,
    /// Measured, averaged over recent generations.
    seconds_per_f: Option<f64>,
}

impl State {
    fn running_f(&self) -> u64 {
        let left = |active: &Active| {
            active.planned_f.saturating_sub(active.live.spent_f.load(Ordering::Relaxed))
        };
        self.running.values().map(left).fold(0, u64::saturating_add)
    }

    fn backlog_f(&self) -> u64 {
        self.waiting.iter().map(Job::planned_f).fold(self.running_f(), u64::saturating_add)
    }

    /// Clients and planned forwards of what waits.
    fn planned(&self) -> Vec<(&str, u64)> {
        self.waiting.iter().map(|job| (job.live.new.client.as_str(), job.planned_f())).collect()
    }

    fn take_next(&mut self) -> Option<Job> {
        let at = self.fair.next(self.waiting.iter().map(|job| job.live.new.client.as_str()))?;
        let job = self.waiting.remove(at)?;
        self.fair.begin(&job.live.new.client, job.planned_f());
        Some(job)
    }
}

/// A reading of the queue for metrics and answers.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    pub waiting: usize,
    pub running: usize,
    /// Planned U-Net forwards of waiting work and the rest of running work.
    pub backlog_f: u64,
    pub seconds_per_f: Option<f64>,
    /// When the present backlog will be done, from measured speed.
    pub retry_after: u64,
    /// No more is admitted until something is done.
    pub full: bool,
}

/// What comes before a request.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, utoipa::ToSchema)]
pub struct Ahead {
    /// Requests that begin earlier and have not begun yet.
    pub position: usize,
    /// U-Net forwards until it begins, with one generation thread.
    pub f: u64,
    /// Seconds until it begins, once the machine's speed has been measured.
    pub seconds: Option<f64>,
}

pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    max_waiting: usize,
    max_f: u64,
    workers: usize,
}

impl Queue {
    pub fn new(max_waiting: usize, max_f: u64, workers: usize) -> Self {
        let state = Mutex::new(State::default());
        Self { state, changed: Condvar::new(), max_waiting, max_f, workers }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits planned requests, all or none, or says when to come back.
    pub fn push(&self, lives: Vec<Arc<Live>>) -> Result<(), Problem> {
        let mut state = self.lock();
        if state.closed {
            return Err(Problem::new(Kind::Draining, "no new work is accepted").retry_after(10));
        }
        let backlog = state.backlog_f();
        let planned = lives.iter().map(|live| live.new.planned.cost.f).fold(0, u64::saturating_add);
        let full = state.waiting.len() + state.running.len() + lives.len() > self.places();
        let heavy = backlog > 0 && backlog.saturating_add(planned) > self.max_f;
        if full || heavy {
            let stats = self.stats_of(&state);
            let seconds = stats.retry_after;
            return Err(Problem::new(
                Kind::QueueFull,
                format!(
                    "{} requests wait and {} run, {backlog} U-Net forwards in all; this request \
                     plans {planned}; try again in about {seconds} s",
                    stats.waiting, stats.running
                ),
            )
            .retry_after(seconds));
        }
        for live in lives {
            state.waiting.push_back(Job { live, enqueued: Instant::now() });
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Work on its way to an idle thread does not count as waiting.
    fn places(&self) -> usize {
        self.max_waiting + self.workers
    }

    /// Takes up again what was admitted before this process began, whatever waits.
    pub fn restore(&self, live: Arc<Live>) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        state.waiting.push_back(Job { live, enqueued: Instant::now() });
        drop(state);
        self.changed.notify_all();
    }

    /// What runs.
    pub fn running(&self) -> Vec<Arc<Live>> {
        self.lock().running.values().map(|active| Arc::clone(&active.live)).collect()
    }

    /// Blocks for the next job; `None` when the server ends.
    pub fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.take_next() {
                let active = Active { planned_f: job.planned_f(), live: Arc::clone(&job.live) };
                state.running.insert(job.live.id.clone(), active);
                return Some(job);
            }
            if state.finished {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Blocks until the deadlines of waiting jobs have passed, and takes these out; `None` when
    /// the server ends.
    pub fn overdue(&self) -> Option<Vec<Job>> {
        let mut state = self.lock();
        while !state.finished {
            let now = Instant::now();
            let late = |job: &Job| job.live.cancel.deadline().is_some_and(|at| at <= now);
            if state.waiting.iter().any(late) {
                let (late, rest): (Vec<_>, Vec<_>) = state.waiting.drain(..).partition(late);
                state.waiting = rest.into();
                drop(state);
                self.changed.notify_all();
                return Some(late);
            }
            let next = state.waiting.iter().filter_map(|job| job.live.cancel.deadline()).min();
            let wait = next.map_or(LONG, |at| at.saturating_duration_since(now));
            state =
                self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    /// A worker is done with a job.
    pub fn finish(&self, id: &str) {
        self.lock().running.remove(id);
        self.changed.notify_all();
    }

    /// Takes a job out that has not begun.
    pub fn take(&self, id: &str) -> Option<Job> {
        let mut state = self.lock();
        let at = state.waiting.iter().position(|job| job.live.id == id)?;
        let job = state.waiting.remove(at);
        drop(state);
        self.changed.notify_all();
        job
    }

    /// Learns the machine's speed from a generation that spent `f` forwards.
    pub fn measure(&self, seconds: f64, f: u64) {
        if f == 0 || !seconds.is_finite() {
            return;
        }
        let measured = seconds / f as f64;
        let mut state = self.lock();
        state.seconds_per_f =
            Some(state.seconds_per_f.map_or(measured, |old| 0.7 * old + 0.3 * measured));
    }

    /// What comes before a waiting job; `None` when it does not wait.
    pub fn ahead(&self, id: &str) -> Option<Ahead> {
        let state = self.lock();
        let index = state.waiting.iter().position(|job| job.live.id == id)?;
        Some(self.ahead_among(&state, &state.planned(), index))
    }

    /// What would come before a request of `client` that plans `f` forwards.
    pub fn ahead_of_new(&self, client: &str, f: u64) -> Ahead {
        let state = self.lock();
        let (mut all, index) = (state.planned(), state.waiting.len());
        all.push((client, f));
        self.ahead_among(&state, &all, index)
    }

    /// What would come before each of several requests of `client` that are admitted together: the
    /// ones before it as well.
    pub fn ahead_of_each(&self, client: &str, planned: &[u64]) -> Vec<Ahead> {
        let state = self.lock();
        let (mut all, first) = (state.planned(), state.waiting.len());
        all.extend(planned.iter().map(|&f| (client, f)));
        (first..all.len()).map(|index| self.ahead_among(&state, &all, index)).collect()
    }

    /// What comes before one of `all` that wait or would wait.
    fn ahead_among(&self, state: &State, all: &[(&str, u64)], index: usize) -> Ahead {
        let order = state.fair.order(all);
        let position = order.iter().take_while(|&&i| i != index).count();
        let before = order[..position].iter().map(|&i| all[i].1);
        let f = before.fold(state.running_f(), u64::saturating_add);
        let idle = position == 0 && state.running.len() < self.workers;
        let f = if idle { 0 } else { f };
        let seconds = state.seconds_per_f.map(|each| f as f64 * each / self.workers as f64);
        Ahead { position, f, seconds }
    }

    fn stats_of(&self, state: &State) -> Stats {
        let backlog_f = state.backlog_f();
        let seconds = match state.seconds_per_f {
            Some(each) => backlog_f as f64 * each / self.workers as f64,
            None => 5.0,
        };
        Stats {
            waiting: state.waiting.len(),
            running: state.running.len(),
            backlog_f,
            seconds_per_f: state.seconds_per_f,
            retry_after: seconds.ceil().clamp(1.0, 600.0) as u64,
            full: state.waiting.len() + state.running.len() >= self.places()
                || backlog_f >= self.max_f,
        }
    }

    pub fn stats(&self) -> Stats {
        self.stats_of(&self.lock())
    }

    /// Admits nothing more. What clients wait for still runs; what outlives the process and has
    /// not begun is taken out.
    pub fn close(&self) -> Vec<Job> {
        let mut state = self.lock();
        state.closed = true;
        let (later, now): (Vec<_>, Vec<_>) =
            state.waiting.drain(..).partition(|job| job.live.durable);
        state.waiting = now.into();
        drop(state);
        self.changed.notify_all();
        later
    }

    /// Waits until nothing waits or runs; false when time is up first.
    pub fn wait_idle(&self, at_most: Duration) -> bool {
        let state = self.lock();
        let busy = |state: &mut State| !state.waiting.is_empty() || !state.running.is_empty();
        let (_state, timeout) = self
            .changed
            .wait_timeout_while(state, at_most, busy)
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }

    /// Takes everything out that waits, and gives what runs to `stop`.
    pub fn abort(&self, stop: impl Fn(&Live)) -> Vec<Job> {
        let mut state = self.lock();
        let waiting = state.waiting.drain(..).collect();
        for active in state.running.values() {
            stop(&active.live);
        }
        drop(state);
        self.changed.notify_all();
        waiting
    }

    /// Lets the workers end.
    pub fn end(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.finished = true;
        drop(state);
        self.changed.notify_all();
    }
}
