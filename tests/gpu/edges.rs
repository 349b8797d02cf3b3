//! The edges of the contract in random company: lengths of 0, empty sequences, windows of 0, positions far outside the keys, rows
//! that see nothing or one key, biases that absorb the score, garbage in keys and values that the lengths hide.

use wgpu_attention::{Bias, Causal, Element, Layout, Logits, Packed, Problem, Window};

use crate::composed::{broadcast, strided};
use crate::support::{Case, Data, Random, gpus, small};
use crate::{problem, ways};

const SEQS: [u32; 12] = [1, 2, 3, 5, 8, 17, 31, 32, 63, 65, 96, 131];
// One bucket of dims: each more takes seconds to compile, and `types` has them all.
const DIMS: [u32; 9] = [1, 3, 4, 7, 12, 16, 28, 31, 32];
const GARBAGE: [f32; 4] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30];

fn edge_problem(r: &mut Random) -> Problem {
    let kv_heads = 1 + r.below(3);
    let heads = kv_heads * (1 + r.below(4));
    let mut p = Problem::new(1 + r.below(4), heads, r.pick(&SEQS), r.pick(&SEQS), r.pick(&DIMS));
    p.kv_heads = kv_heads;
    if r.once_in(2) {
        p.value_dim = r.pick(&DIMS);
    }
    p.element = r.pick(&[Element::F32, Element::F32, Element::F16, Element::Bf16]);
    p.scale = r.pick(&[None, None, Some(0.0), Some(-1.5), Some(30.0)]);
    p.softcap = r.pick(&[None, None, Some(0.1), Some(50.0)]);
    p.causal = r.pick(&[Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset]);
    let side = |r: &mut Random| r.pick(&[None, None, Some(0), Some(1), Some(5), Some(40), Some(1 << 28)]);
    p.window = Window { left: side(r), right: side(r) };
    let full = [p.batch, p.heads, p.seq_q, p.seq_kv];
    p.mask = r.once_in(3).then(|| broadcast(r, full));
    let element = r.pick(&[Element::F32, Element::F16, Element::Bf16]);
    p.bias = r.once_in(3).then(|| Bias { shape: broadcast(r, full), element });
    (p.alibi, p.sinks, p.lse) = (r.once_in(4), r.once_in(3), r.once_in(2));
    if r.once_in(4) {
        p.weights = r.once_in(2);
        p.logits = r.pick(&[None, Some(Logits::Raw), Some(Logits::Capped), Some(Logits::Masked)]);
    }
    if r.once_in(4) {
        p.packed = Some(Packed { total_q: p.seq_q + r.below(40), total_kv: p.seq_kv + r.below(40) });
    } else {
        p.key_lengths = r.once_in(2);
    }
    let (batch, rows, keys) =
        p.packed.map_or((p.batch, p.seq_q, p.seq_kv), |packed| (1, packed.total_q, packed.total_kv));
    let sizes = [
        (heads, rows, p.head_dim),
        (kv_heads, keys, p.head_dim),
        (kv_heads, keys, p.value_dim),
        (heads, rows, p.value_dim),
    ];
    [p.q, p.k, p.v, p.out] = sizes.map(|(heads, rows, dim)| match r.below(3) {
        0 => Layout::Bshd,
        1 => strided(r, [batch, heads, rows], dim),
        _ => Layout::Bhsd,
    });
    if p.element != Element::F32 && matches!(p.out, Layout::Strided(_)) {
        p.out = Layout::Bshd;
    }
    p
}

