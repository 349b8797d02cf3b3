//! One call path for machines with and without a GPU.

use crate::error::{Error, Result};
use crate::gpu::{Gpu, describe};
use crate::problem::{Inputs, Outputs, Problem};
use crate::reference;

/// Runs problems on the GPU, or on the CPU reference where the caller allows that. Which one is never a secret: match on it,
/// or ask for its [`Runner::name`].
#[derive(Debug)]
pub enum Runner {
    /// On a GPU adapter (which may be a driver that computes on the CPU; its name says so).
    Gpu(Box<Gpu>),
    /// On the CPU reference in f32: correct, not fast.
    Cpu,
}

impl Runner {
    /// The best GPU adapter.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::new`], such as [`Error::NoAdapter`] on a machine without a GPU.
    pub fn gpu() -> Result<Runner> {
        Ok(Runner::Gpu(Box::new(Gpu::new()?)))
    }

    /// The best GPU adapter, or the CPU reference on a machine that has none.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::new`] where there is an adapter: one whose driver fails, say.
    pub fn gpu_or_cpu() -> Result<Runner> {
        match Runner::gpu() {
            Err(Error::NoAdapter { .. }) if Gpu::adapters().is_empty() => Ok(Runner::Cpu),
            result => result,
        }
    }

    /// What computes: the adapter with its backend and driver, or `CPU reference`.
    pub fn name(&self) -> String {
        match self {
            Runner::Gpu(gpu) => describe(gpu.info()),
            Runner::Cpu => "CPU reference (no GPU adapter)".into(),
        }
    }

    /// Runs a problem on host slices.
    pub fn attention(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        match self {
            Runner::Gpu(gpu) => gpu.attention(problem, inputs),
            Runner::Cpu => reference::attention::<f32>(problem, inputs),
        }
    }
}
