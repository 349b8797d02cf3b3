//! A device of our own: adapters, upload, run, read-back. Callers with their own device use [`Attention`] directly.

#[cfg(not(target_arch = "wasm32"))]
mod alarm;
mod environment;
mod open;
mod operations;
pub mod proof;
mod read;
mod resident;
mod wait;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Inputs, Outputs, Problem};
use crate::device::encode::{Attention, Home, Prepared};
use crate::device::lock;
use crate::trace::span;

pub use resident::Resident;
pub(crate) use resident::whole;

/// How to open a device.
#[non_exhaustive]
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// Limits to ask for; `None` asks for all that the adapter offers.
    pub limits: Option<wgpu::Limits>,
    /// Features to ask for; `None` asks for those of use that the adapter offers.
    pub features: Option<wgpu::Features>,
    /// Compile shaders with wgpu's runtime checks; slower.
    pub checked: bool,
    /// Run no trial before the first use of a kernel: trust the driver. See [`Gpu::prove`].
    pub unproven: bool,
}

/// An adapter with a device of its own.
///
/// # Asynchronous calls
///
/// Each function that waits has a form with the suffix `_async`, which it runs on the thread of its caller. The futures of the asynchronous
/// functions run under any executor, with or without tokio, and several of them at once, also on one thread. Nobody has to poll the
/// device: a future that waits does so whenever it is polled.
///
/// Native backends report finished work only to those who poll the device, so that nothing would wake the task. Therefore a thread
/// wakes it while it waits, at intervals that grow to a millisecond. That thread never uses the device, and ends with the wait. A
/// browser wakes the task by itself.
///
/// On native backends the futures are [`Send`], and nothing but the driver's compiler blocks the thread that polls them; see
/// [`Attention::prepare_async`]. A future may be dropped at any time: what was submitted still runs, and nothing is submitted
/// afterwards.
#[derive(Debug)]
pub struct Gpu {
    info: wgpu::AdapterInfo,
    device: wgpu::Device,
    queue: wgpu::Queue,
    library: Attention,
    unproven: bool,
    faults: Arc<Mutex<Faults>>,
}

/// What wgpu reported outside of error scopes.
#[derive(Debug, Default)]
struct Faults {
    /// Comes back from every call.
    lost: Option<Error>,
    /// The first error of each thread that no call has returned yet. wgpu reports on the thread whose command is wrong, so that no
    /// other thread's call gets it.
    threads: HashMap<ThreadId, Error>,
}

/// An adapter in a line: name, backend, driver.
pub fn describe(info: &wgpu::AdapterInfo) -> String {
    format!("{} ({}, {} {})", info.name, info.backend, info.driver, info.driver_info)
}

impl Gpu {
    /// The adapter.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.info
    }

    /// The device. What is wrong with commands of your own, outside of your error scopes, comes back from the next call of this `Gpu` on
    /// the same thread.
    pub fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// Its queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// Planner and pipelines of this device.
    pub fn library(&self) -> &Attention {
        &self.library
    }

    /// The same, to give it tuned rows or a pipeline cache.
    pub fn library_mut(&mut self) -> &mut Attention {
        &mut self.library
    }

    /// Runs a problem on host slices: plan, upload, compute slice by slice, read back.
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::plan`], [`Attention::prepare`], [`Gpu::upload`], [`Gpu::run`] and [`Gpu::download`].
    pub fn attention(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        self.attention_with(problem, inputs, &Options::default())
    }

    /// The same with planning [`Options`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::attention`].
    pub fn attention_with(&self, problem: &Problem, inputs: &Inputs<'_>, options: &Options) -> Result<Outputs> {
        self.block_on(self.attention_with_async(problem, inputs, options))
    }

    /// [`Gpu::attention`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::attention`].
    pub async fn attention_async(&self, problem: &Problem, inputs: &Inputs<'_>) -> Result<Outputs> {
        self.attention_with_async(problem, inputs, &Options::default()).await
    }

    /// [`Gpu::attention_with`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::attention`].
    pub async fn attention_with_async(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_>,
        options: &Options,
    ) -> Result<Outputs> {
        // What is wrong with the inputs is said before a trial runs.
        problem.check()?.check_inputs(inputs)?;
        let plan = self.plan_with_async(problem, options).await?;
        self.compute(&plan, inputs).await
    }

    pub(crate) fn check_home(&self, field: &'static str, home: &Home) -> Result<()> {
        if home.is(self.library.home()) { Ok(()) } else { Err(Error::OtherDevice { field }) }
    }

    /// Submits one slice after the other and waits for each; `progress(done, of)` follows each. Any number of threads may run the same
    /// `prepared` at once, each on a `resident` of its own: see [`crate::Recording`] for their scratch.
    ///
    /// # Errors
    ///
    /// [`Error::OtherDevice`] if `prepared` or `resident` belongs to another device, those of [`Prepared::encode`] if `resident`
    /// was uploaded for another plan, and those of [`Prepared::begin`] and of [`Gpu::wait`].
    pub fn run(&self, prepared: &Prepared, resident: &Resident, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        self.block_on(self.run_async(prepared, resident, progress))
    }

    /// [`Gpu::run`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::run`].
    pub async fn run_async(
        &self,
        prepared: &Prepared,
        resident: &Resident,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<()> {
        self.fault()?;
        self.check_home("prepared", prepared.home())?;
        self.check_home("resident", &resident.home)?;
        let call = prepared.begin()?;
        let (slices, buffers) = (prepared.slices(), resident.buffers());
        let record = |slice, encoder: &mut _| call.encode_slice(slice, encoder, &buffers);
        self.submit_slices(slices, record, |done| progress(done, slices)).await
    }

    /// Records and submits one slice after the other, and waits for each. `done` is told how many are done.
    pub(crate) async fn submit_slices(
        &self,
        slices: usize,
        mut record: impl FnMut(usize, &mut wgpu::CommandEncoder) -> Result<()>,
        mut done: impl FnMut(usize),
    ) -> Result<()> {
        let run = async {
            for slice in 0..slices {
                let label = Some("wgpu-attention: slice");
                let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
                record(slice, &mut encoder)?;
                self.queue.submit([encoder.finish()]);
                self.fault()?;
                self.wait_async().await?;
                done(slice + 1);
            }
            Ok(())
        };
        span!("run", slices).around(run).await
    }

    /// What went wrong on this thread, told once, or that the device is lost, told every time.
    pub(crate) fn fault(&self) -> Result<()> {
        let mut faults = lock(&self.faults);
        let own = faults.threads.remove(&thread::current().id());
        faults.lost.clone().or(own).map_or(Ok(()), Err)
    }
}
