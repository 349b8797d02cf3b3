//! The operations beside attention on a device: compiled, with buffers of their own types.

mod buffers;

use std::marker::PhantomData;
use std::ops::Range;

use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::device::encode::{Attention, Program, Recording, Scratch, check_slice};
use crate::dispatch::step::Step;
use crate::dispatch::steps::Steps;
use crate::kernel::slot::Slot;
use crate::ops::advance::Advance;
use crate::ops::append::{self, Append};
use crate::ops::merge::{Merge, Partials};
use crate::ops::project::{Projection, Wiring};
use crate::ops::rotary::{self, Rotation};
use crate::plan::no_more_slices;
use crate::trace::span;

pub use buffers::{AdvanceBuffers, AppendBuffers, MergeBuffers, ProjectionBuffers, RotationBuffers};

/// Compiled dispatches with the scratch that they need, whatever their buffers are called.
#[derive(Debug)]
pub(crate) struct Compiled {
    program: Program,
    slices: Vec<Range<usize>>,
    needs: Vec<Need>,
    scratch: Scratch,
    alignment: u64,
}

#[derive(Clone, Copy, Debug)]
struct Need {
    slot: Slot,
    bytes: u64,
    written: bool,
}

impl Compiled {
    /// Compiles the steps, and allocates buffers of the given bytes for the slots that hold intermediate results.
    pub(crate) async fn new(
        attention: &Attention,
        operation: &str,
        steps: &[Step],
        slices: Vec<Range<usize>>,
        scratch: &[(Slot, u64)],
    ) -> Result<Self> {
        attention.caps().check()?;
        let program = attention.program(operation, steps).await?;
        let scratch: Vec<_> = scratch.iter().copied().filter(|&(_, bytes)| bytes > 0).collect();
        let mut needs = needs(steps);
        needs.retain(|need| scratch.iter().all(|(slot, _)| *slot != need.slot));
        let scratch = Scratch::new(attention.device(), operation, scratch).await?;
        Ok(Compiled { program, slices, needs, scratch, alignment: attention.caps().alignment() })
    }

    pub(crate) fn steps(&self) -> impl Iterator<Item = &Step> {
        self.program.steps()
    }

    pub(crate) fn slices(&self) -> usize {
        self.slices.len()
    }

    pub(crate) fn slice(&self, slice: usize) -> Result<Range<usize>> {
        no_more_slices(slice, self.slices())?;
        Ok(self.slices[slice].clone())
    }

