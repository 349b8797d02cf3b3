//! Makes plans: divides a problem into parts that fit the device and lists the dispatches of each.

use std::ops::Range;

use crate::caps::{CPU_TURNS, Caps};
use crate::choose::{
    choose_body, choose_fused, choose_native, fused_step, key_step, partial_bytes, partials, scores_tile, transforms,
    values_tile, whole_vectors,
};
use crate::error::{Error, Result};
use crate::kernel::body::Body;
use crate::kernel::format::Format;
use crate::kernel::params::{
    self, At, Attention, Keys, LineAt, Lines, Pages, PairAt, Place, Transform, Visible, flags,
};
use crate::kernel::slot::Slot;
use crate::kernel::{self, Variant, export, logits, scores, softmax, values, weights};
use crate::operands::{Kind, Operand, Operands};
use crate::ops::merge::{Merge, Partials};
use crate::ops::pack::pack;
use crate::options::Options;
use crate::part::{Axis, Cut, Excess, Part, count, span};
use crate::plan::Plan;
use crate::problem::{Broadcast, Causal, Element, Layout, Logits, Strides};
use crate::shape::{Shape, Tensor};
use crate::step::Bound;
use crate::steps::{self, SPARE, Span, Steps, check_dispatches, checked_u32};
use crate::tuned::{Choice, Tuning};
use crate::walk::{Band, most_keys};

/// Places of the small arrays, in u32 words of one buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Lists {
    /// Where each list begins, also one that the problem does not have.
    places: Operands<u64>,
    words: u64,
}

impl Lists {
    fn new(shape: &Shape) -> Self {
        // A word of padding stands for no list at all: a binding may not be empty.
        let mut words = 4u64;
        let places = Operands::from_fn(|operand| {
            if operand.kind() != Kind::List {
                return None;
            }
            // `merge` binds the sinks alone, and a binding begins at a multiple of 256 bytes.
            let place = if operand == Operand::Sinks { words.next_multiple_of(64) } else { words };
            if let Some(len) = operand.len(shape) {
                words = place + len;
            }
            Some(place)
        });
        Lists { places, words }
    }

    /// Where a list begins. A plan is made only where all lists together fit a binding, so that the place fits a word.
    pub(crate) fn place(&self, list: Operand) -> u32 {
        *self.places.get(list).expect("every list has a place") as u32
    }

    pub(crate) fn bytes(&self) -> u64 {
        4 * self.words
    }
}

pub(crate) struct Planner<'a> {
    shape: &'a Shape,
    caps: &'a Caps,
    budget: u64,
    flops_per_second: f64,
    lists: Lists,
    /// The fused kernel; otherwise `scores`, `softmax` and `values`.
    fused: Option<Variant>,
    /// Parts that `split` makes of the keys, 0 where it writes the output itself and leaves nothing to merge.
    partials: u32,
    scores: scores::Scores,
    softmax: softmax::Softmax,
    values: values::Values,
    /// The transform runs as a pass of its own.
    separate: bool,
    /// Keys of one dispatch where a head's keys or values exceed a binding.
    key_step: u32,
    /// `out` is written in f32 and packed afterwards.
    unpacked: bool,
    steps: Steps<'a>,
    scratch: u64,
    state: u64,
    reasons: Vec<String>,
}

