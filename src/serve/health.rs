//! Which part of its life the server is in.

use std::sync::atomic::{AtomicU8, Ordering};

use super::problem::{Kind, Problem};

/// Loading → warming → ready → draining, never backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Life {
    /// Checkpoints are being read.
    Loading,
    /// A first image is being generated.
    Warming,
    Ready,
    /// Finishing accepted work.
    Draining,
}

const LIVES: [Life; 4] = [Life::Loading, Life::Warming, Life::Ready, Life::Draining];

#[derive(Debug, Default)]
pub struct Health(AtomicU8);

impl Health {
    pub fn life(&self) -> Life {
        LIVES[usize::from(self.0.load(Ordering::SeqCst)).min(LIVES.len() - 1)]
    }

    /// Moves on; a later state is never left.
    pub fn advance(&self, to: Life) {
        self.0.fetch_max(to as u8, Ordering::SeqCst);
    }

    /// # Errors
    /// The problem that answers a generation now.
    pub fn check(&self, drain_seconds: u64) -> Result<(), Problem> {
        match self.life() {
            Life::Ready => Ok(()),
            Life::Loading => Err(Problem::new(Kind::NotReady, "loading models").retry_after(5)),
            Life::Warming => {
                Err(Problem::new(Kind::NotReady, "generating a first image").retry_after(5))
            }
            Life::Draining => {
                Err(Problem::new(Kind::Draining, "finishing accepted work; no new work is taken")
                    .retry_after(drain_seconds.clamp(1, 600)))
            }
        }
    }
}
