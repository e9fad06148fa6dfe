//! Strengths from pairwise outcomes with ties: Bradley-Terry as Davidson (1970, J. Am. Stat.
//! Assoc. 65) extends it. With strengths p and a tie parameter v, of two players
//!
//! P(i wins) = p_i / (p_i + p_j + v sqrt(p_i p_j)),  P(tie) = v sqrt(p_i p_j) / (the same).
//!
//! In l = log p and log v it is a multinomial logit, so its likelihood has one maximum, where it
//! has any. Players must be joined by wins and ties in both directions (Ford 1957, for wins); with ties
//! that is not enough, as a player who only won and tied is the better the more likely ties are.

/// How often one player won against another, lost and tied; weights need not be whole numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcomes {
    pub wins: f64,
    pub losses: f64,
    pub ties: f64,
}

/// Outcomes of players i < j.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    players: usize,
    /// Row by row of the upper triangle.
    pairs: Vec<Outcomes>,
}

/// The most likely strengths.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// log p of each player; their mean is 0.
    pub strengths: Vec<f64>,
    /// v; 0 where nobody tied.
    pub tie: f64,
}

impl Fit {
    /// Of players whose strengths differ by `difference`: P(the first wins), P(tie).
    pub fn probabilities(&self, difference: f64) -> (f64, f64) {
        let (win, loss) = ((difference / 2.0).exp(), (-difference / 2.0).exp());
        let all = win + loss + self.tie;
        (win / all, self.tie / all)
    }
}

/// Odds of 160,000 to 1, as a logarithm: no number of votes that is met here says so, and what
/// goes beyond it has no maximum.
const MOST_STRENGTH: f64 = 12.0;

const MOST_ITERATIONS: usize = 100;
/// Of the gradient, in votes.
const TOLERANCE: f64 = 1e-9;

impl Table {
    pub fn new(players: usize) -> Self {
        let pairs = vec![Outcomes::default(); players * players.saturating_sub(1) / 2];
        Self { players, pairs }
    }

    /// Notes an outcome of `i` against `j`, who are not the same.
    pub fn add(&mut self, i: usize, j: usize, outcome: Outcomes) {
        let (first, second) = (i.min(j), i.max(j));
        let at = first * self.players - first * (first + 1) / 2 + second - first - 1;
        let pair = &mut self.pairs[at];
        let (wins, losses) =
            if i < j { (outcome.wins, outcome.losses) } else { (outcome.losses, outcome.wins) };
        pair.wins += wins;
        pair.losses += losses;
        pair.ties += outcome.ties;
    }

    /// Pairs that met: i, j and their outcomes.
    pub fn met(&self) -> impl Iterator<Item = (usize, usize, Outcomes)> {
        let n = self.players;
        let all = (0..n).flat_map(move |i| (i + 1..n).map(move |j| (i, j)));
        let met = all.zip(&self.pairs).map(|((i, j), outcome)| (i, j, *outcome));
        met.filter(|(_, _, o)| o.wins + o.losses + o.ties > 0.0)
    }

    /// Whether every player can be reached from every other by wins and ties: else there is no
    /// most likely set of strengths.
    pub fn is_connected(&self) -> bool {
        let reach = |forward: bool| {
            let mut seen = vec![false; self.players];
            let mut open = vec![0];
            while let Some(at) = open.pop() {
                if std::mem::replace(&mut seen[at], true) {
                    continue;
                }
                for (i, j, o) in self.met() {
                    let (up, down) = (o.wins + o.ties > 0.0, o.losses + o.ties > 0.0);
                    let (up, down) = if forward { (up, down) } else { (down, up) };
                    open.extend((i == at && up && !seen[j]).then_some(j));
                    open.extend((j == at && down && !seen[i]).then_some(i));
                }
            }
            seen.into_iter().all(|seen| seen)
        };
        self.players > 0 && reach(true) && reach(false)
    }

    /// Groups of players who met, directly or through others; each in order.
    pub fn groups(&self) -> Vec<Vec<usize>> {
        let mut of: Vec<usize> = (0..self.players).collect();
        for (i, j, _) in self.met() {
            let (old, new) = (of[i].max(of[j]), of[i].min(of[j]));
            of.iter_mut().filter(|group| **group == old).for_each(|group| *group = new);
        }
        let first = (0..self.players).filter(|&i| of[i] == i);
        first.map(|i| (0..self.players).filter(|&j| of[j] == i).collect()).collect()
    }

