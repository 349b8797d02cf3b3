//! A plan of attention that is compiled and has its scratch.

use std::ops::Range;

use crate::contract::error::{Error, Result};
use crate::contract::operands::Operand;
use crate::device::encode::Home;
use crate::device::encode::buffers::Buffers;
use crate::device::encode::program::{Copy, Program};
use crate::device::encode::scratch::{Recording, Scratch};
use crate::kernel::slot::Slot;
use crate::plan::Plan;

/// A plan with its pipelines and scratch, ready to be recorded any number of times, from any number of threads.
#[derive(Debug)]
pub struct Prepared {
    pub(super) plan: Plan,
    pub(super) program: Program,
    pub(super) scratch: Scratch,
    pub(super) home: Home,
}

impl Prepared {
    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How many slices there are.
    pub fn slices(&self) -> usize {
        self.plan.slices()
    }

    /// Records the whole plan. Submit the encoder afterwards; nothing is submitted or waited for here.
    ///
    /// Where [`Plan::estimate`] exceeds what the driver allows one submission, record and submit slice by slice instead:
    /// [`Prepared::begin`].
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], [`Error::Unexpected`], [`Error::BufferSize`], [`Error::BufferOffset`], [`Error::BufferUsage`] or
    /// [`Error::Aliased`] for a buffer that does not fit the plan; [`Error::OtherDevice`] for one of another device;
    /// [`Error::OutOfMemory`] if the call needs further scratch, see [`Recording`], and there is no memory. wgpu tells nobody the
    /// device of an encoder: one of another device is an error of that device when it is finished. Between devices of two
    /// [`wgpu::Instance`]s, wgpu may take one device's buffer for another's.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &Buffers<'_>) -> Result<()> {
        self.check(buffers)?;
        self.record(0..self.plan.dispatches(), encoder, buffers, &self.scratch.shared()?, None)
    }

    /// Begins a call that is recorded slice by slice.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if the call needs further scratch, see [`Recording`], and there is no memory.
    pub fn begin(&self) -> Result<Recording<'_, Prepared>> {
        Ok(Recording { of: self, set: self.scratch.own()? })
    }

    /// Checks the buffers and records nothing.
    pub(crate) fn check(&self, buffers: &Buffers<'_>) -> Result<()> {
        buffers.check(&self.plan)
    }

    /// The name of each dispatch.
    pub(crate) fn labels(&self) -> &[String] {
        self.program.labels()
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub(crate) fn slice(&self, slice: usize) -> Result<Range<usize>> {
        self.plan.check_slice(slice)?;
        Ok(self.plan.slice_range(slice))
    }

    /// Records some dispatches with buffers that [`Prepared::check`] took.
    pub(crate) fn record(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &Buffers<'_>,
        set: &[(Slot, wgpu::Buffer)],
        timestamps: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<()> {
        let own = |slot: Slot| &set.iter().find(|(own, _)| *own == slot).expect("the plan states its scratch").1;
        let lists = own(Slot::Lists);
        let copies: Vec<_> = buffers
            .lists(&self.plan)
            .map(|(list, from, size)| {
                let place = 4 * u64::from(self.plan.lists().place(list));
                Copy { field: list.name(), from, to: lists, place, size }
            })
            .collect();
        let buffer = |slot: Slot| match (slot, buffers.get(slot)) {
            // `merge` takes the sinks from a buffer of their own.
            (Slot::Sinks, _) => (lists, 4 * u64::from(self.plan.lists().place(Operand::Sinks))),
            (_, Some(slice)) => (slice.buffer(), slice.offset()),
            (_, None) => (own(slot), 0),
        };
        self.program.record(steps, encoder, buffer, &copies, timestamps)
    }
}

impl Recording<'_, Prepared> {
    /// Records one slice. Slices run in order, each at most about [`crate::Options::work_budget`] long; submit after each.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if there is no such slice, and those of [`Prepared::encode`] for the buffers.
    pub fn encode_slice(&self, slice: usize, encoder: &mut wgpu::CommandEncoder, buffers: &Buffers<'_>) -> Result<()> {
        self.record(self.of.slice(slice)?, encoder, buffers, None)
    }

    /// Records only some of the dispatches, by their numbers in [`Plan::steps`], to time a stage of its own. The results are whole
    /// once all have run in order.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if `steps` ends beyond the last dispatch, and those of [`Prepared::encode`] for the buffers.
    pub fn encode_steps(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &Buffers<'_>,
    ) -> Result<()> {
        let (value, limit) = (steps.end as u64, self.of.plan.dispatches() as u64);
        if value > limit {
            return Err(Error::TooLarge { field: "steps.end", value, limit });
        }
        self.record(steps.start.min(steps.end)..steps.end, encoder, buffers, None)
    }

    pub(crate) fn record(
        &self,
        steps: Range<usize>,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &Buffers<'_>,
        timestamps: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Result<()> {
        self.of.check(buffers)?;
        self.of.record(steps, encoder, buffers, &self.set, timestamps)?;
        self.hold(encoder);
        Ok(())
    }
}
