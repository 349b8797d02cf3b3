//! Times GPU work by the GPU's timestamps, or by the wall clock around submission and wait where the device has none.

use std::time::Instant;

use wgpu_attention::wgpu::{
    Buffer, BufferDescriptor, BufferUsages, CommandEncoder, CommandEncoderDescriptor, Features, QuerySet,
    QuerySetDescriptor, QueryType,
};
use wgpu_attention::{Gpu, Result};

/// Two timestamps of 8 bytes.
const BYTES: u64 = 16;

/// Measures one submission at a time.
#[derive(Debug)]
pub struct Timer<'a> {
    gpu: &'a Gpu,
    /// The query set and buffer of the timestamps; `None` for the wall clock.
    stamps: Option<(QuerySet, Buffer)>,
}

impl<'a> Timer<'a> {
    /// A timer that uses the wall clock if `wall_clock` is set or the device has no timestamps.
    pub fn new(gpu: &'a Gpu, wall_clock: bool) -> Self {
        let wanted = Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let stamps = (!wall_clock && gpu.device().features().contains(wanted)).then(|| {
            let set = QuerySetDescriptor { label: Some("timer"), ty: QueryType::Timestamp, count: 2 };
            let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
            let buffer = BufferDescriptor { label: Some("timer"), size: BYTES, usage, mapped_at_creation: false };
            (gpu.device().create_query_set(&set), gpu.device().create_buffer(&buffer))
        });
        Timer { gpu, stamps }
    }

    /// How this timer measures.
    pub fn name(&self) -> &'static str {
        if self.stamps.is_some() { "GPU timestamps" } else { "wall clock" }
    }

    /// Records, submits and waits; returns milliseconds.
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
}