    /// The most likely strengths, by Newton's method; `None` where there are none.
    pub fn fit(&self) -> Option<Fit> {
        if !self.is_connected() {
            return None;
        }
        let decided = self.met().map(|(_, _, o)| o.wins + o.losses).sum::<f64>();
        let ties = self.met().map(|(_, _, o)| o.ties).sum::<f64>();
        if self.players > 1 && decided == 0.0 {
            // All alike, and v without bound.
            return Some(Fit { strengths: vec![0.0; self.players], tie: f64::INFINITY });
        }
        // The strengths but the first, which is 0 meanwhile; then log v, where anybody tied.
        let strengths = self.players - 1;
        let mut at = vec![0.0; strengths + usize::from(ties > 0.0)];
        let mut value = self.likelihood(&at);
        for _ in 0..MOST_ITERATIONS {
            let (gradient, information) = self.slope(&at);
            if gradient.iter().all(|g| g.abs() < TOLERANCE) {
                break;
            }
            let step = solve(information, gradient)?;
            let mut length = 1.0;
            loop {
                let next: Vec<f64> = at.iter().zip(&step).map(|(x, s)| x + length * s).collect();
                let found = self.likelihood(&next);
                if found >= value || length < 1e-6 {
                    (at, value) = (next, found);
                    break;
                }
                length /= 2.0;
            }
        }
        if at.iter().any(|value| value.abs() > MOST_STRENGTH) {
            return None;
        }
        let mut all = vec![0.0];
        all.extend_from_slice(&at[..strengths]);
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let strengths = all.into_iter().map(|l| l - mean).collect();
        Some(Fit { strengths, tie: at.get(self.players - 1).map_or(0.0, |v| v.exp()) })
    }

    fn probabilities(&self, at: &[f64], i: usize, j: usize) -> (f64, f64, f64) {
        let strength = |player: usize| if player == 0 { 0.0 } else { at[player - 1] };
        let tie = at.get(self.players - 1).map_or(0.0, |v| v.exp());
        let fit = Fit { strengths: Vec::new(), tie };
        let (win, tie) = fit.probabilities(strength(i) - strength(j));
        (win, 1.0 - win - tie, tie)
    }

    fn likelihood(&self, at: &[f64]) -> f64 {
        let log = |n: f64, p: f64| if n > 0.0 { n * p.ln() } else { 0.0 };
        let each = |(i, j, o): (usize, usize, Outcomes)| {
            let (win, loss, tie) = self.probabilities(at, i, j);
            log(o.wins, win) + log(o.losses, loss) + log(o.ties, tie)
        };
        self.met().map(each).sum()
    }

    /// Gradient of the log-likelihood and the information (minus its second derivatives).
    fn slope(&self, at: &[f64]) -> (Vec<f64>, Vec<Vec<f64>>) {
        let size = at.len();
        let (mut gradient, mut information) = (vec![0.0; size], vec![vec![0.0; size]; size]);
        for (i, j, o) in self.met() {
            let (win, loss, tie) = self.probabilities(at, i, j);
            let n = o.wins + o.losses + o.ties;
            // The sufficient statistics: half of (wins - losses) for i, its negative for j; ties.
            let (ahead, expected) = ((o.wins - o.losses) / 2.0, n * (win - loss) / 2.0);
            let spread = n * (win + loss - (win - loss).powi(2)) / 4.0;
            let mixed = -n * tie * (win - loss) / 2.0;
            let place = |player: usize| player.checked_sub(1);
            for (a, sign) in [(place(i), 1.0), (place(j), -1.0)] {
                let Some(a) = a else { continue };
                gradient[a] += sign * (ahead - expected);
                for (b, other) in [(place(i), 1.0), (place(j), -1.0)] {
                    let Some(b) = b else { continue };
                    information[a][b] += sign * other * spread;
                }
                if size == self.players {
                    information[a][size - 1] += sign * mixed;
                    information[size - 1][a] += sign * mixed;
                }
            }
            if size == self.players {
                gradient[size - 1] += o.ties - n * tie;
                information[size - 1][size - 1] += n * tie * (1.0 - tie);
            }
        }
        (gradient, information)
    }
}

