//! Appending new keys or values to a cache on the GPU.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Element, Layout, Paged, Strides};
use crate::contract::shape::MAX_SIZE;
use crate::contract::tensor::Tensor;
use crate::dispatch::part::{Axis, Cut, Excess, Part, count, span};
use crate::dispatch::step::Step;
use crate::dispatch::steps::{Span, Steps, bind, bound, checked_u32};
use crate::kernel::params::{At, Pages, Place, flags};
use crate::kernel::shader::Shader;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;
use crate::kernel::{Variant, append};

/// New rows of keys or values for a cache that holds some already. Every batch has a place of its own where they go.
///
/// Row `r` of batch `b` goes to row `starts[b] + r` of the cache, in all heads: bits are copied as they are. The rest of the
/// cache keeps what it holds. `starts` is u32 `[batch]` and stays on the GPU. A start from which the rows
/// would reach beyond the cache counts as the last one that fits, so that nothing is written outside; on host slices it is an
/// error. In a circular cache, rows go on at row 0 after the last one.
///
/// A cache in pages is that of [`crate::Problem::paged`]: the block table says in which page of the pool
/// each row stands. A row whose page number lies outside the pool, also a negative one, is not written, so that −1 marks padding;
/// on host slices it is an error. Pages that receive rows must not be shared: of two rows in one place, either may stay.
///
/// A decoding loop makes one `Append` and one plan, both for the capacity, and records of each step: the new keys and values
/// appended at `starts` = keys that each sequence has, then attention with `key_lengths` = `starts` + `rows`, which
/// [`Advance`](crate::operations::Advance) computes on the GPU. When a sequence needs another page, the caller writes its number
/// into the block table, which both read; nothing is planned or compiled anew.
///
/// This is ONNX `TensorScatter`: `past_cache` and `present_cache` are the cache, which changes in place, `update` the new rows,
/// `write_indices` the starts, and `mode` is `circular`. `axis` is a matter of layout: the axes before it are batch and heads,
/// those behind it one row.
///
/// ```
/// use wgpu_attention::operations::Append;
/// use wgpu_attention::{Paged, reference};
///
/// // One new key of two elements for each of two batches; the caches have room for three.
/// let append = Append::new(2, 1, 1, 3, 2);
/// let mut cache = [0.0; 12];
/// reference::append(&append, &[1.0, 2.0, 3.0, 4.0], &mut cache, &[0, 2], None)?;
/// assert_eq!(cache, [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, /* second batch */ 0.0, 0.0, 0.0, 0.0, 3.0, 4.0]);
///
/// // The same in a pool of four pages of two keys: the first batch has pages 3 and 1, the second 2 and 0.
/// let mut paged = Append::new(2, 1, 1, 4, 2);
/// paged.paged = Some(Paged { pages: 4, page_size: 2 });
/// let mut pool = [0.0; 16];
/// reference::append(&paged, &[1.0, 2.0, 3.0, 4.0], &mut pool, &[1, 2], Some(&[3, 1, 2, 0]))?;
/// assert_eq!(pool[14..], [1.0, 2.0]); // page 3, row 1
/// assert_eq!(pool[..2], [3.0, 4.0]); // page 0, row 0
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Append {
    /// Batches, 0 or more.
    pub batch: u32,
    /// Key/value heads, 1 or more.
    pub heads: u32,
    /// New rows per batch and head; 0 to `capacity`.
    pub rows: u32,
    /// Rows per batch and head that the cache has room for; of a paged one the most that a batch may have, as `seq_kv`.
    pub capacity: u32,
    /// Elements of a row, 1 or more.
    pub dim: u32,
    /// Type of the new rows and of the cache.
    pub element: Element,
    /// Layout of the new rows: [batch, heads, rows, dim].
    pub x: Layout,
    /// Layout of the cache: [batch, heads, capacity, dim]; paged: [pages, heads, page_size, dim].
    pub cache: Layout,
    /// The cache is a pool of pages, and a block table [batch, ⌈capacity / page_size⌉] says which of them a batch has.
    pub paged: Option<Paged>,
    /// After its last row the cache goes on at its first.
    pub circular: bool,
}

/// Which buffers the dispatches of an append bind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    pub(crate) x: Slot,
    pub(crate) cache: Slot,
}

impl Slots {
    /// The buffers of an operation of its own.
    pub(crate) const OWN: Slots = Slots { x: Slot::X, cache: Slot::Cache };
}

/// The same tensor, counted in units of several elements.
fn in_units(tensor: &Tensor, elements: u64) -> Tensor {
    let s = &tensor.strides;
    let [offset, batch, head, row] = [s.offset, s.batch, s.head, s.row].map(|n| n / elements);
    Tensor { strides: Strides { offset, batch, head, row }, dim: (u64::from(tensor.dim) / elements) as u32, ..*tensor }
}

