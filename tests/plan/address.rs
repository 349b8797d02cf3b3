//! The addresses that the shaders form, worked out on the host for the corners of every tile: inside the binding, at the
//! right element, and whole vectors where the shader reads vectors.

use wgpu_attention::kernel::{Body, Format, Slot, Variant};
use wgpu_attention::plan::{Bound, Step};
use wgpu_attention::shape::Tensor;
use wgpu_attention::{Broadcast, Plan};

use crate::coverage::{Place, parts_before, places};

pub fn inside(plan: &Plan) {
    for step in plan.steps() {
        // tests/merge.rs runs these with every limit.
        if let Variant::Merge(_) = step.variant {
            continue;
        }
        for bound in &step.bindings {
            match bound.slot {
                Slot::Lists => lists(plan, step, bound),
                // Stands for an output that is not asked for; nothing is written.
                Slot::Spare => {}
                Slot::State => state(step, bound),
                _ if matches!(step.variant, Variant::Pack(_)) => packing(plan, step, bound),
                _ => places(plan, step).for_each(|place| corners(plan, step, bound, &place)),
            }
        }
    }
}

fn corners(plan: &Plan, step: &Step, bound: &Bound, place: &Place) {
    let s = plan.shape();
    let rows = [place.rows.start, place.rows.end - 1];
    let owns_dims = matches!(
        step.variant,
        Variant::Values(_) | Variant::Rows(_) | Variant::Flash(_) | Variant::Matrix(_) | Variant::Split(_)
    );
    // What owns dims runs over the dispatch's keys; all others own keys.
    let keys = if owns_dims { step.params.key0..step.params.key_end } else { place.cols.clone() };
    for row in rows {
        for key in [keys.start, keys.end - 1] {
            let tensor = |of: &Tensor, row: u32, head: u32, first: u32, last: u32, bytes: u64| {
                let last_token = of.sizes[2] - 1;
                let places = match (s.packed, s.paged, bound.slot) {
                    (Some(_), ..) => vec![(0, 0), (0, last_token)],
                    // Any page, whatever the key.
                    (_, Some(paged), Slot::K | Slot::V) => vec![(0, 0), (paged.pages - 1, last_token)],
                    _ => vec![(place.batch, row)],
                };
                for (batch, token) in places {
                    for dim in [first, last] {
                        let want = of.at(batch, head, token) + u64::from(dim);
                        let p = &step.params;
                        let [base, b, h, r] = match bound.slot {
                            Slot::Q => [p.q_base, p.q_batch, p.q_head, p.q_row],
                            Slot::K => [p.k_base, p.k_batch, p.k_head, p.k_row],
                            Slot::V => [p.v_base, p.v_batch, p.v_head, p.v_row],
                            _ => [p.out_base, p.out_batch, p.out_head, p.out_row],
                        };
                        let got = sum(base, [(batch, b), (head, h), (token, r), (dim, 1)]);
                        hits(step, bound, bytes, got, want);
                        let vector = format(&step.variant).is_some_and(|format| format.vector);
                        assert!(!vector || dim > first || got.is_multiple_of(4), "{} reads half vectors", step.variant);
                    }
                }
            };
            let bytes = s.element.bytes();
            let kv_head = place.head / (s.heads / s.kv_heads);
            let p = &step.params;
            let score = |b: u32, h: u32, i: u32| sum(p.s_base, [(b, p.s_batch), (h, p.s_head), (i, p.s_row), (key, 1)]);
            match bound.slot {
                Slot::Q => tensor(s.q(), row, place.head, 0, s.head_dim - 1, bytes),
                Slot::K => tensor(s.k(), key, kv_head, 0, s.head_dim - 1, bytes),
                Slot::V => tensor(s.v(), key, kv_head, place.cols.start, place.cols.end - 1, bytes),
                Slot::Out => tensor(s.out(), row, place.head, place.cols.start, place.cols.end - 1, bytes),
                Slot::Unpacked => tensor(s.out(), row, place.head, place.cols.start, place.cols.end - 1, 4),
                Slot::Scores => {
                    let got = score(place.batch, place.head, row);
                    // The whole vector that holds the key.
                    let end = 4 * (u64::from(got / 4 * 4) + 4);
                    assert!(end <= bound.size && p.s_row.is_multiple_of(4), "{} at {got} of {bound:?}", step.variant);
                }
                Slot::Weights
                    if matches!(step.variant, Variant::Scores(_) | Variant::Logits(_) | Variant::Softmax(_)) =>
                {
                    let want = dense([s.batch, s.heads, s.seq_q, s.seq_kv], [place.batch, place.head, row, key]);
                    let got = score(place.batch, place.head, row);
                    hits(step, bound, 4, got, want);
                    let lanes = matches!(&step.variant, Variant::Scores(x) if x.tile.body != Body::Tiled);
                    assert!(!lanes || (p.s_row.is_multiple_of(4) && (got - key).is_multiple_of(4)), "{}", step.variant);
                }
                Slot::Weights | Slot::Logits => {
                    let want = dense([s.batch, s.heads, s.seq_q, s.seq_kv], [place.batch, place.head, row, key]);
                    let strides = [(place.batch, p.out_batch), (place.head, p.out_head), (row, p.out_row), (key, 1)];
                    hits(step, bound, 4, sum(p.out_base, strides), want);
                }
                Slot::PartialOut => {
                    let (part, last) = (place.part, s.value_dim - 1);
                    let want = s.batch * (parts_before(plan, step) + part) + place.batch;
                    let want = dense([1, s.heads, s.seq_q, s.value_dim], [want, place.head, row, last]);
                    let line = [(place.batch, p.out_batch), (place.head, p.out_head), (row, p.out_row), (last, 1)];
                    hits(step, bound, 4, sum(p.out_base.wrapping_add(part * p.partial_out), line), want);
                }
                Slot::PartialLse => {
                    let want = s.batch * (parts_before(plan, step) + place.part) + place.batch;
                    let want = dense([1, s.heads, s.seq_q, 1], [want, place.head, row, 0]);
                    let part =
                        [(place.part, p.partial_lse), (place.batch, p.lse_batch), (place.head, p.lse_head), (row, 1)];
                    // The maximum and the sum of a row.
                    hits(step, bound, 8, sum(p.lse_base, part), want);
                }
                Slot::Lse => {
                    let (rows, batch, tokens) = match s.packed {
                        None => (s.seq_q, place.batch, vec![row]),
                        Some(packed) => (packed.total_q, 0, vec![0, packed.total_q - 1]),
                    };
                    for token in tokens {
                        let want = dense([1, s.batch, s.heads, rows], [0, batch, place.head, token]);
                        let got = sum(p.lse_base, [(batch, p.lse_batch), (place.head, p.lse_head), (token, 1), (0, 0)]);
                        hits(step, bound, 4, got, want);
                    }
                }
                Slot::Mask => {
                    let strides = [p.mask_batch, p.mask_head, p.mask_row, p.mask_key];
                    let shape = s.mask.unwrap();
                    broadcast(
                        step,
                        bound,
                        shape,
                        (p.mask_base, strides, p.mask_keys),
                        1,
                        [place.batch, place.head, row, key],
                    );
                }
                Slot::Bias => {
                    let strides = [p.bias_batch, p.bias_head, p.bias_row, p.bias_key];
                    let bias = s.bias.unwrap();
                    let at = [place.batch, place.head, row, key];
                    broadcast(step, bound, bias.shape, (p.bias_base, strides, p.bias_keys), bias.element.bytes(), at);
                }
                Slot::Lists | Slot::Spare | Slot::State => unreachable!("handled before"),
                _ => unreachable!("attention binds no operand of the layer"),
            }
        }
    }
}

