//! Whose turn it is: clients share the server by U-Net forwards, not by
//! requests, so that one client's searches do not keep another's plain image
//! waiting. Fair queueing by virtual time: each client's clock advances by what
//! it is given, the client whose clock is furthest behind is next, and who was
//! away does not save up.

use std::collections::BTreeMap;

/// Clocks of the clients that wait, in U-Net forwards.
#[derive(Clone, Debug, Default)]
pub struct Fair {
    now: u64,
    clocks: BTreeMap<String, u64>,
}

impl Fair {
    fn clock(&self, client: &str) -> u64 {
        self.clocks.get(client).copied().unwrap_or(0).max(self.now)
    }

    /// The index of the next of `waiting`, which has the clients in order of arrival.
    pub fn next<'a>(&self, waiting: impl Iterator<Item = &'a str>) -> Option<usize> {
        // The first of equals, so that one client's requests keep their order.
        waiting.enumerate().min_by_key(|(i, client)| (self.clock(client), *i)).map(|(i, _)| i)
    }

    /// A request of `client` that plans `f` forwards begins.
    pub fn begin(&mut self, client: &str, f: u64) {
        let clock = self.clock(client);
        self.now = clock;
        self.clocks.retain(|_, c| *c > clock);
        self.clocks.insert(client.to_owned(), clock.saturating_add(f));
    }

    /// In which order `waiting`, clients with their planned forwards, will begin.
    #[must_use]
    pub fn order(&self, waiting: &[(&str, u64)]) -> Vec<usize> {
        let mut fair = self.clone();
        let mut left: Vec<usize> = (0..waiting.len()).collect();
        let mut order = Vec::with_capacity(left.len());
        while let Some(at) = fair.next(left.iter().map(|&i| waiting[i].0)) {
            let index = left.remove(at);
            fair.begin(waiting[index].0, waiting[index].1);
            order.push(index);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_is_served_in_order() {
        let waiting = [("a", 500), ("a", 1), ("a", 100)];
        assert_eq!(Fair::default().order(&waiting), [0, 1, 2]);
    }

    #[test]
    fn a_light_client_passes_a_heavy_one() {
        let mut fair = Fair::default();
        fair.begin("heavy", 2000);
        let waiting = [("heavy", 2000), ("heavy", 2000), ("light", 100), ("light", 100)];
        assert_eq!(fair.order(&waiting), [2, 3, 0, 1]);
    }

    #[test]
    fn equal_clients_take_turns_and_shares_are_by_forwards() {
        let waiting: Vec<_> = (0..8).map(|i| if i < 4 { ("a", 100) } else { ("b", 100) }).collect();
        assert_eq!(Fair::default().order(&waiting), [0, 4, 1, 5, 2, 6, 3, 7]);
        let waiting: Vec<_> = (0..6).map(|i| if i < 2 { ("a", 300) } else { ("b", 100) }).collect();
        assert_eq!(Fair::default().order(&waiting), [0, 2, 3, 4, 1, 5]);
    }

    #[test]
    fn who_was_away_does_not_save_up() {
        let mut fair = Fair::default();
        for _ in 0..100 {
            fair.begin("busy", 1000);
        }
        // The newcomer is next, but only once: then both take turns.
        let waiting = [("busy", 1000), ("busy", 1000), ("new", 1000), ("new", 1000)];
        assert_eq!(fair.order(&waiting), [2, 0, 3, 1]);
    }
}
