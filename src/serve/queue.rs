//! The bounded queue between HTTP threads and generation threads. It admits
//! work by its planned U-Net forwards, because one search can cost a hundred
//! times a plain image.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::problem::{Kind, Problem};
use super::worker::Done;
use crate::Error;
use crate::engine::{CancelToken, Planned};

/// What a client that waits for a job is told.
pub type Reply = Result<Done, Problem>;

/// One admitted request.
pub struct Job {
    pub id: u64,
    pub planned: Planned,
    pub cancel: CancelToken,
    pub enqueued: Instant,
    /// U-Net forwards done so far.
    pub spent_f: Arc<AtomicU64>,
    pub reply: oneshot::Sender<Reply>,
}

struct Active {
    planned_f: u64,
    spent_f: Arc<AtomicU64>,
    cancel: CancelToken,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    running: BTreeMap<u64, Active>,
    next_id: u64,
    /// Nothing more is admitted.
    closed: bool,
    /// Workers end once nothing waits.
    finished: bool,
    /// Measured, averaged over recent generations.
    seconds_per_f: Option<f64>,
}

impl State {
    fn backlog_f(&self) -> u64 {
        let waiting = self.waiting.iter().map(|job| job.planned.cost.f);
        let running = self
            .running
            .values()
            .map(|active| active.planned_f.saturating_sub(active.spent_f.load(Ordering::Relaxed)));
        waiting.chain(running).fold(0, u64::saturating_add)
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
}

/// In which state a job was when its client left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Queued,
    Running,
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

    /// Admits a planned request, or says when to come back.
    pub fn push(self: &Arc<Self>, planned: Planned) -> Result<Ticket, Problem> {
        let mut state = self.lock();
        if state.closed {
            return Err(Problem::new(Kind::Draining, "no new work is accepted").retry_after(10));
        }
        let backlog = state.backlog_f();
        // Work on its way to an idle thread does not count as waiting.
        let full = state.waiting.len() + state.running.len() >= self.max_waiting + self.workers;
        let heavy = backlog > 0 && backlog.saturating_add(planned.cost.f) > self.max_f;
        if full || heavy {
            let stats = self.stats_of(&state);
            let seconds = stats.retry_after;
            return Err(Problem::new(
                Kind::QueueFull,
                format!(
                    "{} requests wait and {} run, {backlog} U-Net forwards in all; this request \
                     plans {}; try again in about {seconds} s",
                    stats.waiting, stats.running, planned.cost.f
                ),
            )
            .retry_after(seconds));
        }
        let id = state.next_id;
        state.next_id += 1;
        let cancel = CancelToken::default();
        let (reply, receiver) = oneshot::channel();
        let spent_f = Arc::new(AtomicU64::new(0));
        state.waiting.push_back(Job {
            id,
            planned,
            cancel,
            enqueued: Instant::now(),
            spent_f,
            reply,
        });
        drop(state);
        self.changed.notify_all();
        Ok(Ticket { queue: Arc::clone(self), id, receiver, answered: false, on_leave: None })
    }

    /// Blocks for the next job; `None` when the server ends.
    pub fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                let active = Active {
                    planned_f: job.planned.cost.f,
                    spent_f: Arc::clone(&job.spent_f),
                    cancel: job.cancel.clone(),
                };
                state.running.insert(job.id, active);
                return Some(job);
            }
            if state.finished {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A worker is done with a job.
    pub fn finish(&self, id: u64) {
        self.lock().running.remove(&id);
        self.changed.notify_all();
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

    /// The client of a job left: forgets it or tells its worker to stop.
    fn abandon(&self, id: u64) -> Option<Phase> {
        let mut state = self.lock();
        if let Some(at) = state.waiting.iter().position(|job| job.id == id) {
            state.waiting.remove(at);
            drop(state);
            self.changed.notify_all();
            return Some(Phase::Queued);
        }
        let active = state.running.get(&id)?;
        active.cancel.cancel();
        Some(Phase::Running)
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
        }
    }

    pub fn stats(&self) -> Stats {
        self.stats_of(&self.lock())
    }

    /// Admits nothing more; what is in the queue still runs.
    pub fn close(&self) {
        self.lock().closed = true;
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

    /// Answers everything that waits and cancels everything that runs.
    pub fn cancel_all(&self) {
        let mut state = self.lock();
        for job in state.waiting.drain(..) {
            // A client that already left needs no answer.
            let _ = job.reply.send(Err(Problem::from(Error::Cancelled).retry_after(10)));
        }
        for active in state.running.values() {
            active.cancel.cancel();
        }
        drop(state);
        self.changed.notify_all();
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

/// The waiting side of a job. Dropping it before the answer cancels the job.
pub struct Ticket {
    queue: Arc<Queue>,
    id: u64,
    receiver: oneshot::Receiver<Reply>,
    answered: bool,
    on_leave: Option<Box<dyn FnOnce(Phase)>>,
}

impl Ticket {
    /// Runs `then` if the client leaves before the answer.
    pub fn on_leave(&mut self, then: impl FnOnce(Phase) + 'static) {
        self.on_leave = Some(Box::new(then));
    }

    /// Waits for the worker's answer.
    pub async fn answer(mut self) -> Reply {
        let reply = (&mut self.receiver).await;
        self.answered = true;
        reply.unwrap_or_else(|_| Err(Problem::internal("a generation thread dropped its job")))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        if let (Some(phase), Some(then)) = (self.queue.abandon(self.id), self.on_leave.take()) {
            then(phase);
        }
    }
}
