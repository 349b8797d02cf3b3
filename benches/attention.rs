//! Adapters × shapes × kernels through criterion, in FLOP/s of visible pairs. Each result is checked before it is timed.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use wgpu_attention::gpu::describe;
use wgpu_attention::shape::Tensor;
use wgpu_attention::{Causal, DeviceOptions, Error, Gpu, Inputs, Kernel, Logits, Options, Problem, reference};

fn main() {
    let mut criterion =
        Criterion::default().sample_size(10).measurement_time(Duration::from_secs(2)).configure_from_args();
    let adapters = Gpu::adapters();
    assert!(!adapters.is_empty(), "no GPU adapter to measure");
    for adapter in &adapters {
        let gpu = Gpu::open(adapter, &DeviceOptions::default()).expect("the adapter opens");
        // Each stage adds its output to the run before: scores as raw logits, softmax as weights.
        for (stage, logits, weights) in
            [("whole", None, false), ("with scores", Some(Logits::Raw), false), ("with weights", None, true)]
        {
            for (seq, causal) in [(128, Causal::None), (256, Causal::TopLeft)] {
                let mut problem = Problem::new(1, 4, seq, seq, 64);
                (problem.causal, problem.logits, problem.weights) = (causal, logits, weights);
                measure(&mut criterion, &gpu, stage, &problem, &Options::default());
            }
        }
        // Every kernel on its own, at prefill and at decoding.
        for kernel in Kernel::ALL {
            for (seq_q, seq_kv) in [(128, 128), (1, 1024)] {
                let options = Options { kernel: Some(kernel), ..Options::default() };
                measure(&mut criterion, &gpu, kernel.name(), &Problem::new(1, 4, seq_q, seq_kv, 64), &options);
            }
        }
    }
    criterion.final_summary();
}

fn measure(criterion: &mut Criterion, gpu: &Gpu, stage: &str, problem: &Problem, options: &Options) {
    let shape = problem.check().expect("valid");
    let longest = shape.q().extent().max(shape.k().extent());
    let x: Vec<f32> = (0..longest).map(|i| ((i * 7919 % 1000) as f32 / 500.0) - 1.0).collect();
    let of = |tensor: &Tensor| (&x[..tensor.extent() as usize]).into();
    let inputs = Inputs { q: of(shape.q()), k: of(shape.k()), v: of(shape.v()), ..Inputs::default() };
    let plan = match gpu.library().plan_with(problem, options) {
        Ok(plan) => plan,
        Err(error @ Error::Kernel { .. }) => {
            println!("{}: not measured: {error}", describe(gpu.info()));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let prepared = gpu.library().prepare(&plan).expect("compiles");
    let resident = gpu.upload(&plan, &inputs).expect("fits");
    gpu.run(&prepared, &resident, &mut |_, _| ()).expect("runs");
    let got = gpu.download(&plan, &resident).expect("reads back");
    let (want, budget) = reference::attention_with_budget(problem, &inputs).expect("valid");
    let comparison = budget.compare_out(&shape, &got.out, &want.out);
    assert!(comparison.passed(), "{}: {comparison}", describe(gpu.info()));
    let mut group = criterion.benchmark_group(format!("{} {}", gpu.info().name, gpu.info().backend));
    group.throughput(Throughput::Elements(shape.flops() as u64));
    group.bench_function(format!("{stage} {}×{} {:?}", problem.seq_q, problem.seq_kv, problem.causal), |bencher| {
        bencher.iter(|| gpu.run(&prepared, &resident, &mut |_, _| ()).expect("runs"));
    });
    group.finish();
}
