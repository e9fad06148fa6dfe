//! The assignment with the largest total.

/// Pairs `(row, column)`, each used at most once, that maximise the sum of
/// `value(row, column)` (non-negative); min(`rows`, `columns`) pairs, by row.
pub(super) fn assign(
    rows: usize,
    columns: usize,
    value: &dyn Fn(usize, usize) -> f64,
) -> Vec<(usize, usize)> {
    if rows > columns {
        let mut pairs: Vec<_> =
            assign(columns, rows, &|r, c| value(c, r)).into_iter().map(|(r, c)| (c, r)).collect();
        pairs.sort_unstable();
        return pairs;
    }
    // The Hungarian method with potentials; row and column 0 are sentinels.
    let mut row_of = vec![0; columns + 1];
    let (mut u, mut v) = (vec![0.0; rows + 1], vec![0.0; columns + 1]);
    for row in 1..=rows {
        row_of[0] = row;
        let mut least = vec![f64::INFINITY; columns + 1];
        let mut came_from = vec![0; columns + 1];
        let mut done = vec![false; columns + 1];
        let mut at = 0;
        loop {
            done[at] = true;
            let (r, mut delta, mut next) = (row_of[at], f64::INFINITY, 0);
            for c in 1..=columns {
                if done[c] {
                    continue;
                }
                let cost = -value(r - 1, c - 1) - u[r] - v[c];
                if cost < least[c] {
                    (least[c], came_from[c]) = (cost, at);
                }
                if least[c] < delta {
                    (delta, next) = (least[c], c);
                }
            }
            for c in 0..=columns {
                if done[c] {
                    u[row_of[c]] += delta;
                    v[c] -= delta;
                } else {
                    least[c] -= delta;
                }
            }
            at = next;
            if row_of[at] == 0 {
                break;
            }
        }
        while at != 0 {
            row_of[at] = row_of[came_from[at]];
            at = came_from[at];
        }
    }
    let mut pairs: Vec<_> =
        (1..=columns).filter(|&c| row_of[c] != 0).map(|c| (row_of[c] - 1, c - 1)).collect();
    pairs.sort_unstable();
    pairs
}

#[cfg(test)]
mod tests {
    use super::assign;

    #[test]
    fn finds_the_best_total() {
        let value = [[3.0, 2.9, 0.0], [3.0, 0.1, 0.0]];
        assert_eq!(assign(2, 3, &|r, c| value[r][c]), [(0, 1), (1, 0)]);
        assert_eq!(assign(3, 2, &|r, c| value[c][r]), [(0, 1), (1, 0)]);
        assert_eq!(assign(0, 3, &|_, _| 1.0), []);
        assert_eq!(assign(3, 0, &|_, _| 1.0), []);
    }
}
