//! What one call of attention reads and writes on the GPU.

use crate::contract::error::{Error, Result};
use crate::contract::operands::{Kind, Operand, Operands};
use crate::kernel::slot::Slot;
use crate::plan::{Plan, tensors};

/// What one call reads and writes on the GPU. Outputs that the problem does not ask for stay `None`.
///
/// Usages: `STORAGE` for tensors; `COPY_SRC` for the small per-batch and per-head arrays and the block table, which are copied
/// into a buffer of [`crate::Prepared`]; [`Kind`] says which operand is which. Offsets of tensors are multiples of the device's
/// `min_storage_buffer_offset_alignment` (finer offsets go into [`crate::Strides::offset`]), those of small arrays of 4. A slice
/// that ends inside a 4-byte word must be followed by the rest of that word. Outputs have buffers of their own.
///
/// Of an operand without elements, because there is no batch, query or key, any slice of any buffer may be given, also an empty
/// one: it is not looked at.
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// Queries.
    pub q: wgpu::BufferSlice<'a>,
    /// Keys.
    pub k: wgpu::BufferSlice<'a>,
    /// Values.
    pub v: wgpu::BufferSlice<'a>,
    /// The output.
    pub out: wgpu::BufferSlice<'a>,
    /// Mask, bias and the small arrays.
    pub operands: Operands<wgpu::BufferSlice<'a>>,
    /// Log-sum-exp output.
    pub lse: Option<wgpu::BufferSlice<'a>>,
    /// Weights output.
    pub weights: Option<wgpu::BufferSlice<'a>>,
    /// Logits output.
    pub logits: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> Buffers<'a> {
    /// The four tensors that every problem has.
    pub fn new(
        q: wgpu::BufferSlice<'a>,
        k: wgpu::BufferSlice<'a>,
        v: wgpu::BufferSlice<'a>,
        out: wgpu::BufferSlice<'a>,
    ) -> Self {
        Buffers { q, k, v, out, operands: Operands::default(), lse: None, weights: None, logits: None }
    }

    /// Every tensor with its size in the problem, and whether it is written.
    fn tensors(&self, plan: &Plan) -> [Tensor<'a>; 9] {
        tensors(plan.shape()).map(|(slot, want)| {
            let written = matches!(slot, Slot::Out | Slot::Lse | Slot::Weights | Slot::Logits);
            Tensor { field: slot.name(), slice: self.get(slot), want, written }
        })
    }

    pub(crate) fn check(&self, plan: &Plan) -> Result<()> {
        let shape = plan.shape();
        let tensors = self.tensors(plan);
        for tensor in &tensors {
            let field = tensor.field;
            let Some((slice, want)) = used(field, tensor.slice, tensor.want)? else { continue };
            check_slice(field, &slice, want.next_multiple_of(4), plan.alignment())?;
            if !slice.buffer().usage().contains(wgpu::BufferUsages::STORAGE) {
                return Err(Error::BufferUsage { field, usage: "STORAGE" });
            }
        }
        for list in Operand::of_kind(Kind::List) {
            let field = list.name();
            let slice = self.operands.get(list).copied();
            let Some((slice, want)) = used(field, slice, list.bytes(shape))? else { continue };
            check_slice(field, &slice, want, 4)?;
            if !slice.buffer().usage().contains(wgpu::BufferUsages::COPY_SRC) {
                return Err(Error::BufferUsage { field, usage: "COPY_SRC" });
            }
        }
        let lists = self.lists(plan).map(|(list, slice, _)| (list.name(), Some(slice)));
        let tensors = tensors.iter().filter(|tensor| tensor.want != Some(0));
        let others: Vec<_> = tensors.clone().map(|t| (t.field, t.slice)).chain(lists).collect();
        for output in tensors.filter(|t| t.written) {
            let Some(slice) = output.slice else { continue };
            for &(other, with) in &others {
                if other != output.field && with.is_some_and(|with| with.buffer() == slice.buffer()) {
                    return Err(Error::Aliased { output: output.field, other });
                }
            }
        }
        Ok(())
    }

    /// The small arrays that have elements, each with its bytes.
    pub(super) fn lists(&self, plan: &Plan) -> impl Iterator<Item = (Operand, wgpu::BufferSlice<'a>, u64)> {
        Operand::of_kind(Kind::List).filter_map(|list| {
            let size = list.bytes(plan.shape()).filter(|&size| size > 0)?;
            Some((list, *self.operands.get(list)?, size))
        })
    }

    pub(super) fn get(&self, slot: Slot) -> Option<wgpu::BufferSlice<'a>> {
        match slot {
            Slot::Q => Some(self.q),
            Slot::K => Some(self.k),
            Slot::V => Some(self.v),
            Slot::Out => Some(self.out),
            Slot::Lse => self.lse,
            Slot::Weights => self.weights,
            Slot::Logits => self.logits,
            slot => self.operands.get(slot.operand()?).copied(),
        }
    }
}

#[derive(Clone, Copy)]
struct Tensor<'a> {
    field: &'static str,
    slice: Option<wgpu::BufferSlice<'a>>,
    want: Option<u64>,
    written: bool,
}

/// A slice that is read or written, with the bytes that it needs: one that the problem has, and that has elements.
fn used<'a>(
    field: &'static str,
    slice: Option<wgpu::BufferSlice<'a>>,
    want: Option<u64>,
) -> Result<Option<(wgpu::BufferSlice<'a>, u64)>> {
    match (slice, want) {
        (None, None) => Ok(None),
        (Some(slice), Some(want)) => Ok((want > 0).then_some((slice, want))),
        (None, Some(_)) => Err(Error::Missing { field }),
        (Some(_), None) => Err(Error::Unexpected { field }),
    }
}

pub(crate) fn check_slice(field: &'static str, slice: &wgpu::BufferSlice<'_>, want: u64, alignment: u64) -> Result<()> {
    if slice.size() < want {
        return Err(Error::BufferSize { field, got: slice.size(), want });
    }
    if !slice.offset().is_multiple_of(alignment) {
        return Err(Error::BufferOffset { field, offset: slice.offset(), alignment });
    }
    Ok(())
}
