//! Times Burn's attention on the default wgpu adapter, and checks it against the reference of wgpu-attention with its error budget.
//!
//! Prints one JSON object a problem, with the names of `wgpu-attention bench --json`.

use std::time::{Duration, Instant};

use burn_backend::ops::{AttentionModuleOptions, FloatTensorOps};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::attention::{AttentionStrategy, attention, flash_attention};
use burn_tensor::tensor::TensorData;
use clap::Parser;
use cubek::attention::forward::launch::{BlueprintStrategy, Strategy};
use wgpu_attention::reference::attention_with_budget;
use wgpu_attention::{Causal, Inputs, Problem};

/// Which of Burn's kernels.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Kernel {
    /// Flash attention in plain registers, without cooperative matrices
    Unit,
    /// Matrix products around a softmax
    Unfused,
}

#[derive(Parser)]
struct Arguments {
    /// B,H,HKV,SQ,SKV,D
    #[arg(long, value_delimiter = ',', num_args = 1, required = true)]
    shape: Vec<usize>,
    /// Top-left
    #[arg(long)]
    causal: bool,
    #[arg(long, value_enum, default_value = "unit")]
    kernel: Kernel,
}

/// As smooth as a normal distribution needs to be for a timing.
fn noise(len: usize, mut state: u64) -> Vec<f32> {
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (uniform() + uniform() + uniform()) * 2.0).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    let &[batch, heads, kv_heads, seq_q, seq_kv, dim] = &arguments.shape[..] else {
        return Err(format!("--shape takes six numbers, not {}", arguments.shape.len()).into());
    };
    let causal = arguments.causal;
    let [q, k, v] = [(1, heads * seq_q), (2, kv_heads * seq_kv), (3, kv_heads * seq_kv)]
        .map(|(seed, rows)| noise(batch * rows * dim, seed));

    let mut problem = Problem::new(batch as u32, heads as u32, seq_q as u32, seq_kv as u32, dim as u32);
    problem.kv_heads = kv_heads as u32;
    problem.causal = if causal { Causal::TopLeft } else { Causal::None };

    // Burn has no grouped heads here. The heads of a group count as query rows of their key/value head where that is the same
    // problem: best for the peer.
    let (peer_heads, peer_rows) = match heads / kv_heads {
        1 => (heads, seq_q),
        group if seq_q == 1 && !causal => (kv_heads, group),
        group => return Err(format!("{group} query heads a key/value head with {seq_q} queries: not the same problem").into()),
    };
    let device = cubecl::Device::wgpu(Default::default())?;
    let upload = |x: &[f32], heads, rows| {
        let data = TensorData::new(x.to_vec(), [batch, heads, rows, dim]);
        <CubeBackend as FloatTensorOps<CubeBackend>>::float_from_data(data, &device)
    };
    let tensors = [upload(&q, peer_heads, peer_rows), upload(&k, kv_heads, seq_kv), upload(&v, kv_heads, seq_kv)];
    let client = tensors[0].client.clone();
    let run = || {
        let [q, k, v] = tensors.clone();
        let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: causal };
        match arguments.kernel {
            Kernel::Unit => {
                let strategy = Strategy::Unit(BlueprintStrategy::Inferred(()));
                flash_attention(q, k, v, None, None, options, strategy).expect("the unit kernel runs everywhere")
            }
            Kernel::Unfused => attention(q, k, v, None, None, options, AttentionStrategy::Fallback).expect("matrix products"),
        }
    };
    let wait = || cubecl::future::block_on(client.sync()).expect("the device answers");

    let start = Instant::now();
    let out = run();
    wait();
    let first = start.elapsed();
    let data = cubecl::future::block_on(<CubeBackend as FloatTensorOps<CubeBackend>>::float_into_data(out))
        .map_err(|error| format!("{error:?}"))?;
    let got = data.to_vec::<f32>().map_err(|error| format!("{error:?}"))?;
    let (want, budget) = attention_with_budget(&problem, &Inputs { q: (&q).into(), k: (&k).into(), v: (&v).into(), ..Inputs::default() })?;
    let comparison = budget.compare_out(&problem.check()?, &got, &want.out);

    // Several calls between two waits, so that waiting is not what is timed.
    let calls = (Duration::from_millis(20).as_secs_f64() / first.as_secs_f64()).clamp(1.0, 4.0) as u32;
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || (begin.elapsed() < Duration::from_secs(2) && times.len() < 50) {
        let start = Instant::now();
        (0..calls).for_each(|_| drop(run()));
        wait();
        times.push(start.elapsed().as_secs_f64() * 1e3 / f64::from(calls));
    }
    times.sort_by(f64::total_cmp);
    println!(
        "{}",
        serde_json::json!({
            "kernel": format!("burn {:?}", arguments.kernel).to_lowercase(),
            "shape": arguments.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
            "causal": if causal { "top-left" } else { "none" },
            "median_ms": times[times.len() / 2],
            "min_ms": times[0],
            "first_ms": first.as_secs_f64() * 1e3,
            "error": comparison.max_error,
            "right": comparison.passed(),
        })
    );
    Ok(())
}
