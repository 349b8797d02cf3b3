//! Comparison with the CPU: every output of a call against the f64 reference, within the error that f32 arithmetic may make
//! on these very numbers.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example compare
//! ```

use half::f16;
use wgpu_attention::{Broadcast, Element, Gpu, Inputs, Problem, compare, reference};

pub(crate) fn main() -> wgpu_attention::Result<()> {
    // f16 in memory, a boolean mask for each batch, and all outputs that there are.
    let mut problem = Problem::new(2, 4, 33, 65, 32);
    (problem.element, problem.lse, problem.weights) = (Element::F16, true, true);
    problem.mask = Some(Broadcast::new("mask", &[2, 1, 1, 65])?);
    let numbers = |n: usize| (0..n).map(|i| f16::from_f32((i as f32 * 0.37).sin())).collect::<Vec<f16>>();
    let (q, k, v) = (numbers(2 * 4 * 33 * 32), numbers(2 * 4 * 65 * 32), numbers(2 * 4 * 65 * 32));
    let mask: Vec<u8> = (0..2 * 65).map(|i| u8::from(i % 3 != 0)).collect(); // 1: may attend
    let mut inputs = Inputs::new(&q, &k, &v);
    inputs.operands.mask = Some((&mask).into());

    // ANCHOR: compare
    let mut outputs = Gpu::new()?.attention(&problem, &inputs)?;
    let comparisons = compare(&problem, &inputs, &outputs)?;
    print!("{comparisons}"); // a line for each output
    assert!(comparisons.passed());

    // A wrong number is found, and where it is.
    outputs.out[7] += 0.01;
    let comparisons = compare(&problem, &inputs, &outputs)?;
    let worst = comparisons.get("out").and_then(|out| out.budget.worst).expect("there are outputs");
    println!("{worst:?}");
    assert!(!comparisons.passed() && worst.index == 7);
    // ANCHOR_END: compare

    // ANCHOR: f32
    // What f32 arithmetic alone loses on the CPU: the same functions, once in f32 and once in f64.
    let f32s = reference::attention::<f32>(&problem, &inputs)?.lse.expect("asked for");
    let f64s = reference::attention::<f64>(&problem, &inputs)?.lse.expect("asked for");
    let lost = f32s.iter().zip(&f64s).map(|(&x, y)| (f64::from(x) - y).abs()).fold(0.0, f64::max);
    println!("f32 on the CPU loses {lost:.1e} in lse");
    // ANCHOR_END: f32
    assert!(lost > 0.0 && lost < 1e-5);
    Ok(())
}
