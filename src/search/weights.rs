//! Arithmetic of choices: the best, softmax weights, effective sample size, resampling.

use rand::Rng;

/// The largest value and its first place; place 0 where all are -inf.
pub fn first_max(values: &[f64]) -> (usize, f64) {
    let mut top = (0, f64::NEG_INFINITY);
    for (i, value) in values.iter().enumerate() {
        if *value > top.1 {
            top = (i, *value);
        }
    }
    top
}

/// Places by descending value, ties by place.
pub fn ranking(values: &[f64]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    places
}

/// exp(v) normalised; uniform where all are -inf, or none is a number.
pub fn softmax(values: &[f64]) -> Vec<f64> {
    let (_, top) = first_max(values);
    if !top.is_finite() {
        return vec![1.0 / values.len() as f64; values.len()];
    }
    let exp: Vec<f64> = values.iter().map(|value| (value - top).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// log(mean(exp(v))); -inf where all are.
pub fn log_mean_exp(values: &[f64]) -> f64 {
    let (_, top) = first_max(values);
    if top == f64::NEG_INFINITY {
        return top;
    }
    let mean = values.iter().map(|value| (value - top).exp()).sum::<f64>() / values.len() as f64;
    top + mean.ln()
}

/// lambda v; -inf where scoring failed, at lambda 0 too.
pub fn scaled(lambda: f64, value: f64) -> f64 {
    if value == f64::NEG_INFINITY { value } else { lambda * value }
}

/// 1 / sum of squared weights, of normalised ones.
pub fn effective_size(weights: &[f64]) -> f64 {
    1.0 / weights.iter().map(|w| w * w).sum::<f64>()
}

/// Systematic resampling: one uniform number, evenly spaced pointers. With uniform weights every
/// place is kept once, in order.
pub fn systematic<R: Rng>(weights: &[f64], rng: &mut R) -> Vec<usize> {
    let n = weights.len();
    let offset: f64 = rng.random();
    let mut places = Vec::with_capacity(n);
    let (mut at, mut sum) = (0, weights.first().copied().unwrap_or_default());
    for pointer in 0..n {
        // Rounding must not take a uniform weight's pointer over its edge.
        let target = (pointer as f64 + offset.clamp(1e-9, 1.0 - 1e-9)) / n as f64;
        while sum < target && at + 1 < n {
            at += 1;
            sum += weights[at];
        }
        places.push(at);
    }
    places
}

/// n independent draws.
pub fn multinomial<R: Rng>(weights: &[f64], rng: &mut R) -> Vec<usize> {
    let draw = |target: f64| {
        let mut sum = 0.0;
        let inside = |w: &f64| {
            sum += w;
            target < sum
        };
        weights.iter().position(inside).unwrap_or(weights.len() - 1)
    };
    let targets: Vec<f64> = weights.iter().map(|_| rng.random()).collect();
    targets.into_iter().map(draw).collect()
}

/// Unbiased standard deviation of the finite values; 0 for fewer than two.
pub fn deviation(values: &[f64]) -> f64 {
    let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    if finite.len() < 2 {
        return 0.0;
    }
    let mean = finite.iter().sum::<f64>() / finite.len() as f64;
    let squares: f64 = finite.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / (finite.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn ties_go_to_the_first_and_failures_never_win() {
        let no = f64::NEG_INFINITY;
        assert_eq!(first_max(&[no, 1.0, 2.0, 2.0]), (2, 2.0));
        assert_eq!(first_max(&[no, no]), (0, no));
        assert_eq!(ranking(&[1.0, 3.0, no, 3.0]), [1, 3, 0, 2]);
        assert_eq!(softmax(&[no, no]), [0.5, 0.5]);
        assert_eq!(softmax(&[no, 1e4]), [0.0, 1.0]);
        assert_eq!(log_mean_exp(&[no, no]), no);
        assert!((log_mean_exp(&[1e4, 1e4 + 2f64.ln()]) - (1e4 + 1.5f64.ln())).abs() < 1e-9);
        assert_eq!(deviation(&[1.0, no, 3.0]), 2f64.sqrt());
        assert_eq!(deviation(&[1.0]), 0.0);
    }

    #[test]
    fn uniform_weights_are_resampled_to_themselves() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for n in 1..40 {
            let weights = vec![1.0 / n as f64; n];
            assert_eq!(systematic(&weights, &mut rng), (0..n).collect::<Vec<_>>());
            assert!((effective_size(&weights) - n as f64).abs() < 1e-9);
        }
    }

    #[test]
    fn resampling_is_unbiased() {
        let weights = [0.1, 0.45, 0.0, 0.25, 0.2];
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for scheme in [systematic::<ChaCha8Rng>, multinomial] {
            let (rounds, mut counts) = (20_000, [0.0; 5]);
            for _ in 0..rounds {
                scheme(&weights, &mut rng).into_iter().for_each(|at| counts[at] += 1.0);
            }
            for (count, weight) in counts.iter().zip(weights) {
                let found = count / (5.0 * f64::from(rounds));
                assert!((found - weight).abs() < 0.01, "{found} is not {weight}");
            }
        }
    }
}
