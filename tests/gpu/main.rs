//! The GPU against the reference, on every adapter: each stage and the whole, within the error budget of the very data.

#[path = "../support/mod.rs"]
mod support;

mod asynchronous;
mod claims;
mod composed;
mod decode;
mod device;
mod differential;
mod edges;
mod empty;
mod hidden;
mod layouts;
mod limits;
mod long;
mod matrix;
mod nonfinite;
mod operands;
mod paged;
mod profile;
mod stages;
mod types;
mod visible;
mod weights;

use std::fmt;

use support::{Case, gpus, is_small};
use wgpu_attention::internal::Tensor;
use wgpu_attention::{
    Broadcast, Causal, Element, Error, Form, Gpu, Kernel, Logits, Obstacle, Options, Problem, wgpu, with,
};

fn form(form: Option<Form>) -> Options {
    with!(Options::default(), form)
}

/// A problem with every output.
fn problem(sizes: [u32; 5], set: impl FnOnce(&mut Problem)) -> Problem {
    let [batch, heads, seq_q, seq_kv, head_dim] = sizes;
    let mut p = Problem::new(batch, heads, seq_q, seq_kv, head_dim);
    (p.lse, p.weights, p.logits) = (true, true, Some(Logits::Masked));
    set(&mut p);
    p
}

/// The same problem without the outputs of the size of the score matrix: every kernel can run, keys out of range are skipped.
fn lean(p: &Problem) -> Problem {
    let mut p = p.clone();
    (p.weights, p.logits) = (false, None);
    p
}

/// Every kernel that can be forced, with the bodies of those that have two.
const KERNELS: [(Kernel, Option<Form>); 7] = [
    (Kernel::Unfused, Some(Form::Tiled)),
    (Kernel::Unfused, Some(Form::Lanes)),
    (Kernel::Rows, None),
    (Kernel::Flash, None),
    (Kernel::Matrix, None),
    (Kernel::Matrix, Some(Form::Emulated)),
    (Kernel::Split, None),
];

/// The ways in which a test computes a problem: on Vulkan and its peers every way, on OpenGL and in the small suite the planner's
/// choice alone, because compiling takes most of the time; there `every_kernel_holds_on_every_adapter` runs the rest.
fn ways(gpu: &Gpu, p: &Problem) -> Vec<Options> {
    let every = every_way(gpu, p);
    let few = is_small() || gpu.info().backend == wgpu::Backend::Gl;
    every.into_iter().take(if few { 1 } else { usize::MAX }).collect()
}

/// Every way to compute a problem on a device, none twice: first the planner's choice, then each kernel wherever it can run.
/// Where one cannot, the refusal must give the very reason that is expected.
fn every_way(gpu: &Gpu, p: &Problem) -> Vec<Options> {
    let plan = |way: &Options| gpu.library().plan_with(p, way);
    let mut plans = vec![plan(&form(None)).unwrap_or_else(|error| panic!("{error}\n{p:?}"))];
    let mut ways = vec![form(None)];
    for (kernel, form) in KERNELS {
        let way = with!(Options::default(), kernel: Some(kernel), form);
        match (plan(&way), obstacle(gpu, p, kernel, form)) {
            (Ok(plan), None) => {
                if plans.iter().all(|other| other.steps() != plan.steps()) {
                    plans.push(plan);
                    ways.push(way);
                }
            }
            (Err(Error::Kernel { kernel: name, why }), Some(reason)) => {
                assert!(name == kernel.name() && reason.is(&why), "{name}: {why}, not {reason:?}\n{p:?}");
            }
            (result, reason) => panic!("{}: {:?}, but expected {reason:?}\n{p:?}", kernel.name(), result.err()),
        }
    }
    ways
}

/// What a refusal must be: a pattern of [`Obstacle`].
#[derive(Clone, Copy)]
struct Reason {
    pattern: &'static str,
    fits: fn(&Obstacle) -> bool,
}

impl Reason {
    fn is(&self, why: &Obstacle) -> bool {
        (self.fits)(why)
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.pattern)
    }
}

macro_rules! reason {
    ($pattern:pat) => {
        $crate::Reason { pattern: stringify!($pattern), fits: |why| matches!(why, $pattern) }
    };
}

use reason;

