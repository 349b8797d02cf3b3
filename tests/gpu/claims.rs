//! Each kernel against each feature of the contract: it runs the problem itself, with none but its helpers, and rightly; or it
//! refuses, with the reason that stands here. A claim that is silently dropped, added or handed on to another kernel fails.

use std::collections::BTreeSet;

use wgpu_attention::{
    Bias, Broadcast, Causal, Element, Error, Gpu, Kernel, Layout, Logits, Obstacle, Options, Packed, Paged, Plan, with,
};
use wgpu_attention::{Form, Problem, Strides, Window, wgpu};

use crate::support::{Case, gpus, is_small};
use crate::{Reason, reason};

/// A feature: its name, the sizes [batch, heads, seq_q, seq_kv, head_dim] it is tried at, and how a problem asks for it.
struct Feature {
    name: &'static str,
    sizes: [u32; 5],
    ask: fn(&mut Problem),
    /// It changes the output of a problem of the same sizes.
    changes: bool,
}

const SIZES: [u32; 5] = [2, 4, 17, 36, 20];

fn feature(name: &'static str, changes: bool, ask: fn(&mut Problem)) -> Feature {
    Feature { name, sizes: SIZES, ask, changes }
}

fn features() -> Vec<Feature> {
    vec![
        feature("plain", false, |_| ()),
        feature("shared key/value heads", false, |p| p.kv_heads = 2),
        feature("value_dim of its own", false, |p| p.value_dim = 28),
        Feature { sizes: [1, 2, 5, 9, 7], ..feature("odd dims", false, |p| p.value_dim = 3) },
        Feature { sizes: [1, 2, 5, 9, 256], ..feature("256 dims", false, |_| ()) },
        Feature { sizes: [1, 2, 5, 9, 512], ..feature("512 dims", false, |_| ()) },
        Feature { sizes: [1, 2, 1, 601, 20], ..feature("one query of many keys", false, |_| ()) },
        feature("layout bshd", false, |p| *p = p.clone().with_layout(Layout::Bshd)),
        feature("strides", false, |p| {
            p.k = Layout::Strided(Strides { offset: 8, batch: 4 * 36 * 24, head: 24, row: 4 * 24 });
        }),
        feature("scale", true, |p| p.scale = Some(-0.7)),
        feature("soft cap", true, |p| p.softcap = Some(0.5)),
        feature("ALiBi", true, |p| p.alibi = true),
        feature("bias f32", true, |p| p.bias = Some(bias(Element::F32))),
        feature("bias f16", true, |p| p.bias = Some(bias(Element::F16))),
        feature("bias bf16", true, |p| p.bias = Some(bias(Element::Bf16))),
        feature("mask", true, |p| p.mask = Some(Broadcast([2, 1, 17, 36]))),
        feature("key lengths", true, |p| p.key_lengths = true),
        feature("key positions", true, |p| {
            (p.key_positions, p.causal) = (true, Causal::Offset);
            p.window.left = Some(9);
        }),
        feature("causal top-left", true, |p| p.causal = Causal::TopLeft),
        feature("causal bottom-right", true, |p| p.causal = Causal::BottomRight),
        feature("causal offset", true, |p| p.causal = Causal::Offset),
        feature("window", true, |p| p.window = Window { left: Some(5), right: Some(3) }),
        feature("sinks", true, |p| p.sinks = true),
        feature("packed", false, |p| p.packed = Some(Packed { total_q: 40, total_kv: 50 })),
        feature("keys in pages", false, |p| {
            (p.paged, p.key_lengths) = (Some(Paged { pages: 11, page_size: 7 }), true);
        }),
        feature("f16", false, |p| p.element = Element::F16),
        feature("native f16", false, |p| p.element = Element::F16),
        feature("bf16", false, |p| p.element = Element::Bf16),
        feature("lse", false, |p| p.lse = true),
        feature("weights", false, |p| p.weights = true),
        feature("logits raw", false, |p| p.logits = Some(Logits::Raw)),
        feature("logits capped", false, |p| (p.softcap, p.logits) = (Some(0.5), Some(Logits::Capped))),
        feature("logits masked", false, |p| (p.causal, p.logits) = (Causal::TopLeft, Some(Logits::Masked))),
    ]
}