    /// Records some dispatches with buffers that [`Compiled::check`] took.
    pub(crate) fn record(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &[(Slot, wgpu::BufferSlice<'_>)],
        set: &[(Slot, wgpu::Buffer)],
    ) -> Result<()> {
        let buffer = |slot: Slot| {
            if let Some((_, buffer)) = set.iter().find(|(own, _)| *own == slot) {
                return (buffer, 0);
            }
            let slice = buffers.iter().find(|(given, _)| *given == slot).expect("Compiled::check found it").1;
            (slice.buffer(), slice.offset())
        };
        self.program.record(steps, encoder, buffer, &[], None)
    }

    /// Checks the buffers and records nothing.
    pub(crate) fn check(&self, buffers: &[(Slot, wgpu::BufferSlice<'_>)]) -> Result<()> {
        let find = |slot: Slot| buffers.iter().find(|(given, _)| *given == slot).map(|(_, slice)| *slice);
        for need in &self.needs {
            let field = need.slot.name();
            let slice = find(need.slot).ok_or(Error::Missing { field })?;
            check_slice(field, &slice, need.bytes, self.alignment)?;
            if !slice.buffer().usage().contains(wgpu::BufferUsages::STORAGE) {
                return Err(Error::BufferUsage { field, usage: "STORAGE" });
            }
            for other in self.needs.iter().filter(|other| need.written && other.slot != need.slot) {
                if find(other.slot).is_some_and(|with| with.buffer() == slice.buffer()) {
                    return Err(Error::Aliased { output: field, other: other.slot.name() });
                }
            }
        }
        Ok(())
    }
}

fn needs(steps: &[Step]) -> Vec<Need> {
    let mut needs: Vec<Need> = Vec::new();
    for bound in steps.iter().flat_map(|step| &step.bindings) {
        let (bytes, written) = (bound.offset + bound.size, bound.written);
        match needs.iter_mut().find(|need| need.slot == bound.slot) {
            Some(need) => (need.bytes, need.written) = (need.bytes.max(bytes), need.written || written),
            None => needs.push(Need { slot: bound.slot, bytes, written }),
        }
    }
    needs
}

/// The description of an operation beside attention: [`Append`], [`Advance`], [`Merge`], [`Projection`] or [`Rotation`].
pub trait Description {
    /// The buffers that the operation reads and writes.
    type Buffers<'a>;

    /// The operation's name in labels and traces.
    #[doc(hidden)]
    const NAME: &'static str;

    /// The buffers by what the operation calls them.
    #[doc(hidden)]
    fn slots<'a>(of: &Self::Buffers<'a>) -> Vec<(Slot, Option<wgpu::BufferSlice<'a>>)>;
}

/// A [`Description`] compiled for a device, ready to be recorded any number of times, from any number of threads.
///
/// Each buffer needs the usage `STORAGE`, and an offset that is a multiple of the device's `min_storage_buffer_offset_alignment`. What
/// is written has a buffer of its own. A buffer that the operation does not use, because there is no row, say, is not looked at.
#[derive(Debug)]
pub struct Operation<D> {
    compiled: Compiled,
    of: PhantomData<fn() -> D>,
}

impl<D: Description> Operation<D> {
    async fn new(attention: &Attention, steps: Steps<'_>, scratch: &[(Slot, u64)]) -> Result<Self> {
        let (steps, slices) = steps.finish();
        let prepare = Compiled::new(attention, D::NAME, &steps, slices, scratch);
        let span = span!("prepare", operation = D::NAME, dispatches = steps.len());
        Ok(Operation { compiled: span.around(prepare).await?, of: PhantomData })
    }

    /// Each buffer that is read or written, by its field, and its least size in bytes. There is none where the operation has no rows.
    pub fn needs(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.compiled.needs.iter().map(|need| (need.slot.name(), need.bytes))
    }

    /// The dispatches in order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.compiled.steps()
    }

    /// Records everything. Nothing is submitted or waited for.
    ///
    /// # Errors
    ///
    /// Those of [`crate::Prepared::encode`], except that a buffer which the operation does not use is no error.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &D::Buffers<'_>) -> Result<()> {
        let (of, slots) = (&self.compiled, given::<D>(buffers));
        of.check(&slots)?;
        of.record(0..of.slices.last().map_or(0, |slice| slice.end), encoder, &slots, &of.scratch.shared()?)
    }

    /// How many slices there are: parts of the work that may be submitted one by one, in order.
    pub fn slices(&self) -> usize {
        self.compiled.slices()
    }

    /// Begins a call that is recorded slice by slice, as [`crate::Prepared::begin`] does.
    ///
    /// # Errors
    ///
    /// Those of [`crate::Prepared::begin`].
    pub fn begin(&self) -> Result<Recording<'_, Operation<D>>> {
        Ok(Recording { of: self, set: self.compiled.scratch.own()? })
    }
}

impl<D: Description> Recording<'_, Operation<D>> {
    /// Records one slice; submit after each, in order.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if there is no such slice, and those of [`Operation::encode`] for the buffers.
    pub fn encode_slice(
        &self,
        slice: usize,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &D::Buffers<'_>,
    ) -> Result<()> {
        let (of, slots) = (&self.of.compiled, given::<D>(buffers));
        let steps = of.slice(slice)?;
        of.check(&slots)?;
        of.record(steps, encoder, &slots, &self.set)?;
        self.hold(encoder);
        Ok(())
    }
}

fn given<'a, D: Description>(buffers: &D::Buffers<'a>) -> Vec<(Slot, wgpu::BufferSlice<'a>)> {
    D::slots(buffers).into_iter().filter_map(|(slot, slice)| Some((slot, slice?))).collect()
}

