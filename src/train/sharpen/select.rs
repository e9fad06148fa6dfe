//! Which trajectories of a group are learnt from.

use crate::train::settings::Aggregate;

/// The chosen trajectories.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pick {
    pub best: usize,
    pub worst: usize,
    /// The best score less the worst.
    pub gap: f64,
}

/// Why a group is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Skip {
    /// Fewer than two scores are numbers.
    TooFew,
    Tie,
    /// The gap is below the least that is learnt from.
    SmallGap,
}

impl Skip {
    pub fn name(self) -> &'static str {
        match self {
            Self::TooFew => "too_few_scores",
            Self::Tie => "tie",
            Self::SmallGap => "small_gap",
        }
    }
}

/// A trajectory's score from those of its states; NaN where one is none, or there are none.
pub fn aggregate(scores: &[f64], how: Aggregate) -> f64 {
    let sum: f64 = scores.iter().sum();
    match (scores.last(), how) {
        (None, _) => f64::NAN,
        (Some(_), Aggregate::Mean) => sum / scores.len() as f64,
        (Some(_), Aggregate::Sum) => sum,
        (Some(_), Aggregate::Last) if sum.is_nan() => f64::NAN,
        (Some(last), Aggregate::Last) => *last,
    }
}

/// The best and the worst of a group's scores; the first of equals. Those that are not finite
/// are never chosen.
///
/// # Errors
/// Why there is nothing to learn from.
pub fn select(scores: &[f64], min_gap: f64) -> Result<Pick, Skip> {
    let mut finite = scores.iter().copied().enumerate().filter(|(_, s)| s.is_finite());
    let first = finite.next().ok_or(Skip::TooFew)?;
    let (mut best, mut worst, mut count) = (first, first, 1);
    for at in finite {
        count += 1;
        if at.1 > best.1 {
            best = at;
        }
        if at.1 < worst.1 {
            worst = at;
        }
    }
    let gap = best.1 - worst.1;
    if count < 2 {
        Err(Skip::TooFew)
    } else if gap == 0.0 {
        Err(Skip::Tie)
    } else if gap < min_gap {
        Err(Skip::SmallGap)
    } else {
        Ok(Pick { best: best.0, worst: worst.0, gap })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn groups_without_a_preference_are_skipped() {
        assert_eq!(select(&[], 0.0), Err(Skip::TooFew));
        assert_eq!(select(&[1.0], 0.0), Err(Skip::TooFew));
        assert_eq!(select(&[1.0, f64::NAN, f64::INFINITY], 0.0), Err(Skip::TooFew));
        assert_eq!(select(&[2.0, 2.0, 2.0], 0.0), Err(Skip::Tie));
        assert_eq!(select(&[2.0, 2.05], 0.1), Err(Skip::SmallGap));
        let pick = select(&[f64::NAN, 2.0, 3.0, 1.0, 3.0], 0.1);
        assert_eq!(pick, Ok(Pick { best: 2, worst: 3, gap: 2.0 }));
    }

    #[test]
    fn a_trajectory_with_a_failed_score_has_none() {
        let scores = [1.0, f64::NAN, 2.0];
        for how in [Aggregate::Mean, Aggregate::Sum, Aggregate::Last] {
            assert!(aggregate(&scores, how).is_nan() && aggregate(&[], how).is_nan());
        }
        let scores = [1.0, 2.0, 6.0];
        let all = [Aggregate::Mean, Aggregate::Sum, Aggregate::Last];
        assert_eq!(all.map(|how| aggregate(&scores, how)), [3.0, 9.0, 6.0]);
    }

    proptest! {
        /// With as many states in each trajectory, sum and mean choose the same.
        #[test]
        fn sum_and_mean_agree(scores in proptest::collection::vec(
            proptest::collection::vec(-5.0..5.0f64, 3), 2..6)) {
            let of = |how| scores.iter().map(|s| aggregate(s, how)).collect::<Vec<_>>();
            let (mean, sum) = (select(&of(Aggregate::Mean), 0.0), select(&of(Aggregate::Sum), 0.0));
            match (mean, sum) {
                (Ok(a), Ok(b)) => {
                    // Up to rounding: scores that differ by less may swap.
                    let mean = of(Aggregate::Mean);
                    prop_assert!((mean[a.best] - mean[b.best]).abs() < 1e-12);
                    prop_assert!((mean[a.worst] - mean[b.worst]).abs() < 1e-12);
                }
                (a, b) => prop_assert_eq!(a.is_err(), b.is_err()),
            }
        }
    }
}
