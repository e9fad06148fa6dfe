//! What an update learns from, in an order that is a function of the seed and the update.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// An endless sequence of epochs over `len` entries, each in an order of its own.
#[derive(Clone, Debug)]
pub struct Order {
    len: usize,
    seed: u64,
    /// The epoch whose order is known.
    known: Option<(u64, Vec<u32>)>,
}

impl Order {
    /// `len` is at least 1.
    pub fn new(len: usize, seed: u64) -> Self {
        Self { len: len.max(1), seed, known: None }
    }

    /// Entry `position` of the sequence.
    pub fn at(&mut self, position: u64) -> usize {
        let len = self.len as u64;
        let epoch = position / len;
        if self.known.as_ref().is_none_or(|(known, _)| *known != epoch) {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(epoch);
            let mut order: Vec<u32> = (0..self.len as u32).collect();
            order.shuffle(&mut rng);
            self.known = Some((epoch, order));
        }
        let within = (position % len) as usize;
        self.known.as_ref().map_or(0, |(_, order)| order[within] as usize)
    }

    /// The entries of `update`, `batch` of them.
    pub fn batch(&mut self, update: u64, batch: usize) -> Vec<usize> {
        let from = update * batch as u64;
        (from..from + batch as u64).map(|position| self.at(position)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_once_an_epoch_whoever_asks() {
        let mut order = Order::new(7, 3);
        let first: Vec<usize> = (0..14).map(|p| order.at(p)).collect();
        for epoch in first.chunks(7) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..7).collect::<Vec<_>>());
        }
        assert_ne!(first[..7], first[7..]);
        let mut later = Order::new(7, 3);
        assert_eq!(later.at(9), first[9]);
        assert_eq!(later.batch(1, 5), first[5..10]);
        assert_ne!(Order::new(7, 4).batch(0, 7), first[..7]);
    }
}
