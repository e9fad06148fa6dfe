//! Predictions of several trajectories in one batch, step by step: whoever needs a prediction
//! while others of the same network do too goes with them. Every row keeps its own timestep and
//! conditioning, and rows do not influence each other.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::denoiser::{Conditioning, Denoiser};
use super::sparing::{RowLimit, SparingDenoiser};
use crate::{Error, Result};

/// Of the seconds that the last batch took, the part that the next one waits for trajectories
/// which are between two predictions.
const PATIENCE: u32 = 4;
/// The most that it waits: a trajectory may be busy with something longer than a step.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// Where the trajectories of one network and latent shape meet.
pub struct Junction {
    network: Box<dyn Denoiser>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Trajectories under way.
    members: usize,
    waiting: Vec<Call>,
    /// Whether a batch is being put together or runs.
    busy: bool,
    /// What the last batch took.
    last: Duration,
}

/// What one trajectory wants predicted.
struct Call {
    x: Tensor,
    t: Tensor,
    cond: Vec<Conditioning>,
    slot: Arc<Slot>,
}

/// Where a call's outcome is left.
#[derive(Default)]
struct Slot(Mutex<Option<Outcome>>);

enum Outcome {
    /// The prediction, and the rows and calls of its batch.
    Done(Tensor, usize, usize),
    Failed(Error),
    /// A batch of several failed, perhaps because of another's rows.
    Alone,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Junction {
    pub fn new(network: impl Denoiser + 'static) -> Arc<Self> {
        let network = Box::new(network);
        Arc::new(Self { network, state: Mutex::default(), changed: Condvar::new() })
    }

    /// A trajectory that goes with others in batches of at most `most_rows` rows.
    pub fn member(self: &Arc<Self>, most_rows: usize) -> Member {
        self.lock().members += 1;
        Member { junction: Arc::clone(self), most_rows, seen: Seen::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Predicts all rows, fewer at a time where memory is short.
    fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor> {
        let limit = RowLimit::default();
        SparingDenoiser::new(self.network.as_ref(), &limit).predict(x, t, cond)
    }
}

/// How often a trajectory's predictions went with others'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Together {
    /// Predictions.
    pub calls: u64,
    /// Those that went with others'.
    pub joint: u64,
    /// The most rows of one batch, others' counted.
    pub most_rows: usize,
}

#[derive(Default)]
struct Seen {
    calls: AtomicU64,
    joint: AtomicU64,
    most_rows: AtomicUsize,
}

/// One trajectory at a [`Junction`]; it leaves when it is dropped.
pub struct Member {
    junction: Arc<Junction>,
    most_rows: usize,
    seen: Seen,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.junction.lock().members -= 1;
        self.junction.changed.notify_all();
    }
}

impl Member {
    pub fn together(&self) -> Together {
        Together {
            calls: self.seen.calls.load(Ordering::Relaxed),
            joint: self.seen.joint.load(Ordering::Relaxed),
            most_rows: self.seen.most_rows.load(Ordering::Relaxed),
        }
    }

