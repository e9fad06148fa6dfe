//! What this process took: memory and processor time.

use std::time::Duration;

/// The most memory of this process since a moment, where Linux tells.
pub struct PeakMemory;

impl PeakMemory {
    /// Forgets the peak so far. Where it cannot, it stays.
    pub fn start() -> Self {
        drop(std::fs::write("/proc/self/clear_refs", "5"));
        Self
    }

    pub fn bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }
}

/// Processor time of this process so far, all threads.
pub fn cpu_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        use rustix::time::{ClockId, clock_gettime};
        Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).ok()
    }
    #[cfg(not(unix))]
    None
}

/// Processor seconds since `start`, of [`cpu_time`].
pub fn cpu_seconds_since(start: Option<Duration>) -> Option<f64> {
    cpu_time().zip(start).map(|(end, start)| end.saturating_sub(start).as_secs_f64())
}
