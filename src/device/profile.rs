//! How long each step of a plan takes on the device.

use std::cell::Cell;
use std::fmt;
use std::ops::Range;

use serde::Serialize;
use web_time::Instant;

use crate::contract::error::{Result, counted};
use crate::device::allocation::allocate;
use crate::device::encode::{Buffers, Prepared};
use crate::device::gpu::Gpu;

/// What measured the time of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// Timestamps that the device wrote before and after the step.
    Timestamps,
    /// The clock of the host around the submission of the step alone, which includes the submission and the wait.
    Wall,
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Clock::Timestamps => "timestamps of the device",
            Clock::Wall => "the wall clock around each step, submitted alone",
        })
    }
}

/// The time of one step of a plan.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// The label of the step's debug group, such as `flash[64×32] b0 h0..8`.
    pub label: String,
    /// How long it took.
    pub milliseconds: f64,
    /// Its floating-point operations, as the plan estimates them.
    pub flops: f64,
}

/// How long each step of a [`crate::Plan`] took, as [`Prepared::profile`] measures it. Print a profile to read it as a table.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Profile {
    /// What measured the times.
    pub clock: Clock,
    /// One entry for each of [`crate::Plan::steps`], in order.
    pub steps: Vec<StepTime>,
}

impl Profile {
    /// The sum of the times of all steps.
    pub fn milliseconds(&self) -> f64 {
        sum(self.steps.iter().map(|step| step.milliseconds))
    }
}

/// The sum, 0 rather than −0 where there is nothing.
fn sum(numbers: impl Iterator<Item = f64>) -> f64 {
    0.0 + numbers.sum::<f64>()
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.milliseconds();
        let flops = sum(self.steps.iter().map(|step| step.flops));
        let row = |f: &mut fmt::Formatter<'_>, milliseconds: f64, flops: f64, label: &str| {
            let share = if total > 0.0 { 100.0 * milliseconds / total } else { 0.0 };
            let rate = if milliseconds > 0.0 { format!("{:.1}", flops / milliseconds / 1e6) } else { "–".into() };
            writeln!(f, "{milliseconds:>10.3} {share:>5.1} % {:>10.4} {rate:>9}  {label}", flops / 1e9)
        };
        writeln!(f, "time of each step by {}", self.clock)?;
        writeln!(f, "{:>10} {:>7} {:>10} {:>9}  step", "ms", "share", "GFLOP", "GFLOP/s")?;
        self.steps.iter().try_for_each(|step| row(f, step.milliseconds, step.flops, &step.label))?;
        row(f, total, flops, &format!("total of {}; operations are estimated", counted(self.steps.len(), "step")))
    }
}

/// Steps that one query set has timestamps for: two for each step.
const STAMPED: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;

/// Cuts ranges into pieces of at most so many steps.
fn pieces(ranges: impl Iterator<Item = Range<usize>>, most: usize) -> Vec<Range<usize>> {
    ranges.flat_map(|range| range.clone().step_by(most).map(move |first| first..range.end.min(first + most))).collect()
}

impl Prepared {
    /// Runs the plan once and measures each of its steps. The outputs are those of [`Prepared::encode`].
    ///
    /// Each step has a compute pass of its own, with timestamps before and after it where the device has
    /// [`wgpu::Features::TIMESTAMP_QUERY`], and one submission for each slice of the plan. Where the device has no timestamps, each step is
    /// submitted alone, and the wall clock runs until it is done. The sum is more than the plan takes without a profile, where steps
    /// may overlap. What runs for the first time takes longer, too: profile a second run.
    ///
    /// # Errors
    ///
    /// [`crate::Error::OtherDevice`] if this plan was prepared for another device, [`crate::Error::OutOfMemory`] if there is no memory
    /// for the timestamps, and those of [`Prepared::encode`], [`Prepared::begin`] and [`Gpu::wait`].
    pub fn profile(&self, gpu: &Gpu, buffers: &Buffers<'_>) -> Result<Profile> {
        gpu.block_on(self.profile_async(gpu, buffers))
    }

