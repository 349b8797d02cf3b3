//! Who does what: every workgroup once, and every row, key and dim of every head once, in an order that reads nothing unwritten.

use std::collections::HashMap;
use std::ops::Range;

use wgpu_attention::internal::Step;
use wgpu_attention::internal::kernel::{Slot, Variant, scores_lanes};
use wgpu_attention::{Element, Plan};

/// Dispatches that belong together follow each other and share `[0, n)`, n being whole tiles of whole heads, and together the
/// dispatches of a variant hold as many (row, key) pairs as the problem.
pub fn every_workgroup_once(plan: &Plan) {
    let s = plan.shape();
    let rows = u64::from(s.problem().batch) * u64::from(s.problem().heads) * u64::from(s.problem().seq_q);
    let mut pairs: HashMap<Variant, u64> = HashMap::new();
    let mut steps = plan.steps().iter().peekable();
    let mut expected = 0;
    while let Some(step) = steps.next() {
        let (p, variant) = (step.uniform.place(), &step.variant);
        assert_eq!(p.first, expected, "{variant}");
        if let Some(next) = steps.peek().filter(|next| next.uniform.place().first != 0) {
            assert_eq!((&next.variant, &next.bindings), (variant, &step.bindings));
            expected = p.end;
            continue;
        }
        expected = 0;
        let tiles = p.row_tiles * p.col_tiles;
        assert!(p.end.is_multiple_of(tiles), "{variant} ends inside a head");
        if !matches!(variant, Variant::Pack(_) | Variant::Merge(_) | Variant::MergeTotals(_)) {
            let keys = keys(plan, step).len() as u64;
            let each = if variant.takes_group() { lines(step).len() as u64 } else { 1 };
            let count = u64::from(p.end / tiles) * u64::from(p.row_end - p.row0) * each * keys;
            *pairs.entry(*variant).or_default() += count;
        }
    }
    assert!(!pairs.is_empty());
    for (variant, found) in pairs {
        // With the cap as an output of its own the transform runs twice.
        let times =
            if matches!(variant, Variant::Logits(_)) { found / (rows * u64::from(s.problem().seq_kv)) } else { 1 };
        assert!((1..=2).contains(&times), "{variant}");
        assert_eq!(found, times * rows * u64::from(s.problem().seq_kv), "{variant}");
    }
}

/// What one workgroup owns.
pub struct Place {
    pub batch: u32,
    pub head: u32,
    pub rows: Range<u32>,
    /// Keys, or value dims.
    pub cols: Range<u32>,
    /// Which part of the keys, where several workgroups share them.
    pub part: u32,
}

/// The keys of a step: all, where the kernel does not know another range.
pub fn keys(plan: &Plan, step: &Step) -> Range<u32> {
    assert_eq!(step.uniform.get("seq_kv"), Some(plan.shape().problem().seq_kv), "{}", step.variant);
    match (step.uniform.get("key0"), step.uniform.get("key_end")) {
        (Some(first), Some(end)) => first..end,
        (first, end) => {
            assert_eq!((first, end), (None, None), "{}", step.variant);
            0..plan.shape().problem().seq_kv
        }
    }
}

/// The query heads of a key/value head that are lines of the tiles of a step.
fn lines(step: &Step) -> Range<u32> {
    step.uniform["group0"]..step.uniform["group_end"]
}

/// The value dims of the kernels that own them.
fn dims(plan: &Plan, step: &Step) -> Range<u32> {
    assert_eq!(step.uniform["value_dim"], plan.shape().problem().value_dim, "{}", step.variant);
    0..plan.shape().problem().value_dim
}

