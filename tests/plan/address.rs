//! The addresses that the shaders form, worked out on the host for the corners of every tile: inside the binding, at the
//! right element, and whole vectors where the shader reads vectors.

use wgpu_attention::internal::Tensor;
use wgpu_attention::internal::kernel::{Format, Slot, Variant};
use wgpu_attention::internal::{Bound, Step};
use wgpu_attention::{Broadcast, Plan};

use crate::coverage::{Place, keys, parts_before, places};

pub fn inside(plan: &Plan) {
    for step in plan.steps() {
        // tests/merge.rs runs these with every limit.
        if let Variant::Merge(_) | Variant::MergeTotals(_) = step.variant {
            continue;
        }
        for bound in &step.bindings {
            match bound.slot {
                Slot::Lists => lists(plan, step, bound),
                // Stands for an output that is not asked for; nothing is written.
                Slot::Spare => {}
                Slot::State => state(step, bound),
                _ if matches!(step.variant, Variant::Pack(_)) => packing(plan, step, bound),
                _ => {
                    let at = fields(step, bound.slot);
                    places(plan, step).for_each(|place| corners(plan, step, bound, &place, &at));
                }
            }
        }
    }
}

/// The fields that place an operand: its base, then its strides and what else there is of it.
fn fields(step: &Step, slot: Slot) -> Vec<u32> {
    let block = match slot {
        Slot::Q => "q_",
        Slot::K => "k_",
        Slot::V => "v_",
        Slot::Scores => "s_",
        Slot::Weights
            if matches!(
                step.variant,
                Variant::Scores(_) | Variant::ScoresLanes(_) | Variant::Logits(_) | Variant::Softmax(_)
            ) =>
        {
            "s_"
        }
        Slot::Lse | Slot::PartialLse | Slot::Totals => "lse_",
        Slot::Mask => "mask_",
        Slot::Bias => "bias_",
        _ => "out_",
    };
    let members = step.uniform.layout().members.iter().filter(|member| member.name.starts_with(block));
    members.map(|member| step.uniform[&*member.name]).collect()
}

