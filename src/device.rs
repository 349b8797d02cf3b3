//! The only folder that talks to wgpu: it opens devices, compiles kernels, records plans and moves data.

pub(crate) mod allocation;
pub(crate) mod encode;
pub mod gpu;
pub(crate) mod layer;
pub(crate) mod operation;
pub(crate) mod pipelines;
pub(crate) mod profile;
#[cfg(feature = "reference")]
pub(crate) mod runner;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what stays whole where a thread panics while it holds the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
