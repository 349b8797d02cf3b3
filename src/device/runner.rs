//! One call path for machines with and without a GPU.

use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Inputs, Outputs, Problem};
use crate::device::gpu::{Gpu, describe};
use crate::reference;

/// Runs problems on the GPU, or on the CPU reference where the caller allows that. Which one is never a secret: match on it,
/// or ask for its [`Runner::name`].
#[derive(Debug)]
pub enum Runner {
    /// On a GPU adapter (which may be a driver that computes on the CPU; its name says so).
    Gpu(Box<Gpu>),
    /// On the CPU reference in f32: correct, not fast.
    Cpu {
        /// Why no GPU computes.
        why: String,
    },
}

impl Runner {
    /// The best GPU adapter.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::new`], such as [`Error::NoAdapter`] on a machine without a GPU.
    pub fn gpu() -> Result<Runner> {
        pollster::block_on(Self::gpu_async())
    }

    /// [`Runner::gpu`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`Runner::gpu`].
    pub async fn gpu_async() -> Result<Runner> {
        Ok(Runner::Gpu(Box::new(Gpu::new_async().await?)))
    }

    /// The best GPU adapter. The CPU reference computes on a machine that has no adapter, and where the adapter's driver gives wrong
    /// results by every kernel; see [`Gpu::plan`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::new`] where there is an adapter: one that makes no device, say.
    pub fn gpu_or_cpu() -> Result<Runner> {
        pollster::block_on(Self::gpu_or_cpu_async())
    }

    /// [`Runner::gpu_or_cpu`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`Runner::gpu_or_cpu`].
    pub async fn gpu_or_cpu_async() -> Result<Runner> {
        match Runner::gpu_async().await {
            Err(Error::NoAdapter { .. }) if Gpu::adapters_async().await.is_empty() => {
                Ok(Runner::Cpu { why: "no GPU adapter".into() })
            }
            Ok(Runner::Gpu(gpu)) => Runner::proven_async(*gpu).await,
            result => result,
        }
    }

    /// A GPU, or the CPU reference if the GPU's driver gives wrong results by every kernel for an ordinary problem in f32.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::plan`], but for [`Error::Kernel`].
    pub fn proven(gpu: Gpu) -> Result<Runner> {
        pollster::block_on(Self::proven_async(gpu))
    }

    /// [`Runner::proven`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`Runner::proven`].
    pub async fn proven_async(gpu: Gpu) -> Result<Runner> {
        match gpu.plan_with_async(&Problem::new(1, 1, 64, 64, 64), &Options::default()).await {
            Err(error @ Error::Kernel { .. }) => {
                Ok(Runner::Cpu { why: format!("{} computes nothing rightly: {error}", describe(gpu.info())) })
            }
            planned => planned.map(|_| Runner::Gpu(Box::new(gpu))),
        }
    }

    /// What computes: the adapter with its backend and driver, or `CPU reference` with the reason.
    pub fn name(&self) -> String {
        match self {
            Runner::Gpu(gpu) => describe(gpu.info()),
            Runner::Cpu { why } => format!("CPU reference ({why})"),
        }
    }

    /// Runs a problem on host slices.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::attention`] or of [`reference::attention`], whichever runs.
    pub fn attention(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        match self {
            Runner::Gpu(gpu) => gpu.attention(problem, inputs),
            Runner::Cpu { .. } => reference::attention::<f32>(problem, inputs),
        }
    }

    /// [`Runner::attention`] without blocking the thread while a GPU computes. The CPU reference computes on the thread that polls.
    ///
    /// # Errors
    ///
    /// Those of [`Runner::attention`].
    pub async fn attention_async(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        match self {
            Runner::Gpu(gpu) => gpu.attention_async(problem, inputs).await,
            Runner::Cpu { .. } => reference::attention::<f32>(problem, inputs),
        }
    }
}