/// x of a x = b, by elimination with pivots; `None` where a is singular.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Option<Vec<f64>> {
    let n = b.len();
    for column in 0..n {
        let pivot =
            (column..n).max_by(|&i, &j| a[i][column].abs().total_cmp(&a[j][column].abs()))?;
        a.swap(column, pivot);
        b.swap(column, pivot);
        if a[column][column].abs() < 1e-12 {
            return None;
        }
        for row in column + 1..n {
            let factor = a[row][column] / a[column][column];
            let (above, below) = a.split_at_mut(row);
            for (value, pivot) in below[0][column..].iter_mut().zip(&above[column][column..]) {
                *value -= factor * pivot;
            }
            b[row] -= factor * b[column];
        }
    }
    for row in (0..n).rev() {
        let known: f64 = (row + 1..n).map(|k| a[row][k] * b[k]).sum();
        b[row] = (b[row] - known) / a[row][row];
    }
    Some(b)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    fn outcomes(wins: f64, losses: f64, ties: f64) -> Outcomes {
        Outcomes { wins, losses, ties }
    }

    #[test]
    fn two_players_have_their_shares() {
        // Then the model has as many parameters as outcomes: its probabilities are the shares.
        let mut table = Table::new(2);
        table.add(1, 0, outcomes(2.0, 6.0, 4.0));
        let fit = table.fit().unwrap();
        let (win, tie) = fit.probabilities(fit.strengths[0] - fit.strengths[1]);
        assert!((win - 0.5).abs() < 1e-9 && (tie - 1.0 / 3.0).abs() < 1e-9, "{win} {tie}");
        // log(6/2), and v = 4 / sqrt(6 2).
        assert!((fit.strengths[0] - fit.strengths[1] - 3f64.ln()).abs() < 1e-9);
        assert!((fit.tie - 4.0 / 12f64.sqrt()).abs() < 1e-9);
        assert!(fit.strengths.iter().sum::<f64>().abs() < 1e-12);
    }

    #[test]
    fn without_ties_it_is_bradley_terry() {
        let mut table = Table::new(2);
        table.add(0, 1, outcomes(9.0, 3.0, 0.0));
        let fit = table.fit().unwrap();
        assert_eq!(fit.tie, 0.0);
        assert!((fit.strengths[0] - fit.strengths[1] - 3f64.ln()).abs() < 1e-9);
        let mut table = Table::new(2);
        table.add(0, 1, outcomes(0.0, 0.0, 3.0));
        let fit = table.fit().unwrap();
        assert_eq!((fit.strengths.as_slice(), fit.tie), (&[0.0, 0.0][..], f64::INFINITY));
    }

    #[test]
    fn who_never_lost_or_never_met_has_no_strength() {
        let mut table = Table::new(3);
        table.add(0, 1, outcomes(3.0, 2.0, 0.0));
        assert_eq!(table.groups(), [vec![0, 1], vec![2]]);
        assert!(table.fit().is_none());
        table.add(2, 1, outcomes(4.0, 0.0, 0.0));
        assert_eq!(table.groups(), [vec![0, 1, 2]]);
        assert!(table.fit().is_none(), "2 has lost to nobody");
        table.add(2, 0, outcomes(0.0, 0.0, 1.0));
        let fit = table.fit().unwrap();
        assert!(fit.strengths[2] > fit.strengths[1]);
        let mut table = Table::new(2);
        table.add(0, 1, outcomes(3.0, 0.0, 3.0));
        assert!(table.fit().is_none(), "the stronger 0 is, the likelier ties must be");
    }

    fn simulated(strengths: &[f64], tie: f64, votes: usize, seed: u64) -> Table {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let truth = Fit { strengths: strengths.to_vec(), tie };
        let mut table = Table::new(strengths.len());
        for _ in 0..votes {
            let i = random.random_range(0..strengths.len());
            let j = (i + random.random_range(1..strengths.len())) % strengths.len();
            let (win, even) = truth.probabilities(strengths[i] - strengths[j]);
            let lot: f64 = random.random();
            table.add(
                i,
                j,
                match lot {
                    lot if lot < win => outcomes(1.0, 0.0, 0.0),
                    lot if lot < win + even => outcomes(0.0, 0.0, 1.0),
                    _ => outcomes(0.0, 1.0, 0.0),
                },
            );
        }
        table
    }

    #[test]
    fn many_votes_give_the_strengths_back() {
        let truth = [0.9, 0.3, 0.0, -1.2];
        let table = simulated(&truth, 0.6, 40_000, 1);
        let fit = table.fit().unwrap();
        for (found, truth) in fit.strengths.iter().zip(truth) {
            assert!((found - truth).abs() < 0.06, "{:?}", fit.strengths);
        }
        assert!((fit.tie - 0.6).abs() < 0.04, "{}", fit.tie);
    }

    #[test]
    fn nothing_near_is_more_likely() {
        let table = simulated(&[0.5, 0.0, -0.5], 0.4, 300, 2);
        let fit = table.fit().unwrap();
        let at = |fit: &[f64]| table.likelihood(fit);
        let best = [
            fit.strengths[1] - fit.strengths[0],
            fit.strengths[2] - fit.strengths[0],
            fit.tie.ln(),
        ];
        for i in 0..3 {
            for step in [-1e-3, 1e-3] {
                let mut other = best;
                other[i] += step;
                assert!(at(&other) < at(&best), "{i} {step}");
            }
        }
    }
}