/// Why a kernel cannot run a problem on a device, as its documentation has it.
fn obstacle(gpu: &Gpu, p: &Problem, kernel: Kernel, form: Option<Form>) -> Option<Reason> {
    let caps = gpu.library().caps();
    let limits = &caps.limits;
    let full = p.key_positions || p.softcap.is_some() || p.alibi || p.mask.is_some() || p.bias.is_some();
    let paged = p.paged.is_some();
    let small = p.lse || p.sinks || p.key_lengths || p.packed.is_some() || paged;
    let lists = small || p.causal == Causal::Offset;
    let buffers = match kernel {
        Kernel::Unfused => return paged.then_some(reason!(Obstacle::Pages)),
        _ if full => 8,
        Kernel::Flash | Kernel::Matrix if !lists => 4,
        _ => 6,
    };
    let bound =
        |tensor: &Tensor| u64::from(tensor.sizes[2].saturating_sub(1)) * tensor.strides.row + u64::from(tensor.dim);
    let shape = p.check().unwrap();
    let longest = bound(shape.k()).max(bound(shape.v())) * shape.problem().element.bytes();
    let alignment = u64::from(limits.min_storage_buffer_offset_alignment).max(32);
    // Where the keys of a head exceed a binding, what waits between the dispatches over them needs room, and a binding.
    let room = limits.max_storage_buffer_binding_size;
    let several = p.packed.is_none() && !paged && longest > room - alignment;
    let dims = |dim: u32| u64::from([32, 64, 128, 256].into_iter().find(|&dims| dim <= dims).unwrap_or(256));
    let between = match kernel {
        Kernel::Rows => {
            let dims = dims(p.head_dim.max(p.value_dim));
            let lanes = u64::from(caps.subgroup_size.filter(|lanes| [4, 8].contains(lanes)).unwrap_or(8));
            16 * lanes * (512 / dims).min(8) * (1 + dims / 4)
        }
        Kernel::Flash => 2048 * (2 + dims(p.value_dim).min(128) / 8),
        Kernel::Split => longest.div_ceil(room - alignment) * 4 * shape.lse_len() * u64::from(p.value_dim).max(2),
        _ => u64::MAX,
    };
    let most = if full { 8 } else { 6 };
    let few = limits.max_compute_invocations_per_workgroup < 128;
    // What the problem and the device are comes before what is asked for.
    if kernel == Kernel::Split && p.packed.is_some() {
        Some(reason!(Obstacle::PackedSequences))
    } else if kernel == Kernel::Split && p.head_dim.max(p.value_dim) > 256 {
        Some(reason!(Obstacle::SplitDims { dims: 257.. }))
    } else if kernel == Kernel::Split && few && !caps.int64 && limits.max_compute_workgroup_storage_size < 8836 {
        // The bytes of its only tile of 64 invocations.
        Some(reason!(Obstacle::SplitDims { dims: ..=256 }))
    } else if kernel == Kernel::Matrix && p.element != Element::F16 {
        Some(reason!(Obstacle::NotF16 { element: Element::F32 | Element::Bf16 }))
    } else if kernel == Kernel::Matrix && !caps.f16 {
        Some(reason!(Obstacle::NoF16))
    } else if kernel == Kernel::Matrix && form.is_none() && caps.matrices.is_empty() {
        Some(reason!(Obstacle::NoMatrices))
    } else if kernel == Kernel::Matrix && form.is_none() && caps.subgroup_max_size.is_none_or(|most| most > 64) {
        Some(reason!(Obstacle::SubgroupLanes { limit: 64 }))
    } else if kernel == Kernel::Matrix && few {
        Some(reason!(Obstacle::NoTile))
    } else if kernel == Kernel::Rows && p.head_dim.max(p.value_dim) > 256 {
        Some(reason!(Obstacle::LaneDims { dims: 257.. }))
    } else if kernel == Kernel::Flash && few {
        Some(reason!(Obstacle::NoTile))
    } else if limits.max_storage_buffers_per_shader_stage < buffers {
        Some(reason!(Obstacle::Bindings { .. }))
    } else if p.logits.is_some() {
        Some(reason!(Obstacle::Logits))
    } else if several
        && (between > room || (kernel != Kernel::Split && limits.max_storage_buffers_per_shader_stage <= most))
    {
        Some(match kernel {
            Kernel::Matrix => reason!(Obstacle::LongKeys),
            // The f32 results of 16-bit outputs may exceed a binding even in one dispatch.
            Kernel::Split => reason!(Obstacle::SeveralDispatches { .. } | Obstacle::Partials { .. }),
            _ => reason!(Obstacle::SeveralDispatches { .. }),
        })
    } else {
        None
    }
}

/// Compares on every adapter, in every way, and again without the outputs that keep fused kernels away.
#[track_caller]
fn everywhere(case: Case) {
    all_everywhere(&[case]);
}

/// The same with many cases, adapter by adapter, so that other tests need not wait for OpenGL meanwhile.
#[track_caller]
fn all_everywhere(cases: &[Case]) {
    for gpu in gpus() {
        for case in cases {
            let lean = case.lean();
            // A case that was lean from the start runs once.
            for case in [Some(case), Some(&lean).filter(|lean| lean.problem != case.problem)].into_iter().flatten() {
                for way in ways(gpu, &case.problem) {
                    case.check(gpu, &way);
                }
            }
        }
    }
}

#[test]
fn every_kernel_holds_on_every_adapter() {
    for element in [Element::F32, Element::F16] {
        let p = problem([2, 4, 35, 67, 20], |p| {
            (p.element, p.kv_heads, p.causal) = (element, 2, Causal::BottomRight);
            (p.key_lengths, p.sinks, p.weights, p.logits) = (true, true, false, None);
            p.mask = (element == Element::F16).then_some(Broadcast([1, 1, 35, 66]));
        });
        let case = Case::random(p, 1);
        for gpu in gpus() {
            let ways = every_way(gpu, &case.problem);
            assert!(
                ways.len() >= if gpu.library().caps().limits.max_storage_buffers_per_shader_stage < 8 { 2 } else { 5 }
            );
            for way in ways {
                if way.kernel == Some(Kernel::Rows) && gpu.library().caps().subgroup_size.is_some_and(|size| size < 8) {
                    println!("left to the other adapters: rows, which drivers of four lanes take minutes to compile");
                    continue;
                }
                case.check(gpu, &way);
            }
        }
    }
}
