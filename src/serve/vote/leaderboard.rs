//! What votes say: strengths with intervals, who can be told from whom, and how far the voters
//! can be trusted.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::davidson::{Fit, Outcomes, Table};
use super::{Choice, Purpose, Vote};

/// Replicates of the bootstrap, and its seed: the same votes have the same intervals.
const REPLICATES: usize = 1000;
const SEED: u64 = 1970;
/// The part of replicates that must have strengths for an interval to be given.
const ENOUGH: f64 = 0.9;
/// Votes from which on a share may be called one-sided.
const ENOUGH_VOTES: usize = 20;
/// Votes of the player with the fewest, from which on a table is usable, and established.
const USABLE: usize = 30;
const ESTABLISHED: usize = 100;

/// An estimate with its 95% interval, where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub value: f64,
    pub low: Option<f64>,
    pub high: Option<f64>,
}

/// A player.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub player: String,
    pub votes: usize,
    /// Natural logarithm; the players' mean is 0.
    pub strength: Estimate,
    /// Wins, half of ties counted, that are expected against a player of mean strength.
    pub expected: f64,
    /// The best and the worst place that cannot be excluded.
    pub places: (usize, usize),
}

/// Two players of a group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Versus {
    pub a: String,
    pub b: String,
    pub votes: usize,
    /// a's strength less b's.
    pub difference: Estimate,
    /// `a`, `b`, or neither: they cannot be separated.
    pub better: Option<String>,
}

/// Players who met, directly or through others.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Group {
    pub players: Vec<String>,
    pub votes: usize,
    /// `preliminary`, `usable` or `established`.
    pub status: &'static str,
    /// Why there are no strengths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_identifiable: Option<String>,
    /// Strongest first.
    pub rows: Vec<Row>,
    pub versus: Vec<Versus>,
    /// Davidson's tie parameter; none where all tied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie: Option<f64>,
}

/// A share of votes, with Wilson's 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    pub of: usize,
    pub value: Option<f64>,
    pub low: f64,
    pub high: f64,
}

impl Share {
    /// Wilson (1927).
    fn of(hits: usize, of: usize) -> Self {
        if of == 0 {
            return Self { of, value: None, low: 0.0, high: 1.0 };
        }
        let (n, p, z) = (of as f64, hits as f64 / of as f64, 1.959_964_f64);
        let (middle, scale) = (p + z * z / (2.0 * n), 1.0 + z * z / n);
        let half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        Self { of, value: Some(p), low: (middle - half) / scale, high: (middle + half) / scale }
    }

