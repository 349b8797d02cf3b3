//! Longer sequences.

use crate::contract::error::Result;
use crate::ops::advance::{Advance, By};

/// Adds to each length what the description says, up to its limit. A length beyond the limit becomes the limit.
///
/// # Errors
///
/// Whatever is wrong with the description, and [`crate::Error::Length`] if a slice has not the length that it says.
pub fn advance(advance: &Advance, lengths: &mut [u32], by: Option<&[u32]>) -> Result<()> {
    advance.check_lengths(lengths.len(), by.map(<[u32]>::len))?;
    for (b, length) in lengths.iter_mut().enumerate() {
        let by = match (advance.by, by) {
            (By::Same(by), _) => by,
            (By::Each, by) => by.map_or(0, |by| by[b]),
        };
        *length = u64::from(advance.limit).min(u64::from(*length) + u64::from(by)) as u32;
    }
    Ok(())
}