fn corners(plan: &Plan, step: &Step, bound: &Bound, place: &Place, at: &[u32]) {
    let s = plan.shape();
    let rows = [place.rows.start, place.rows.end - 1];
    let owns_dims = matches!(
        step.variant,
        Variant::Values(_)
            | Variant::ValuesLanes(_)
            | Variant::Rows(_)
            | Variant::Flash(_)
            | Variant::Matrix(_)
            | Variant::Split(_)
    );
    // What owns dims runs over the dispatch's keys; all others own keys.
    let keys = if owns_dims { keys(plan, step) } else { place.cols.clone() };
    for row in rows {
        for key in [keys.start, keys.end - 1] {
            let tensor = |of: &Tensor, row: u32, head: u32, first: u32, last: u32, bytes: u64| {
                let last_token = of.sizes[2] - 1;
                let places = match (s.problem().packed, s.problem().paged, bound.slot) {
                    (Some(_), ..) => vec![(0, 0), (0, last_token)],
                    // Any page, whatever the key.
                    (_, Some(paged), Slot::K | Slot::V) => vec![(0, 0), (paged.pages - 1, last_token)],
                    _ => vec![(place.batch, row)],
                };
                for (batch, token) in places {
                    for dim in [first, last] {
                        let want = of.at(batch, head, token) + u64::from(dim);
                        let got = tensor_at(at, [batch, head, token, dim]);
                        hits(step, bound, bytes, got, want);
                        let vector = format(&step.variant).is_some_and(|format| format.vector);
                        assert!(!vector || dim > first || got.is_multiple_of(4), "{} reads half vectors", step.variant);
                    }
                }
            };
            let bytes = s.problem().element.bytes();
            let kv_head = place.head / (s.problem().heads / s.problem().kv_heads);
            let score = |b: u32, h: u32, i: u32| tensor_at(at, [b, h, i, key]);
            match bound.slot {
                Slot::Q => tensor(s.q(), row, place.head, 0, s.problem().head_dim - 1, bytes),
                Slot::K => tensor(s.k(), key, kv_head, 0, s.problem().head_dim - 1, bytes),
                Slot::V => tensor(s.v(), key, kv_head, place.cols.start, place.cols.end - 1, bytes),
                Slot::Out => tensor(s.out(), row, place.head, place.cols.start, place.cols.end - 1, bytes),
                Slot::Unpacked => tensor(s.out(), row, place.head, place.cols.start, place.cols.end - 1, 4),
                Slot::Scores => {
                    let got = score(place.batch, place.head, row);
                    // The whole vector that holds the key.
                    let end = 4 * (u64::from(got / 4 * 4) + 4);
                    assert!(end <= bound.size && at[3].is_multiple_of(4), "{} at {got} of {bound:?}", step.variant);
                }
                Slot::Weights
                    if matches!(
                        step.variant,
                        Variant::Scores(_) | Variant::ScoresLanes(_) | Variant::Logits(_) | Variant::Softmax(_)
                    ) =>
                {
                    let want = dense(
                        [s.problem().batch, s.problem().heads, s.problem().seq_q, s.problem().seq_kv],
                        [place.batch, place.head, row, key],
                    );
                    let got = score(place.batch, place.head, row);
                    hits(step, bound, 4, got, want);
                    let lanes = matches!(step.variant, Variant::ScoresLanes(_));
                    assert!(!lanes || (at[3].is_multiple_of(4) && (got - key).is_multiple_of(4)), "{}", step.variant);
                }
                Slot::Weights | Slot::Logits => {
                    let want = dense(
                        [s.problem().batch, s.problem().heads, s.problem().seq_q, s.problem().seq_kv],
                        [place.batch, place.head, row, key],
                    );
                    hits(step, bound, 4, tensor_at(at, [place.batch, place.head, row, key]), want);
                }
                Slot::PartialOut => {
                    let (part, last) = (place.part, s.problem().value_dim - 1);
                    let want = s.problem().batch * (parts_before(plan, step) + part) + place.batch;
                    let want = dense(
                        [1, s.problem().heads, s.problem().seq_q, s.problem().value_dim],
                        [want, place.head, row, last],
                    );
                    let line = tensor_at(at, [place.batch, place.head, row, last]);
                    hits(step, bound, 4, line.wrapping_add(part * step.uniform["next_out"]), want);
                }
                Slot::PartialLse => {
                    let want = s.problem().batch * (parts_before(plan, step) + place.part) + place.batch;
                    let want = dense([1, s.problem().heads, s.problem().seq_q, 1], [want, place.head, row, 0]);
                    let part = place.part.wrapping_mul(step.uniform["next_lse"]);
                    // The maximum and the sum of a row.
                    hits(step, bound, 8, line_at(at, [place.batch, place.head, row]).wrapping_add(part), want);
                }
                Slot::Lse => {
                    let (rows, batch, tokens) = match s.problem().packed {
                        None => (s.problem().seq_q, place.batch, vec![row]),
                        Some(packed) => (packed.total_q, 0, vec![0, packed.total_q - 1]),
                    };
                    for token in tokens {
                        let want =
                            dense([1, s.problem().batch, s.problem().heads, rows], [0, batch, place.head, token]);
                        let got = line_at(at, [batch, place.head, token]);
                        hits(step, bound, 4, got, want);
                    }
                }
                Slot::Mask => {
                    broadcast(step, bound, s.problem().mask.unwrap(), at, 1, [place.batch, place.head, row, key]);
                }
                Slot::Bias => {
                    let (bias, of) = (s.problem().bias.unwrap(), [place.batch, place.head, row, key]);
                    broadcast(step, bound, bias.shape, at, bias.element.bytes(), of);
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
        Variant::ScoresLanes(x) => Some(x.format),
        Variant::Values(x) => Some(x.format),
        Variant::ValuesLanes(x) => Some(x.format),
        Variant::Rows(x) => Some(x.format),
        Variant::Flash(x) => Some(x.format),
        Variant::Matrix(x) => Some(x.format()),
        Variant::Split(x) => Some(x.format),
        _ => None,
    }
}

/// An element of a tensor of which base and strides are given.
fn tensor_at(at: &[u32], [batch, head, row, last]: [u32; 4]) -> u32 {
    let [base, b, h, r] = *at else { panic!("{at:?} are not the fields of a tensor") };
    sum(base, [(batch, b), (head, h), (row, r), (last, 1)])
}

/// A row of a tensor of one number a row.
fn line_at(at: &[u32], [batch, head, row]: [u32; 3]) -> u32 {
    let [base, b, h] = *at else { panic!("{at:?} are not the fields of a tensor of one number a row") };
    sum(base, [(batch, b), (head, h), (row, 1), (0, 0)])
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

fn broadcast(step: &Step, bound: &Bound, Broadcast(shape): Broadcast, fields: &[u32], bytes: u64, at: [u32; 4]) {
    let [base, batch, head, row, key, covered] = *fields else { panic!("{fields:?} are not those of an operand") };
    let strides = [batch, head, row, key];
    let inside = shape[3] == 1 || at[3] < shape[3];
    assert_eq!(at[3] < covered, inside, "{}: keys that a short axis covers", step.variant);
    if inside {
        let place = [0, 1, 2, 3].map(|axis| if shape[axis] == 1 { 0 } else { at[axis] });
        let terms = [0, 1, 2, 3].map(|axis| (at[axis], strides[axis]));
        hits(step, bound, bytes, sum(base, terms), dense(shape, place));
    }
}

fn lists(plan: &Plan, step: &Step, bound: &Bound) {
    let (s, p) = (plan.shape(), &step.uniform);
    let packed = s.problem().packed.is_some();
    let table_row = s.problem().paged.map_or(0, |paged| s.problem().seq_kv.div_ceil(paged.page_size));
    let places = [
        (s.problem().key_lengths, "list_key_lengths", s.problem().batch),
        (s.problem().key_positions, "list_key_positions", s.problem().batch * s.problem().seq_kv),
        (s.problem().causal == wgpu_attention::Causal::Offset, "list_offsets", s.problem().batch),
        (s.problem().alibi, "list_alibi_slopes", s.problem().heads),
        (s.problem().sinks, "list_sinks", s.problem().heads),
        (packed, "list_cu_seqlens_q", s.problem().batch + 1),
        (packed, "list_cu_seqlens_kv", s.problem().batch + 1),
        (s.problem().paged.is_some(), "list_block_table", s.problem().batch * table_row),
    ];
    // The pages of the last key are in the table, and no number that is clamped leaves the pool.
    match (s.problem().paged, p.get("page_size")) {
        (Some(paged), Some(page_size)) => {
            assert_eq!((p["pages"], page_size), (paged.pages, paged.page_size));
            assert_eq!((s.problem().seq_kv - 1) / page_size, p["table_row"] - 1, "{}", step.variant);
            assert_eq!(p["table_row"], table_row, "{}", step.variant);
        }
        (None, Some(page_size)) => assert!(page_size >= s.problem().seq_kv, "{} looks for a second page", step.variant),
        (paged, None) => {
            let reads = step.variant.bindings().iter().any(|(slot, _)| matches!(slot, Slot::K | Slot::V));
            assert!(paged.is_none() || !reads, "{} reads no pages", step.variant);
        }
    }
    let mut taken: Vec<_> = places.into_iter().filter(|place| place.0).map(|(_, at, n)| p[at]..p[at] + n).collect();
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
    assert!(16 * u64::from(step.uniform.place().end) * u64::from(each) <= bound.size, "{bound:?}");
    assert!(step.uniform["key0"] == 0 || step.uniform.has("CARRIED"), "{} starts anew", step.variant);
}

fn packing(plan: &Plan, step: &Step, bound: &Bound) {
    let count = u64::from(step.uniform["elements"]);
    let (bytes, words) =
        if bound.slot == Slot::Unpacked { (4 * count, count) } else { (4 * count.div_ceil(2), count.div_ceil(2)) };
    assert!(bytes <= bound.size && words > 0, "{bound:?}");
    // Both sides begin at the same element.
    let element = if bound.slot == Slot::Unpacked { bound.offset / 4 } else { bound.offset / 2 };
    let first = |other: &Bound| if other.slot == Slot::Unpacked { other.offset / 4 } else { other.offset / 2 };
    assert!(step.bindings.iter().filter(|other| other.slot != Slot::Lists).all(|other| element == first(other)));
    let (p, out) = (&step.uniform, plan.shape().out());
    if let Some(packed) = plan.shape().problem().packed {
        for n in [0, count - 1] {
            let token = (u64::from(p["element0"]) + n) / u64::from(p["token_elements"]) + u64::from(p["token0"]);
            let token = (token % u64::from(packed.total_q)) as u32;
            let starts = (0..out.sizes[1]).map(|head| out.at(0, head, token));
            let dim = u64::from(out.dim);
            assert!(starts.into_iter().any(|at| (at..at + dim).contains(&(element + n))), "{n} of {step:?}");
        }
    }
}
