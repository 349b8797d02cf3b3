//! One step around attention (a projection, a rotation) as an operation of its own.

use std::ops::Range;

use crate::encode::{Attention, Program, Recording, Scratch, allocate, check_slice};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, upload_bytes};
use crate::kernel::slot::Slot;
use crate::options::Options;
use crate::plan::no_more_slices;
use crate::problem::{Element, Elements};
use crate::projection::Projection;
use crate::rotation::Rotation;
use crate::step::Step;
use crate::steps::Steps;

/// Compiled dispatches with the buffers that they need, ready to be recorded any number of times, from any number of threads.
#[derive(Debug)]
pub struct Operation {
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

impl Operation {
    pub(crate) fn new(attention: &Attention, steps: Steps<'_>) -> Result<Self> {
        Self::with_scratch(attention, steps, &[])
    }

    /// With buffers of its own, of the given bytes, for some slots.
    pub(crate) fn with_scratch(attention: &Attention, steps: Steps<'_>, scratch: &[(Slot, u64)]) -> Result<Self> {
        attention.caps().check()?;
        let (steps, slices) = steps.finish();
        let program = attention.program(&steps)?;
        let mut needs = needs(&steps);
        needs.retain(|need| scratch.iter().all(|(slot, _)| *slot != need.slot));
        let scratch = Scratch::new(attention.device(), scratch.to_vec())?;
        Ok(Operation { program, slices, needs, scratch, alignment: attention.caps().alignment() })
    }

    /// Each buffer that is read or written, and its least size in bytes. There is none where the operation has no rows.
    pub fn needs(&self) -> impl Iterator<Item = (Slot, u64)> {
        self.needs.iter().map(|need| (need.slot, need.bytes))
    }

    /// The dispatches in order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.program.steps()
    }

    /// Records everything. Nothing is submitted or waited for. A buffer that the operation does not use may be given.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &[(Slot, wgpu::BufferSlice<'_>)]) -> Result<()> {
        self.check(buffers)?;
        self.record(0..self.slices.last().map_or(0, |slice| slice.end), encoder, buffers, &self.scratch.shared()?)
    }

    /// How many slices there are: parts of the work that may be submitted one by one, in order.
    pub fn slices(&self) -> usize {
        self.slices.len()
    }

    /// Begins a call that is recorded slice by slice, as [`crate::Prepared::begin`] does.
    pub fn begin(&self) -> Result<Recording<'_, Operation>> {
        Ok(Recording { of: self, set: self.scratch.own()? })
    }

    pub(crate) fn slice(&self, slice: usize) -> Result<Range<usize>> {
        no_more_slices(slice, self.slices())?;
        Ok(self.slices[slice].clone())
    }

    /// Records some dispatches with buffers that [`Operation::check`] took.
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
            let slice = buffers.iter().find(|(given, _)| *given == slot).expect("Operation::check found it").1;
            (slice.buffer(), slice.offset())
        };
        self.program.record(steps, encoder, buffer, &[])
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

impl Recording<'_, Operation> {
    /// Records one slice; submit after each, in order.
    pub fn encode_slice(
        &self,
        slice: usize,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &[(Slot, wgpu::BufferSlice<'_>)],
    ) -> Result<()> {
        let steps = self.of.slice(slice)?;
        self.of.check(buffers)?;
        self.of.record(steps, encoder, buffers, &self.set)?;
        self.hold(encoder);
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

impl Attention {
    /// Prepares a projection: rows in [`Slot::Query`], weights in [`Slot::Matrix`]`(0)`, biases in [`Slot::Shifts`] (at least
    /// 16 bytes even without a bias), result in [`Slot::Result`].
    pub fn project(&self, projection: &Projection, options: &Options) -> Result<Operation> {
        let mut steps = Steps::new(self.caps(), options);
        projection.plan(self.caps(), options, &mut steps)?;
        Operation::new(self, steps)
    }

    /// Prepares a rotation: rows in [`Slot::Query`], result in [`Slot::Result`] (in place: that one alone), the table in
    /// [`Slot::Angles`] and u32 positions in [`Slot::Positions`].
    pub fn rotate(&self, rotation: &Rotation, options: &Options) -> Result<Operation> {
        let mut steps = Steps::new(self.caps(), options);
        rotation.plan(self.caps(), &mut steps)?;
        Operation::new(self, steps)
    }
}

impl Gpu {
    /// Turns rows on host slices in place, and gives them widened to f32; `rotation.y` must be `None`.
    pub fn rotate(&self, rotation: &Rotation, x: Elements<'_>, table: &[f32], positions: &[u32]) -> Result<Vec<f32>> {
        rotation.check()?;
        if rotation.y.is_some() {
            let why = "host slices turn in place";
            return Err(Error::Conflict { left: "y", right: "host slices", why });
        }
        if x.element() != rotation.element {
            return Err(Error::Element { field: "x", got: x.element(), want: rotation.element });
        }
        let lengths = [
            ("x", x.len() as u64, rotation.extent()),
            ("table", table.len() as u64, u64::from(rotation.table_rows) * u64::from(rotation.rotary_dim)),
            ("positions", positions.len() as u64, rotation.position_count()),
        ];
        for (field, got, want) in lengths {
            if got != want {
                return Err(Error::Length { field, got: got as usize, want: want as usize });
            }
        }
        let operation = self.library().rotate(rotation, &Options::default())?;
        let [x_buffer, table, positions] = allocate(self.device(), || {
            [x.bytes(), bytemuck::cast_slice(table), bytemuck::cast_slice(positions)]
                .map(|bytes| upload_bytes(self.device(), self.queue(), "rotation", bytes))
        })?;
        let slots = [
            (Slot::Result, x_buffer.slice(..)),
            (Slot::Angles, table.slice(..)),
            (Slot::Positions, positions.slice(..)),
        ];
        self.perform(&operation, &slots)?;
        let mut bytes = self.read(x_buffer.slice(..))?;
        bytes.truncate(x.bytes().len());
        let words = || bytemuck::pod_collect_to_vec::<u8, u16>(&bytes);
        Ok(match rotation.element {
            Element::F32 => bytemuck::pod_collect_to_vec(&bytes),
            Element::F16 => words().into_iter().map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
            Element::Bf16 => words().into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
        })
    }
}
