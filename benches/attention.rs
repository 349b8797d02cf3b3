//! Adapters × kernels and stages × shapes through criterion, in FLOP/s of visible pairs. Each result is checked before it is timed.

use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput};
use wgpu_attention::internal::describe;
use wgpu_attention::{
    Causal, DeviceOptions, Error, Gpu, Inputs, Kernel, Logits, Options, Prepared, Problem, Resident, compare, with,
};

/// Batch, heads, kv_heads, seq_q, seq_kv, head_dim, and the causal rule: prefill, the same causal, one step of decoding.
const SHAPES: [([u32; 6], Causal); 3] = [
    ([1, 4, 4, 256, 256, 64], Causal::None),
    ([1, 4, 4, 256, 256, 64], Causal::TopLeft),
    ([1, 8, 2, 1, 1024, 64], Causal::None),
];

/// Operations that the softmax is counted with, for each score: maximum, difference, exponential, sum, quotient.
const SOFTMAX_FLOPS: f64 = 5.0;

fn main() {
    let mut criterion = Criterion::default()
        .with_measurement(Flops)
        .sample_size(10)
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let adapters = Gpu::adapters();
    assert!(!adapters.is_empty(), "no GPU adapter to measure");
    for adapter in &adapters {
        let gpu = Gpu::open(adapter, &DeviceOptions::default()).expect("the adapter opens");
        for ([batch, heads, kv_heads, seq_q, seq_kv, head_dim], causal) in SHAPES {
            let mut problem = Problem::new(batch, heads, seq_q, seq_kv, head_dim);
            (problem.kv_heads, problem.causal) = (kv_heads, causal);
            for kernel in Kernel::ALL {
                whole(&mut criterion, &gpu, &problem, kernel);
            }
            stages(&mut criterion, &gpu, &problem);
        }
    }
    criterion.final_summary();
}

/// A problem that has run once, with what it must be compared with.
struct Ready {
    prepared: Prepared,
    resident: Resident,
    pairs: f64,
}

/// Runs the problem and checks every output before anything is timed.
fn ready(gpu: &Gpu, problem: &Problem, options: &Options) -> Ready {
    let shape = problem.check().expect("valid");
    let data =
        |len: u64, step: u64| -> Vec<f32> { (0..len).map(|i| ((i * step % 1000) as f32 / 500.0) - 1.0).collect() };
    let q = data(shape.q().extent(), 7919);
    let [k, v] = [7907, 7901].map(|step| data(shape.k().extent(), step));
    let inputs = Inputs::new(&q, &k, &v);
    let plan = gpu.library().plan_with(problem, options).expect("plans");
    let prepared = gpu.library().prepare(&plan).expect("compiles");
    let resident = gpu.upload(&plan, &inputs).expect("fits");
    gpu.run(&prepared, &resident, &mut |_, _| ()).expect("runs");
    let got = gpu.download(&plan, &resident).expect("reads back");
    let compared = compare(problem, &inputs, &got).expect("valid");
    assert!(compared.passed(), "on {}:\n{compared}", describe(gpu.info()));
    Ready { prepared, resident, pairs: shape.visible_pairs() as f64 }
}

/// Attention by one kernel, and which one the planner would take.
fn whole(criterion: &mut Criterion<Flops>, gpu: &Gpu, problem: &Problem, kernel: Kernel) {
    let planned = gpu.library().plan(problem).expect("plans").kernel();
    let options = with!(Options::default(), kernel: Some(kernel));
    let name = match gpu.library().plan_with(problem, &options) {
        Ok(plan) if plan.kernel() == planned => format!("{planned}, planned"),
        Ok(plan) => plan.kernel(),
        Err(error @ Error::Kernel { .. }) => {
            println!("{}: not measured: {error}", describe(gpu.info()));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let ready = ready(gpu, problem, &options);
    let flops = 2.0 * f64::from(problem.head_dim + problem.value_dim) * ready.pairs;
    measure(criterion, gpu, problem, &name, flops, || {
        gpu.run(&ready.prepared, &ready.resident, &mut |_, _| ()).expect("runs");
    });
}

/// Each of the three kernels by itself: its dispatches again and again, on what the run before left.
fn stages(criterion: &mut Criterion<Flops>, gpu: &Gpu, problem: &Problem) {
    let mut problem = problem.clone();
    (problem.weights, problem.logits) = (true, Some(Logits::Raw));
    let ready = ready(gpu, &problem, &with!(Options::default(), kernel: Some(Kernel::Unfused)));
    let [head_dim, value_dim] = [problem.head_dim, problem.value_dim].map(f64::from);
    for (stage, each) in [("scores", 2.0 * head_dim), ("softmax", SOFTMAX_FLOPS), ("values", 2.0 * value_dim)] {
        measure(criterion, gpu, &problem, stage, each * ready.pairs, || {
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let recording = ready.prepared.begin().expect("the run before left its scratch");
            for (i, step) in ready.prepared.plan().steps().iter().enumerate() {
                if step.variant.stage() == stage {
                    let buffers = ready.resident.buffers();
                    recording.encode_steps(i..i + 1, &mut encoder, &buffers).expect("the run before passed");
                }
            }
            gpu.queue().submit([encoder.finish()]);
            gpu.wait().expect("runs");
        });
    }
}

fn measure(criterion: &mut Criterion<Flops>, gpu: &Gpu, problem: &Problem, stage: &str, flops: f64, run: impl FnMut()) {
    let p = problem;
    let shape = format!("{},{},{},{},{},{}", p.batch, p.heads, p.kv_heads, p.seq_q, p.seq_kv, p.head_dim);
    let mut group = criterion.benchmark_group(format!("{} {}", gpu.info().name, gpu.info().backend));
    group.throughput(Throughput::Elements(flops as u64));
    let mut run = run;
    group.bench_function(format!("{stage} {shape} {:?}", p.causal), |bencher| bencher.iter(&mut run));
    group.finish();
}

/// Wall time, whose throughput is named for what its elements are: floating-point operations.
struct Flops;

impl Measurement for Flops {
    type Intermediate = <WallTime as Measurement>::Intermediate;
    type Value = <WallTime as Measurement>::Value;

    fn start(&self) -> Self::Intermediate {
        WallTime.start()
    }

    fn end(&self, start: Self::Intermediate) -> Self::Value {
        WallTime.end(start)
    }

    fn add(&self, a: &Self::Value, b: &Self::Value) -> Self::Value {
        WallTime.add(a, b)
    }

    fn zero(&self) -> Self::Value {
        WallTime.zero()
    }

    fn to_f64(&self, value: &Self::Value) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &Flops
    }
}

impl ValueFormatter for Flops {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(&self, typical: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        let Throughput::Elements(flops) = throughput else {
            return WallTime.formatter().scale_throughputs(typical, throughput, values);
        };
        // Operations in a nanosecond are 10⁹ in a second.
        values.iter_mut().for_each(|nanoseconds| *nanoseconds = *flops as f64 / *nanoseconds);
        "GFLOP/s"
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}