impl<'a> Planner<'a> {
    pub(crate) fn new(shape: &'a Shape, caps: &'a Caps, options: &Options, tuning: &Tuning) -> Result<Self> {
        let mut reasons = Vec::new();
        let key_step = key_step(shape, caps)?;
        let fused = choose_fused(shape, caps, options, tuning, key_step, &mut reasons)?;
        let key_step = match &fused {
            // Its parts are shorter.
            Some(Variant::Split(_)) => key_step,
            Some(fused) => fused_step(fused, shape, caps, key_step),
            None if caps.cpu && most_keys(shape, VALUES_ROWS) > values::CPU_KEYS.into() => {
                key_step.min(values::CPU_KEYS)
            }
            None => key_step,
        };
        let (mut body, why) = choose_body(caps, options);
        if fused.is_none() {
            reasons.push(format!("scores and values in the form: {body} ({why})"));
        } else if shape.weights {
            if !shape.seq_kv.is_multiple_of(4) || (options.native_f16 == Some(true) && options.form.is_none()) {
                // The lane form writes whole vectors, also across the ends of rows, and reads f16 packed.
                body = Body::Tiled;
            }
            reasons.push(format!(
                "weights are formed from scores in place, with the maximum and sum of each row: no score matrix beside \
                 them (scores in the form: {body})"
            ));
        }
        // A fused kernel has seen to its own, and forms no scores but for weights.
        let native = if fused.is_some() && !shape.weights { false } else { choose_native(shape, caps, body, options)? };
        let format = |tensors: &[&Tensor]| Format {
            element: shape.element,
            native,
            vector: tensors.iter().all(|t| whole_vectors(t)),
        };
        let operands = transforms(shape) || shape.wants(Logits::Masked);
        let room =
            caps.limits.max_storage_buffers_per_shader_stage >= 6 && caps.limits.max_bindings_per_bind_group >= 7;
        let early = shape.wants(Logits::Raw) || shape.wants(Logits::Capped);
        let separate = operands && (early || !room || body != Body::Tiled);
        if separate && fused.is_none() {
            reasons.push(if early {
                "the score transform is a pass of its own, because scores before it are asked for".into()
            } else if room {
                "the score transform is a pass of its own: unrolled in the lane form it would compile for seconds".into()
            } else {
                format!(
                    "the score transform is a pass of its own: scores cannot bind q, k, scores, lists, mask and bias under {} storage buffers",
                    caps.limits.max_storage_buffers_per_shader_stage
                )
            });
        }
        let qk = format(&[&shape.q, &shape.k]);
        let vo = format(&[&shape.v, &shape.out]);
        for (what, format) in [("q or k", qk), ("v or out", vo)] {
            if !format.vector {
                reasons
                    .push(format!("{what} has rows that are not whole vectors of four: elements are read one by one"));
            }
        }
        if key_step < shape.seq_kv {
            reasons.push(format!(
                "{key_step} keys a dispatch: those of one head exceed a binding, or what the loops of a CPU adapter take"
            ));
        }
        let direct = match &fused {
            Some(Variant::Rows(x)) => x.format.vector,
            Some(Variant::Flash(x)) => x.format.vector,
            Some(Variant::Matrix(x)) => x.vector,
            _ => vo.vector,
        };
        let partials = match &fused {
            Some(Variant::Split(x)) => partials(shape, caps, options, x, key_step),
            _ => 0,
        };
        if partials > 0 {
            reasons.push(match partials {
                1 => "the keys of a row go to one workgroup, whose f32 result the merge rounds".into(),
                _ => format!("the keys of a row go to {partials} workgroups, whose results are merged"),
            });
        }
        // `merge` sees to its output itself.
        let unpacked =
            shape.element != Element::F32 && partials == 0 && (!direct || (fused.is_none() && key_step < shape.seq_kv));
        if unpacked {
            if !shape.out.is_dense() {
                return Err(Error::Conflict {
                    left: "element",
                    right: "out",
                    why: "16-bit rows that are not whole vectors of four, or whose keys are split over dispatches, need a dense out",
                });
            }
            reasons.push("out is summed in an f32 scratch and packed to 16 bits afterwards".into());
        }
        let scores = scores::Scores {
            tile: scores_tile(shape, caps, body, qk)?,
            format: qk,
            full: operands && !separate && fused.is_none(),
        };
        let out = if unpacked { Element::F32 } else { shape.element };
        let values = values::Values { tile: values_tile(shape, caps, body, vo)?, format: vo, out };
        let threads = match (caps.cpu, shape.seq_kv) {
            // Two turns for 32 keys of a row.
            (true, keys) if u64::from(keys / 16) > CPU_TURNS => softmax::THREADS[2],
            (true, _) => softmax::THREADS[0],
            (false, ..=512) => softmax::THREADS[1],
            (false, _) => softmax::THREADS[2],
        };
        let threads = threads
            .min(caps.limits.max_compute_invocations_per_workgroup)
            .min(caps.limits.max_compute_workgroup_size_x);
        let threads = softmax::THREADS.into_iter().rev().find(|&t| t <= threads).expect("8 is below every floor");
        Ok(Planner {
            shape,
            caps,
            budget: caps.binding().min(options.scratch_budget),
            flops_per_second: caps.flops_per_second(),
            lists: Lists::new(shape),
            fused,
            partials,
            scores,
            softmax: softmax::Softmax { threads, lse: shape.lse },
            values,
            separate,
            key_step,
            unpacked,
            steps: Steps::new(caps, options),
            scratch: 0,
            state: 0,
            reasons,
        })
    }