impl Attention {
    /// Prepares an append. Keys and values of the same sizes are two recordings of one operation.
    ///
    /// # Errors
    ///
    /// Those of [`Append::plan`] and of [`Attention::prepare`].
    pub fn append(&self, append: &Append, options: &Options) -> Result<Operation<Append>> {
        pollster::block_on(self.append_async(append, options))
    }

    /// [`Attention::append`] for asynchronous callers; see [`Attention::prepare_async`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::append`].
    pub async fn append_async(&self, append: &Append, options: &Options) -> Result<Operation<Append>> {
        let caps = self.proven_caps();
        let mut steps = Steps::new(&caps, options);
        span!("plan", operation = Append::NAME).within(|| append.dispatches(append::Slots::OWN, &mut steps))?;
        Operation::new(self, steps, &[]).await
    }

    /// Prepares an advance of lengths. Many tokens are many recordings of one operation.
    ///
    /// # Errors
    ///
    /// Those of [`Advance::plan`] and of [`Attention::prepare`].
    pub fn advance(&self, advance: &Advance, options: &Options) -> Result<Operation<Advance>> {
        pollster::block_on(self.advance_async(advance, options))
    }

    /// [`Attention::advance`] for asynchronous callers; see [`Attention::prepare_async`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::advance`].
    pub async fn advance_async(&self, advance: &Advance, options: &Options) -> Result<Operation<Advance>> {
        let caps = self.proven_caps();
        let mut steps = Steps::new(&caps, options);
        advance.dispatches(&mut steps)?;
        Operation::new(self, steps, &[]).await
    }

    /// Prepares a merge.
    ///
    /// # Errors
    ///
    /// Those of [`Merge::plan`] and of [`Attention::prepare`].
    pub fn merge(&self, merge: &Merge, options: &Options) -> Result<Operation<Merge>> {
        pollster::block_on(self.merge_async(merge, options))
    }

    /// [`Attention::merge`] for asynchronous callers; see [`Attention::prepare_async`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::merge`].
    pub async fn merge_async(&self, merge: &Merge, options: &Options) -> Result<Operation<Merge>> {
        let caps = self.proven_caps();
        caps.check()?;
        let mut steps = Steps::new(&caps, options);
        let scratch =
            span!("plan", operation = Merge::NAME).within(|| merge.dispatches(Partials::LogSumExp, &mut steps))?;
        Operation::new(self, steps, &scratch.sizes()).await
    }

    /// Prepares a projection.
    ///
    /// # Errors
    ///
    /// Those of [`Projection::plan`] and of [`Attention::prepare`].
    pub fn project(&self, projection: &Projection, options: &Options) -> Result<Operation<Projection>> {
        pollster::block_on(self.project_async(projection, options))
    }

    /// [`Attention::project`] for asynchronous callers; see [`Attention::prepare_async`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::project`].
    pub async fn project_async(&self, projection: &Projection, options: &Options) -> Result<Operation<Projection>> {
        let caps = self.proven_caps();
        let mut steps = Steps::new(&caps, options);
        span!("plan", operation = Projection::NAME).within(|| projection.dispatches(Wiring::OWN, &mut steps))?;
        Operation::new(self, steps, &[]).await
    }

    /// Prepares a rotation.
    ///
    /// # Errors
    ///
    /// Those of [`Rotation::plan`] and of [`Attention::prepare`].
    pub fn rotate(&self, rotation: &Rotation, options: &Options) -> Result<Operation<Rotation>> {
        pollster::block_on(self.rotate_async(rotation, options))
    }

    /// [`Attention::rotate`] for asynchronous callers; see [`Attention::prepare_async`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::rotate`].
    pub async fn rotate_async(&self, rotation: &Rotation, options: &Options) -> Result<Operation<Rotation>> {
        let caps = self.proven_caps();
        let mut steps = Steps::new(&caps, options);
        span!("plan", operation = Rotation::NAME).within(|| rotation.dispatches(rotary::Slots::OWN, &mut steps))?;
        Operation::new(self, steps, &[]).await
    }
}
