//! Which examples make each batch.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// An endless sequence of batches. In an epoch every example comes once, in an order of that
/// epoch; a batch lies within one bucket, so that a bucket's last one may be smaller.
#[derive(Debug)]
pub struct Batches {
    /// The examples of each bucket.
    buckets: Vec<Vec<usize>>,
    batch: usize,
    seed: u64,
    per_epoch: u64,
    /// The batches of the epoch that was asked for last.
    epoch: Mutex<Option<(u64, Vec<Vec<usize>>)>>,
}

impl Batches {
    /// Of examples 0, 1, … with these buckets, in batches of at most `batch`.
    ///
    /// # Errors
    /// When there is no example, or `batch` is 0.
    pub fn new(
        buckets: impl IntoIterator<Item = (u32, u32)>,
        batch: usize,
        seed: u64,
    ) -> Result<Self> {
        if batch == 0 {
            return Err(Error::invalid("batch", "must be positive"));
        }
        let mut grouped: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for (i, bucket) in buckets.into_iter().enumerate() {
            grouped.entry(bucket).or_default().push(i);
        }
        if grouped.is_empty() {
            return Err(Error::invalid("images", "at least one example is needed"));
        }
        let buckets: Vec<_> = grouped.into_values().collect();
        let per_epoch = buckets.iter().map(|b| b.len().div_ceil(batch) as u64).sum();
        Ok(Self { buckets, batch, seed, per_epoch, epoch: Mutex::new(None) })
    }

    /// Batches in an epoch.
    pub fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    /// The examples of batch `step`: the same whatever was asked for before.
    pub fn at(&self, step: u64) -> Vec<usize> {
        let (epoch, place) = (step / self.per_epoch, (step % self.per_epoch) as usize);
        let mut held = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some((of, batches)) if *of == epoch => batches[place].clone(),
            _ => {
                let batches = self.shuffled(epoch);
                let batch = batches[place].clone();
                *held = Some((epoch, batches));
                batch
            }
        }
    }

    fn shuffled(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(epoch);
        let mut batches = Vec::new();
        for bucket in &self.buckets {
            let mut order = bucket.clone();
            order.shuffle(&mut rng);
            batches.extend(order.chunks(self.batch).map(<[usize]>::to_vec));
        }
        batches.shuffle(&mut rng);
        batches
    }
}