    pub(crate) fn plan(mut self) -> Result<Plan> {
        if self.lists.bytes() > self.caps.binding() {
            let limit = self.caps.binding();
            let field =
                if self.shape.paged.is_some() { Operand::BlockTable.name() } else { "per-batch and per-head arrays" };
            return Err(Error::bytes(field, self.lists.bytes(), limit));
        }
        let s = self.shape;
        check_dispatches(self.dispatches())?;
        // A tile of 64 rows is one dispatch at least where it exceeds the work budget: most that is refused is refused here, before its
        // dispatches are listed.
        let tiles = s.visible_pairs() as f64 / (64.0 * f64::from(s.seq_kv.max(1)));
        check_dispatches((self.steps.budgets(s.flops()).min(tiles) / 4.0) as u64)?;
        let mut parts = Vec::new();
        if s.batch == 0 || s.seq_q == 0 {
            // What follows the parts has nothing to write either.
            (self.partials, self.unpacked) = (0, false);
            self.reasons.push("there is no query row: nothing runs and nothing is written".into());
        } else {
            let excess = |part: &Part| {
                let (field, bytes, limit) = self.excess(part)?;
                Some(Excess { field, bytes, limit, cuts: self.cuts() })
            };
            Part::new(0..s.batch, 0..s.heads, 0..s.seq_q).divide(&excess, &mut |part| {
                parts.push(part);
                check_dispatches(parts.len() as u64)
            })?;
        }
        if parts.len() > 1 {
            let what = match self.fused {
                None => format!("the score matrix of {} bytes", 4 * s.scores_len()),
                Some(_) => "the problem".into(),
            };
            self.reasons.push(format!(
                "{what} runs in {} parts under the scratch budget and binding limit of {} bytes",
                parts.len(),
                self.budget
            ));
        }
        for part in &parts {
            self.part(part)?;
        }
        let mut scratch = vec![(Slot::Scores, self.scratch), (Slot::State, self.state)];
        if self.totals() && !parts.is_empty() {
            let totals = 8 * s.lse_len();
            if totals > self.caps.limits.max_buffer_size {
                let limit = self.caps.limits.max_buffer_size;
                return Err(Error::bytes("totals", totals, limit));
            }
            scratch.push((Slot::Totals, totals));
        }
        if self.partials > 0 {
            let merge = Merge {
                partials: self.partials,
                batch: s.batch,
                heads: s.heads,
                seq_q: s.seq_q,
                value_dim: s.value_dim,
                element: s.element,
                out: Layout::Strided(s.out.strides),
                lse: s.lse,
                sinks: s.sinks,
            };
            let merged = merge.dispatches(Partials::Totals, &mut self.steps)?;
            let [out, lse] = partial_bytes(s, self.partials);
            scratch.extend([(Slot::PartialOut, out), (Slot::PartialLse, lse)]);
            scratch.extend(merged.sizes());
        }
        if self.weighs() {
            for part in &parts {
                self.weigh(part)?;
            }
        }
        if self.unpacked {
            let unpacked = 4 * s.out.extent();
            if unpacked > self.caps.limits.max_buffer_size {
                let limit = self.caps.limits.max_buffer_size;
                return Err(Error::bytes("out in f32", unpacked, limit));
            }
            let params = kernel::pack::Params {
                visible: self.visible(),
                list: params::Lists::from_fn(|list| self.lists.place(list)),
                flags: problem_flags(s),
                sequences: s.batch,
                ..kernel::pack::Params::default()
            };
            let packed = s.packed.map(|_| (params, self.lists.bytes()));
            pack(self.caps, s.element, &s.out, packed, &mut self.steps)?;
            scratch.push((Slot::Unpacked, unpacked));
        }
        let spare = self.steps.list.iter().any(|step| step.bindings.iter().any(|bound| bound.slot == Slot::Spare));
        scratch.push((Slot::Spare, if spare { SPARE } else { 0 }));
        scratch.retain(|(_, bytes)| *bytes > 0);
        let (steps, slices) = self.steps.finish();
        Ok(Plan {
            shape: s.clone(),
            steps,
            slices,
            scratch,
            choice: self.fused.as_ref().map_or(Choice::Unfused, Choice::of),
            lists: self.lists,
            alignment: self.caps.alignment(),
            flops_per_second: self.flops_per_second,
            reasons: self.reasons,
        })
    }

    /// How a part is cut: some kernels take the query heads of a key/value head together.
    fn cuts(&self) -> Vec<Cut> {
        let scores = self.fused.is_none() || self.shape.weights;
        let together =
            self.fused.is_some_and(|fused| fused.takes_group()) || scores && Variant::Scores(self.scores).takes_group();
        let rows = self.scores.tile.tile_rows.max(self.values.tile.tile_rows);
        vec![
            Cut::anywhere(Axis::Batch),
            Cut::at_multiples(Axis::Heads, if together { self.shape.group } else { 1 }),
            Cut::at_multiples(Axis::Rows, rows),
        ]
    }

