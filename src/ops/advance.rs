//! Advancing the lengths of sequences on the GPU.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::shape::MAX_SIZE;
use crate::dispatch::part::{Axis, Cut, Excess, Part, count};
use crate::dispatch::step::Step;
use crate::dispatch::steps::{Span, Steps, bind, bound, checked_u32};
use crate::kernel::params::Place;
use crate::kernel::shader::Shader;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;
use crate::kernel::{Variant, advance};

/// Lengths of sequences, u32 `[batch]`, which grow on the GPU: `lengths[b] = min(lengths[b] + by, limit)`.
///
/// With it the lengths of a decoding loop live in one buffer on the GPU, and many tokens are recorded in one submission. Of each token
/// record: an [`Append`](crate::operations::Append) of the new keys and one of the new values with `starts` = lengths, this
/// operation, and attention with `key_lengths` = lengths.
///
/// A length that has reached `limit` stays there, also where the sum would leave u32; so does one that was beyond. The limit is
/// the capacity of the cache, so that a length never counts keys that are not there. A circular cache goes on counting:
/// give it `u32::MAX`. Its starts then go round by themselves, and `key_lengths` beyond `seq_kv` count as `seq_kv` on the GPU.
///
/// ```
/// use wgpu_attention::operations::{Advance, By};
/// use wgpu_attention::reference;
///
/// let mut lengths = [0, 5, 8];
/// reference::advance(&Advance::new(3, 1, 8), &mut lengths, None)?;
/// assert_eq!(lengths, [1, 6, 8]); // the last sequence is full
///
/// // A number for each sequence, as the drafted tokens that a model accepts.
/// let mut advance = Advance::new(3, 0, 8);
/// advance.by = By::Each;
/// reference::advance(&advance, &mut lengths, Some(&[3, 0, 1]))?;
/// assert_eq!(lengths, [4, 6, 8]);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Batches, 0 or more.
    pub batch: u32,
    /// What is added to each length.
    pub by: By,
    /// The most that a length becomes: the capacity of the cache, or `u32::MAX` for a circular one.
    pub limit: u32,
}

/// What [`Advance`] adds to each length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The same number for every batch.
    Same(u32),
    /// A number for each batch, from a buffer of u32 `[batch]`.
    Each,
}

impl Advance {
    /// By the same number for every batch.
    pub fn new(batch: u32, by: u32, limit: u32) -> Self {
        Advance { batch, by: By::Same(by), limit }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] for more batches than there may be, and for a number that is larger than the limit.
    pub fn check(&self) -> Result<()> {
        let by = if let By::Same(by) = self.by { by } else { 0 };
        for (field, value, limit) in [("batch", self.batch, MAX_SIZE), ("by", by, self.limit)] {
            if value > limit {
                return Err(Error::TooLarge { field, value: value.into(), limit: limit.into() });
            }
        }
        Ok(())
    }

    pub(crate) fn check_lengths(&self, lengths: usize, by: Option<usize>) -> Result<()> {
        self.check()?;
        let field = "by";
        let each = match (self.by, by) {
            (By::Each, None) => return Err(Error::Missing { field }),
            (By::Same(_), Some(_)) => return Err(Error::Unexpected { field }),
            (By::Same(_), None) => 0,
            (By::Each, Some(_)) => self.batch,
        };
        super::check_lengths(&[("lengths", lengths, self.batch.into()), (field, by.unwrap_or(0), each.into())])
    }

    /// Checks that no length is beyond the limit.
    pub(crate) fn check_limit(&self, lengths: &[u32]) -> Result<()> {
        match lengths.iter().position(|&length| length > self.limit) {
            Some(index) => {
                let (value, limit) = (lengths[index].into(), self.limit.into());
                Err(Error::Entry { field: "lengths", index, value, want: "at most", limit })
            }
            None => Ok(()),
        }
    }

    /// The dispatches on a device, in order: pure data.
    ///
    /// # Errors
    ///
    /// Those of [`Advance::check`], [`Error::Device`] if the device is below what every kernel needs, and [`Error::Room`] if the plan
    /// takes more than the device or the crate allows.
    pub fn plan(&self, caps: &Caps, options: &Options) -> Result<Vec<Step>> {
        super::plan(caps, options, |steps| self.dispatches(steps))
    }

    /// Adds the dispatches to the steps. The batches are the rows of a part.
    pub(crate) fn dispatches(&self, steps: &mut Steps<'_>) -> Result<()> {
        self.check()?;
        if self.batch == 0 {
            return Ok(());
        }
        let (caps, limit) = (steps.caps, steps.caps.binding());
        let excess = |part: &Part| {
            let (_, bytes, _) = bind(caps, span(part), 4, 0);
            (bytes > limit).then(|| Excess { field: "lengths", bytes, limit, cuts: vec![Cut::anywhere(Axis::Rows)] })
        };
        Part::new(0..1, 0..1, 0..self.batch).divide(&excess, &mut |part| self.part(&part, steps))
    }

    fn part(&self, part: &Part, steps: &mut Steps<'_>) -> Result<()> {
        let kernel = advance::Advance { each: self.by == By::Each };
        let (lengths, lengths_base) = bound(steps.caps, Slot::Lengths, span(part), 4, 0, true)?;
        let mut bindings = vec![lengths];
        let (by, by_base) = match self.by {
            By::Same(by) => (by, 0),
            By::Each => {
                let (by, base) = bound(steps.caps, Slot::By, span(part), 4, 0, false)?;
                bindings.push(by);
                (0, base)
            }
        };
        let row_tiles = checked_u32("workgroups", count(&part.rows).div_ceil(kernel.threads().into()))?;
        let uniform = Uniform::new(&advance::Params {
            place: Place { row_tiles, col_tiles: 1, ..part.place() },
            lengths_base,
            by_base,
            by,
            limit: self.limit,
        });
        let flops = 16.0 * count(&part.rows) as f64;
        steps.push(part, Variant::Advance(kernel), uniform, bindings, row_tiles, flops)
    }
}

/// The lengths of a part.
fn span(part: &Part) -> Span {
    (part.rows.start.into(), part.rows.end.into())
}