/// The workgroups of a step as shaders/shared/params.wgsl numbers them.
pub fn places<'a>(plan: &'a Plan, step: &'a Step) -> Box<dyn Iterator<Item = Place> + 'a> {
    let p = step.uniform.place();
    if step.variant.takes_group() {
        let (tile, tile_cols, cols) = match &step.variant {
            Variant::Split(x) => (x.tile.rows, None, dims(plan, step)),
            Variant::ScoresLanes(x) => (x.tile.tile_rows(), Some(scores_lanes::TILE_KEYS), keys(plan, step)),
            Variant::ValuesLanes(x) => (x.tile.tile_rows(), Some(x.tile.dims), dims(plan, step)),
            other => panic!("{other} is not known here"),
        };
        let (group, group0, each) = (step.uniform["group"], lines(step).start, lines(step).len() as u32);
        let lines = (p.row_end - p.row0) * each;
        return Box::new((p.first..p.end).flat_map(move |index| {
            let (line, col) = (index / p.col_tiles, index % p.col_tiles);
            let (plane, first) = (line / p.row_tiles, line % p.row_tiles * tile);
            // `split` shares out keys, the others columns.
            let (cols, part) = match tile_cols {
                None => (cols.clone(), col),
                Some(wide) => (cols.start + col * wide..cols.end.min(cols.start + (col + 1) * wide), 0),
            };
            (first..lines.min(first + tile)).map(move |n| Place {
                batch: p.batch0 + plane / p.heads,
                head: (p.head0 + plane % p.heads) * group + group0 + n % each,
                rows: p.row0 + n / each..p.row0 + n / each + 1,
                cols: cols.clone(),
                part,
            })
        }));
    }
    let threads = step.variant.threads();
    let (tile_rows, tile_cols, cols) = match &step.variant {
        Variant::Scores(x) => (x.tile.tile_rows, x.tile.tile_cols, keys(plan, step)),
        Variant::Values(x) => (x.tile.tile_rows, x.tile.tile_cols, dims(plan, step)),
        Variant::Softmax(_) => (1, u32::MAX, keys(plan, step)),
        Variant::Rows(x) => (x.tile.tile_rows(), u32::MAX, dims(plan, step)),
        Variant::Flash(x) => (x.tile.tile_rows(), x.tile.dims, dims(plan, step)),
        Variant::Matrix(x) => (x.tile.tile_rows(), x.tile.dims, dims(plan, step)),
        _ => (1, threads, keys(plan, step)),
    };
    Box::new((p.first..p.end).map(move |index| {
        let (line, col) = (index / p.col_tiles, index % p.col_tiles);
        let (plane, row) = (line / p.row_tiles, line % p.row_tiles);
        let first_row = p.row0 + row * tile_rows;
        let first_col = cols.start + col.saturating_mul(tile_cols);
        Place {
            batch: p.batch0 + plane / p.heads,
            head: p.head0 + plane % p.heads,
            rows: first_row..first_row.saturating_add(tile_rows).min(p.row_end),
            cols: first_col..first_col.saturating_add(tile_cols).min(cols.end),
            part: 0,
        }
    }))
}

/// Parts of the keys that the dispatches before a step of `split` have.
pub fn parts_before(plan: &Plan, step: &Step) -> u32 {
    keys(plan, step).start.div_ceil(keys(plan, &plan.steps()[0]).end) * step.uniform.place().col_tiles
}

/// How far a row is.
#[derive(Clone, Default)]
struct Row {
    scored: Vec<u8>,
    transforms: Vec<u8>,
    softmax: u8,
    exported: HashMap<&'static str, Vec<u8>>,
    summed: Vec<u32>,
    lse: u8,
    /// Times that a kernel did all of this at once.
    fused: u8,
    /// Parts of the keys that wait for a merge, and those that each dim was merged from.
    parts: u32,
    merged: Vec<u32>,
}