    /// The first operand of a part that is too large, with its bytes and the limit.
    fn excess(&self, part: &Part) -> Option<(&'static str, u64, u64)> {
        let s = self.shape;
        let limit = self.caps.binding();
        let scores = self.score_bytes(part);
        if self.fused.is_none() && scores > self.budget {
            return Some(("one row of scores", scores, self.budget));
        }
        let state = self.state_bytes(part);
        if state > self.budget {
            return Some(("state", state, self.budget));
        }
        let bytes = s.element.bytes();
        let out_bytes = if self.unpacked { 4 } else { bytes };
        let mut operands = vec![("q", self.query_span(&s.q, part), bytes)];
        if self.partials == 0 {
            operands.push(("out", self.query_span(&s.out, part), out_bytes));
        }
        let split = self.key_step < s.seq_kv;
        let group = s.group;
        let one_head = count(&part.batch) == 1 && part.heads.start / group == (part.heads.end - 1) / group;
        if !(split && one_head) {
            operands.push(("k", self.key_span(&s.k, part, &(0..s.seq_kv)), bytes));
            operands.push(("v", self.key_span(&s.v, part, &(0..s.seq_kv)), bytes));
        }
        if let Some(mask) = s.mask {
            operands.push((Operand::Mask.name(), broadcast_span(&mask, part), 1));
        }
        if let Some(bias) = s.bias {
            operands.push((Operand::Bias.name(), broadcast_span(&bias.shape, part), bias.element.bytes()));
        }
        if self.weighs() {
            // Bound as twice the binding of lse, see `bound`.
            let (_, size, _) = self.bind(self.lse_span(part), 4, 0);
            if 2 * size > limit {
                return Some(("totals", 2 * size, limit));
            }
        }
        if s.lse && self.partials == 0 {
            operands.push(("lse", self.lse_span(part), 4));
        }
        if s.weights || s.logits.is_some() {
            operands.push(("weights or logits", self.dense_span(part), 4));
        }
        operands.into_iter().find_map(|(field, span, bytes)| {
            let (_, size, _) = self.bind(span, bytes, 0);
            (size > limit).then_some((field, size, limit))
        })
    }

    fn score_bytes(&self, part: &Part) -> u64 {
        4 * part.planes() * count(&part.rows) * u64::from(self.shape.score_row())
    }

    /// Of the rows of a fused kernel that wait between dispatches.
    fn state_bytes(&self, part: &Part) -> u64 {
        let (tile, blocks, each) = match &self.fused {
            Some(Variant::Rows(x)) if x.carry => (x.tile.tile_rows(), 1, x.state_bytes()),
            Some(Variant::Flash(x)) if x.carry => {
                (x.tile.tile_rows(), self.shape.value_dim.div_ceil(x.tile.dims), x.state_bytes())
            }
            _ => return 0,
        };
        part.planes() * count(&part.rows).div_ceil(tile.into()) * u64::from(blocks) * each
    }

    fn query_span(&self, tensor: &Tensor, part: &Part) -> Span {
        let (batch, rows) = match self.shape.packed {
            None => (part.batch.clone(), part.rows.clone()),
            Some(packed) => (0..1, 0..packed.total_q),
        };
        span(tensor, &batch, &part.heads, &rows)
    }

    fn key_span(&self, tensor: &Tensor, part: &Part, keys: &Range<u32>) -> Span {
        let (batch, rows) = match (self.shape.packed, self.shape.paged) {
            (Some(packed), _) => (0..1, 0..packed.total_kv),
            // Any page may hold keys of any sequence.
            (_, Some(paged)) => (0..paged.pages, 0..paged.page_size),
            _ => (part.batch.clone(), keys.clone()),
        };
        let group = self.shape.group;
        let heads = part.heads.start / group..(part.heads.end - 1) / group + 1;
        span(tensor, &batch, &heads, &rows)
    }

    fn lse_span(&self, part: &Part) -> Span {
        let s = self.shape;
        let (heads, last) = (u64::from(s.heads), |r: &Range<u32>| u64::from(r.end - 1));
        match s.packed {
            None => {
                let row = |b: u64, h: u64, i: u64| (b * heads + h) * u64::from(s.seq_q) + i;
                let first = row(part.batch.start.into(), part.heads.start.into(), part.rows.start.into());
                (first, row(last(&part.batch), last(&part.heads), last(&part.rows)) + 1)
            }
            Some(packed) => {
                let total = u64::from(packed.total_q);
                (u64::from(part.heads.start) * total, u64::from(part.heads.end) * total)
            }
        }
    }

    /// Of a dense [batch, heads, seq_q, seq_kv] output.
    fn dense_span(&self, part: &Part) -> Span {
        let s = self.shape;
        broadcast_span(&Broadcast([s.batch, s.heads, s.seq_q, s.seq_kv]), part)
    }

    /// Two numbers where lse has one, so that both have the same base.
    fn totals_bound(&self, part: &Part) -> (u64, u64, u32) {
        let (offset, size, base) = self.bind(self.lse_span(part), 4, 0);
        (2 * offset, 2 * size, base)
    }

    fn bind(&self, span: Span, bytes: u64, origin: u64) -> (u64, u64, u32) {
        steps::bind(self.caps, span, bytes, origin)
    }

