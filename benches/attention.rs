//! Adapters × shapes × forms through criterion, in FLOP/s of visible pairs. Each result is checked before it is timed.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use wgpu_attention::gpu::describe;
use wgpu_attention::{Causal, DeviceOptions, Gpu, Inputs, Logits, Options, Problem, reference};

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
                measure(&mut criterion, &gpu, stage, &problem);
            }
        }
    }
    criterion.final_summary();
}

fn measure(criterion: &mut Criterion, gpu: &Gpu, stage: &str, problem: &Problem) {
    let shape = problem.check().expect("valid");
    let x: Vec<f32> = (0..shape.q().extent()).map(|i| ((i * 7919 % 1000) as f32 / 500.0) - 1.0).collect();
    let inputs = Inputs { q: (&x).into(), k: (&x).into(), v: (&x).into(), ..Inputs::default() };
    let plan = gpu.library().plan_with(problem, &Options::default()).expect("plans");
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
