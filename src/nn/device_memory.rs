//! How much memory a device has.

use candle_core::Device;

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What can be taken now.
    pub free: u64,
    /// All there is, whoever holds it; the CPU's with the swap space.
    pub total: u64,
}

impl DeviceMemory {
    /// A GPU's as its driver tells, the CPU's as `/proc/meminfo` does; nothing where they do not.
    pub fn of(device: &Device) -> Option<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let (free, total) = super::cuda::room(device).ok()?;
                Some(Self { free, total })
            }
            Device::Cpu => Self::read(&std::fs::read_to_string("/proc/meminfo").ok()?),
            _ => None,
        }
    }

    fn read(meminfo: &str) -> Option<Self> {
        let bytes = |name: &str| {
            let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(kib << 10)
        };
        let total = bytes("MemTotal:")? + bytes("SwapTotal:").unwrap_or(0);
        Some(Self { free: bytes("MemAvailable:")?, total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24689764 kB\nMemFree:         1000 kB\n\
                    MemAvailable:   11 kB\nSwapTotal:  236 kB\n";
        let memory = DeviceMemory { free: 11 << 10, total: 24_690_000 << 10 };
        assert_eq!(DeviceMemory::read(text), Some(memory));
        let without_swap = DeviceMemory { free: 2 << 10, total: 5 << 10 };
        assert_eq!(DeviceMemory::read("MemTotal: 5 kB\nMemAvailable: 2 kB"), Some(without_swap));
        assert_eq!(DeviceMemory::read("MemTotal: 5 kB\n"), None);
        assert_eq!(DeviceMemory::read("MemTotal: 5\nMemAvailable: x kB\n"), None);
    }
}