    /// The dispatches of one part.
    fn part(&mut self, part: &Part) -> Result<()> {
        let s = self.shape;
        if let Some(fused) = self.fused {
            // m + ln l would lose l where m is large.
            let totals = if self.totals() || self.partials > 0 { flags::LSE | flags::TOTALS } else { 0 };
            let lse = if s.lse { flags::LSE } else { 0 };
            self.state = self.state.max(self.state_bytes(part));
            for keys in self.ranges() {
                let carried = if keys.start > 0 { flags::CARRIED } else { 0 };
                self.step(fused, part, &keys, lse | totals | carried)?;
            }
            return Ok(());
        }
        self.scratch = self.scratch.max(self.score_bytes(part));
        let ranges = self.ranges();
        let every = if s.weights || s.logits.is_some() { flags::EVERY_KEY } else { 0 };
        let capped_first = self.separate && s.wants(Logits::Capped) && s.softcap.is_some();
        for keys in &ranges {
            self.step(Variant::Scores(self.scores), part, keys, every)?;
        }
        let all = 0..s.seq_kv;
        if capped_first {
            // Only the cap: no operand hides a key yet.
            self.transform(part, flags::PACKED | flags::SOFTCAP | flags::EVERY_KEY)?;
        }
        if s.logits.is_some() {
            if self.separate && s.wants(Logits::Masked) {
                self.transform(part, u32::MAX)?;
            }
            self.step(Variant::Export(export::Export { to: Slot::Logits }), part, &all, flags::EXPORT_LOGITS)?;
        }
        if self.separate && !s.wants(Logits::Masked) {
            self.transform(part, if capped_first { !flags::SOFTCAP } else { u32::MAX })?;
        }
        let whole_rows = if s.weights { flags::EVERY_KEY } else { 0 };
        self.step(Variant::Softmax(self.softmax), part, &all, whole_rows)?;
        if s.weights {
            self.step(Variant::Export(export::Export { to: Slot::Weights }), part, &all, 0)?;
        }
        for (i, keys) in ranges.iter().enumerate() {
            self.step(Variant::Values(self.values), part, keys, if i > 0 { flags::ADD } else { 0 })?;
        }
        Ok(())
    }

    /// Keys of each dispatch.
    fn ranges(&self) -> Vec<Range<u32>> {
        let all = self.shape.seq_kv;
        // Rows without any key have their output written all the same.
        let firsts = (0..all.max(1)).step_by(self.key_step as usize);
        firsts.map(|first| first..all.min(first.saturating_add(self.key_step))).collect()
    }

    /// Whether the fused kernel leaves maximum and sum of each row, for `weights`; those of `split`'s parts come from the merge.
    fn totals(&self) -> bool {
        self.weighs() && self.partials == 0
    }

    /// Whether the weights follow a fused kernel: rows without any key have none.
    fn weighs(&self) -> bool {
        self.fused.is_some() && self.shape.weights && self.shape.seq_kv > 0
    }

    /// The weights of one part, after the fused kernel: raw scores into the caller's buffer, and `weights` on them in place.
    fn weigh(&mut self, part: &Part) -> Result<()> {
        let all = 0..self.shape.seq_kv;
        for keys in self.ranges() {
            self.step(Variant::Scores(self.scores), part, &keys, 0)?;
        }
        let lse = if self.shape.lse && self.partials == 0 { flags::LSE } else { 0 };
        self.step(Variant::Weights(weights::Weights), part, &all, lse)
    }

    /// The score transform as a pass of its own, with only the flags in `keep`.
    fn transform(&mut self, part: &Part, keep: u32) -> Result<()> {
        let from = self.steps.list.len();
        self.step(Variant::Logits(logits::Logits), part, &(0..self.shape.seq_kv), 0)?;
        self.steps.list[from..].iter_mut().for_each(|step| step.uniform.keep_flags(keep));
        Ok(())
    }

