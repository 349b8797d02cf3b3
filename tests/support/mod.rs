//! Adapters under test, signed random data, and the comparison of a GPU run with the reference.
#![allow(dead_code)] // each test file uses a part of this

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, OnceLock};

use wgpu_attention::gpu::describe;
use wgpu_attention::{Causal, DeviceOptions, Elements, Gpu, Inputs, Options, Problem, reference, wgpu};

/// The adapters that `WGPU_ATTENTION_ADAPTERS` lists (`backend:name-part`, …), or all; none at all is a failure.
pub fn gpus() -> &'static [Gpu] {
    take_turn();
    static GPUS: OnceLock<Vec<Gpu>> = OnceLock::new();
    GPUS.get_or_init(|| {
        const HELP: &str = "no adapter to test on; Debian and Ubuntu: apt-get install mesa-vulkan-drivers libvulkan1 libegl1 libgles2 libgl1-mesa-dri";
        let adapters = match std::env::var("WGPU_ATTENTION_ADAPTERS") {
            Ok(list) => list.split(',').map(|wanted| Gpu::find(wanted).unwrap_or_else(|error| panic!("{error}\n{HELP}"))).collect(),
            Err(_) => Gpu::adapters(),
        };
        assert!(!adapters.is_empty(), "{HELP}");
        let options = DeviceOptions { checked: checked(), ..Default::default() };
        adapters.iter().map(|adapter| Gpu::open(adapter, &options).expect("the adapter opens")).collect()
    })
}

/// Lets the tests of a binary that use adapters run one after the other, each until its thread ends: wgpu's OpenGL panics where
/// a thread waits a second for another that compiles. The drivers use all processors anyway.
fn take_turn() {
    static TURN: Mutex<()> = Mutex::new(());
    thread_local!(static MINE: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) });
    MINE.with_borrow_mut(|mine| {
        mine.get_or_insert_with(|| TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    });
}

/// Whether shaders are compiled with wgpu's runtime checks.
pub fn checked() -> bool {
    std::env::var_os("WGPU_ATTENTION_CHECKED").is_some()
}

/// A device with the least that the crate promises to run on, and every split forced.
pub fn floor(gpu: &Gpu, binding: u64, side: u32) -> Gpu {
    let adapter = Gpu::adapters().into_iter().find(|a| a.get_info() == *gpu.info()).expect("still there");
    let limits = wgpu::Limits {
        max_storage_buffers_per_shader_stage: 4,
        max_compute_workgroup_storage_size: 16352,
        max_compute_invocations_per_workgroup: 256,
        max_compute_workgroups_per_dimension: side,
        max_storage_buffer_binding_size: binding,
        ..adapter.limits()
    };
    let options = DeviceOptions { limits: Some(limits), features: Some(wgpu::Features::empty()), checked: checked() };
    Gpu::open(&adapter, &options).expect("lower limits are granted")
}

/// Whether the adapter is slow and runs the small suite; what is left to the others is printed by name.
pub fn small(left_out: &str) -> bool {
    let small = std::env::var("WGPU_ATTENTION_SUITE").is_ok_and(|suite| suite == "small");
    if small {
        println!("left to the other adapters: {left_out}");
    }
    small
}

/// Host operands of a problem.
#[derive(Default)]
pub struct Data {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub mask: Option<Vec<u8>>,
    pub bias: Option<Vec<f32>>,
    pub key_lengths: Option<Vec<u32>>,
    pub offsets: Option<Vec<i32>>,
    pub alibi_slopes: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    pub cu_seqlens_q: Option<Vec<u32>>,
    pub cu_seqlens_kv: Option<Vec<u32>>,
}

/// A small linear congruential generator (Knuth's constants): the same data on every machine.
pub struct Random(pub u64);

impl Random {
    /// Uniform in [-1, 1).
    pub fn signed(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32 / (1 << 23) as f32) - 1.0
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: u32) -> u32 {
        (((self.signed() + 1.0) / 2.0 * n as f32) as u32).min(n - 1)
    }

    pub fn signed_vec(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.signed() * size).collect()
    }
}

impl Data {
    /// Signed data for every operand of a problem; `peak` scales q, so that softmax is as peaked as wanted.
    pub fn random(problem: &Problem, seed: u64, peak: f32) -> Data {
        let shape = problem.check().expect("a valid problem");
        let mut r = Random(seed);
        let (batch, heads) = (problem.batch as usize, problem.heads as usize);
        Data {
            q: r.signed_vec(shape.q().extent() as usize, peak),
            k: r.signed_vec(shape.k().extent() as usize, 1.0),
            v: r.signed_vec(shape.v().extent() as usize, 1.0),
            mask: problem.mask.map(|m| (0..m.len()).map(|_| u8::from(r.signed() > -0.2)).collect()),
            bias: problem.bias.map(|b| {
                let bias = |r: &mut Random| if r.below(8) == 0 { f32::NEG_INFINITY } else { 2.0 * r.signed() };
                (0..b.shape.len()).map(|_| bias(&mut r)).collect()
            }),
            key_lengths: problem.key_lengths.then(|| (0..batch).map(|_| r.below(problem.seq_kv + 1)).collect()),
            offsets: (problem.causal == Causal::Offset)
                .then(|| (0..batch).map(|_| r.below(2 * problem.seq_kv) as i32 - problem.seq_kv as i32 / 2).collect()),
            alibi_slopes: problem.alibi.then(|| r.signed_vec(heads, 0.1)),
            sinks: problem.sinks.then(|| r.signed_vec(heads, 2.0)),
            cu_seqlens_q: None,
            cu_seqlens_kv: None,
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q: Elements::F32(&self.q),
            k: Elements::F32(&self.k),
            v: Elements::F32(&self.v),
            mask: self.mask.as_deref(),
            bias: self.bias.as_deref().map(Elements::F32),
            key_lengths: self.key_lengths.as_deref(),
            offsets: self.offsets.as_deref(),
            alibi_slopes: self.alibi_slopes.as_deref(),
            sinks: self.sinks.as_deref(),
            cu_seqlens_q: self.cu_seqlens_q.as_deref(),
            cu_seqlens_kv: self.cu_seqlens_kv.as_deref(),
        }
    }
}

/// Runs a problem and compares every output with the f64 reference, row by row, under the derived budget.
pub fn check(gpu: &Gpu, problem: &Problem, inputs: &Inputs<'_>, options: &Options) {
    let plan = gpu.library().plan_with(problem, options).unwrap_or_else(|error| panic!("{error}: {problem:?}"));
    let got = gpu.attention_with(problem, inputs, options).unwrap_or_else(|error| panic!("{error}: {problem:?}"));
    let (want, budget) = reference::attention_with_budget(problem, inputs).expect("valid inputs");
    let mut comparisons = vec![("out", budget.compare_out(plan.shape(), &got.out, &want.out))];
    let rest = [
        ("lse", &got.lse, &want.lse, &budget.lse),
        ("weights", &got.weights, &want.weights, &budget.weights),
        ("logits", &got.logits, &want.logits, &budget.logits),
    ];
    for (name, got, want, tolerance) in rest {
        assert_eq!(got.is_some(), want.is_some(), "{name} is given exactly when asked for");
        if let (Some(got), Some(want)) = (got, want) {
            comparisons.push((name, tolerance.check(got, want)));
        }
    }
    for (name, comparison) in comparisons {
        assert!(comparison.passed(), "{name} on {}: {comparison}\n{plan}\n{problem:?}", describe(gpu.info()));
    }
}
