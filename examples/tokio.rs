//! Asynchronous calls under tokio: several requests at once on one device, and no thread is blocked.
//!
//! The futures are `Send` and need no particular executor. A server would use a runtime of several threads.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example tokio
//! ```

use std::sync::Arc;

use tokio::task::JoinSet;
use wgpu_attention::{Causal, Gpu, Inputs, Outputs, Problem, Result};

/// One request: a causal prompt of so many tokens.
async fn answer(gpu: Arc<Gpu>, tokens: u32) -> Result<(u32, Outputs)> {
    let mut problem = Problem::new(1, 4, tokens, tokens, 32);
    problem.causal = Causal::TopLeft;
    let x: Vec<f32> = (0..4 * tokens * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    // ANCHOR: call
    let outputs = gpu.attention_async(&problem, &Inputs::new(&x, &x, &x)).await?;
    // ANCHOR_END: call
    assert!((outputs.out[0] - x[0]).abs() < 1e-6); // the first row sees one key
    Ok((tokens, outputs))
}

pub(crate) fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime of one thread");
    // ANCHOR: spawn
    runtime.block_on(async {
        let gpu = Arc::new(Gpu::new_async().await?);
        let mut requests = JoinSet::new();
        for tokens in [5, 64, 17, 120] {
            requests.spawn(answer(gpu.clone(), tokens));
        }
        let mut answered = Vec::new();
        while let Some(answer) = requests.join_next().await {
            let (tokens, outputs) = answer.expect("no request panics")?;
            println!("{tokens} tokens: {} numbers", outputs.out.len());
            answered.push(tokens);
        }
        answered.sort_unstable();
        assert_eq!(answered, [5, 17, 64, 120]);
        Ok(())
    })
    // ANCHOR_END: spawn
}
