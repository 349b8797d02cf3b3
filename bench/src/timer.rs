//! Times GPU work by the GPU's timestamps, or by the wall clock around submission and wait where the device has none.

use std::time::Instant;

use wgpu_attention::wgpu::{
    Buffer, BufferDescriptor, BufferUsages, CommandEncoder, CommandEncoderDescriptor, Features, QuerySet,
    QuerySetDescriptor, QueryType,
};
use wgpu_attention::{Gpu, Prepared, Resident, Result};

/// Two timestamps of 8 bytes.
const BYTES: u64 = 16;
/// The shortest time that is reported: a nanosecond.
pub(crate) const LEAST_MS: f64 = 1e-6;

/// What a [`Timer`] reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// The GPU's timestamps, or the wall clock where the device has none.
    #[default]
    Timestamps,
    /// The wall clock around submission and wait, to compare with programs that have no timestamps.
    Wall,
}

/// Measures one submission at a time.
#[derive(Debug)]
pub struct Timer<'a> {
    gpu: &'a Gpu,
    /// The query set and buffer of the timestamps; `None` for the wall clock.
    stamps: Option<(QuerySet, Buffer)>,
}

impl<'a> Timer<'a> {
    /// A timer for work on this device.
    pub fn new(gpu: &'a Gpu, clock: Clock) -> Self {
        let wanted = Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let stamps = (clock == Clock::Timestamps && gpu.device().features().contains(wanted)).then(|| {
            let set = QuerySetDescriptor { label: Some("timer"), ty: QueryType::Timestamp, count: 2 };
            let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
            let buffer = BufferDescriptor { label: Some("timer"), size: BYTES, usage, mapped_at_creation: false };
            (gpu.device().create_query_set(&set), gpu.device().create_buffer(&buffer))
        });
        Timer { gpu, stamps }
    }

    /// How this timer measures: `GPU timestamps` or `wall clock`.
    pub fn name(&self) -> &'static str {
        if self.stamps.is_some() { "GPU timestamps" } else { "wall clock" }
    }

    /// Records, submits and waits; returns milliseconds, or 0 where the clock is too coarse.
    ///
    /// # Errors
    ///
    /// What `record` returns, and what the device reports.
    pub fn time(&self, record: impl FnOnce(&mut CommandEncoder) -> Result<()>) -> Result<f64> {
        let mut encoder = self.gpu.device().create_command_encoder(&CommandEncoderDescriptor { label: Some("timed") });
        if let Some((set, _)) = &self.stamps {
            encoder.write_timestamp(set, 0);
        }
        record(&mut encoder)?;
        if let Some((set, buffer)) = &self.stamps {
            encoder.write_timestamp(set, 1);
            encoder.resolve_query_set(set, 0..2, buffer, 0);
        }
        let commands = encoder.finish();
        let start = Instant::now();
        self.gpu.queue().submit([commands]);
        self.gpu.wait()?;
        let wall = start.elapsed().as_secs_f64() * 1e3;
        let Some((_, buffer)) = &self.stamps else { return Ok(wall) };
        let bytes = self.gpu.read(buffer.slice(..))?;
        let ticks: Vec<u64> = bytes.as_chunks().0.iter().map(|&stamp| u64::from_le_bytes(stamp)).collect();
        let period = f64::from(self.gpu.queue().get_timestamp_period());
        Ok(ticks[1].saturating_sub(ticks[0]) as f64 * period / 1e6)
    }

    /// Time of one call of attention in milliseconds, above 0. Each slice is submitted and timed by itself, as [`Gpu::run`] submits them;
    /// `progress(done, of)` is called after each.
    ///
    /// # Errors
    ///
    /// What [`Prepared::begin`] and the device report.
    pub fn call(
        &self,
        prepared: &Prepared,
        resident: &Resident,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<f64> {
        let buffers = resident.buffers();
        let recording = prepared.begin()?;
        let time = |slice| {
            let ms = self.time(|encoder| recording.encode_slice(slice, encoder, &buffers));
            progress(slice + 1, prepared.slices());
            ms
        };
        let ms: f64 = (0..prepared.slices()).map(time).sum::<Result<f64>>()?;
        // A clock that is too coarse may return 0; rates must stay finite.
        Ok(ms.max(LEAST_MS))
    }
}