pub fn every_place_once(plan: &Plan) {
    let s = plan.shape();
    let [all_keys, dims] = [s.problem().seq_kv as usize, s.problem().value_dim as usize];
    let fresh = Row {
        scored: vec![0; all_keys],
        transforms: vec![0; all_keys],
        summed: vec![0; dims],
        merged: vec![0; dims],
        ..Row::default()
    };
    let mut rows = vec![fresh; (s.problem().batch * s.problem().heads * s.problem().seq_q) as usize];
    let mut packed = vec![0u8; s.out().extent() as usize];
    for step in plan.steps() {
        let p = step.uniform.place();
        if let Variant::Pack(_) = step.variant {
            let out = step.bindings.iter().find(|bound| bound.slot == Slot::Out).unwrap();
            let threads = u64::from(step.variant.threads());
            let words = u64::from(p.first) * threads..u64::from(p.end) * threads;
            let count = u64::from(step.uniform["elements"]);
            let elements = (2 * words.start).min(count)..(2 * words.end).min(count);
            elements.for_each(|n| packed[(out.offset / 2 + n) as usize] += 1);
            continue;
        }
        if let Variant::Merge(_) | Variant::MergeTotals(_) = &step.variant {
            let (threads, groups) = (step.variant.threads(), s.problem().value_dim.div_ceil(4));
            let partials = step.uniform["partial0"]..step.uniform["partial_end"];
            for item in p.first * threads..(p.end * threads).min(step.uniform["items"]) {
                let (line, dim) = match &step.variant {
                    Variant::MergeTotals(_) => (item, 0),
                    _ => (item / groups, item % groups * 4),
                };
                let (plane, row) = (line / (p.row_end - p.row0), p.row0 + line % (p.row_end - p.row0));
                let (batch, head) = (p.batch0 + plane / p.heads, p.head0 + plane % p.heads);
                let row = &mut rows[((batch * s.problem().heads + head) * s.problem().seq_q + row) as usize];
                assert!(row.parts >= partials.end, "{} reads what no workgroup wrote", step.variant);
                match &step.variant {
                    Variant::MergeTotals(pass) => row.lse += u8::from(pass.lse),
                    _ => {
                        let end = s.problem().value_dim.min(dim + 4);
                        row.merged[dim as usize..end as usize].iter_mut().for_each(|n| *n += partials.len() as u32);
                    }
                }
            }
            continue;
        }
        let walked = keys(plan, step);
        for place in places(plan, step) {
            assert!(!place.rows.is_empty() && !place.cols.is_empty(), "{} has an idle workgroup", step.variant);
            assert!(
                place.batch < s.problem().batch
                    && place.head < s.problem().heads
                    && place.rows.end <= s.problem().seq_q,
                "{}",
                step.variant
            );
            for i in place.rows.clone() {
                let row = &mut rows[((place.batch * s.problem().heads + place.head) * s.problem().seq_q + i) as usize];
                let all = |counts: &[u8]| counts.iter().all(|&n| n == 1);
                let cols = place.cols.start as usize..place.cols.end as usize;
                match &step.variant {
                    Variant::Scores(_) | Variant::ScoresLanes(_) => row.scored[cols].iter_mut().for_each(|n| *n += 1),
                    Variant::Logits(_) => {
                        assert!(all(&row.scored) && row.softmax == 0);
                        row.transforms[cols].iter_mut().for_each(|n| *n += 1);
                    }
                    Variant::Softmax(x) => {
                        assert!(all(&row.scored) && row.transforms.iter().all(|&n| n == row.transforms[0]));
                        row.softmax += 1;
                        row.lse += u8::from(x.lse);
                    }
                    Variant::Export(x) => {
                        let logits = x.to == Slot::Logits;
                        assert!(all(&row.scored) && (row.softmax == 0) == logits);
                        row.exported.entry(x.to.name()).or_insert(vec![0; all_keys])[cols]
                            .iter_mut()
                            .for_each(|n| *n += 1);
                    }
                    Variant::Values(_) | Variant::ValuesLanes(_) => {
                        assert!(row.softmax == 1);
                        row.summed[cols].iter_mut().for_each(|n| *n += walked.len() as u32);
                    }
                    Variant::Split(_) => {
                        let bound = |slot| step.bindings.iter().any(|bound| bound.slot == slot);
                        if bound(Slot::PartialOut) {
                            let number = parts_before(plan, step) + place.part;
                            assert!(bound(Slot::PartialLse) && row.parts == number, "parts one after the other");
                            row.parts += 1;
                        } else {
                            assert!(place.part == 0 && p.col_tiles == 1 && walked == (0..s.problem().seq_kv));
                            row.lse += u8::from(bound(Slot::Lse));
                        }
                        if place.part == 0 {
                            assert!(row.summed[cols.clone()].iter().all(|&n| n == walked.start));
                            row.fused += u8::from(walked.end == s.problem().seq_kv);
                            row.summed[cols].iter_mut().for_each(|n| *n += walked.len() as u32);
                        }
                    }
                    Variant::Rows(_) | Variant::Flash(_) | Variant::Matrix(_) => {
                        // Keys one after the other; what is left in between waits in a scratch.
                        let carried = step.bindings.iter().any(|bound| bound.slot == Slot::State);
                        assert!(carried || walked == (0..s.problem().seq_kv));
                        assert!(row.summed[cols.clone()].iter().all(|&n| n == walked.start));
                        // The first block of value dims also writes lse, where the last keys are walked.
                        if cols.start == 0 && walked.end == s.problem().seq_kv {
                            row.fused += 1;
                            let bound = |slot| step.bindings.iter().any(|bound| bound.slot == slot);
                            row.lse += u8::from(bound(Slot::Lse));
                        }
                        row.summed[cols].iter_mut().for_each(|n| *n += walked.len() as u32);
                    }
                    other => panic!("{other} is not known here"),
                }
            }
        }
    }
    for row in &rows {
        assert_eq!(row.lse, u8::from(s.problem().lse));
        if row.fused > 0 {
            assert!(row.fused == 1 && row.exported.is_empty() && s.problem().logits.is_none());
            assert!(row.scored.iter().chain([&row.softmax]).all(|&n| n == u8::from(s.problem().weights)));
            assert!(row.transforms.iter().all(|&n| n == row.transforms[0] && n <= u8::from(s.problem().weights)));
            assert!(row.summed.iter().all(|&n| n == s.problem().seq_kv));
            assert!(row.merged.iter().all(|&n| n == row.parts), "each dim is merged from each part once");
            continue;
        }
        assert!(row.scored.iter().all(|&n| n == 1) && row.softmax == 1);
        assert!(row.transforms.iter().all(|&n| n == row.transforms[0]));
        assert!(row.summed.iter().all(|&n| n == s.problem().seq_kv), "each dim sums each key once");
        for (name, asked) in [("weights", s.problem().weights), ("logits", s.problem().logits.is_some())] {
            let done = row.exported.get(name);
            assert!(done.is_some() == asked && done.is_none_or(|done| done.iter().all(|&n| n == 1)), "{name}");
        }
    }
    let packs = plan.steps().iter().any(|step| matches!(step.variant, Variant::Pack(_)));
    assert!(packed.iter().all(|&n| n == u8::from(packs)) && (!packs || s.problem().element != Element::F32));
}
