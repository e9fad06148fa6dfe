//! The learning rate of an update.

use super::settings::LrSchedule;

/// What the base rate is multiplied with at `update` (from 0) of `updates`: up from 1/w to 1
/// over `warmup` updates, then constant, linear to 0, or half a cosine to 0.
pub fn factor(schedule: LrSchedule, update: u64, warmup: u64, updates: u64) -> f64 {
    if update < warmup {
        return (update + 1) as f64 / warmup as f64;
    }
    let left = updates.saturating_sub(warmup).max(1) as f64;
    let done = ((update - warmup) as f64 / left).min(1.0);
    match schedule {
        LrSchedule::Constant => 1.0,
        LrSchedule::Linear => 1.0 - done,
        LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes() {
        let at = |schedule, update| factor(schedule, update, 4, 24);
        assert_eq!([0, 1, 3].map(|u| at(LrSchedule::Constant, u)), [0.25, 0.5, 1.0]);
        assert_eq!(at(LrSchedule::Constant, 20), 1.0);
        assert_eq!([4, 14, 24].map(|u| at(LrSchedule::Linear, u)), [1.0, 0.5, 0.0]);
        assert!((at(LrSchedule::Cosine, 14) - 0.5).abs() < 1e-12);
        assert_eq!(factor(LrSchedule::Cosine, 0, 0, 10), 1.0);
    }
}
