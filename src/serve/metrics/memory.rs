//! Memory of this process.

/// Bytes of it that are in the host's memory, where the system tells.
pub fn resident() -> Option<u64> {
    read(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn read(status: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    #[test]
    fn status_is_read() {
        assert_eq!(super::read("Name:\tds\nVmHWM:\t 9 kB\nVmRSS:\t    2048 kB\n"), Some(2 << 20));
        assert_eq!(super::read("VmRSS: many kB"), None);
        assert_eq!(super::read(""), None);
    }
}
