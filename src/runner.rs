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
    /// The best GPU adapter. On a machine without any: the CPU reference if `allow_cpu`, else [`Error::NoAdapter`].
    /// Every other error (a driver that fails, say) is returned either way.
    pub fn new(allow_cpu: bool) -> Result<Runner> {
        pollster::block_on(Self::new_async(allow_cpu))
    }

    /// [`Runner::new`] without blocking the thread.
    pub async fn new_async(allow_cpu: bool) -> Result<Runner> {
        match Gpu::new_async().await {
            Ok(gpu) => Ok(Runner::Gpu(Box::new(gpu))),
            Err(Error::NoAdapter { .. }) if allow_cpu && Gpu::adapters_async().await.is_empty() => Ok(Runner::Cpu),
            Err(error) => Err(error),
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

    /// [`Runner::attention`] without blocking the thread while a GPU computes. The CPU reference computes on the thread that polls.
    pub async fn attention_async(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        match self {
            Runner::Gpu(gpu) => gpu.attention_async(problem, inputs).await,
            Runner::Cpu => reference::attention::<f32>(problem, inputs),
        }
    }
}
