//! `--fewer-prompts`: the costly budgets of a sweep on its first prompts alone.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

/// `F:N,…`: budgets from F on run on the first N prompts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thinning(Vec<(u64, usize)>);

impl Thinning {
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a budget runs on a prompt.
    #[must_use]
    pub fn holds(&self, budget: u64, prompt_index: usize) -> bool {
        self.0.iter().all(|&(from, prompts)| budget < from || prompt_index < prompts)
    }
}

impl FromStr for Thinning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let part = |part: &str| {
            let (from, prompts) = part.split_once(':')?;
            let prompts = prompts.trim().parse().ok().filter(|&n: &usize| n > 0)?;
            Some((from.trim().parse().ok()?, prompts))
        };
        let parts: Option<Vec<_>> = text.split(',').map(part).collect();
        parts.map(Self).ok_or_else(|| {
            format!("'{text}' is not like 5000:8,20000:4 (a budget, and prompts from there on)")
        })
    }
}

impl fmt::Display for Thinning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(from, n)| format!("{from}:{n}")).collect();
        f.write_str(&parts.join(","))
    }
}

impl Serialize for Thinning {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Thinning {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costly_budgets_run_on_fewer_prompts() {
        let thinning: Thinning = "5000:8, 20000:4".parse().unwrap();
        assert_eq!(thinning.to_string(), "5000:8,20000:4");
        let prompts = |budget| (0..100).filter(|p| thinning.holds(budget, *p)).count();
        assert_eq!([100, 4999, 5000, 10_000, 20_000].map(prompts), [100, 100, 8, 8, 4]);
        assert!(Thinning::default().holds(u64::MAX, usize::MAX));
        for bad in ["", "5000", "5000:0", "a:1", "1:2:3"] {
            assert!(bad.parse::<Thinning>().is_err(), "{bad}");
        }
    }
}
