//! Which two images a voter is shown.

use std::collections::{BTreeMap, BTreeSet};

use rand::Rng;
use serde_json::{Map, Value};

use super::{Choice, Purpose};
use crate::serve::compare::Contract;

/// Of ballots, those that repeat one of the voter's, and those of one player against itself.
const REPEATS: f64 = 0.1;
const SAME: f64 = 0.05;

/// A finished arm of a comparison with a contract.
#[derive(Clone, Debug, PartialEq)]
pub struct Arm {
    pub generation: String,
    pub player: String,
    /// Image files, in the order of their seeds.
    pub files: Vec<String>,
}

/// A comparison whose arms cost the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    pub prompt: String,
    pub contract: String,
    pub arms: Vec<Arm>,
}

/// An image that is shown.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Side {
    pub generation: String,
    pub player: String,
    pub position: usize,
    pub file: String,
}

/// The generations and positions of two images.
pub type Images = [(String, usize); 2];

/// What a voter is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    pub prompt: String,
    pub contract: String,
    pub purpose: Purpose,
    pub repeats: Option<String>,
    pub left: Side,
    pub right: Side,
}

impl Shown {
    fn mirrored(self) -> Self {
        Self { left: self.right, right: self.left, ..self }
    }

    /// The same two images, whichever side they are on.
    #[must_use]
    pub fn images(&self) -> Images {
        let mut images =
            [&self.left, &self.right].map(|side| (side.generation.clone(), side.position));
        images.sort();
        images
    }
}

/// A vote of the voter with what was shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Past {
    pub ballot: String,
    pub shown: Shown,
    pub choice: Choice,
}

/// A contract in a word.
#[must_use]
pub fn contract_name(contract: Contract) -> String {
    match contract {
        Contract::EqualF(f) => format!("equal_f:{f}"),
        Contract::EqualLatencyMs(ms) => format!("equal_latency_ms:{ms}"),
    }
}