    /// One kernel over a part and a range of keys, in as many dispatches as the limits need.
    fn step(&mut self, variant: Variant, part: &Part, keys: &Range<u32>, extra_flags: u32) -> Result<()> {
        let s = self.shape;
        let lines = self.tile_lines(&variant, part);
        let each = if variant.takes_group() { count(&self.group(part)) } else { 1 };
        let both = 2.0 * f64::from(s.head_dim + s.value_dim);
        // Each block of value dims forms the scores again.
        let blocks = |dims: u32| s.value_dim.div_ceil(dims);
        let blocked = |dims: u32| 2.0 * f64::from(blocks(dims) * s.head_dim + s.value_dim);
        // Lines of a tile, tiles of columns, operations of a row and key.
        let (tile, col_tiles, flops) = match &variant {
            Variant::Scores(x) => {
                (x.tile.tile_rows, count(keys).div_ceil(x.tile.tile_cols.into()), 2.0 * f64::from(s.head_dim))
            }
            Variant::Values(x) => {
                (x.tile.tile_rows, s.value_dim.div_ceil(x.tile.tile_cols).into(), 2.0 * f64::from(s.value_dim))
            }
            Variant::Softmax(_) => (1, 1, 32.0),
            Variant::Flash(x) => (x.tile.tile_rows(), blocks(x.tile.dims).into(), blocked(x.tile.dims)),
            Variant::Matrix(x) => (x.tile.tile_rows(), blocks(x.tile.dims).into(), blocked(x.tile.dims)),
            Variant::Rows(x) => (x.tile.tile_rows(), 1, both),
            Variant::Split(x) => (x.tile.rows, u64::from(self.partials.max(1)) / self.dispatches(), both),
            _ => (1, count(keys).div_ceil(variant.threads().into()), 32.0),
        };
        let row_tiles = lines.div_ceil(tile.into());
        let mut params = self.params(part, keys, extra_flags);
        let mut planes = part.planes();
        if variant.takes_group() {
            let place = &mut params.place;
            place.head0 = part.heads.start / s.group;
            place.heads = (part.heads.end - 1) / s.group + 1 - place.head0;
            planes = count(&part.batch) * u64::from(place.heads);
        }
        if self.partials > 0 && matches!(variant, Variant::Split(_)) {
            params.flags &= !flags::SINKS;
        }
        params.place.row_tiles = checked_u32("row tiles", row_tiles)?;
        params.place.col_tiles = checked_u32("column tiles", col_tiles)?;
        let bindings = variant
            .bindings()
            .into_iter()
            .map(|(slot, written)| self.bound(slot, written, &variant, part, keys, &mut params))
            .collect::<Vec<_>>();
        let skips = params.flags & flags::EVERY_KEY == 0;
        let band = match &variant {
            Variant::Logits(_) | Variant::Export(_) | Variant::Weights(_) => Band::every(s),
            _ if skips => Band::of(s, (tile / each as u32).max(1)),
            _ => Band::every(s),
        };
        // Pairs of the first lines of a plane.
        let first = u64::from(part.rows.start);
        let pairs = |lines: u64| {
            let rows = first + lines / each;
            let rest = match lines % each {
                0 => 0,
                some => some * band.pairs(rows..rows + 1, keys),
            };
            (each * band.pairs(first..rows, keys) + rest) as f64
        };
        let plane = pairs(lines);
        // Of the first tiles of rows; `rows` takes them from both ends by turns.
        let tiles = |n: u64| {
            let line = |tiles: u64| lines.min(tiles * u64::from(tile));
            match &variant {
                Variant::Rows(_) => pairs(line(n.div_ceil(2))) + plane - pairs(line(row_tiles - n / 2)),
                _ => pairs(line(n)),
            }
        };
        let workgroups = checked_u32("workgroups", row_tiles * col_tiles * planes)?;
        self.steps.push_uneven(variant, variant.attention(&params), bindings, workgroups, |n| {
            let (n, cols) = (u64::from(n) / col_tiles, u64::from(n) % col_tiles);
            let (planes, n) = (n / row_tiles, n % row_tiles);
            let whole = tiles(n);
            let begun = if cols == 0 { 0.0 } else { (tiles(n + 1) - whole) * cols as f64 / col_tiles as f64 };
            flops * (planes as f64 * plane + whole + begun)
        })
    }

    /// Dispatches of a part that walk its keys one after the other.
    fn dispatches(&self) -> u64 {
        u64::from(self.shape.seq_kv.div_ceil(self.key_step).max(1))
    }

    /// Lines of a part that a kernel's tiles divide: rows, of each head or of all query heads of a key/value head.
    fn tile_lines(&self, variant: &Variant, part: &Part) -> u64 {
        count(&part.rows) * if variant.takes_group() { count(&self.group(part)) } else { 1 }
    }

    /// The query heads of a key/value head that a part has: all, unless it lies within one group.
    fn group(&self, part: &Part) -> Range<u32> {
        let group = self.shape.group;
        let first = part.heads.start % group;
        first..group.min(first + part.heads.end - part.heads.start)
    }

