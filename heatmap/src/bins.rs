//! Cells that stand for several tokens, where there are more tokens than pixels.

/// The cells along a side of a panel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Axis {
    pub tokens: usize,
    /// Neighbouring tokens that share a cell.
    pub per_cell: usize,
    /// Pixels of a cell.
    pub pixels: usize,
}

impl Axis {
    pub fn cells(&self) -> usize {
        self.tokens.div_ceil(self.per_cell)
    }

    /// In pixels.
    pub fn length(&self) -> usize {
        self.cells() * self.pixels
    }

    /// The middle of a token in pixels.
    pub fn middle(&self, token: usize) -> usize {
        (2 * token + 1) * self.pixels / (2 * self.per_cell)
    }
}

/// The largest weight of each cell. `row` gives the weights of a query.
pub fn largest<'a>(row: impl Fn(usize) -> &'a [f32], down: Axis, across: Axis) -> Vec<f32> {
    let mut cells = vec![0f32; down.cells() * across.cells()];
    for query in 0..down.tokens {
        let line = &mut cells[query / down.per_cell * across.cells()..][..across.cells()];
        for (cell, weights) in line.iter_mut().zip(row(query).chunks(across.per_cell)) {
            *cell = weights.iter().copied().fold(*cell, f32::max);
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_shows_the_largest_of_its_weights() {
        // Three queries of five keys, two of each to a cell: the last cells are smaller.
        let weights = [0.1, 0.2, 0.3, 0.0, 0.0, 0.4, 0.0, 0.0, 0.9, 0.5, 0.0, 0.6, 0.0, 0.0, 0.7];
        let axis = |tokens| Axis { tokens, per_cell: 2, pixels: 1 };
        let row = |query: usize| &weights[5 * query..][..5];
        assert_eq!(largest(row, axis(3), axis(5)), [0.4, 0.9, 0.5, 0.6, 0.0, 0.7]);
        let one = |tokens| Axis { tokens, per_cell: 1, pixels: 4 };
        assert_eq!(largest(row, one(3), one(5)), weights);
        assert_eq!((axis(5).length(), axis(5).middle(4), one(5).length(), one(5).middle(4)), (3, 2, 20, 18));
    }
}