    /// Not by a handful of votes: Wilson's interval is too narrow for them.
    fn excludes(&self, value: f64) -> bool {
        self.of >= ENOUGH_VOTES && !(self.low..=self.high).contains(&value)
    }
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Leaderboard {
    pub votes: usize,
    pub voters: usize,
    pub prompts: usize,
    pub both_bad: usize,
    pub groups: Vec<Group>,
    /// Repeated pairs of which the voter said the same again.
    pub consistency: Share,
    /// Decided votes for the left image.
    pub left: Share,
    pub side_bias: bool,
    /// Of two images of one player: decided votes for the first.
    pub same: Share,
    /// They can be told apart, though they are from one player: do not trust the table.
    pub same_separated: bool,
}

/// Evaluates votes.
#[must_use]
pub fn leaderboard(votes: &[Vote]) -> Leaderboard {
    let ranked: Vec<&Vote> = votes.iter().filter(|v| v.purpose == Purpose::Pair).collect();
    let names: BTreeSet<&str> =
        ranked.iter().flat_map(|v| [v.left.as_str(), v.right.as_str()]).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let all = table(names.len(), &ends(&names, &ranked), &ranked, |_| 1.0);
    let groups = match names.as_slice() {
        [] => Vec::new(),
        _ => all.groups(),
    };
    let groups = groups.into_iter().map(|group| {
        let players: Vec<&str> = group.iter().map(|&i| names[i]).collect();
        let inside = ranked.iter().copied().filter(|v| players.contains(&v.left.as_str()));
        evaluate(&players, &inside.collect::<Vec<_>>())
    });
    let groups = groups.collect();
    let decided = |purpose: fn(Purpose) -> bool, hit: fn(&Vote) -> bool| {
        let decided = votes.iter().filter(|v| purpose(v.purpose) && v.choice.sign() != 0);
        let (hits, of) = decided.fold((0, 0), |(hits, of), v| (hits + usize::from(hit(v)), of + 1));
        Share::of(hits, of)
    };
    let left = decided(|p| p != Purpose::Same, |v| v.choice == Choice::Left);
    let same = decided(|p| p == Purpose::Same, |v| (v.choice == Choice::Left) == v.first_is_left);
    let by_ballot: BTreeMap<&str, Choice> =
        votes.iter().map(|v| (v.ballot.as_str(), v.choice)).collect();
    let again = votes.iter().filter_map(|v| {
        let first = by_ballot.get(v.repeats.as_deref()?)?;
        Some(first.mirrored().sign() == v.choice.sign())
    });
    let (agreed, of) = again.fold((0, 0), |(hits, of), same| (hits + usize::from(same), of + 1));
    let distinct = |of: fn(&Vote) -> &str| votes.iter().map(of).collect::<BTreeSet<_>>().len();
    Leaderboard {
        votes: votes.len(),
        voters: distinct(|v| &v.voter),
        prompts: distinct(|v| &v.prompt),
        both_bad: votes.iter().filter(|v| v.choice == Choice::BothBad).count(),
        groups,
        consistency: Share::of(agreed, of),
        left,
        side_bias: left.excludes(0.5),
        same,
        same_separated: same.excludes(0.5),
    }
}

/// The left and the right player of each vote, as places in `names`, which has them all.
fn ends(names: &[&str], votes: &[&Vote]) -> Vec<(usize, usize)> {
    let at: BTreeMap<&str, usize> = names.iter().enumerate().map(|(i, name)| (*name, i)).collect();
    votes.iter().map(|vote| (at[vote.left.as_str()], at[vote.right.as_str()])).collect()
}

/// Outcomes of `players` by weighted votes.
fn table(
    players: usize,
    ends: &[(usize, usize)],
    votes: &[&Vote],
    weight: impl Fn(usize) -> f64,
) -> Table {
    let mut table = Table::new(players);
    for (index, (vote, &(i, j))) in votes.iter().zip(ends).enumerate() {
        let (weight, mut outcome) = (weight(index), Outcomes::default());
        if weight == 0.0 {
            continue;
        }
        match vote.choice {
            Choice::Left => outcome.wins = weight,
            Choice::Right => outcome.losses = weight,
            Choice::Tie | Choice::BothBad => outcome.ties = weight,
        }
        if i != j {
            table.add(i, j, outcome);
        }
    }
    table
}

/// Fits of votes of which prompts and voters are drawn anew, each with replacement and
/// independently (Owen 2007, Ann. Appl. Stat. 1): votes on one prompt or of one voter are not
/// independent.
fn replicates(players: usize, ends: &[(usize, usize)], votes: &[&Vote]) -> Vec<Option<Fit>> {
    let index = |of: fn(&Vote) -> &str| -> (Vec<usize>, usize) {
        let mut known: BTreeMap<&str, usize> = BTreeMap::new();
        let all = votes.iter().map(|vote| {
            let next = known.len();
            *known.entry(of(vote)).or_insert(next)
        });
        let all = all.collect();
        (all, known.len())
    };
    let (prompts, voters) = (index(|v| &v.prompt), index(|v| &v.voter));
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(SEED);
    let mut draw = |count: usize| {
        let mut times = vec![0.0; count];
        (0..count).for_each(|_| times[random.random_range(0..count)] += 1.0);
        times
    };
    let one = |_| {
        let (by_prompt, by_voter) = (draw(prompts.1), draw(voters.1));
        let weight = |i: usize| by_prompt[prompts.0[i]] * by_voter[voters.0[i]];
        table(players, ends, votes, weight).fit().filter(|fit| fit.tie.is_finite())
    };
    (0..REPLICATES).map(one).collect()
}

/// The middle 95% of what `of` says of each replicate, if enough of them have it.
fn interval(replicates: &[Option<Fit>], of: impl Fn(&Fit) -> f64) -> Option<(f64, f64)> {
    let mut found: Vec<f64> = replicates.iter().flatten().map(of).collect();
    if (found.len() as f64) < ENOUGH * replicates.len() as f64 {
        return None;
    }
    found.sort_by(f64::total_cmp);
    let at = |part: f64| found[((found.len() - 1) as f64 * part).round() as usize];
    Some((at(0.025), at(0.975)))
}

fn evaluate(players: &[&str], votes: &[&Vote]) -> Group {
    let count = |name: &str| votes.iter().filter(|v| v.left == name || v.right == name).count();
    let fewest = players.iter().map(|name| count(name)).min().unwrap_or(0);
    let mut group = Group {
        players: players.iter().map(|name| (*name).to_owned()).collect(),
        votes: votes.len(),
        status: match fewest {
            n if n >= ESTABLISHED => "established",
            n if n >= USABLE => "usable",
            _ => "preliminary",
        },
        not_identifiable: None,
        rows: Vec::new(),
        versus: Vec::new(),
        tie: None,
    };
    let ends = ends(players, votes);
    let Some(fit) = table(players.len(), &ends, votes, |_| 1.0).fit() else {
        let message = "one of them, or several, only won against the others, or only lost: any \
                       strength that is great enough explains that";
        group.not_identifiable = Some(message.to_owned());
        return group;
    };
    group.tie = Some(fit.tie).filter(|tie| tie.is_finite());
    let replicates = replicates(players.len(), &ends, votes);
    let estimate = |of: &dyn Fn(&Fit) -> f64| {
        let interval = interval(&replicates, of);
        Estimate { value: of(&fit), low: interval.map(|i| i.0), high: interval.map(|i| i.1) }
    };
    // How many are surely better, and surely worse.
    let mut beaten = vec![(0, 0); players.len()];
    for i in 0..players.len() {
        for j in i + 1..players.len() {
            let difference = estimate(&|fit: &Fit| fit.strengths[i] - fit.strengths[j]);
            let better = match (difference.low, difference.high) {
                (Some(low), _) if low > 0.0 => Some((i, j)),
                (_, Some(high)) if high < 0.0 => Some((j, i)),
                _ => None,
            };
            if let Some((winner, loser)) = better {
                beaten[loser].0 += 1;
                beaten[winner].1 += 1;
            }
            let (a, b) = (players[i].to_owned(), players[j].to_owned());
            let met = |v: &&&Vote| (v.left == a && v.right == b) || (v.left == b && v.right == a);
            group.versus.push(Versus {
                votes: votes.iter().filter(met).count(),
                better: better.map(|(winner, _)| players[winner].to_owned()),
                difference,
                a,
                b,
            });
        }
    }
    for (i, name) in players.iter().enumerate() {
        let (win, tie) = match fit.tie.is_finite() {
            true => fit.probabilities(fit.strengths[i]),
            false => (0.0, 1.0),
        };
        group.rows.push(Row {
            player: (*name).to_owned(),
            votes: count(name),
            strength: estimate(&|fit: &Fit| fit.strengths[i]),
            expected: win + tie / 2.0,
            places: (1 + beaten[i].0, players.len() - beaten[i].1),
        });
    }
    group.rows.sort_by(|a, b| b.strength.value.total_cmp(&a.strength.value));
    group
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote(number: usize, left: &str, right: &str, choice: Choice) -> Vote {
        Vote {
            ballot: number.to_string(),
            voter: format!("v{}", number % 7),
            prompt: format!("p{}", number % 40),
            purpose: Purpose::Pair,
            repeats: None,
            left: left.to_owned(),
            right: right.to_owned(),
            first_is_left: true,
            choice,
        }
    }

    /// `wins` of every ten votes are for a, two are ties; sides change.
    fn votes(count: usize, wins: usize) -> Vec<Vote> {
        let one = |i: usize| {
            // A permutation of the digits, so that voters and prompts see all outcomes.
            let lot = (i * 7 + i / 10) % 10;
            let for_a = lot < wins;
            match (i.is_multiple_of(2), lot >= 8) {
                (true, true) => vote(i, "a", "b", Choice::Tie),
                (false, true) => vote(i, "b", "a", Choice::BothBad),
                (true, _) => vote(i, "a", "b", if for_a { Choice::Left } else { Choice::Right }),
                (false, _) => vote(i, "b", "a", if for_a { Choice::Right } else { Choice::Left }),
            }
        };
        (0..count).map(one).collect()
    }

    #[test]
    fn what_is_far_apart_is_separated_and_what_is_not_is_not() {
        let clear = leaderboard(&votes(300, 6));
        let group = &clear.groups[0];
        assert_eq!((clear.votes, clear.voters, clear.prompts), (300, 7, 40));
        assert_eq!((group.status, group.rows[0].player.as_str()), ("established", "a"));
        let versus = &group.versus[0];
        assert_eq!((versus.better.as_deref(), versus.votes), (Some("a"), 300));
        assert!((versus.difference.value - 3f64.ln()).abs() < 0.05, "{versus:?}");
        assert_eq!((group.rows[0].places, group.rows[1].places), ((1, 1), (2, 2)));
        assert!((group.rows[0].expected + group.rows[1].expected - 1.0).abs() < 1e-9);
        let even = leaderboard(&votes(300, 4));
        let versus = &even.groups[0].versus[0];
        assert_eq!(versus.better, None);
        assert!(versus.difference.low.unwrap() < 0.0 && versus.difference.high.unwrap() > 0.0);
        assert_eq!(even.groups[0].rows[0].places, (1, 2));
        assert_eq!(leaderboard(&votes(300, 6)), clear, "the same votes say the same");
        assert!(!clear.side_bias && clear.left.of == 240);
        assert_eq!(clear.both_bad, 30);
    }

    #[test]
    fn what_has_no_answer_gets_none() {
        let none = leaderboard(&[]);
        assert!(none.groups.is_empty() && none.left.value.is_none() && !none.side_bias);
        let one_sided: Vec<Vote> = (0..50).map(|i| vote(i, "a", "b", Choice::Left)).collect();
        let board = leaderboard(&one_sided);
        assert!(board.groups[0].not_identifiable.is_some() && board.groups[0].rows.is_empty());
        // All from the left: the page's fault, or the voters'.
        assert!(board.side_bias);
        let mut apart = votes(100, 5);
        apart.extend((0..4).map(|i| vote(200 + i, "c", "d", Choice::Tie)));
        let board = leaderboard(&apart);
        let players: Vec<_> = board.groups.iter().map(|g| g.players.join(" ")).collect();
        assert_eq!(players, ["a b", "c d"], "who never met is not compared");
        let ties = &board.groups[1];
        assert_eq!((ties.tie, ties.rows[0].strength.value), (None, 0.0));
        assert_eq!((ties.status, ties.versus[0].better.as_deref()), ("preliminary", None));
    }

    #[test]
    fn one_prompt_s_votes_are_one_observation() {
        // 200 votes, of which each prompt's are alike: as good as as many prompts.
        let of = |prompts: usize| {
            let one = |i: usize| {
                let choice = if i % prompts % 5 < 3 { Choice::Left } else { Choice::Right };
                Vote { prompt: (i % prompts).to_string(), ..vote(i, "a", "b", choice) }
            };
            let board = leaderboard(&(0..200).map(one).collect::<Vec<_>>());
            let difference = board.groups[0].versus[0].difference;
            difference.high.unwrap() - difference.low.unwrap()
        };
        assert!(of(10) > 2.0 * of(200), "{} {}", of(10), of(200));
    }

    #[test]
    fn repeats_and_one_player_against_itself_are_apart_from_the_table() {
        let mut all = votes(100, 6);
        let repeat = |i: usize, choice| Vote {
            purpose: Purpose::Repeat,
            repeats: Some(i.to_string()),
            ..vote(1000 + i, &votes(100, 6)[i].right, &votes(100, 6)[i].left, choice)
        };
        let first = all[0].choice;
        all.push(repeat(0, first.mirrored()));
        all.push(repeat(2, all[2].choice));
        for i in 0..30_usize {
            let choice = if i.is_multiple_of(10) { Choice::Tie } else { Choice::Left };
            let same = Vote { purpose: Purpose::Same, ..vote(2000 + i, "a", "a", choice) };
            all.push(Vote { first_is_left: i % 3 != 1, ..same });
        }
        let board = leaderboard(&all);
        assert_eq!(board.groups[0].votes, 100);
        assert_eq!((board.consistency.of, board.consistency.value), (2, Some(0.5)));
        assert_eq!((board.same.of, board.same.value), (27, Some(18.0 / 27.0)));
        assert!(!board.same_separated);
        assert!(Share::of(30, 40).excludes(0.5) && !Share::of(3, 4).excludes(0.5));
    }
}