    fn params(&self, part: &Part, keys: &Range<u32>, extra_flags: u32) -> Attention {
        let s = self.shape;
        let rows = u64::from(part.rows.end - part.rows.start);
        let group = self.group(part);
        let row = u64::from(s.score_row());
        let s_head = rows * row;
        let s_batch = count(&part.heads) * s_head;
        let origin = u64::from(part.batch.start) * s_batch
            + u64::from(part.heads.start) * s_head
            + u64::from(part.rows.start) * row;
        Attention {
            place: Place::of(part),
            keys: Keys { key0: keys.start, key_end: keys.end },
            visible: self.visible(),
            pages: Pages {
                pages: s.paged.map_or(0, |p| p.pages),
                page_size: s.paged.map_or(s.seq_kv.max(1), |p| p.page_size),
                table_row: s.paged.map_or(0, |p| p.of(s.seq_kv)),
            },
            list: params::Lists::from_fn(|list| self.lists.place(list)),
            flags: problem_flags(s) | extra_flags,
            group: s.group,
            lines: Lines { group0: group.start, group_end: group.end },
            head_dim: s.head_dim,
            value_dim: s.value_dim,
            transform: Transform { scale: s.scale, softcap: s.softcap.unwrap_or(0.0), ..Transform::default() },
            s: At {
                base: 0u64.wrapping_sub(origin) as u32,
                batch: s_batch as u32,
                head: s_head as u32,
                row: s.score_row(),
            },
            values_rows: self.values.tile.tile_rows,
            values_each: if Variant::Values(self.values).takes_group() { group.end - group.start } else { 1 },
            ..Attention::default()
        }
    }

    fn visible(&self) -> Visible {
        let s = self.shape;
        Visible {
            seq_q: s.seq_q,
            seq_kv: s.seq_kv,
            total_q: s.packed.map_or(0, |p| p.total_q),
            total_kv: s.packed.map_or(0, |p| p.total_kv),
            window_left: s.window.left.unwrap_or(0),
            window_right: s.window.right.unwrap_or(0),
        }
    }

    /// The binding of a slot, and its base and strides in the uniform. Strides wrap like addresses.
    fn bound(
        &self,
        slot: Slot,
        written: bool,
        variant: &Variant,
        part: &Part,
        keys: &Range<u32>,
        p: &mut Attention,
    ) -> Bound {
        let s = self.shape;
        let bytes = s.element.bytes();
        let [heads, rows, keys_all] = [s.heads, s.seq_q, s.seq_kv].map(u64::from);
        let dense = Strides { offset: 0, batch: heads * rows * keys_all, head: rows * keys_all, row: keys_all };
        let unpacked = self.unpacked
            && matches!(variant, Variant::Values(_) | Variant::Rows(_) | Variant::Flash(_) | Variant::Matrix(_));
        let partial = self.partials > 0;
        let fused = self.fused.is_some();
        let weighs = matches!(variant, Variant::Weights(_));
        let (slot, (offset, size, base)) = match slot {
            // A binding may not be empty, and no kernel reads keys or values where there are none.
            Slot::K | Slot::V if s.k.is_empty() => (Slot::Lists, (0, self.lists.bytes(), 0)),
            Slot::Q => (slot, self.bind(self.query_span(&s.q, part), bytes, s.q.strides.offset)),
            Slot::K => (slot, self.bind(self.key_span(&s.k, part, keys), bytes, s.k.strides.offset)),
            Slot::V => (slot, self.bind(self.key_span(&s.v, part, keys), bytes, s.v.strides.offset)),
            Slot::Out if partial => (Slot::PartialOut, (0, partial_bytes(s, self.partials)[0], 0)),
            Slot::State => (slot, (0, self.state_bytes(part), 0)),
            Slot::Out if unpacked => {
                (Slot::Unpacked, self.bind(self.query_span(&s.out, part), 4, s.out.strides.offset))
            }
            Slot::Out => (slot, self.bind(self.query_span(&s.out, part), bytes, s.out.strides.offset)),
            Slot::Lse if partial && !weighs => (Slot::PartialLse, (0, partial_bytes(s, self.partials)[1], 0)),
            Slot::Lse if self.totals() && !weighs => (Slot::Totals, self.totals_bound(part)),
            Slot::Totals => (slot, self.totals_bound(part)),
            // The merge gave out that of `split`'s parts.
            Slot::Lse if !s.lse || partial => (Slot::Spare, (0, SPARE, 0)),
            Slot::Lse => (slot, self.bind(self.lse_span(part), 4, 0)),
            Slot::Weights | Slot::Logits => (slot, self.bind(self.dense_span(part), 4, 0)),
            // A shader that can take the operand binds something even where the problem has none, or none of its elements.
            Slot::Mask if s.mask.is_none_or(|mask| mask.is_empty()) => (Slot::Lists, (0, self.lists.bytes(), 0)),
            Slot::Bias if s.bias.is_none_or(|bias| bias.shape.is_empty()) => (Slot::Lists, (0, self.lists.bytes(), 0)),
            Slot::Mask => (slot, self.bind(broadcast_span(&s.mask.expect("matched above"), part), 1, 0)),
            Slot::Bias => {
                let bias = s.bias.expect("matched above");
                (slot, self.bind(broadcast_span(&bias.shape, part), bias.element.bytes(), 0))
            }
            Slot::Lists => (slot, (0, self.lists.bytes(), 0)),
            Slot::Scores if fused => (Slot::Weights, self.bind(self.dense_span(part), 4, 0)),
            Slot::Scores => (slot, (0, self.score_bytes(part), p.s.base)),
            _ => unreachable!("attention's kernels bind no such operand"),
        };
        let parts_before = (keys.start / self.key_step).wrapping_mul(p.place.col_tiles);
        match slot {
            Slot::Q => p.q = At::new(base, &s.q.strides),
            Slot::K => p.k = At::new(base, &s.k.strides),
            Slot::V => p.v = At::new(base, &s.v.strides),
            Slot::Out | Slot::Unpacked => p.out = At::new(base, &s.out.strides),
            Slot::Weights if fused => p.s = At::new(base, &dense),
            Slot::Weights | Slot::Logits => p.out = At::new(base, &dense),
            Slot::PartialOut => {
                let plane = s.seq_q.wrapping_mul(s.value_dim);
                let batch = s.heads.wrapping_mul(plane);
                p.partials.next_out = s.batch.wrapping_mul(batch);
                // Behind the parts of the dispatches before.
                let base = parts_before.wrapping_mul(p.partials.next_out);
                p.out = At { base, batch, head: plane, row: s.value_dim };
            }
            Slot::PartialLse => {
                let batch = s.heads.wrapping_mul(s.seq_q);
                p.partials.next_lse = s.batch.wrapping_mul(batch);
                let base = parts_before.wrapping_mul(p.partials.next_lse);
                p.lse = LineAt { base, batch, head: s.seq_q };
            }
            Slot::Lse | Slot::Totals => {
                let row = s.packed.map_or(s.seq_q, |packed| packed.total_q);
                p.lse = LineAt { base, batch: s.heads.wrapping_mul(row), head: row };
            }
            Slot::Mask => p.transform.mask = pair_at(base, &s.mask.expect("matched above"), s.seq_kv),
            Slot::Bias => p.transform.bias = pair_at(base, &s.bias.expect("matched above").shape, s.seq_kv),
            _ => {}
        }
        Bound { slot, offset, size, written }
    }
}