/// What an arm is called in the table: its method and adapter, which it may have from the
/// comparison's base, and whatever else it has of its own; the same for the same whatever its label is.
#[must_use]
pub fn player(base: &Map<String, Value>, arm: &Map<String, Value>) -> String {
    let of = |name: &str| arm.get(name).or_else(|| base.get(name));
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let list = |pairs: BTreeMap<&String, String>| {
        pairs
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut name = match of("method") {
        Some(Value::String(name)) => name.clone(),
        Some(Value::Object(method)) => {
            let name = method.get("name").map_or_else(|| "plain".to_owned(), text);
            let others = method.iter().filter(|(key, value)| *key != "name" && !value.is_null());
            let params = list(others.map(|(key, value)| (key, text(value))).collect());
            if params.is_empty() { name } else { format!("{name}({params})") }
        }
        _ => "plain".to_owned(),
    };
    if let Some(adapter) = of("adapter").filter(|adapter| !adapter.is_null()) {
        name = format!("{name}@{}", text(adapter));
    }
    let aside = ["method", "adapter", "label", "alone", "digests", "previews"];
    let others =
        arm.iter().filter(|(key, value)| !aside.contains(&key.as_str()) && !value.is_null());
    let others = list(others.map(|(key, value)| (key, text(value))).collect());
    if others.is_empty() { name } else { format!("{name} {others}") }
}

fn side(arm: &Arm, position: usize) -> Side {
    Side {
        generation: arm.generation.clone(),
        player: arm.player.clone(),
        position,
        file: arm.files[position].clone(),
    }
}

/// Every two images of different players with the same seed.
fn pairs(found: &[Match]) -> Vec<Shown> {
    let mut shown = Vec::new();
    for Match { prompt, contract, arms } in found {
        for (i, a) in arms.iter().enumerate() {
            for b in arms[i + 1..].iter().filter(|b| b.player != a.player) {
                // Nothing is to be said of the same file.
                let count = a.files.len().min(b.files.len());
                for position in (0..count).filter(|&p| a.files[p] != b.files[p]) {
                    shown.push(Shown {
                        prompt: prompt.clone(),
                        contract: contract.clone(),
                        purpose: Purpose::Pair,
                        repeats: None,
                        left: side(a, position),
                        right: side(b, position),
                    });
                }
            }
        }
    }
    shown
}

/// Every two images of one arm.
fn sames(found: &[Match]) -> Vec<Shown> {
    let mut shown = Vec::new();
    for Match { prompt, contract, arms } in found {
        for arm in arms {
            let count = arm.files.len();
            let two = (0..count).flat_map(|i| (i + 1..count).map(move |j| (i, j)));
            for (i, j) in two.filter(|&(i, j)| arm.files[i] != arm.files[j]) {
                shown.push(Shown {
                    prompt: prompt.clone(),
                    contract: contract.clone(),
                    purpose: Purpose::Same,
                    repeats: None,
                    left: side(arm, i),
                    right: side(arm, j),
                });
            }
        }
    }
    shown
}

/// How often two players met in votes; the one that comes first by name is first.
pub type Met = BTreeMap<(String, String), u32>;

/// What a voter can be shown.
pub struct Pool {
    pairs: Vec<Shown>,
    sames: Vec<Shown>,
    /// Those that are there still.
    files: BTreeSet<String>,
    met: Met,
    past: Vec<Past>,
}

impl Pool {
    /// `past`: the voter's votes; `met`: everybody's.
    pub fn new(found: &[Match], met: Met, past: Vec<Past>) -> Self {
        let files = found.iter().flat_map(|m| &m.arms).flat_map(|a| &a.files).cloned().collect();
        let seen: BTreeSet<Images> = past.iter().map(|past| past.shown.images()).collect();
        let fresh = |mut shown: Vec<Shown>| {
            shown.retain(|s| !seen.contains(&s.images()));
            shown
        };
        Self { pairs: fresh(pairs(found)), sames: fresh(sames(found)), files, met, past }
    }

    /// Chooses what to show; `None` when there is nothing new. Pairs of players who have met least
    /// come first. `aside`: what is not to be shown.
    pub fn choose(&self, aside: &BTreeSet<Images>, random: &mut impl Rng) -> Option<Shown> {
        let fresh = |shown: &'_ &Shown| aside.is_empty() || !aside.contains(&shown.images());
        let again = self.again();
        let lot: f64 = random.random();
        if lot < REPEATS && !again.is_empty() {
            let past = again[random.random_range(0..again.len())];
            let repeats = Some(past.ballot.clone());
            let shown = Shown { purpose: Purpose::Repeat, repeats, ..past.shown.clone() };
            return Some(shown.mirrored());
        }
        let one_of = |shown: &[&Shown], random: &mut _| {
            let shown = shown[Rng::random_range(random, 0..shown.len())];
            turned(shown.clone(), random)
        };
        let same: Vec<_> = self.sames.iter().filter(fresh).collect();
        if lot > 1.0 - SAME && !same.is_empty() {
            return Some(one_of(&same, random));
        }
        let mut pairs: Vec<_> = self.pairs.iter().filter(fresh).collect();
        let fewest = pairs.iter().map(|shown| self.times(shown)).min()?;
        pairs.retain(|shown| self.times(shown) == fewest);
        Some(one_of(&pairs, random))
    }

    /// How often its players have met.
    fn times(&self, shown: &Shown) -> u32 {
        let (a, b) = (&shown.left.player, &shown.right.player);
        let key = if a < b { (a.clone(), b.clone()) } else { (b.clone(), a.clone()) };
        self.met.get(&key).copied().unwrap_or(0)
    }

    /// Votes that can be asked for again.
    fn again(&self) -> Vec<&Past> {
        let repeated: BTreeSet<&str> =
            self.past.iter().filter_map(|past| past.shown.repeats.as_deref()).collect();
        let there = |shown: &Shown| {
            [&shown.left, &shown.right].iter().all(|side| self.files.contains(&side.file))
        };
        let again = self.past.iter().filter(|past| past.shown.purpose == Purpose::Pair);
        let again = again.filter(|past| there(&past.shown));
        let mut again: Vec<_> =
            again.filter(|past| !repeated.contains(past.ballot.as_str())).collect();
        // Not what the voter has just seen.
        again.truncate(again.len().saturating_sub(3));
        again
    }
}

/// With the sides by lot.
fn turned(shown: Shown, random: &mut impl Rng) -> Shown {
    if random.random() { shown.mirrored() } else { shown }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use serde_json::json;

    use super::*;

    fn name(arm: Value) -> String {
        player(&Map::new(), arm.as_object().unwrap())
    }

    #[test]
    fn players_are_what_differs_whatever_they_are_called() {
        assert_eq!(name(json!({})), "plain");
        assert_eq!(name(json!({"label": "x", "method": "plain", "alone": false})), "plain");
        assert_eq!(name(json!({"adapter": "rlhf"})), "plain@rlhf");
        let demon = json!({"method": {"name": "demon", "k": 8, "beta": "auto"}, "adapter": null});
        assert_eq!(name(demon), "demon(beta=auto k=8)");
        assert_eq!(
            name(json!({"steps": 20, "guidance_scale": 3})),
            "plain guidance_scale=3 steps=20"
        );
        let base = json!({"prompt": "p", "method": "demon", "adapter": "rlhf", "steps": 5});
        let from_base = |arm: Value| player(base.as_object().unwrap(), arm.as_object().unwrap());
        assert_eq!(from_base(json!({})), "demon@rlhf");
        assert_eq!(from_base(json!({"method": "best-of-n", "adapter": null})), "best-of-n");
        assert_eq!(from_base(json!({"method": null})), "plain@rlhf");
    }

    fn found() -> Vec<Match> {
        let arm = |generation: &str, player: &str| Arm {
            generation: generation.to_owned(),
            player: player.to_owned(),
            files: (0..2).map(|i| format!("{generation}{i}")).collect(),
        };
        let one = Match {
            prompt: "p".to_owned(),
            contract: "equal_f:100".to_owned(),
            arms: vec![arm("g", "a"), arm("h", "b"), arm("i", "a")],
        };
        vec![one]
    }

    #[test]
    fn everything_is_shown_once_and_some_of_it_again_the_other_way() {
        let (found, mut random) = (found(), ChaCha8Rng::seed_from_u64(3));
        let (mut past, mut met): (Vec<Past>, Met) = (Vec::new(), Met::new());
        let next = |past: &[Past], met: &Met, random: &mut ChaCha8Rng| {
            Pool::new(&found, met.clone(), past.to_vec()).choose(&BTreeSet::new(), random)
        };
        while let Some(shown) = next(&past, &met, &mut random) {
            assert!(past.len() < 60);
            match shown.purpose {
                Purpose::Pair => {
                    assert_ne!(shown.left.player, shown.right.player);
                    assert_eq!(shown.left.position, shown.right.position);
                }
                Purpose::Same => assert_eq!(shown.left.generation, shown.right.generation),
                Purpose::Repeat => {
                    let first: &Past = past
                        .iter()
                        .find(|p: &&Past| Some(&p.ballot) == shown.repeats.as_ref())
                        .unwrap();
                    assert_eq!(
                        (&first.shown.left, &first.shown.right),
                        (&shown.right, &shown.left)
                    );
                }
            }
            let ballot = past.len().to_string();
            if shown.purpose == Purpose::Pair {
                *met.entry(("a".to_owned(), "b".to_owned())).or_default() += 1;
            }
            past.push(Past { ballot, shown, choice: Choice::Tie });
        }
        let pairs: Vec<_> = past.iter().filter(|p| p.shown.purpose == Purpose::Pair).collect();
        // a (twice) against b, two images each; never one arm of a against the other.
        assert_eq!(pairs.len(), 4);
        let images: BTreeSet<_> = pairs.iter().map(|p| p.shown.images()).collect();
        assert_eq!(images.len(), 4);
        let mut sides = BTreeSet::new();
        for seed in 0..40 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let shown = next(&[], &Met::new(), &mut random).unwrap();
            sides.insert((shown.purpose == Purpose::Same, shown.left.player == "b"));
        }
        assert!(sides.contains(&(false, true)) && sides.contains(&(false, false)));
        assert!(sides.contains(&(true, false)), "now and then one against itself");
    }

    #[test]
    fn who_met_least_is_next() {
        let mut found = found();
        found[0].arms.push(Arm {
            generation: "j".to_owned(),
            player: "c".to_owned(),
            files: vec!["j0".to_owned(), "j1".to_owned()],
        });
        let met = ["b", "c"].map(|other| (("a".to_owned(), other.to_owned()), 1));
        let pool = Pool::new(&found, met.into_iter().collect(), Vec::new());
        for seed in 0..20 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let shown = pool.choose(&BTreeSet::new(), &mut random).unwrap();
            let mut players = [shown.left.player, shown.right.player];
            players.sort();
            assert!(shown.purpose == Purpose::Same || players == ["b", "c"], "{players:?}");
        }
    }
}