fn format(variant: &Variant) -> Option<Format> {
    match variant {
        Variant::Scores(x) => Some(x.format),
        Variant::Values(x) => Some(x.format),
        Variant::Rows(x) => Some(x.format),
        Variant::Flash(x) => Some(x.format),
        Variant::Matrix(x) => Some(x.format()),
        Variant::Split(x) => Some(x.format),
        _ => None,
    }
}

/// Base and terms as the shader adds them.
fn sum(base: u32, terms: [(u32, u32); 4]) -> u32 {
    terms.into_iter().fold(base, |at, (n, stride)| at.wrapping_add(n.wrapping_mul(stride)))
}

fn dense(sizes: [u32; 4], at: [u32; 4]) -> u64 {
    sizes.into_iter().zip(at).fold(0, |place, (n, x)| place * u64::from(n) + u64::from(x))
}

/// The address lies in the binding, and is that of element `want` of the operand.
fn hits(step: &Step, bound: &Bound, bytes: u64, got: u32, want: u64) {
    let at = u64::from(got) * bytes;
    assert!(at + bytes <= bound.size, "{} reaches byte {at} of {bound:?}", step.variant);
    assert_eq!(bound.offset + at, want * bytes, "{} at {got} of {bound:?}", step.variant);
}

fn broadcast(
    step: &Step,
    bound: &Bound,
    Broadcast(shape): Broadcast,
    (base, strides, covered): (u32, [u32; 4], u32),
    bytes: u64,
    at: [u32; 4],
) {
    let inside = shape[3] == 1 || at[3] < shape[3];
    assert_eq!(at[3] < covered, inside, "{}: keys that a short axis covers", step.variant);
    if inside {
        let place = [0, 1, 2, 3].map(|axis| if shape[axis] == 1 { 0 } else { at[axis] });
        let terms = [0, 1, 2, 3].map(|axis| (at[axis], strides[axis]));
        hits(step, bound, bytes, sum(base, terms), dense(shape, place));
    }
}