    /// Waits for the batch that has our rows; puts it together and runs it when nobody else does.
    fn wait(&self, slot: &Slot) -> Outcome {
        let junction = &*self.junction;
        let mut state = junction.lock();
        loop {
            if let Some(outcome) = slot.lock().take() {
                return outcome;
            }
            if state.busy {
                state = junction.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.busy = true;
            let calls = self.gather(state);
            Batch { junction, calls, start: Instant::now() }.run();
            state = junction.lock();
        }
    }

    /// The next batch: what waits, in the order of coming, as far as there is room.
    fn gather(&self, mut state: MutexGuard<'_, State>) -> Vec<Call> {
        let until = Instant::now() + (state.last / PATIENCE).min(LONGEST_WAIT);
        let rows = |state: &State| state.waiting.iter().map(|c| c.cond.len()).sum::<usize>();
        while state.waiting.len() < state.members && rows(&state) < self.most_rows {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.junction.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let (mut room, mut count) = (self.most_rows, 0);
        for call in &state.waiting {
            // The first goes even when it alone is more.
            if call.cond.len() > room && count > 0 {
                break;
            }
            room = room.saturating_sub(call.cond.len());
            count += 1;
        }
        state.waiting.drain(..count).collect()
    }
}

impl Denoiser for Member {
    fn device(&self) -> &Device {
        self.junction.network.device()
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        self.junction.network.latent_shape(width, height)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor> {
        let rows = x.dim(0)?;
        if cond.len() != rows || t.dims() != [rows] {
            let message = format!(
                "{} conditionings and {:?} timesteps for {rows} rows",
                cond.len(),
                t.dims()
            );
            return Err(Error::invalid("conditioning", message));
        }
        let slot = Arc::new(Slot::default());
        let owned = cond.iter().map(|c| (*c).clone()).collect();
        let call = Call { x: x.clone(), t: t.clone(), cond: owned, slot: Arc::clone(&slot) };
        self.junction.lock().waiting.push(call);
        self.junction.changed.notify_all();
        self.seen.calls.fetch_add(1, Ordering::Relaxed);
        match self.wait(&slot) {
            Outcome::Done(prediction, rows, calls) => {
                self.seen.joint.fetch_add(u64::from(calls > 1), Ordering::Relaxed);
                self.seen.most_rows.fetch_max(rows, Ordering::Relaxed);
                Ok(prediction)
            }
            Outcome::Failed(error) => Err(error),
            Outcome::Alone => self.junction.predict(x, t, cond),
        }
    }
}

/// Calls that go together. When it ends, in whatever way, nobody waits for it any longer.
struct Batch<'a> {
    junction: &'a Junction,
    calls: Vec<Call>,
    start: Instant,
}

impl Batch<'_> {
    fn run(self) {
        let predicted = self.predict();
        let rows = self.calls.iter().map(|call| call.cond.len()).sum();
        let count = self.calls.len();
        match predicted {
            Ok(parts) => {
                for (call, part) in self.calls.iter().zip(parts) {
                    *call.slot.lock() = Some(Outcome::Done(part, rows, count));
                }
            }
            // Of several, each is told to go alone as this is dropped.
            Err(error) => match self.calls.as_slice() {
                [only] => *only.slot.lock() = Some(Outcome::Failed(error)),
                _ => tracing::debug!(rows, %error, "a joint prediction failed"),
            },
        }
    }

    fn predict(&self) -> Result<Vec<Tensor>> {
        let cond: Vec<&Conditioning> = self.calls.iter().flat_map(|call| &call.cond).collect();
        if let [only] = self.calls.as_slice() {
            return Ok(vec![self.junction.predict(&only.x, &only.t, &cond)?]);
        }
        let join = |of: fn(&Call) -> &Tensor| {
            Tensor::cat(&self.calls.iter().map(of).collect::<Vec<_>>(), 0)
        };
        let (x, t) = (join(|call| &call.x)?, join(|call| &call.t)?);
        let all = self.junction.predict(&x, &t, &cond)?;
        let mut start = 0;
        let part = |call: &Call| {
            let rows = call.cond.len();
            start += rows;
            Ok(all.narrow(0, start - rows, rows)?.contiguous()?)
        };
        self.calls.iter().map(part).collect()
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        for call in &self.calls {
            // A slot that was emptied already is nobody's any more.
            call.slot.lock().get_or_insert(Outcome::Alone);
        }
        let mut state = self.junction.lock();
        state.last = self.start.elapsed();
        state.busy = false;
        drop(state);
        self.junction.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::thread;

    use candle_core::DType;

    use super::*;
    use crate::diffusion::denoiser::TextCond;

    /// 2 x + t, slowly; knows the most rows it had, and dislikes some timesteps.
    struct Slow(Arc<AtomicUsize>);

    const BAD: f32 = -1.0;
    const DEADLY: f32 = -2.0;

    impl Denoiser for Slow {
        fn device(&self) -> &Device {
            &Device::Cpu
        }

        fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
            Ok((1, height as usize, width as usize))
        }

        fn predict(&self, x: &Tensor, t: &Tensor, _: &[&Conditioning]) -> Result<Tensor> {
            thread::sleep(Duration::from_millis(4));
            let times = t.to_vec1::<f32>()?;
            self.0.fetch_max(times.len(), Ordering::Relaxed);
            assert!(!times.contains(&DEADLY), "deadly");
            if times.contains(&BAD) {
                return Err(Error::invalid("t", "bad"));
            }
            Ok(x.affine(2.0, 0.0)?.broadcast_add(&t.reshape((times.len(), 1, 1, 1))?)?)
        }
    }

    fn conditioning() -> Result<Conditioning> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let text = TextCond { context: zeros(&[1, 1])?, pooled: zeros(&[1])?, time_ids: [0.0; 6] };
        Ok(Conditioning::plain(text))
    }

