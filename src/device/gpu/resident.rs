//! Operands and outputs of a call in device memory.

use crate::contract::error::Result;
use crate::contract::operands::Operands;
use crate::contract::problem::{Element, Inputs};
use crate::contract::tensor::Tensor;
use crate::device::allocation::{allocate, upload_bytes};
use crate::device::encode::{Buffers, Home};
use crate::device::gpu::Gpu;
use crate::plan::Plan;

/// Operands of one call in device memory, and buffers for its outputs.
#[derive(Debug)]
pub struct Resident {
    pub(super) home: Home,
    q: wgpu::Buffer,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    pub(super) out: wgpu::Buffer,
    operands: Operands<wgpu::Buffer>,
    pub(super) lse: Option<wgpu::Buffer>,
    pub(super) weights: Option<wgpu::Buffer>,
    pub(super) logits: Option<wgpu::Buffer>,
}

impl Resident {
    /// The operands as [`crate::Prepared::encode`] takes them.
    pub fn buffers(&self) -> Buffers<'_> {
        Buffers {
            q: self.q.slice(..),
            k: self.k.slice(..),
            v: self.v.slice(..),
            out: self.out.slice(..),
            operands: self.operands.as_ref().map(|_, buffer| buffer.slice(..)),
            lse: whole(&self.lse),
            weights: whole(&self.weights),
            logits: whole(&self.logits),
        }
    }
}

/// All of a buffer that there may be.
pub(crate) fn whole(buffer: &Option<wgpu::Buffer>) -> Option<wgpu::BufferSlice<'_>> {
    buffer.as_ref().map(|buffer| buffer.slice(..))
}

impl Gpu {
    /// Uploads operands and makes output buffers, filled with NaN where the kernels must write.
    ///
    /// # Errors
    ///
    /// Those of [`crate::Shape::check_inputs`], [`crate::Error::OutOfMemory`] if there is no memory for the buffers, and those of
    /// [`Gpu::wait`].
    pub fn upload(&self, plan: &Plan, inputs: &Inputs<'_>) -> Result<Resident> {
        pollster::block_on(self.upload_async(plan, inputs))
    }

    /// [`Gpu::upload`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::upload`].
    pub async fn upload_async(&self, plan: &Plan, inputs: &Inputs<'_>) -> Result<Resident> {
        let s = plan.shape();
        s.check_inputs(inputs)?;
        self.fault()?;
        let make = |label: &str, bytes: &[u8]| upload_bytes(&self.device, &self.queue, label, bytes);
        let nan = |label: &str, wanted: bool, len: u64| {
            wanted.then(|| make(label, bytemuck::cast_slice(&vec![f32::NAN; len as usize])))
        };
        let create = || Resident {
            home: self.library.home().clone(),
            q: make("q", inputs.q.bytes()),
            k: make("k", inputs.k.bytes()),
            v: make("v", inputs.v.bytes()),
            // Which tokens of a packed batch belong to a sequence is not known here: they start as 0.
            out: match s.problem.packed {
                Some(_) => make("out", &vec![0; (s.out().extent() * s.problem.element.bytes()) as usize]),
                None => make("out", &unwritten(s.out(), s.problem.element)),
            },
            operands: inputs.operands.map(|operand, data| make(operand.name(), data.bytes())),
            // Tokens that no packed sequence owns stay 0.
            lse: match s.problem.packed {
                Some(_) => s.problem.lse.then(|| make("lse", &vec![0; 4 * s.lse_len() as usize])),
                None => nan("lse", s.problem.lse, s.lse_len()),
            },
            weights: nan("weights", s.problem.weights, s.scores_len()),
            logits: nan("logits", s.problem.logits.is_some(), s.scores_len()),
        };
        let resident = allocate(&self.device, create).await?;
        self.fault()?;
        Ok(resident)
    }
}

/// The bytes of an output that nothing was written to: NaN in every row, 0 in the gaps that strides leave.
pub(super) fn unwritten(tensor: &Tensor, element: Element) -> Vec<u8> {
    // All bits are set in a NaN of any of the types.
    let row = vec![0xff; tensor.dim as usize * element.bytes() as usize];
    let mut bytes = vec![0; (tensor.extent() * element.bytes()) as usize];
    let [batch, heads, rows] = tensor.sizes;
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..rows {
                let at = (tensor.at(b, h, i) * element.bytes()) as usize;
                bytes[at..at + row.len()].copy_from_slice(&row);
            }
        }
    }
    bytes
}
