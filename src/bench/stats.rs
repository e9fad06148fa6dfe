//! Means with bootstrap intervals that resample prompts.
//!
//! Images of one prompt are not independent: the unit that is resampled is the
//! prompt, with all its seeds. One [`Bootstrap`] is shared by every row of a
//! table, so that all rows see the same resampled prompts (paired over prompts).

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Resamples per interval.
pub const REPLICATES: usize = 2_000;

const SEED: u64 = 0x6e66_652d_7377_6565;

/// A mean over all finite values, with a 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub mean: f64,
    /// Percentile bootstrap over prompts; `None` below two prompts.
    pub interval: Option<(f64, f64)>,
    /// Finite values.
    pub n: usize,
    /// Prompts with at least one finite value.
    pub prompts: usize,
}

/// The mean of the finite values; `None` without any.
#[must_use]
pub fn mean(values: &[f64]) -> Option<f64> {
    let (mut sum, mut n) = (0.0, 0usize);
    for value in values.iter().filter(|v| v.is_finite()) {
        sum += value;
        n += 1;
    }
    (n > 0).then(|| sum / n as f64)
}

/// The `q`-quantile of sorted values, linear between order statistics.
#[must_use]
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let position = q.clamp(0.0, 1.0) * last as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (position - below as f64) * (sorted[above] - sorted[below]))
}

/// Which prompts each resample holds: the same for everything estimated with it.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    clusters: usize,
    /// `replicates` rows of `clusters` indices.
    draws: Vec<u32>,
}

impl Bootstrap {
    /// Draws [`REPLICATES`] resamples of `clusters` prompts, the same on every run.
    #[must_use]
    pub fn new(clusters: usize) -> Self {
        Self::keyed(clusters, REPLICATES, SEED)
    }

    /// As [`Bootstrap::new`] with another number of resamples and another key.
    #[must_use]
    pub fn keyed(clusters: usize, replicates: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut draws = Vec::with_capacity(clusters * replicates);
        for replicate in 0..replicates {
            rng.set_stream(replicate as u64);
            rng.set_word_pos(0);
            draws.extend((0..clusters).map(|_| below(rng.next_u64(), clusters)));
        }
        Self { clusters, draws }
    }

    /// The mean over all finite values of `clusters` (one list per prompt) and
    /// its 95% interval; `None` without a finite value.
    ///
    /// # Panics
    /// When `clusters` is not as long as this bootstrap was made for.
    #[must_use]
    pub fn estimate(&self, clusters: &[Vec<f64>]) -> Option<Estimate> {
        assert_eq!(clusters.len(), self.clusters, "one list of values per prompt");
        let sums: Vec<(f64, usize)> = clusters.iter().map(|values| sum_and_count(values)).collect();
        let (sum, n) = sums.iter().fold((0.0, 0), |(s, n), c| (s + c.0, n + c.1));
        if n == 0 {
            return None;
        }
        let prompts = sums.iter().filter(|c| c.1 > 0).count();
        let interval = if prompts < 2 { None } else { self.interval(&sums) };
        Some(Estimate { mean: sum / n as f64, interval, n, prompts })
    }

    fn interval(&self, sums: &[(f64, usize)]) -> Option<(f64, f64)> {
        let mut means: Vec<f64> = self
            .draws
            .chunks_exact(self.clusters)
            .filter_map(|draw| {
                let (sum, n) = draw.iter().fold((0.0, 0), |(s, n), &i| {
                    let cluster = sums[i as usize];
                    (s + cluster.0, n + cluster.1)
                });
                (n > 0).then(|| sum / n as f64)
            })
            .collect();
        means.sort_by(f64::total_cmp);
        Some((quantile(&means, 0.025)?, quantile(&means, 0.975)?))
    }
}

/// A uniform index below `n` from 64 random bits.
fn below(bits: u64, n: usize) -> u32 {
    ((u128::from(bits) * n as u128) >> 64) as u32
}

fn sum_and_count(values: &[f64]) -> (f64, usize) {
    values.iter().filter(|v| v.is_finite()).fold((0.0, 0), |(sum, count), v| (sum + v, count + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(mean(&[1.0, 2.0, 6.0, f64::NAN]), Some(3.0));
        assert_eq!(mean(&[f64::NAN]), None);
        assert_eq!(quantile(&[0.0, 1.0, 2.0, 3.0, 4.0], 0.5), Some(2.0));
        assert_eq!(quantile(&[0.0, 10.0], 0.25), Some(2.5));
        assert_eq!(quantile(&[], 0.5), None);
        // Two prompts, one value each: a resample is {a,a}, {a,b} or {b,b} with
        // 1/4, 1/2, 1/4, so both tails of 2.5% sit on the extremes.
        let e = Bootstrap::new(2).estimate(&[vec![0.0], vec![1.0]]).unwrap();
        assert_eq!((e.mean, e.interval, e.n, e.prompts), (0.5, Some((0.0, 1.0)), 2, 2));
    }

    #[test]
    fn missing_values_are_left_out_and_one_prompt_has_no_interval() {
        let b = Bootstrap::new(3);
        let e = b.estimate(&[vec![1.0, f64::NAN, 3.0], vec![], vec![f64::INFINITY]]).unwrap();
        assert_eq!((e.mean, e.interval, e.n, e.prompts), (2.0, None, 2, 1));
        assert_eq!(b.estimate(&[vec![], vec![f64::NAN], vec![]]), None);
    }

    #[test]
    fn constant_values_have_a_closed_interval_and_reruns_agree() {
        let clusters: Vec<Vec<f64>> = (0..7).map(|_| vec![0.25; 3]).collect();
        let e = Bootstrap::new(7).estimate(&clusters).unwrap();
        assert_eq!(e.interval, Some((0.25, 0.25)));
        let varied: Vec<Vec<f64>> = (0..7).map(|i| vec![f64::from(i) * 0.3; 2]).collect();
        let run = || Bootstrap::new(7).estimate(&varied);
        assert_eq!(run(), run());
    }

    fn normal(rng: &mut ChaCha8Rng) -> f64 {
        let u = |rng: &mut ChaCha8Rng| (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        (-2.0 * (1.0 - u(rng)).ln()).sqrt() * (std::f64::consts::TAU * u(rng)).cos()
    }

    #[test]
    fn intervals_cover_the_truth_when_seeds_of_a_prompt_agree() {
        // Prompt effects of sd 1, seed noise of sd 0.3: resampling images instead
        // of prompts would cover far less than 95%.
        let (prompts, seeds, trials) = (40, 4, 400);
        let bootstrap = Bootstrap::keyed(prompts, 400, 7);
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mut covered = 0;
        for _ in 0..trials {
            let clusters: Vec<Vec<f64>> = (0..prompts)
                .map(|_| {
                    let effect = normal(&mut rng);
                    (0..seeds).map(|_| 2.0 + effect + 0.3 * normal(&mut rng)).collect()
                })
                .collect();
            let (low, high) = bootstrap.estimate(&clusters).unwrap().interval.unwrap();
            covered += usize::from(low <= 2.0 && 2.0 <= high);
        }
        let coverage = covered as f64 / f64::from(trials);
        assert!((0.90..=0.98).contains(&coverage), "{coverage}");
    }
}