fn bias(element: Element) -> Bias {
    Bias { shape: Broadcast([1, 4, 17, 36]), element }
}

/// Every pair of kernel and feature that is not claimed, with the reason for it. All others are.
const REFUSED: [(Kernel, &str, Reason); 19] = [
    (Kernel::Unfused, "keys in pages", reason!(Obstacle::Pages)),
    (Kernel::Rows, "512 dims", reason!(Obstacle::LaneDims { dims: 512 })),
    (Kernel::Rows, "native f16", reason!(Obstacle::PackedF16)),
    (Kernel::Rows, "logits raw", reason!(Obstacle::Logits)),
    (Kernel::Rows, "logits capped", reason!(Obstacle::Logits)),
    (Kernel::Rows, "logits masked", reason!(Obstacle::Logits)),
    (Kernel::Flash, "logits raw", reason!(Obstacle::Logits)),
    (Kernel::Flash, "logits capped", reason!(Obstacle::Logits)),
    (Kernel::Flash, "logits masked", reason!(Obstacle::Logits)),
    (Kernel::Matrix, "bf16", reason!(Obstacle::NotF16 { element: Element::Bf16 })),
    (Kernel::Matrix, "logits raw", reason!(Obstacle::Logits)),
    (Kernel::Matrix, "logits capped", reason!(Obstacle::Logits)),
    (Kernel::Matrix, "logits masked", reason!(Obstacle::Logits)),
    (Kernel::Split, "512 dims", reason!(Obstacle::SplitDims { dims: 512 })),
    (Kernel::Split, "native f16", reason!(Obstacle::PackedF16)),
    (Kernel::Split, "packed", reason!(Obstacle::PackedSequences)),
    (Kernel::Split, "logits raw", reason!(Obstacle::Logits)),
    (Kernel::Split, "logits capped", reason!(Obstacle::Logits)),
    (Kernel::Split, "logits masked", reason!(Obstacle::Logits)),
];

/// What a kernel's plan consists of: itself, and the helpers that it is documented to have.
fn consists_of(kernel: Kernel, p: &Problem) -> (BTreeSet<&'static str>, BTreeSet<&'static str>) {
    let (must, may): (&[&str], &[&str]) = match kernel {
        Kernel::Unfused => (&["scores", "softmax", "values"], &["logits", "export", "pack"]),
        Kernel::Rows => (&["rows"], &["pack"]),
        Kernel::Flash => (&["flash"], &["pack"]),
        Kernel::Matrix => (&["matrix"], &["pack"]),
        Kernel::Split => (&["split"], &["merge", "pack"]),
        other => unreachable!("the helpers of {other} are not listed"),
    };
    let mut must: BTreeSet<_> = must.iter().copied().collect();
    let mut all: BTreeSet<_> = must.iter().chain(may).copied().collect();
    if kernel != Kernel::Unfused && p.weights {
        must.extend(["scores", "softmax"]);
        all.extend(["scores", "logits", "softmax"]);
    }
    (must, all)
}

fn options(kernel: Kernel, feature: &Feature) -> Options {
    let native = feature.name == "native f16";
    let form = match kernel {
        // The lane form of the three kernels has no native f16.
        Kernel::Unfused if native => Some(Form::Tiled),
        // Adapters without matrices run the same text with plain numbers.
        Kernel::Matrix => Some(Form::Emulated),
        _ => None,
    };
    with!(Options::default(), kernel: Some(kernel), native_f16: native.then_some(true), form)
}

fn problem(feature: &Feature, element: Element) -> Problem {
    let [batch, heads, seq_q, seq_kv, head_dim] = feature.sizes;
    let mut p = Problem::new(batch, heads, seq_q, seq_kv, head_dim);
    p.element = element;
    (feature.ask)(&mut p);
    p
}

