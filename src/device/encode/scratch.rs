//! Scratch buffers, and the calls that hold them while they are recorded in parts.

use std::sync::{Arc, Mutex};

use crate::contract::error::Result;
use crate::device::allocation::{allocate, allocate_at_once};
use crate::device::lock;
use crate::kernel::slot::Slot;

/// The buffers in which one call keeps its intermediate results.
pub(crate) type Set = Vec<(Slot, wgpu::Buffer)>;

/// Sets of scratch buffers. Preparing makes one; another is made when a call needs it while all are taken.
#[derive(Debug)]
pub(crate) struct Scratch {
    device: wgpu::Device,
    /// The size of each buffer, and its name for debuggers.
    sizes: Vec<(Slot, u64, String)>,
    sets: Mutex<Sets>,
}

#[derive(Debug, Default)]
struct Sets {
    /// Serves every call that is recorded as a whole: wgpu runs these one after the other.
    shared: Option<Arc<Set>>,
    /// Each serves one call in several submissions, and is taken as long as anybody else refers to it.
    own: Vec<Arc<Set>>,
}

impl Scratch {
    pub(crate) async fn new(device: &wgpu::Device, operation: &str, sizes: Vec<(Slot, u64)>) -> Result<Self> {
        let named = |(slot, size): (Slot, u64)| (slot, size, format!("{operation}: {}", slot.name()));
        let sizes: Vec<_> = sizes.into_iter().map(named).collect();
        let first = allocate(device, || create(device, &sizes)).await?;
        let sets = Sets { shared: None, own: vec![first] };
        Ok(Scratch { device: device.clone(), sizes, sets: Mutex::new(sets) })
    }

    /// For a call that one encoder records as a whole.
    pub(crate) fn shared(&self) -> Result<Arc<Set>> {
        let mut sets = lock(&self.sets);
        if let Some(set) = &sets.shared {
            return Ok(set.clone());
        }
        let set = match sets.own.iter().position(|set| Arc::strong_count(set) == 1) {
            Some(free) => sets.own.swap_remove(free),
            None => self.another()?,
        };
        Ok(sets.shared.insert(set).clone())
    }

    /// For a call in several submissions, until the last reference is gone.
    pub(crate) fn own(&self) -> Result<Arc<Set>> {
        let mut sets = lock(&self.sets);
        if let Some(free) = sets.own.iter().find(|set| Arc::strong_count(set) == 1) {
            return Ok(free.clone());
        }
        let set = self.another()?;
        sets.own.push(set.clone());
        Ok(set)
    }

    fn another(&self) -> Result<Arc<Set>> {
        allocate_at_once(&self.device, || create(&self.device, &self.sizes))
    }
}

fn create(device: &wgpu::Device, sizes: &[(Slot, u64, String)]) -> Arc<Set> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
    let buffer = |(slot, size, label): &(Slot, u64, String)| {
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size: *size, usage, mapped_at_creation: false };
        (*slot, device.create_buffer(&descriptor))
    };
    Arc::new(sizes.iter().map(buffer).collect())
}

/// One call of a [`crate::Prepared`], an [`Operation`](crate::operations::Operation) or a
/// [`PreparedLayer`](crate::multihead::PreparedLayer) that is recorded in parts, for several submissions.
///
/// What such a call leaves in scratch for its next part is its own: other calls of the same object may be in flight, on any thread,
/// and their submissions may come in between. The first call that is recorded in parts takes the scratch that preparing allocated. One
/// that begins before the device is done with the calls before it (which wgpu notices when the device is polled, and at each
/// submission) allocates its own, which then serves later calls too.
#[derive(Debug)]
pub struct Recording<'a, T> {
    pub(crate) of: &'a T,
    pub(crate) set: Arc<Set>,
}

impl<T> Recording<'_, T> {
    /// Keeps the scratch from other calls until what the encoder has so far has run, or is dropped.
    pub(crate) fn hold(&self, encoder: &wgpu::CommandEncoder) {
        if !self.set.is_empty() {
            let set = self.set.clone();
            encoder.on_submitted_work_done(move || drop(set));
        }
    }
}
