//! Times Burn's attention on the default wgpu adapter, and checks it against the reference of wgpu-attention with its error budget.
//!
//! Reads one request a line, `unit 1,8,8,1024,1024,64c`, and answers each with one JSON object a line, until its input ends. One
//! process for all: Burn's kernels take seconds to minutes to compile, and are kept only as long as the process lives.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use burn_backend::TensorData;
use burn_backend::ops::{AttentionModuleOptions, FloatTensorOps};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::attention::{AttentionStrategy, attention, flash_attention};
use burn_cubecl::tensor::CubeTensor;

use cubek::attention::forward::launch::{BlueprintStrategy, Strategy};
use wgpu_attention::reference::attention_with_budget;
use wgpu_attention::{Causal, Inputs, Problem};

/// Several short calls between two waits, so that waiting is not what is timed.
const AT_ONCE: Duration = Duration::from_millis(20);
const MOST_AT_ONCE: u32 = 4;
/// Timed samples of one request: this many at least, then until the time is up or there are the most.
const LEAST: usize = 5;
const MOST: usize = 50;
const TIME: Duration = Duration::from_secs(1);

/// Which of Burn's kernels.
#[derive(Clone, Copy, Debug)]
enum Kernel {
    /// Flash attention in plain registers, without cooperative matrices.
    Unit,
    /// Matrix products around a softmax.
    Unfused,
}

/// What is known of a request after its first call.
struct Subject {
    kernel: Kernel,
    causal: bool,
    tensors: [CubeTensor; 3],
    first: Duration,
    error: f64,
    /// The largest error in proportion to its budget: up to 1 is right.
    of_budget: f64,
}

fn main() {
    let mut subjects = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("standard input is text");
        // A kernel that does not compile panics on a thread of the runtime; the next request may fare better.
        let answer = catch_unwind(AssertUnwindSafe(|| answer(&line, &mut subjects)));
        let answer = answer.unwrap_or_else(|_| Err("Burn panicked".into()));
        println!("{}", answer.unwrap_or_else(|error| serde_json::json!({ "failed": error.to_string() })));
        std::io::stdout().flush().expect("standard output is open");
    }
}

fn answer(line: &str, subjects: &mut HashMap<String, Subject>) -> Result<serde_json::Value, Box<dyn Error>> {
    if !subjects.contains_key(line) {
        subjects.insert(line.to_owned(), Subject::new(line)?);
    }
    let subject = &subjects[line];
    let warm = subject.time(1);
    let calls = (AT_ONCE.as_secs_f64() / warm.as_secs_f64()).clamp(1.0, f64::from(MOST_AT_ONCE)) as u32;
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.len() < LEAST || (begin.elapsed() < TIME && times.len() < MOST) {
        times.push(subject.time(calls).as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(serde_json::json!({
        "adapter": subject.tensors[0].client.properties().identity.name,
        "kernel": format!("{:?}", subject.kernel).to_lowercase(),
        "median_ms": times[times.len() / 2],
        "min_ms": times[0],
        "first_ms": subject.first.as_secs_f64() * 1e3,
        "error": subject.error,
        "of_budget": subject.of_budget,
        "right": subject.of_budget <= 1.0,
        "timer": format!("wall clock, {calls} calls a wait"),
    }))
}

impl Subject {
    fn new(line: &str) -> Result<Self, Box<dyn Error>> {
        let (kernel, shape) = line.split_once(' ').ok_or("a request is a kernel and a shape")?;
        let kernel = match kernel {
            "unit" => Kernel::Unit,
            "unfused" => Kernel::Unfused,
            other => return Err(format!("no kernel {other}").into()),
        };
        let causal = shape.ends_with('c');
        let sizes: Vec<usize> = shape.trim_end_matches('c').split(',').map(str::parse).collect::<Result<_, _>>()?;
        let &[batch, heads, kv_heads, seq_q, seq_kv, dim] = &sizes[..] else {
            return Err(format!("a shape is six numbers, not {}", sizes.len()).into());
        };
        let mut problem = Problem::new(batch as u32, heads as u32, seq_q as u32, seq_kv as u32, dim as u32);
        problem.kv_heads = kv_heads as u32;
        problem.causal = if causal { Causal::TopLeft } else { Causal::None };
        let checked = problem.check()?;

        // Burn has no grouped heads here. The heads of a group count as query rows of their key/value head where that is the
        // same problem: best for the peer.
        let (peer_heads, peer_rows) = match heads / kv_heads {
            1 => (heads, seq_q),
            group if seq_q == 1 && !causal => (kv_heads, group),
            group => {
                return Err(
                    format!("{group} query heads a key/value head with {seq_q} queries: another problem").into()
                );
            }
        };
        let [q, k, v] = [(1, heads * seq_q), (2, kv_heads * seq_kv), (3, kv_heads * seq_kv)]
            .map(|(seed, rows)| noise(batch * rows * dim, seed));
        let device = cubecl::Device::wgpu(Default::default())?;
        let upload = |x: &[f32], heads, rows| {
            let data = TensorData::new(x.to_vec(), [batch, heads, rows, dim]);
            <CubeBackend as FloatTensorOps<CubeBackend>>::float_from_data(data, &device)
        };
        let tensors = [upload(&q, peer_heads, peer_rows), upload(&k, kv_heads, seq_kv), upload(&v, kv_heads, seq_kv)];
        let mut subject = Subject { kernel, causal, tensors, first: Duration::ZERO, error: 0.0, of_budget: 0.0 };

        let start = Instant::now();
        let out = subject.call();
        subject.wait();
        subject.first = start.elapsed();
        let data = cubecl::future::block_on(<CubeBackend as FloatTensorOps<CubeBackend>>::float_into_data(out))
            .map_err(|error| format!("{error:?}"))?;
        let got = data.to_vec::<f32>().map_err(|error| format!("{error:?}"))?;
        let inputs = Inputs::new(&q, &k, &v);
        let (want, budget) = attention_with_budget(&problem, &inputs)?;
        let comparison = budget.compare_out(&checked, &got, &want.out);
        (subject.error, subject.of_budget) = (comparison.max_error, comparison.worst_ratio);
        Ok(subject)
    }

    fn call(&self) -> CubeTensor {
        let [q, k, v] = self.tensors.clone();
        let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: self.causal };
        match self.kernel {
            Kernel::Unit => {
                let strategy = Strategy::Unit(BlueprintStrategy::Inferred(()));
                flash_attention(q, k, v, None, None, options, strategy).expect("the unit kernel runs everywhere")
            }
            Kernel::Unfused => {
                attention(q, k, v, None, None, options, AttentionStrategy::Fallback).expect("matrix products")
            }
        }
    }

    fn wait(&self) {
        cubecl::future::block_on(self.tensors[0].client.sync()).expect("the device answers");
    }

    /// Time of one of so many calls.
    fn time(&self, calls: u32) -> Duration {
        let start = Instant::now();
        (0..calls).for_each(|_| drop(self.call()));
        self.wait();
        start.elapsed() / calls
    }
}

/// As smooth as a normal distribution needs to be for a timing.
fn noise(len: usize, mut state: u64) -> Vec<f32> {
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (uniform() + uniform() + uniform()) * 2.0).collect()
}
