//! Waiting for the device.

use std::future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use futures::FutureExt;
use futures::channel::oneshot;

use crate::contract::error::{Error, Result};
use crate::device::gpu::Gpu;
#[cfg(not(target_arch = "wasm32"))]
use crate::device::gpu::alarm::Alarm;
use crate::device::lock;

impl Gpu {
    /// Waits until the device is idle.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`] if the device is lost. [`Error::Validation`] or [`Error::OutOfMemory`] if wgpu refused a command
    /// that the caller gave on this thread; see [`Gpu::device`].
    pub fn wait(&self) -> Result<()> {
        loop {
            let polled = self.device.poll(wgpu::PollType::wait_indefinitely());
            self.fault()?;
            match polled {
                Ok(_) => return Ok(()),
                // OpenGL waits two seconds at most, however long it is asked to: nothing is lost.
                Err(wgpu::PollError::Timeout) => {}
                Err(error) => return Err(Error::DeviceLost(error.to_string())),
            }
        }
    }

    /// Waits until what was submitted so far is done, without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::wait`].
    pub async fn wait_async(&self) -> Result<()> {
        let (send, done) = oneshot::channel();
        self.queue.on_submitted_work_done(move || {
            // The receiver is gone if the caller dropped the future.
            let _ = send.send(());
        });
        self.answer(done).await
    }

    /// Runs a call on this thread. Where the call waits for the device, so does the thread, which is done sooner than if it asked again
    /// and again.
    pub(crate) fn block_on<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let mut call = pin!(call);
        let mut task = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(result) = call.as_mut().poll(&mut task) {
                return result;
            }
            self.wait()?;
        }
    }

    /// What a callback of the device sends.
    pub(super) async fn answer<T>(&self, mut sent: oneshot::Receiver<T>) -> Result<T> {
        #[cfg(not(target_arch = "wasm32"))]
        let mut alarm = Alarm::default();
        let answer = future::poll_fn(|task| {
            // On native backends callbacks run while the device is polled. It does not block; in a browser it does nothing.
            let polled = self.device.poll(wgpu::PollType::Poll);
            match (sent.poll_unpin(task), polled) {
                (Poll::Ready(Ok(answer)), _) => return Poll::Ready(Ok(answer)),
                (Poll::Ready(Err(error)), _) => return Poll::Ready(Err(Error::DeviceLost(error.to_string()))),
                (Poll::Pending, Err(error)) => return Poll::Ready(Err(Error::DeviceLost(error.to_string()))),
                (Poll::Pending, Ok(_)) => {}
            }
            // A lost device may never answer.
            if let Some(lost) = &lock(&self.faults).lost {
                return Poll::Ready(Err(lost.clone()));
            }
            #[cfg(not(target_arch = "wasm32"))]
            alarm.set(task.waker());
            Poll::Pending
        });
        let answer = answer.await;
        self.fault()?;
        answer
    }
}