    /// A trajectory of `steps` steps with `rows` rows each.
    fn walk(member: &Member, number: usize, rows: usize, steps: usize) -> Result<Vec<f32>> {
        let cond = conditioning()?;
        let conds = vec![&cond; rows];
        let mut seen = Vec::new();
        for step in 0..steps {
            let t = vec![(number * 100 + step) as f32; rows];
            let x = Tensor::full((number + step) as f32, (rows, 1, 2, 2), &Device::Cpu)?;
            let y = member.predict(&x, &Tensor::new(t, &Device::Cpu)?, &conds)?;
            assert_eq!(y.dims(), [rows, 1, 2, 2]);
            seen.extend(y.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(seen)
    }

    #[test]
    fn trajectories_go_together_and_find_what_they_find_alone() -> Result<()> {
        let most = Arc::new(AtomicUsize::new(0));
        let junction = Junction::new(Slow(Arc::clone(&most)));
        let members: Vec<Member> = (0..4).map(|_| junction.member(5)).collect();
        let found = thread::scope(|scope| {
            let start = |(i, member)| scope.spawn(move || walk(member, i, 1 + i % 2, 12));
            let threads: Vec<_> = members.iter().enumerate().map(start).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect::<Result<Vec<_>>>()
        })?;
        let joint: u64 = members.iter().map(|m| m.together().joint).sum();
        assert!(joint > 0, "all went alone");
        assert!((2..=5).contains(&most.load(Ordering::Relaxed)), "within the limit");
        drop(members);
        for (i, found) in found.into_iter().enumerate() {
            let alone = junction.member(5);
            assert_eq!(found, walk(&alone, i, 1 + i % 2, 12)?);
            let calls = Together { calls: 12, joint: 0, most_rows: 1 + i % 2 };
            assert_eq!(alone.together(), calls);
        }
        Ok(())
    }

    /// What a thread came to, if it did not panic.
    type Ended<T> = thread::Result<Result<T>>;

    /// Two trajectories, of which the first asks for a timestep that the network dislikes.
    fn beside(timestep: f32) -> Result<(Ended<Tensor>, Ended<Vec<f32>>)> {
        let junction = Junction::new(Slow(Arc::default()));
        let (bad, good) = (junction.member(8), junction.member(8));
        let cond = conditioning()?;
        let x = Tensor::zeros((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
        let t = Tensor::new(&[timestep], &Device::Cpu)?;
        Ok(thread::scope(|scope| {
            let other = scope.spawn(|| walk(&good, 1, 1, 8));
            thread::sleep(Duration::from_millis(6));
            let outcome = catch_unwind(AssertUnwindSafe(|| bad.predict(&x, &t, &[&cond])));
            drop(bad);
            (outcome, other.join())
        }))
    }

    #[test]
    fn who_fails_fails_alone() -> Result<()> {
        let (failed, other) = beside(BAD)?;
        assert_eq!(failed.unwrap().unwrap_err().to_string(), "t: bad");
        assert_eq!(other.unwrap()?.len(), 32);
        Ok(())
    }

    #[test]
    fn a_panic_leaves_nobody_waiting() -> Result<()> {
        let (failed, other) = beside(DEADLY)?;
        assert!(failed.is_err());
        // Whoever ran a batch with both falls, too.
        if let Ok(found) = other {
            assert_eq!(found?.len(), 32);
        }
        Ok(())
    }

    #[test]
    fn a_call_that_does_not_fit_itself_is_refused() -> Result<()> {
        let junction = Junction::new(Slow(Arc::default()));
        let cond = conditioning()?;
        let x = Tensor::zeros((2, 1, 2, 2), DType::F32, &Device::Cpu)?;
        let t = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
        let error = junction.member(8).predict(&x, &t, &[&cond]).unwrap_err();
        assert!(error.to_string().starts_with("conditioning: 1 "), "{error}");
        Ok(())
    }
}
