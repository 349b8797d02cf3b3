//! How many keys the rows of a problem see by causal rule and window, and how many of them a tile of rows loads: in closed form, so that
//! the cost does not depend on the lengths.

use std::ops::Range;

use crate::contract::problem::Causal;
use crate::contract::shape::Shape;

/// The key range of every row: `[row + first, row + end)`, cut to `[0, keys)`. A `first` of `None` is key 0, and an `end` of `None` is
/// `keys`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Band {
    first: Option<i64>,
    end: Option<i64>,
    keys: i64,
    /// The most keys that a row sees, where its position is known only to the GPU; otherwise `keys`.
    width: i64,
}

/// How many keys before and after its position a row sees; `None` where there is no bound. Where the keys have listed positions, any
/// key may be one of those.
fn sides(s: &Shape) -> (Option<i64>, Option<i64>) {
    if s.problem.key_positions {
        return (None, None);
    }
    let right = if s.problem.causal == Causal::None { s.problem.window.right } else { Some(0) };
    (s.problem.window.left.map(i64::from), right.map(i64::from))
}

impl Band {
    /// The key range that each row is charged with, where a tile of `tile` rows loads every key that any of its rows sees. Where only
    /// the GPU knows the offsets, a row is charged with the width of the window, or with all keys. Lengths of batches and sequences
    /// count as the longest.
    pub(crate) fn of(s: &Shape, tile: u32) -> Band {
        let (left, right) = sides(s);
        let keys = i64::from(s.problem.seq_kv);
        let all = Band { first: None, end: None, keys, width: keys };
        // The range of a tile is wider than that of one row: half of the excess is at each end.
        let wider = i64::from(tile.min(s.problem.seq_q).max(1)) - 1;
        let offset = match s.problem.causal {
            Causal::None | Causal::TopLeft => 0,
            Causal::BottomRight => keys - i64::from(s.problem.seq_q),
            Causal::Offset => {
                return Band { width: width(left, right, wider + 1).map_or(keys, |w| w.min(keys)), ..all };
            }
        };
        let first = left.map(|left| offset - left - wider / 2);
        let end = right.map(|right| offset + right + 1 + (wider - wider / 2));
        Band { first, end, ..all }
    }

    /// The band in which every row sees every key.
    pub(crate) fn every(s: &Shape) -> Band {
        let keys = s.problem.seq_kv.into();
        Band { first: None, end: None, keys, width: keys }
    }

    /// Number of pairs of one of these rows and a key of a range that the row sees.
    pub(crate) fn pairs(&self, rows: Range<u64>, keys: &Range<u32>) -> u64 {
        let count = rows.end - rows.start;
        let (low, top) = (i64::from(keys.start), i64::from(keys.end - keys.start));
        if self.width < self.keys {
            let share = u128::from(count) * self.width as u128 * top as u128 / self.keys as u128;
            return share as u64;
        }
        let sum = |bound: Option<i64>, none: i64| match bound {
            None => none * count as i64,
            Some(bound) => ramp(rows.start as i64 + bound - low, count as i64, top),
        };
        (sum(self.end, top) - sum(self.first, 0)) as u64
    }
}

/// The most keys that `tile` neighbouring rows see together, where both sides are bounded.
fn width(left: Option<i64>, right: Option<i64>, tile: i64) -> Option<i64> {
    Some(left? + right? + tile)
}

/// The most keys that a tile of `tile` rows loads, whatever lengths and offsets the GPU finds.
pub(crate) fn most_keys(s: &Shape, tile: u32) -> u64 {
    let (left, right) = sides(s);
    let [rows, keys] = [s.problem.seq_q, s.problem.seq_kv].map(i64::from);
    let offset = match s.problem.causal {
        Causal::None | Causal::TopLeft => Some(0),
        // A shorter key length moves the positions, but widens no range.
        Causal::BottomRight if s.problem.packed.is_none() => Some(keys - rows),
        _ => None,
    };
    // From the first key of the first row to the last one of the last row.
    let end = offset.zip(right).map_or(keys, |(offset, right)| (rows + offset + right).clamp(0, keys));
    let first = offset.zip(left).map_or(0, |(offset, left)| (offset - left).clamp(0, keys));
    let all = end - first;
    width(left, right, i64::from(tile).min(rows)).map_or(all, |width| width.min(all)) as u64
}

