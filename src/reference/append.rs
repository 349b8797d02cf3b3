//! New rows in a cache.

use crate::contract::error::Result;
use crate::ops::append::Append;

/// Copies the new rows into the cache, bit for bit: row `r` of batch `b` goes to row `min(starts[b], capacity − rows) + r`, or,
/// if the cache is circular, to row `(starts[b] + r) mod capacity`. (ONNX `TensorScatter`.) In a paged cache row `p` of batch `b`
/// is row `p % page_size` of page `block_table[b, p / page_size]`; where there is no such page, nothing is copied.
///
/// # Errors
///
/// Whatever is wrong with the description, and [`crate::Error::Length`] if a slice has not the length that it says.
pub fn append<T: Copy>(
    append: &Append,
    x: &[T],
    cache: &mut [T],
    starts: &[u32],
    block_table: Option<&[u32]>,
) -> Result<()> {
    let [from, to] = append.tensors()?;
    append.check_lengths(x.len(), cache.len(), starts.len(), block_table)?;
    for (b, &start) in (0..append.batch).zip(starts) {
        for (h, r) in (0..append.heads).flat_map(|h| (0..append.rows).map(move |r| (h, r))) {
            let row = match append.circular {
                true => ((u64::from(start) + u64::from(r)) % u64::from(append.capacity)) as u32,
                false => start.min(append.capacity - append.rows) + r,
            };
            let (slab, row) = match (append.paged, block_table) {
                (Some(paged), Some(table)) => {
                    let columns = table.len() / append.batch as usize;
                    let page = table[b as usize * columns + (row / paged.page_size) as usize];
                    if page >= paged.pages {
                        continue;
                    }
                    (page, row % paged.page_size)
                }
                _ => (b, row),
            };
            let (source, target) = (from.at(b, h, r) as usize, to.at(slab, h, row) as usize);
            let dim = append.dim as usize;
            cache[target..target + dim].copy_from_slice(&x[source..source + dim]);
        }
    }
    Ok(())
}