/// Operands at the edge of what is allowed.
pub fn edge_operands(p: &Problem, r: &mut Random, seed: u64) -> Data {
    let mut data = Data::random(p, seed, r.pick(&[1.0, 1.0, 6.0, 40.0]));
    if let (Some(bias), Some(values)) = (p.bias, &mut data.bias) {
        let lowest = match bias.element {
            Element::F32 => f32::MIN,
            Element::F16 => half::f16::MIN.to_f32(),
            Element::Bf16 => half::bf16::MIN.to_f32(),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        };
        let (low, share, hide) = (r.pick(&[lowest, lowest, -1e4, 6e4]), r.pick(&[1, 2, 3]), r.once_in(3));
        for at in 0..values.len() {
            if hide && at / bias.shape.0[3] as usize % 3 == 1 {
                values.set(at, f32::NEG_INFINITY);
            } else if r.once_in(share) {
                values.set(at, low);
            }
        }
    }
    if let (Some(shape), Some(mask)) = (p.mask, &mut data.mask) {
        for (n, row) in mask.chunks_mut(shape.0[3] as usize).enumerate() {
            let kind = (n as u32 + r.below(2)) % 5;
            if kind < 2 {
                row.fill(0);
            }
            if kind == 1 {
                *row.last_mut().expect("an axis is never 0") = 255;
            }
        }
    }
    for length in data.key_lengths.iter_mut().flatten() {
        *length = r.pick(&[0, 1, *length, p.seq_kv, p.seq_kv / 3]);
    }
    for offset in data.offsets.iter_mut().flatten() {
        let (q, kv) = (p.seq_q as i32, p.seq_kv as i32);
        *offset = r.pick(&[*offset, *offset, -1, -q, 1 - q, kv - q, kv, 1 << 29, i32::MIN]);
    }
    for slope in data.slopes.iter_mut().flatten() {
        *slope = r.pick(&[*slope, 0.0, -*slope, 8.0]);
    }
    for sink in data.sinks.iter_mut().flatten() {
        *sink = r.pick(&[*sink, *sink, 60.0, -200.0]);
    }
    data
}

/// Fills what the lengths hide: all values, and keys unless their own logits are asked for.
fn soil(p: &Problem, data: &mut Data, r: &mut Random) {
    let Some(lengths) = &data.key_lengths else { return };
    let shape = p.check().unwrap();
    let keys = !matches!(p.logits, Some(Logits::Raw | Logits::Capped));
    for (b, &length) in (0..).zip(lengths) {
        for (j, h) in (length..p.seq_kv).flat_map(|j| (0..p.kv_heads).map(move |h| (j, h))) {
            let garbage = r.pick(&GARBAGE);
            for (tensor, of, wanted) in [(&mut data.k, shape.k(), keys), (&mut data.v, shape.v(), true)] {
                let at = of.at(b, h, j) as usize;
                if wanted {
                    tensor.fill(at..at + of.dim as usize, garbage);
                }
            }
        }
    }
}

#[test]
fn the_edges_hold_in_random_company() {
    let problems = if small("the_edges_hold_in_random_company, 50 of its 70 problems") { 20 } else { 70 };
    let cases: Vec<Case> = (0..problems)
        .map(|seed| {
            let r = &mut Random(seed);
            let p = edge_problem(r);
            let mut case = Case::new(p.clone(), edge_operands(&p, r, seed));
            soil(&p, &mut case.operands, r);
            case
        })
        .collect();
    for gpu in gpus() {
        for case in &cases {
            for way in ways(gpu, &case.problem) {
                case.check(gpu, &way);
            }
        }
    }
}

/// The weight of a key that the softmax leaves nothing may be the smallest normal number, not 0, however large its value is: with a logit of
/// −∞, and beside a sink that takes everything.
#[test]
fn weights_next_to_nothing_are_within_the_budget() {
    for element in [Element::F32, Element::Bf16] {
        let p = problem([1, 8, 5, 7, 32], |p| (p.sinks, p.element, p.logits) = (true, element, None));
        let mut data = Data::random(&p, 11, 1.0);
        data.sinks = Some((0..8).map(|head| 86.0 + 0.5 * head as f32).collect());
        data.v.fill(0..data.v.len(), 500.0);
        // Queries below and keys above 0: their product is −∞ in the lanes of an infinity.
        data.q.fill(0..data.q.len() / 2, -1.0);
        data.q.fill(0..1, f32::NEG_INFINITY);
        data.k.fill(0..data.k.len() / 2, 1.0);
        let case = Case::new(p, data);
        for gpu in gpus() {
            for way in ways(gpu, &case.problem) {
                case.check(gpu, &way);
            }
        }
    }
}