/// What keeps a kernel from a feature on a device: this table, and what the device lacks.
fn refusal(gpu: &Gpu, kernel: Kernel, feature: &Feature) -> Option<Reason> {
    let listed = REFUSED.iter().find(|&&(k, name, _)| k == kernel && name == feature.name).map(|&(.., why)| why);
    let native = feature.name == "native f16" || kernel == Kernel::Matrix;
    let no_f16 = (native && !gpu.library().caps().f16).then_some(reason!(Obstacle::NoF16));
    // Devices too small for a kernel as such have tests of their own (limits.rs). What the device lacks comes before what is asked for.
    match listed {
        Some(reason) if reason.is(&Obstacle::Logits) => no_f16.or(listed),
        _ => listed.or(no_f16),
    }
}

fn planned(gpu: &Gpu, kernel: Kernel, feature: &Feature, p: &Problem) -> Option<Plan> {
    let what = format!("{} with {}", kernel.name(), feature.name);
    match (gpu.library().plan_with(p, &options(kernel, feature)), refusal(gpu, kernel, feature)) {
        (Ok(plan), None) => {
            let names: BTreeSet<_> = plan.steps().iter().map(|step| step.variant.stage()).collect();
            let (must, may) = consists_of(kernel, p);
            assert!(names.is_superset(&must) && names.is_subset(&may), "{what} is {names:?}, not {must:?}\n{plan}");
            if feature.name == "native f16" {
                assert!(plan.steps().iter().any(|step| step.variant.needs().f16), "{what}\n{plan}");
            }
            Some(plan)
        }
        (Err(Error::Kernel { why, .. }), Some(reason)) => {
            assert!(reason.is(&why), "{what} is refused because {why}, not {reason:?}");
            None
        }
        (Ok(plan), Some(reason)) => panic!("{what} is planned, though it should be refused: {reason:?}\n{plan}"),
        (Err(error), _) => panic!("{what}: {error}"),
    }
}

#[test]
fn each_kernel_runs_what_it_claims_itself_and_refuses_the_rest_by_name() {
    let features = features();
    let mut refused: BTreeSet<(&str, &str)> = REFUSED.iter().map(|&(kernel, name, _)| (kernel.name(), name)).collect();
    let mut claimed = 0;
    for feature in &features {
        let case = Case::random(problem(feature, Element::F32), 21);
        let half_case = Case::random(problem(feature, Element::F16), 21);
        if feature.changes {
            let [batch, heads, seq_q, seq_kv, head_dim] = feature.sizes;
            let plain = Case::random(Problem::new(batch, heads, seq_q, seq_kv, head_dim), 21);
            let apart = case.want.out.iter().zip(&plain.want.out).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(apart > 1e-3, "a kernel that ignores {} would pass", feature.name);
        }
        for kernel in Kernel::ALL {
            // `matrix` takes f16 alone.
            let case = if kernel == Kernel::Matrix { &half_case } else { &case };
            for gpu in gpus() {
                // Compiling takes most of the time: elsewhere the plans alone are looked at, and other tests run every kernel.
                let runs = !is_small() && gpu.info().backend != wgpu::Backend::Gl;
                let Some(_) = planned(gpu, kernel, feature, &case.problem) else {
                    refused.remove(&(kernel.name(), feature.name));
                    continue;
                };
                claimed += 1;
                if runs {
                    case.check(gpu, &options(kernel, feature));
                }
            }
        }
    }
    assert_eq!(refused, BTreeSet::new(), "refusals in the table that never happened");
    // Native f16 is where adapters differ: the three kernels and flash claim it once, matrix all that it claims.
    let pairs = Kernel::ALL.len() * features.len() - REFUSED.len();
    let of_matrix = features.len() - REFUSED.iter().filter(|(kernel, ..)| *kernel == Kernel::Matrix).count();
    let without = gpus().iter().filter(|gpu| !gpu.library().caps().f16).count();
    assert_eq!(
        claimed,
        pairs * gpus().len() - (2 + of_matrix) * without,
        "pairs of kernel and feature that are claimed"
    );
}
