//! All features in random company.

use wgpu_attention::{
    Bias, Broadcast, Causal, Element, Layout, Logits, Options, Packed, Problem, Strides, Window, with,
};

use crate::support::{Case, Random, gpus, small};
use crate::ways;

const SEQS: [u32; 10] = [1, 2, 7, 16, 33, 63, 64, 65, 100, 129];
// One bucket of dims and mostly one element type: each more takes seconds to compile, and `types` has them all.
const DIMS: [u32; 6] = [1, 4, 7, 16, 28, 32];

pub fn broadcast(r: &mut Random, full: [u32; 4]) -> Broadcast {
    let mut shape = full.map(|n| if r.once_in(2) { 1 } else { n });
    if shape[3] > 2 && r.once_in(4) {
        shape[3] -= 1;
    }
    Broadcast(shape)
}

/// A layout with room between rows, whole vectors or not.
pub fn strided(r: &mut Random, sizes: [u32; 3], dim: u32) -> Layout {
    let [_, heads, rows] = sizes.map(u64::from);
    let step = if r.once_in(2) { 4 } else { 1 };
    let pad = |n: u64, r: &mut Random| (n + u64::from(r.below(9))).next_multiple_of(step);
    let (inner, outer) = if r.once_in(2) { (heads, rows) } else { (rows, heads) };
    let small = pad(dim.into(), r);
    let large = pad(small * inner, r);
    let batch = pad(large * outer, r);
    let (head, row) = if inner == heads { (small, large) } else { (large, small) };
    Layout::Strided(Strides { offset: u64::from(r.below(3)) * step, batch, head, row })
}

fn random_problem(r: &mut Random) -> (Problem, Options) {
    let kv_heads = 1 + r.below(3);
    let heads = kv_heads * (1 + r.below(3));
    let mut p = Problem::new(1 + r.below(3), heads, r.pick(&SEQS), r.pick(&SEQS), r.pick(&DIMS));
    p.kv_heads = kv_heads;
    if r.once_in(2) {
        p.value_dim = r.pick(&DIMS);
    }
    p.element = if r.once_in(12) { Element::Bf16 } else { Element::F32 };
    p.scale = r.once_in(4).then(|| 2.0 * r.signed());
    p.softcap = r.once_in(3).then(|| 1.0 + r.normal().abs());
    p.causal = r.pick(&[Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset]);
    let side = |r: &mut Random| r.once_in(3).then(|| r.below(50));
    p.window = Window { left: side(r), right: side(r) };
    let full = [p.batch, p.heads, p.seq_q, p.seq_kv];
    p.mask = r.once_in(3).then(|| broadcast(r, full));
    p.bias = r
        .once_in(3)
        .then(|| Bias { shape: broadcast(r, full), element: r.pick(&[Element::F32, Element::F16, Element::Bf16]) });
    (p.alibi, p.sinks) = (r.once_in(3), r.once_in(3));
    (p.lse, p.weights) = (r.once_in(2), r.once_in(3));
    p.logits = r.pick(&[None, None, None, Some(Logits::Raw), Some(Logits::Capped), Some(Logits::Masked)]);
    if r.once_in(4) {
        p.packed = Some(Packed { total_q: p.seq_q + r.below(40), total_kv: p.seq_kv + r.below(40) });
        // Rows that no sequence owns keep their NaN.
        p.lse = false;
    } else {
        p.key_lengths = r.once_in(3);
    }
    let (batch, rows, keys) =
        p.packed.map_or((p.batch, p.seq_q, p.seq_kv), |packed| (1, packed.total_q, packed.total_kv));
    let sizes = [
        (heads, rows, p.head_dim),
        (kv_heads, keys, p.head_dim),
        (kv_heads, keys, p.value_dim),
        (heads, rows, p.value_dim),
    ];
    let mut layout = |(heads, rows, dim)| match r.below(4) {
        0 => Layout::Bshd,
        1 => strided(r, [batch, heads, rows], dim),
        _ => Layout::Bhsd,
    };
    [p.q, p.k, p.v, p.out] = sizes.map(&mut layout);
    if p.element != Element::F32 && matches!(p.out, Layout::Strided(_)) {
        p.out = Layout::Bshd;
    }
    let mut options = Options::default();
    if r.once_in(4) {
        options.scratch_budget = 4 * u64::from(p.seq_kv.next_multiple_of(4)) * (1 + u64::from(r.below(40)));
    }
    if r.once_in(4) {
        options.work_budget = std::time::Duration::from_micros(1 + u64::from(r.below(100)));
    }
    (p, options)
}

#[test]
fn features_hold_in_random_company() {
    let problems = if small("features_hold_in_random_company, 40 of its 60 problems") { 20 } else { 60 };
    let cases: Vec<(Case, Options)> = (0..problems)
        .map(|seed| {
            let (p, options) = random_problem(&mut Random(seed));
            (Case::random(p, seed), options)
        })
        .collect();
    for gpu in gpus() {
        for (case, Options { scratch_budget, work_budget, .. }) in &cases {
            for way in ways(gpu, &case.problem) {
                case.check(gpu, &with!(way, scratch_budget: *scratch_budget, work_budget: *work_budget));
            }
        }
    }
}