    /// [`Prepared::profile`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Prepared::profile`].
    pub async fn profile_async(&self, gpu: &Gpu, buffers: &Buffers<'_>) -> Result<Profile> {
        gpu.fault()?;
        gpu.check_home("prepared", self.home())?;
        let (clock, times) = if gpu.device().features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            (Clock::Timestamps, self.stamped(gpu, buffers).await?)
        } else {
            (Clock::Wall, self.clocked(gpu, buffers).await?)
        };
        let named = self.plan().steps().iter().zip(self.labels());
        let steps = named.zip(times).map(|((step, label), milliseconds)| {
            let (label, flops) = (label.clone(), step.flops);
            StepTime { label, milliseconds, flops }
        });
        Ok(Profile { clock, steps: steps.collect() })
    }

    /// Milliseconds of each step by timestamps.
    async fn stamped(&self, gpu: &Gpu, buffers: &Buffers<'_>) -> Result<Vec<f64>> {
        let slices = (0..self.slices()).map(|slice| self.plan().slice_range(slice));
        let pieces = pieces(slices, STAMPED);
        let Some(longest) = pieces.iter().map(ExactSizeIterator::len).max() else { return Ok(Vec::new()) };
        let device = gpu.device();
        // Two timestamps of 8 bytes.
        let bytes = |steps: usize| 16 * steps as u64;
        let buffer = |steps, usage| {
            let label = Some("profile: timestamps");
            device.create_buffer(&wgpu::BufferDescriptor {
                label,
                size: bytes(steps),
                usage,
                mapped_at_creation: false,
            })
        };
        let (queries, resolved, all) = allocate(device, || {
            let (label, ty) = (Some("profile: timestamps"), wgpu::QueryType::Timestamp);
            let queries = device.create_query_set(&wgpu::QuerySetDescriptor { label, ty, count: 2 * longest as u32 });
            let copied = wgpu::BufferUsages::COPY_SRC;
            let resolved = buffer(longest, wgpu::BufferUsages::QUERY_RESOLVE | copied);
            (queries, resolved, buffer(self.plan().dispatches(), wgpu::BufferUsages::COPY_DST | copied))
        })
        .await?;
        let call = self.begin()?;
        let record = |piece: usize, encoder: &mut wgpu::CommandEncoder| {
            let steps = pieces[piece].clone();
            for (step, n) in steps.clone().zip(0..) {
                let writes = wgpu::ComputePassTimestampWrites {
                    query_set: &queries,
                    beginning_of_pass_write_index: Some(2 * n),
                    end_of_pass_write_index: Some(2 * n + 1),
                };
                call.record(step..step + 1, encoder, buffers, Some(writes))?;
            }
            // A query set is resolved to a multiple of 256 bytes, which the place of a piece need not be.
            encoder.resolve_query_set(&queries, 0..2 * steps.len() as u32, &resolved, 0);
            encoder.copy_buffer_to_buffer(&resolved, 0, &all, bytes(steps.start), bytes(steps.len()));
            Ok(())
        };
        gpu.submit_slices(pieces.len(), record, |_| ()).await?;
        let stamps: Vec<[u64; 2]> = bytemuck::pod_collect_to_vec(&gpu.read_async(all.slice(..)).await?);
        let milliseconds = f64::from(gpu.queue().get_timestamp_period()) / 1e6;
        Ok(stamps.iter().map(|[first, last]| last.saturating_sub(*first) as f64 * milliseconds).collect())
    }

    /// Milliseconds of each step by the wall clock.
    async fn clocked(&self, gpu: &Gpu, buffers: &Buffers<'_>) -> Result<Vec<f64>> {
        let call = self.begin()?;
        let begun = Cell::new(Instant::now());
        let mut times = Vec::new();
        let record = |step, encoder: &mut wgpu::CommandEncoder| {
            call.encode_steps(step..step + 1, encoder, buffers)?;
            begun.set(Instant::now());
            Ok(())
        };
        let done = |_| times.push(begun.get().elapsed().as_secs_f64() * 1e3);
        gpu.submit_slices(self.plan().dispatches(), record, done).await?;
        Ok(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_has_as_many_steps_as_one_query_set_has_timestamps_for() {
        assert_eq!(pieces([0..5, 5..6, 6..13].into_iter(), 3), [0..3, 3..5, 5..6, 6..9, 9..12, 12..13]);
        assert_eq!(pieces(std::iter::once(0..2 * STAMPED + 1), STAMPED).len(), 3);
        assert_eq!(pieces([].into_iter(), 3), []);
    }

    #[test]
    fn a_profile_prints_each_step_with_its_share() {
        let step = |label: &str, milliseconds, flops| StepTime { label: label.into(), milliseconds, flops };
        let steps = vec![step("scores[64×64] b0 h0..8", 1.0, 2e9), step("softmax b0 h0..8", 3.0, 0.0)];
        let text = Profile { clock: Clock::Timestamps, steps }.to_string();
        let want = "time of each step by timestamps of the device\n        ms   share      GFLOP   GFLOP/s  step
     1.000  25.0 %     2.0000    2000.0  scores[64×64] b0 h0..8
     3.000  75.0 %     0.0000       0.0  softmax b0 h0..8
     4.000 100.0 %     2.0000     500.0  total of 2 steps; operations are estimated\n";
        assert_eq!(text, want);
        let nothing = Profile { clock: Clock::Wall, steps: Vec::new() }.to_string();
        assert!(nothing.contains("0.000   0.0 %     0.0000         –  total of 0 steps"), "{nothing}");
    }
}
