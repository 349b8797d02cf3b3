//! The buffers of each operation beside attention.

use super::Description;
use crate::kernel::slot::Slot;
use crate::ops::advance::Advance;
use crate::ops::append::Append;
use crate::ops::merge::Merge;
use crate::ops::project::{Projection, Wiring};
use crate::ops::rotary::Rotation;

/// The buffers of an [`Append`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct AppendBuffers<'a> {
    /// The new rows.
    pub x: wgpu::BufferSlice<'a>,
    /// The cache, or the pool of its pages, which is changed in place.
    pub cache: wgpu::BufferSlice<'a>,
    /// The row of the cache where the new rows of each batch begin, u32 `[batch]`.
    pub starts: wgpu::BufferSlice<'a>,
    /// The pages of each batch, u32 or i32 [batch, ⌈capacity / page_size⌉], if the cache is paged.
    pub block_table: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> AppendBuffers<'a> {
    /// The buffers of an append to a cache that is not paged.
    pub fn new(x: wgpu::BufferSlice<'a>, cache: wgpu::BufferSlice<'a>, starts: wgpu::BufferSlice<'a>) -> Self {
        AppendBuffers { x, cache, starts, block_table: None }
    }
}

impl Description for Append {
    type Buffers<'a> = AppendBuffers<'a>;

    fn slots<'a>(of: &Self::Buffers<'a>) -> Vec<(Slot, Option<wgpu::BufferSlice<'a>>)> {
        vec![
            (Slot::X, Some(of.x)),
            (Slot::Cache, Some(of.cache)),
            (Slot::Starts, Some(of.starts)),
            (Slot::BlockTable, of.block_table),
        ]
    }
}

/// The buffers of an [`Advance`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct AdvanceBuffers<'a> {
    /// The lengths, u32 `[batch]`, which are changed in place.
    pub lengths: wgpu::BufferSlice<'a>,
    /// What is added to each, u32 `[batch]`, if each batch has a number of its own.
    pub by: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> AdvanceBuffers<'a> {
    /// The buffers of an advance by the same number for every batch.
    pub fn new(lengths: wgpu::BufferSlice<'a>) -> Self {
        AdvanceBuffers { lengths, by: None }
    }
}

impl Description for Advance {
    type Buffers<'a> = AdvanceBuffers<'a>;

    fn slots<'a>(of: &Self::Buffers<'a>) -> Vec<(Slot, Option<wgpu::BufferSlice<'a>>)> {
        vec![(Slot::Lengths, Some(of.lengths)), (Slot::By, of.by)]
    }
}

/// The buffers of a [`Merge`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct MergeBuffers<'a> {
    /// The outputs of the partials, f32 [partials, batch, heads, seq_q, value_dim].
    pub partial_out: wgpu::BufferSlice<'a>,
    /// The log-sum-exps of the partials, f32 [partials, batch, heads, seq_q].
    pub partial_lse: wgpu::BufferSlice<'a>,
    /// The attention sinks, f32 `[heads]`, if there are any.
    pub sinks: Option<wgpu::BufferSlice<'a>>,
    /// The merged output.
    pub out: wgpu::BufferSlice<'a>,
    /// The merged log-sum-exp, f32 [batch, heads, seq_q], if it is asked for.
    pub lse: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> MergeBuffers<'a> {
    /// The buffers of a merge without sinks whose log-sum-exp is not asked for.
    pub fn new(
        partial_out: wgpu::BufferSlice<'a>,
        partial_lse: wgpu::BufferSlice<'a>,
        out: wgpu::BufferSlice<'a>,
    ) -> Self {
        MergeBuffers { partial_out, partial_lse, sinks: None, out, lse: None }
    }
}

impl Description for Merge {
    type Buffers<'a> = MergeBuffers<'a>;

    fn slots<'a>(of: &Self::Buffers<'a>) -> Vec<(Slot, Option<wgpu::BufferSlice<'a>>)> {
        vec![
            (Slot::PartialOut, Some(of.partial_out)),
            (Slot::PartialLse, Some(of.partial_lse)),
            (Slot::Sinks, of.sinks),
            (Slot::Out, Some(of.out)),
            (Slot::Lse, of.lse),
        ]
    }
}

/// The buffers of a [`Projection`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct ProjectionBuffers<'a> {
    /// The rows, f32.
    pub x: wgpu::BufferSlice<'a>,
    /// The weights.
    pub weight: wgpu::BufferSlice<'a>,
    /// The biases, f32, if there are any.
    pub biases: Option<wgpu::BufferSlice<'a>>,
    /// The result, f32.
    pub y: wgpu::BufferSlice<'a>,
}

impl<'a> ProjectionBuffers<'a> {
    /// The buffers of a projection without biases.
    pub fn new(x: wgpu::BufferSlice<'a>, weight: wgpu::BufferSlice<'a>, y: wgpu::BufferSlice<'a>) -> Self {
        ProjectionBuffers { x, weight, biases: None, y }
    }
}

impl Description for Projection {
    type Buffers<'a> = ProjectionBuffers<'a>;

    fn slots<'a>(of: &Self::Buffers<'a>) -> Vec<(Slot, Option<wgpu::BufferSlice<'a>>)> {
        vec![
            (Wiring::OWN.x, Some(of.x)),
            (Wiring::OWN.weight, Some(of.weight)),
            (Slot::Biases, of.biases),
            (Wiring::OWN.y, Some(of.y)),
        ]
    }
}

/// The buffers of a [`Rotation`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct RotationBuffers<'a> {
    /// The rows, which are changed in place unless the rotation has a `y`.
    pub x: wgpu::BufferSlice<'a>,
    /// The cosines and sines, f32 [table_rows, rotary_dim], as [`Rotation::table`] makes them.
    pub table: wgpu::BufferSlice<'a>,
    /// The positions, u32; [`crate::operations::Positions`] says how many.
    pub positions: wgpu::BufferSlice<'a>,
    /// The result, if the rotation is not in place.
    pub y: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> RotationBuffers<'a> {
    /// The buffers of a rotation in place.
    pub fn new(x: wgpu::BufferSlice<'a>, table: wgpu::BufferSlice<'a>, positions: wgpu::BufferSlice<'a>) -> Self {
        RotationBuffers { x, table, positions, y: None }
    }
}

impl Description for Rotation {
    type Buffers<'a> = RotationBuffers<'a>;

    fn slots<'a>(of: &Self::Buffers<'a>) -> Vec<(Slot, Option<wgpu::BufferSlice<'a>>)> {
        vec![
            (Slot::X, Some(of.x)),
            (Slot::Angles, Some(of.table)),
            (Slot::Positions, Some(of.positions)),
            (Slot::Y, of.y),
        ]
    }
}