/// Whether rows begin and end at multiples of some elements.
fn whole(tensor: &Tensor, elements: u64) -> bool {
    let s = &tensor.strides;
    let axes = [s.batch, s.head, s.row].into_iter().zip(tensor.sizes);
    let mut places = axes.filter(|&(_, size)| size > 1).map(|(stride, _)| stride);
    [s.offset, tensor.dim.into()].iter().all(|n| n.is_multiple_of(elements))
        && places.all(|stride| stride.is_multiple_of(elements))
}

impl Append {
    /// Of dense f32 rows to a dense cache that does not go round.
    pub fn new(batch: u32, heads: u32, rows: u32, capacity: u32, dim: u32) -> Self {
        Append {
            batch,
            heads,
            rows,
            capacity,
            dim,
            element: Element::F32,
            x: Layout::Bhsd,
            cache: Layout::Bhsd,
            paged: None,
            circular: false,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Zero`] or [`Error::TooLarge`] for a size out of range, [`Error::Overlap`] if two elements of the cache have the
    /// same address, and [`Error::Room`] if elements are too far apart or the block table has too many entries.
    pub fn check(&self) -> Result<()> {
        self.tensors().map(|_| ())
    }

    /// The new rows and the cache.
    pub(crate) fn tensors(&self) -> Result<[Tensor; 2]> {
        let sizes = [
            ("batch", self.batch, MAX_SIZE),
            ("heads", self.heads, MAX_SIZE),
            ("capacity", self.capacity, MAX_SIZE),
            ("rows", self.rows, self.capacity),
            ("dim", self.dim, MAX_SIZE),
        ];
        for (field, value, limit) in sizes {
            // Without a batch or a row nothing is appended, also to a cache without room.
            if value == 0 && ["heads", "dim"].contains(&field) {
                return Err(Error::Zero { field });
            }
            if value > limit {
                return Err(Error::TooLarge { field, value: value.into(), limit: limit.into() });
            }
        }
        let x = Tensor::input("x", [self.batch, self.heads, self.rows], self.dim, self.x)?;
        let cache = match self.paged {
            None => [self.batch, self.heads, self.capacity],
            Some(paged) => {
                paged.check(self.batch, self.capacity)?;
                [paged.pages, self.heads, paged.page_size]
            }
        };
        Ok([x, Tensor::output("cache", cache, self.dim, self.cache)?])
    }

    /// Entries in a row of the block table.
    fn columns(&self) -> u32 {
        self.paged.map_or(0, |paged| paged.of(self.capacity))
    }

    pub(crate) fn check_lengths(&self, x: usize, cache: usize, starts: usize, table: Option<&[u32]>) -> Result<()> {
        let [from, to] = self.tensors()?;
        let field = "block_table";
        let columns = match (table, self.paged) {
            (None, Some(_)) => return Err(Error::Missing { field }),
            (Some(_), None) => return Err(Error::Unexpected { field }),
            _ => self.columns(),
        };
        super::check_lengths(&[
            ("x", x, from.extent()),
            ("cache", cache, to.extent()),
            ("starts", starts, self.batch.into()),
            (field, table.map_or(0, <[u32]>::len), u64::from(self.batch) * u64::from(columns)),
        ])
    }

    /// Checks that every new row has a place in the cache.
    pub(crate) fn check_places(&self, starts: &[u32], block_table: Option<&[u32]>) -> Result<()> {
        let last = self.capacity - self.rows;
        if let Some(index) = starts.iter().position(|&start| start > last && !self.circular) {
            let (value, limit) = (starts[index].into(), last.into());
            return Err(Error::Entry { field: "starts", index, value, want: "at most", limit });
        }
        let (Some(table), Some(paged)) = (block_table, self.paged) else { return Ok(()) };
        for (b, &start) in starts.iter().enumerate() {
            for row in 0..self.rows {
                let page = self.row(start, row) / paged.page_size;
                let index = b * self.columns() as usize + page as usize;
                let (value, limit) = (table[index].into(), (paged.pages - 1).into());
                if value > limit {
                    return Err(Error::Entry { field: "block_table", index, value, want: "at most", limit });
                }
            }
        }
        Ok(())
    }

    /// The row of a batch's cache that a new row goes to.
    fn row(&self, start: u32, row: u32) -> u32 {
        match self.circular {
            true => ((u64::from(start) + u64::from(row)) % u64::from(self.capacity)) as u32,
            false => start.min(self.capacity - self.rows) + row,
        }
    }

    /// The dispatches on a device, in order: pure data.
    ///
    /// # Errors
    ///
    /// Those of [`Append::check`], [`Error::Device`] if the device is below what every kernel needs, and [`Error::Room`] if an
    /// operand or the plan takes more than the device or the crate allows.
    pub fn plan(&self, caps: &Caps, options: &Options) -> Result<Vec<Step>> {
        super::plan(caps, options, |steps| self.dispatches(Slots::OWN, steps))
    }

    /// Adds the dispatches to the steps.
    pub(crate) fn dispatches(&self, slots: Slots, steps: &mut Steps<'_>) -> Result<()> {
        let tensors = self.tensors()?;
        if self.batch == 0 || self.rows == 0 {
            return Ok(());
        }
        let bytes = self.element.bytes();
        let fits = |variant: &append::Append| {
            let elements = variant.bytes() / bytes;
            elements >= 1 && tensors.iter().all(|tensor| whole(tensor, elements))
        };
        let variant = append::Append::all().find(fits).expect("a unit of one element always fits");
        let [x, cache] = tensors.map(|tensor| in_units(&tensor, variant.bytes() / bytes));
        let mut part = Part::new(0..self.batch, 0..self.heads, 0..self.rows);
        part.cache_rows = 0..self.capacity;
        let planner = Planner { append: self, slots, caps: steps.caps, variant, x, cache };
        part.divide(&|part| planner.excess(part), &mut |part| planner.part(&part, steps))
    }
}

struct Planner<'a> {
    append: &'a Append,
    slots: Slots,
    caps: &'a Caps,
    variant: append::Append,
    /// In units of the variant.
    x: Tensor,
    cache: Tensor,
}

impl Planner<'_> {
    /// The first operand of a part that exceeds a binding.
    fn excess(&self, part: &Part) -> Option<Excess> {
        let (limit, unit) = (self.caps.binding(), self.variant.bytes());
        let per_batch = Strides { batch: 1, ..Strides::default() };
        let operands = [
            ("cache", self.cache_span(part), unit, self.cache.strides, Axis::CacheRows),
            ("block_table", self.table_span(part), 4, per_batch, Axis::Rows),
            ("x", part.span(&self.x), unit, self.x.strides, Axis::Rows),
            ("starts", starts_span(part), 4, per_batch, Axis::Rows),
        ];
        operands.into_iter().find_map(|(field, span, bytes, strides, rows)| {
            let (_, bytes, _) = bind(self.caps, span, bytes, 0);
            (bytes > limit).then(|| Excess { field, bytes, limit, cuts: Cut::widest(&strides, rows) })
        })
    }

    fn cache_span(&self, part: &Part) -> Span {
        match self.append.paged {
            None => span(&self.cache, &part.batch, &part.heads, &part.cache_rows),
            // Any page may be the one.
            Some(paged) => span(&self.cache, &(0..paged.pages), &part.heads, &(0..paged.page_size)),
        }
    }

    fn table_span(&self, part: &Part) -> Span {
        let columns = u64::from(self.append.columns());
        (u64::from(part.batch.start) * columns, u64::from(part.batch.end) * columns)
    }

    fn part(&self, part: &Part, steps: &mut Steps<'_>) -> Result<()> {
        let (caps, unit) = (self.caps, self.variant.bytes());
        let units = self.x.dim;
        let items = checked_u32("items", count(&part.rows) * u64::from(units))?;
        let row_tiles = items.div_ceil(self.variant.threads());
        let (x, cache) = (&self.x.strides, &self.cache.strides);
        let (from, x_base) = bound(caps, self.slots.x, part.span(&self.x), unit, x.offset, false)?;
        let (to, cache_base) = bound(caps, self.slots.cache, self.cache_span(part), unit, cache.offset, true)?;
        let (starts, starts_base) = bound(caps, Slot::Starts, starts_span(part), 4, 0, false)?;
        let (table, table_base) = match self.append.paged {
            // Something must be bound.
            None => (starts, 0),
            Some(_) => bound(caps, Slot::BlockTable, self.table_span(part), 4, 0, false)?,
        };
        let paged = if self.append.paged.is_some() { flags::PAGED } else { 0 };
        let uniform = Uniform::new(&append::Params {
            place: Place { row_tiles, col_tiles: 1, ..part.place() },
            x: At::new(x_base, x),
            cache: At::new(cache_base, cache),
            starts_base,
            table_base,
            rows: self.append.rows,
            capacity: self.append.capacity,
            units,
            cache_row0: part.cache_rows.start,
            cache_row_end: part.cache_rows.end,
            pages: Pages {
                pages: self.append.paged.map_or(0, |paged| paged.pages),
                page_size: self.append.paged.map_or(self.append.capacity, |paged| paged.page_size),
                table_row: self.append.columns(),
            },
            flags: paged | if self.append.circular { flags::CIRCULAR } else { 0 },
        });
        let workgroups = checked_u32("workgroups", u64::from(row_tiles) * part.planes())?;
        let flops = 16.0 * f64::from(items) * part.planes() as f64;
        steps.push(part, Variant::Append(self.variant), uniform, vec![from, starts, table, to], workgroups, flops)
    }
}

fn starts_span(part: &Part) -> Span {
    (part.batch.start.into(), part.batch.end.into())
}
