//! Measures attention on a GPU: how long a call takes, how near that is to what the adapter can do, and whether a difference
//! between two measurements is real.
//!
//! - [`Timer`] measures a call by the GPU's timestamps, or by the wall clock where the device has none.
//! - [`Repeats`] runs a call once to warm up, then as often as fits a given time.
//! - [`Ceilings`] are the multiply-add rate and the copy bandwidth that plain shaders reach on the same adapter.
//! - [`Times`] gives median, quantiles and bootstrap confidence intervals.
//!
//! # Measuring your own problem
//!
//! ```no_run
//! use wgpu_attention::{Gpu, Inputs, Problem};
//! use wgpu_attention_bench::{Ceilings, Clock, Repeats, Timer};
//!
//! # fn main() -> wgpu_attention_bench::Result<()> {
//! let problem = Problem::new(1, 8, 1024, 1024, 64); // batch, heads, seq_q, seq_kv, head_dim
//! let x = vec![0.5; 8 * 1024 * 64];
//!
//! let gpu = Gpu::new()?;
//! let plan = gpu.plan(&problem)?;
//! let prepared = gpu.library().prepare(&plan)?;
//! let resident = gpu.upload(&plan, &Inputs::new(&x, &x, &x))?;
//!
//! let timer = Timer::new(&gpu, Clock::Timestamps);
//! let times = Repeats::default().measure(|| timer.call(&prepared, &resident, &mut |_, _| {}))?;
//!
//! let gflops = plan.shape().flops() / times.median() / 1e6;
//! let share = 100.0 * gflops / Ceilings::measure(&gpu, &timer)?.gflops;
//! println!("{} ms, {gflops} GFLOP/s, {share} % of the ceiling, by {}", times.median(), timer.name());
//! println!("95 % confidence interval of the median: {:?}", times.median_interval());
//! # Ok(())
//! # }
//! ```
//!
//! Two measurements are compared by the ratio of their medians:
//!
//! ```
//! use wgpu_attention_bench::{Times, Verdict};
//!
//! let old = Times::new(vec![10.1, 10.0, 10.2, 10.1, 10.0])?;
//! let new = Times::new(vec![8.1, 8.0, 8.3, 8.0, 8.2])?;
//! let ratio = new.ratio_to(&old);
//! assert_eq!(ratio.verdict(), Verdict::Faster);
//! assert!(ratio.interval.high < 1.0);
//! # Ok::<(), wgpu_attention_bench::Error>(())
//! ```
//!
//! An interval covers the noise within the two measurements. It knows nothing of what was different between them, such as another
//! program that was running, or a card that was hot.

mod ceilings;
mod error;
mod repeats;
mod statistics;
mod timer;

pub use ceilings::Ceilings;
pub use error::{Error, Result};
pub use repeats::Repeats;
pub use statistics::{CONFIDENCE, Interval, Quantiles, Ratio, Times, Verdict};
pub use timer::{Clock, Timer};