/// Most rows of a tile of `values`.
const VALUES_ROWS: u32 = 64;

fn problem_flags(s: &Shape) -> u32 {
    let bias = s.bias.map_or(0, |bias| {
        flags::BIAS
            | match bias.element {
                Element::F32 => flags::BIAS_F32,
                Element::F16 => 0,
                Element::Bf16 => flags::BIAS_BF16,
            }
    });
    let causal = match s.causal {
        Causal::None => 0,
        Causal::TopLeft => flags::CAUSAL,
        Causal::BottomRight => flags::CAUSAL | flags::BOTTOM_RIGHT,
        Causal::Offset => flags::CAUSAL | flags::OFFSETS,
    };
    let set = [
        (s.window.left.is_some(), flags::WINDOW_LEFT),
        (s.window.right.is_some(), flags::WINDOW_RIGHT),
        (s.key_lengths, flags::LENGTHS),
        (s.packed.is_some(), flags::PACKED),
        (s.paged.is_some(), flags::PAGED),
        (s.softcap.is_some(), flags::SOFTCAP),
        (s.alibi, flags::ALIBI),
        (s.sinks, flags::SINKS),
        (s.mask.is_some(), flags::MASK),
    ];
    set.into_iter().filter(|&(on, _)| on).fold(bias | causal, |all, (_, flag)| all | flag)
}

fn pair_at(base: u32, of: &Broadcast, seq_kv: u32) -> PairAt {
    let [batch, head, row, key] = broadcast_strides(of);
    PairAt { base, batch, head, row, key, keys: covered(of, seq_kv) }
}

fn broadcast_strides(Broadcast(shape): &Broadcast) -> [u32; 4] {
    let mut strides = [0; 4];
    let mut step = 1u64;
    for axis in (0..4).rev() {
        strides[axis] = if shape[axis] == 1 { 0 } else { step as u32 };
        step *= u64::from(shape[axis]);
    }
    strides
}

fn broadcast_span(Broadcast(shape): &Broadcast, part: &Part) -> Span {
    let [b, h, r] = [&part.batch, &part.heads, &part.rows];
    let pick = |axis: usize, full: u32| if shape[axis] == 1 { 0 } else { u64::from(full) };
    let row = |b: u32, h: u32, r: u32| {
        ((pick(0, b) * u64::from(shape[1]) + pick(1, h)) * u64::from(shape[2]) + pick(2, r)) * u64::from(shape[3])
    };
    (row(b.start, h.start, r.start), row(b.end - 1, h.end - 1, r.end - 1) + u64::from(shape[3]))
}

/// Keys that a broadcast operand covers: all if its last axis is 1.
fn covered(Broadcast(shape): &Broadcast, seq_kv: u32) -> u32 {
    if shape[3] == 1 { seq_kv } else { shape[3] }
}
