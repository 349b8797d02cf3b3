//! What of a tensor is drawn.

use crate::Layer;

impl Layer {
    /// Cuts the first rows and columns of sequence `batch` out of `[batches, heads, seq_q, seq_kv]` weights: what follows
    /// them is padding.
    ///
    /// # Panics
    ///
    /// If `weights` has no such sequence, rows or columns.
    pub fn cut(
        name: String,
        weights: &[f32],
        [_, heads, seq_q, seq_kv]: [usize; 4],
        batch: usize,
        [rows, columns]: [usize; 2],
    ) -> Self {
        let starts =
            (0..heads).flat_map(|head| (0..rows).map(move |row| ((batch * heads + head) * seq_q + row) * seq_kv));
        let weights = starts.flat_map(|start| &weights[start..][..columns]).copied().collect();
        Layer { name, heads, weights }
    }
}

/// How many rows and columns of sequence `batch` hold weights: at the end of either, those whose weights are zero in all heads
/// are padding. At least one is left of each.
///
/// # Panics
///
/// If `weights` has no such sequence.
pub fn used(weights: &[f32], [_, heads, seq_q, seq_kv]: [usize; 4], batch: usize) -> [usize; 2] {
    let (mut rows, mut columns) = (1, 1);
    for index in 0..heads * seq_q {
        let row = &weights[(batch * heads * seq_q + index) * seq_kv..][..seq_kv];
        if let Some(last) = row.iter().rposition(|&weight| weight != 0.0) {
            (rows, columns) = (rows.max(index % seq_q + 1), columns.max(last + 1));
        }
    }
    [rows, columns]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_cut_off() {
        let weights: Vec<f32> = (0..2 * 2 * 3 * 3).map(|n| n as f32).collect();
        let layer = Layer::cut("x".into(), &weights, [2, 2, 3, 3], 1, [1, 2]);
        assert_eq!((layer.heads, layer.weights), (2, vec![18.0, 19.0, 27.0, 28.0]));
    }

    #[test]
    fn padding_is_what_is_zero_at_the_end_in_every_head() {
        // Two sequences, two heads, two queries, four keys; the first sequence has no padding.
        let mut weights = [0.25; 32];
        weights[16..].fill(0.0);
        // A zero in the middle is no padding, and what one head does not need another may.
        (weights[16], weights[26]) = (1.0, 1.0);
        assert_eq!(used(&weights, [2, 2, 2, 4], 0), [2, 4]);
        assert_eq!(used(&weights, [2, 2, 2, 4], 1), [1, 3]);
        assert_eq!(used(&[0.0; 4], [1, 1, 2, 2], 0), [1, 1]);
    }
}