/// Σ clamp(first + i, 0, top) over i < count.
fn ramp(first: i64, count: i64, top: i64) -> i64 {
    // The number of terms that are clamped to 0, and of terms below `top`.
    let zeros = (1 - first).clamp(0, count);
    let below = (top - first).clamp(zeros, count);
    let rising = below - zeros;
    rising * first + (zeros + below - 1) * rising / 2 + top * (count - below)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::problem::{Problem, Window};

    #[test]
    fn pairs_and_widths_are_those_that_counting_row_by_row_gives() {
        let sides = [None, Some(0), Some(1), Some(5), Some(40)];
        let causals = [Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset];
        for (rows, keys) in [(1, 1), (1, 23), (23, 1), (7, 20), (20, 7), (16, 16)] {
            for (left, right) in sides.iter().flat_map(|left| sides.map(|right| (*left, right))) {
                for causal in causals {
                    let mut p = Problem::new(1, 1, rows, keys, 4);
                    (p.window, p.causal) = (Window { left, right }, causal);
                    let shape = p.check().unwrap();
                    one(&shape);
                }
            }
        }
    }

    fn one(s: &Shape) {
        let [rows, keys] = [s.problem().seq_q, s.problem().seq_kv].map(i64::from);
        let (left, right) = sides(s);
        let range = |row: i64, offset: i64| {
            let first = left.map_or(0, |left| (row + offset - left).clamp(0, keys));
            let end = right.map_or(keys, |right| (row + offset + right + 1).clamp(0, keys));
            first..end
        };
        let offset = if s.problem().causal == Causal::BottomRight { keys - rows } else { 0 };
        let band = Band::of(s, 1);
        for part in [0..s.problem().seq_kv, 0..s.problem().seq_kv / 2, s.problem().seq_kv / 3..s.problem().seq_kv] {
            let cut = |row: i64| {
                let range = range(row, offset);
                (range.end.min(part.end.into()) - range.start.max(part.start.into())).max(0) as u64
            };
            if s.problem().causal != Causal::Offset {
                for rows in [
                    0..u64::from(s.problem().seq_q),
                    0..0,
                    u64::from(s.problem().seq_q / 2)..u64::from(s.problem().seq_q),
                ] {
                    let want: u64 = (rows.start as i64..rows.end as i64).map(cut).sum();
                    assert_eq!(band.pairs(rows.clone(), &part), want, "{:?} {rows:?} {part:?}", s.problem().window);
                }
            }
        }
        let offsets =
            if s.problem().causal == Causal::Offset { -rows - keys - 50..rows + keys + 50 } else { offset..offset + 1 };
        for tile in [1, 3, 8] {
            let widest = offsets.clone().flat_map(|offset| {
                (0..rows).step_by(tile as usize).map(move |row| {
                    let last = (row + i64::from(tile)).min(rows) - 1;
                    range(last, offset).end - range(row, offset).start
                })
            });
            let widest = widest.max().unwrap() as u64;
            assert!(
                most_keys(s, tile) >= widest,
                "{:?} {:?} {widest} of tiles of {tile}",
                s.problem().window,
                s.problem().causal
            );
            assert!(
                most_keys(s, tile) <= widest + 2 * u64::from(tile),
                "{:?} {:?}",
                s.problem().window,
                s.problem().causal
            );
            let each = band_of_tiles(s, tile);
            assert!(
                each.abs_diff(walked(s, tile, range, offset)) <= u64::from(tile * tile) * 2,
                "{:?}",
                s.problem().window
            );
        }
    }

    fn band_of_tiles(s: &Shape, tile: u32) -> u64 {
        Band::of(s, tile).pairs(0..s.problem().seq_q.into(), &(0..s.problem().seq_kv))
    }

    fn walked(s: &Shape, tile: u32, range: impl Fn(i64, i64) -> Range<i64>, offset: i64) -> u64 {
        let rows = i64::from(s.problem().seq_q);
        if s.problem().causal == Causal::Offset {
            return band_of_tiles(s, tile);
        }
        let tiles = (0..rows).step_by(tile as usize).map(|row| {
            let last = (row + i64::from(tile)).min(rows) - 1;
            (last + 1 - row) * (range(last, offset).end - range(row, offset).start)
        });
        tiles.sum::<i64>() as u64
    }
}