fn lists(plan: &Plan, step: &Step, bound: &Bound) {
    let (s, p) = (plan.shape(), &step.params);
    let packed = s.packed.is_some();
    let places = [
        (s.key_lengths, p.list_lengths, s.batch),
        (s.causal == wgpu_attention::Causal::Offset, p.list_offsets, s.batch),
        (s.alibi, p.list_slopes, s.heads),
        (s.sinks, p.list_sinks, s.heads),
        (packed, p.list_cu_q, s.batch + 1),
        (packed, p.list_cu_kv, s.batch + 1),
        (s.paged.is_some(), p.list_pages, s.batch * p.table_row),
    ];
    // The pages of the last key are in the table, and no number that is clamped leaves the pool.
    match s.paged {
        Some(paged) => {
            assert_eq!((p.pages, p.page_size), (paged.pages, paged.page_size));
            assert_eq!((s.seq_kv - 1) / p.page_size, p.table_row - 1, "{}", step.variant);
        }
        None => assert!(p.page_size >= s.seq_kv, "{} looks for a second page", step.variant),
    }
    let mut taken: Vec<_> = places.into_iter().filter(|place| place.0).map(|(_, at, n)| at..at + n).collect();
    taken.sort_by_key(|range| range.start);
    assert!(taken.windows(2).all(|pair| pair[0].end <= pair[1].start), "lists overlap");
    assert!(taken.iter().all(|range| 4 * u64::from(range.end) <= bound.size), "{} lists", step.variant);
}

/// Of every workgroup what waits between dispatches, vectors of four: `rows` keeps m and l, then o, of each
/// row; `flash` three vectors and then o of each invocation.
fn state(step: &Step, bound: &Bound) {
    let (carried, each) = match &step.variant {
        Variant::Rows(x) => (x.carry, x.tile.tile_rows() * (1 + x.tile.dims / 4)),
        Variant::Flash(x) => (x.carry, 128 * (3 + x.tile.rows * x.tile.dims / 32)),
        other => panic!("{other} keeps no state"),
    };
    assert!(carried && bound.offset == 0, "{bound:?}");
    assert!(16 * u64::from(step.params.end) * u64::from(each) <= bound.size, "{bound:?}");
    assert!(step.params.key0 == 0 || step.params.flags & (1 << 16) != 0, "{} starts anew", step.variant);
}

fn packing(plan: &Plan, step: &Step, bound: &Bound) {
    let count = u64::from(step.params.pack_count);
    let (bytes, words) =
        if bound.slot == Slot::Unpacked { (4 * count, count) } else { (4 * count.div_ceil(2), count.div_ceil(2)) };
    assert!(bytes <= bound.size && words > 0, "{bound:?}");
    // Both sides begin at the same element.
    let element = if bound.slot == Slot::Unpacked { bound.offset / 4 } else { bound.offset / 2 };
    let first = |other: &Bound| if other.slot == Slot::Unpacked { other.offset / 4 } else { other.offset / 2 };
    assert!(step.bindings.iter().filter(|other| other.slot != Slot::Lists).all(|other| element == first(other)));
    let (p, out) = (&step.params, plan.shape().out());
    if let Some(packed) = plan.shape().packed {
        for n in [0, count - 1] {
            let token = (u64::from(p.x_base) + n) / u64::from(p.x_row) + u64::from(p.row0);
            let token = (token % u64::from(packed.total_q)) as u32;
            let starts = (0..out.sizes[1]).map(|head| out.at(0, head, token));
            let dim = u64::from(out.dim);
            assert!(starts.into_iter().any(|at| (at..at + dim).contains(&(element + n))), "{n} of {step:?}");
        }
    }
}
