//! Makes plans: divides a problem into parts that fit the device and lists the dispatches of each.

mod division;
mod passes;
mod spans;

use std::ops::Range;

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::operands::{Kind, Operand};
use crate::contract::options::Options;
use crate::contract::problem::{Broadcast, Causal, Element, Layout, Strides};
use crate::contract::shape::Shape;
use crate::contract::walk::Band;
use crate::dispatch::part::{Part, count};
use crate::dispatch::step::Bound;
use crate::dispatch::steps::{SPARE, Steps, check_dispatches, checked_u32};
use crate::kernel::attention::{AttentionKernel, Grid};
use crate::kernel::params::{self, At, Attention, Keys, LineAt, Lines, Pages, PairAt, Transform, Visible, flags};
use crate::kernel::slot::Slot;
use crate::kernel::{self, Variant};
use crate::ops::merge::{Merge, Partials};
use crate::ops::pack::pack;
use crate::plan::Plan;
use crate::plan::lists::Lists;
use crate::plan::measured::Tuning;
use crate::plan::route::{Route, tile_rows};

use spans::broadcast_span;

pub(crate) struct Planner<'a> {
    shape: &'a Shape,
    caps: &'a Caps,
    options: &'a Options,
    budget: u64,
    lists: Lists,
    route: Route,
    steps: Steps<'a>,
    /// The largest score matrix of a part, in bytes.
    scratch: u64,
    /// The most bytes that the rows of a part leave between two dispatches.
    state: u64,
    reasons: Vec<String>,
}

impl<'a> Planner<'a> {
    pub(crate) fn new(shape: &'a Shape, caps: &'a Caps, options: &'a Options, tuning: &Tuning) -> Result<Self> {
        let mut reasons = Vec::new();
        let route = Route::new(shape, caps, options, tuning, &mut reasons)?;
        let budget = caps.binding().min(options.scratch_budget);
        let (lists, steps) = (Lists::new(shape), Steps::new(caps, options));
        Ok(Planner { shape, caps, options, budget, lists, route, steps, scratch: 0, state: 0, reasons })
    }

    pub(crate) fn plan(mut self) -> Result<Plan> {
        self.check()?;
        let parts = self.divide()?;
        for part in &parts {
            self.part(part)?;
        }
        let mut scratch = vec![(Slot::Scores, self.scratch), (Slot::State, self.state)];
        // Without a row nothing is left to do either.
        if !parts.is_empty() {
            self.after(&mut scratch)?;
        }
        let spare = self.steps.list.iter().any(|step| step.bindings.iter().any(|bound| bound.slot == Slot::Spare));
        scratch.push((Slot::Spare, if spare { SPARE } else { 0 }));
        scratch.retain(|(_, bytes)| *bytes > 0);
        let (steps, slices) = self.steps.finish();
        let trials =
            if steps.is_empty() { Vec::new() } else { self.route.trials(self.shape, self.caps, self.options)? };
        Ok(Plan {
            shape: self.shape.clone(),
            steps,
            slices,
            scratch,
            choice: self.route.choice(),
            trials,
            lists: self.lists,
            caps: self.caps.clone(),
            options: self.options.clone(),
            reasons: self.reasons,
        })
    }

    /// Refuses what is too large whatever its parts are.
    fn check(&self) -> Result<()> {
        let (s, limit) = (self.shape, self.caps.binding());
        if self.lists.bytes() > limit {
            let longest = Operand::of_kind(Kind::List).max_by_key(|list| list.len(s)).expect("there are lists");
            return Err(Error::bytes(longest.name(), self.lists.bytes(), limit));
        }
        check_dispatches(self.dispatches())?;
        // A tile of 64 rows is one dispatch at least where it exceeds the work budget: most that is refused is refused here, before its
        // dispatches are listed.
        let tiles = s.visible_pairs() as f64 / (64.0 * f64::from(s.problem.seq_kv.max(1)));
        check_dispatches((self.steps.budgets(s.flops()).min(tiles) / 4.0) as u64)
    }

    /// What follows the kernels of all parts: the merge and the 16-bit output. Adds their scratch.
    fn after(&mut self, scratch: &mut Vec<(Slot, u64)>) -> Result<()> {
        let s = self.shape;
        if self.route.partials() > 0 {
            let merge = Merge {
                partials: self.route.partials(),
                batch: s.problem.batch,
                heads: s.problem.heads,
                seq_q: s.problem.seq_q,
                value_dim: s.problem.value_dim,
                element: s.problem.element,
                out: Layout::Strided(s.out.strides),
                lse: s.problem.lse,
                sinks: s.problem.sinks,
            };
            let merged = merge.dispatches(Partials::Totals, &mut self.steps)?;
            let [out, lse] = self.route.partial_bytes(s);
            scratch.extend([(Slot::PartialOut, out), (Slot::PartialLse, lse)]);
            scratch.extend(merged.sizes());
        }
        if self.route.unpacked(s) {
            let unpacked = self.check_buffer("out in f32", 4 * s.out.extent())?;
            let params = kernel::pack::Params {
                visible: self.visible(),
                list: params::Lists::from_fn(|list| self.lists.place(list)),
                flags: problem_flags(s),
                sequences: s.problem.batch,
                ..kernel::pack::Params::default()
            };
            let packed = s.problem.packed.map(|_| (params, self.lists.bytes()));
            pack(self.caps, s.problem.element, &s.out, packed, &mut self.steps)?;
            scratch.push((Slot::Unpacked, unpacked));
        }
        Ok(())
    }

    fn check_buffer(&self, field: &'static str, bytes: u64) -> Result<u64> {
        let limit = self.caps.limits.max_buffer_size;
        if bytes > limit { Err(Error::bytes(field, bytes, limit)) } else { Ok(bytes) }
    }

    /// One kernel over a part and a range of keys, in as many dispatches as the limits need.
    fn step(&mut self, variant: Variant, part: &Part, keys: &Range<u32>, extra_flags: u32) -> Result<()> {
        let s = self.shape;
        let lines = self.tile_lines(&variant, part);
        let each = if variant.takes_group() { count(&self.group(part)) } else { 1 };
        let kernel = variant.attention().expect("a kernel of attention");
        let Grid { tile_rows: tile, columns: col_tiles, flops } = self.grid(kernel, keys);
        let row_tiles = lines.div_ceil(tile.into());
        let mut params = self.params(part, keys, extra_flags);
        let mut planes = part.planes();
        if variant.takes_group() {
            let place = &mut params.place;
            place.head0 = part.heads.start / s.group;
            place.heads = (part.heads.end - 1) / s.group + 1 - place.head0;
            planes = count(&part.batch) * u64::from(place.heads);
        }
        params.place.row_tiles = checked_u32("row tiles", row_tiles)?;
        params.place.col_tiles = checked_u32("column tiles", col_tiles)?;
        let bindings = variant
            .bindings()
            .into_iter()
            .map(|(slot, written)| self.bound(slot, written, part, keys, &mut params))
            .collect::<Vec<_>>();
        let every_pair = kernel.every_pair() || params.flags & flags::EVERY_KEY != 0;
        let band = if every_pair { Band::every(s) } else { Band::of(s, (tile / each as u32).max(1)) };
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
        // Pairs of the first `n` tiles of rows, in the order in which workgroups take them.
        let tiles = |n: u64| {
            let line = |tiles: u64| lines.min(tiles * u64::from(tile));
            match kernel.takes_both_ends() {
                true => pairs(line(n.div_ceil(2))) + plane - pairs(line(row_tiles - n / 2)),
                false => pairs(line(n)),
            }
        };
        let workgroups = checked_u32("workgroups", row_tiles * col_tiles * planes)?;
        self.steps.push_uneven(part, variant, kernel.pick(&params), bindings, workgroups, |n| {
            let (n, cols) = (u64::from(n) / col_tiles, u64::from(n) % col_tiles);
            let (planes, n) = (n / row_tiles, n % row_tiles);
            let whole = tiles(n);
            let begun = if cols == 0 { 0.0 } else { (tiles(n + 1) - whole) * cols as f64 / col_tiles as f64 };
            flops * (planes as f64 * plane + whole + begun)
        })
    }

    fn grid(&self, kernel: &dyn AttentionKernel, keys: &Range<u32>) -> Grid {
        let grid = kernel.grid(self.shape, count(keys));
        match self.route.partials() {
            partials if partials > 0 && kernel.fused().is_some() => {
                Grid { columns: u64::from(partials) / self.dispatches(), ..grid }
            }
            _ => grid,
        }
    }

    /// Dispatches of a part that walk its keys one after the other.
    fn dispatches(&self) -> u64 {
        u64::from(self.shape.problem.seq_kv.div_ceil(self.route.key_step()).max(1))
    }

    fn params(&self, part: &Part, keys: &Range<u32>, extra_flags: u32) -> Attention {
        let s = self.shape;
        let rows = u64::from(part.rows.end - part.rows.start);
        let group = self.group(part);
        let values = self.route.values();
        let row = u64::from(s.score_row());
        let s_head = rows * row;
        let s_batch = count(&part.heads) * s_head;
        let origin = u64::from(part.batch.start) * s_batch
            + u64::from(part.heads.start) * s_head
            + u64::from(part.rows.start) * row;
        Attention {
            place: part.place(),
            keys: Keys { key0: keys.start, key_end: keys.end },
            visible: self.visible(),
            pages: Pages {
                pages: s.problem.paged.map_or(0, |p| p.pages),
                page_size: s.problem.paged.map_or(s.problem.seq_kv.max(1), |p| p.page_size),
                table_row: s.problem.paged.map_or(0, |p| p.of(s.problem.seq_kv)),
            },
            list: params::Lists::from_fn(|list| self.lists.place(list)),
            // Sinks join where partial results are merged.
            flags: (problem_flags(s) | extra_flags)
                & if extra_flags & flags::PARTIAL != 0 { !flags::SINKS } else { !0 },
            group: s.group,
            lines: Lines { group0: group.start, group_end: group.end },
            head_dim: s.problem.head_dim,
            value_dim: s.problem.value_dim,
            transform: Transform { scale: s.scale, softcap: s.problem.softcap.unwrap_or(0.0), ..Transform::default() },
            s: At {
                base: 0u64.wrapping_sub(origin) as u32,
                batch: s_batch as u32,
                head: s_head as u32,
                row: s.score_row(),
            },
            values_rows: values.map_or(0, |values| tile_rows(&values, s)),
            values_each: if values.is_some_and(|values| values.takes_group()) { group.end - group.start } else { 1 },
            ..Attention::default()
        }
    }

    fn visible(&self) -> Visible {
        let s = self.shape;
        Visible {
            seq_q: s.problem.seq_q,
            seq_kv: s.problem.seq_kv,
            total_q: s.problem.packed.map_or(0, |p| p.total_q),
            total_kv: s.problem.packed.map_or(0, |p| p.total_kv),
            window_left: s.problem.window.left.unwrap_or(0),
            window_right: s.problem.window.right.unwrap_or(0),
        }
    }

    /// The binding of a slot, and its base and strides in the uniform.
    fn bound(&self, slot: Slot, written: bool, part: &Part, keys: &Range<u32>, p: &mut Attention) -> Bound {
        let (slot, (offset, size, base)) = self.range(slot, part, keys, p.s.base);
        self.address(slot, base, keys, p);
        Bound { slot, offset, size, written }
    }

    /// What is bound for a slot: of which buffer, from which byte on, how many bytes, and the base of its addresses.
    fn range(&self, slot: Slot, part: &Part, keys: &Range<u32>, scores: u32) -> (Slot, (u64, u64, u32)) {
        let s = self.shape;
        let bytes = s.problem.element.bytes();
        let unpacked = self.route.unpacked(s);
        let partial = self.route.partials() > 0;
        let fused = self.route.kernel().is_some();
        match slot {
            // A binding may not be empty, and no kernel reads keys or values where there are none.
            Slot::K | Slot::V if s.k.is_empty() => (Slot::Lists, (0, self.lists.bytes(), 0)),
            Slot::Q => (slot, self.bind(self.query_span(&s.q, part), bytes, s.q.strides.offset)),
            Slot::K => (slot, self.bind(self.key_span(&s.k, part, keys), bytes, s.k.strides.offset)),
            Slot::V => (slot, self.bind(self.key_span(&s.v, part, keys), bytes, s.v.strides.offset)),
            Slot::Out if partial => (Slot::PartialOut, (0, self.route.partial_bytes(s)[0], 0)),
            Slot::State => (slot, (0, self.state_bytes(part), 0)),
            Slot::Out if unpacked => {
                (Slot::Unpacked, self.bind(self.query_span(&s.out, part), 4, s.out.strides.offset))
            }
            Slot::Out => (slot, self.bind(self.query_span(&s.out, part), bytes, s.out.strides.offset)),
            Slot::Lse if partial => (Slot::PartialLse, (0, self.route.partial_bytes(s)[1], 0)),
            Slot::Lse if !s.problem.lse => (Slot::Spare, (0, SPARE, 0)),
            Slot::Lse => (slot, self.bind(self.lse_span(part), 4, 0)),
            Slot::Weights | Slot::Logits => (slot, self.bind(self.dense_span(part), 4, 0)),
            // A shader that can take the operand binds something even where the problem has none, or none of its elements.
            Slot::Mask if s.problem.mask.is_none_or(|mask| mask.is_empty()) => {
                (Slot::Lists, (0, self.lists.bytes(), 0))
            }
            Slot::Bias if s.problem.bias.is_none_or(|bias| bias.shape.is_empty()) => {
                (Slot::Lists, (0, self.lists.bytes(), 0))
            }
            Slot::Mask => (slot, self.bind(broadcast_span(&s.problem.mask.expect("matched above"), part), 1, 0)),
            Slot::Bias => {
                let bias = s.problem.bias.expect("matched above");
                (slot, self.bind(broadcast_span(&bias.shape, part), bias.element.bytes(), 0))
            }
            Slot::Lists => (slot, (0, self.lists.bytes(), 0)),
            Slot::Scores if fused => (Slot::Weights, self.bind(self.dense_span(part), 4, 0)),
            Slot::Scores => (slot, (0, self.score_bytes(part), scores)),
            _ => unreachable!("attention's kernels bind no such operand"),
        }
    }

    /// Writes where the elements of what is bound stand. Strides wrap like addresses.
    fn address(&self, slot: Slot, base: u32, keys: &Range<u32>, p: &mut Attention) {
        let s = self.shape;
        let [heads, rows, keys_all] = [s.problem.heads, s.problem.seq_q, s.problem.seq_kv].map(u64::from);
        let dense = Strides { offset: 0, batch: heads * rows * keys_all, head: rows * keys_all, row: keys_all };
        let fused = self.route.kernel().is_some();
        let parts_before = (keys.start / self.route.key_step()).wrapping_mul(p.place.col_tiles);
        match slot {
            Slot::Q => p.q = At::new(base, &s.q.strides),
            Slot::K => p.k = At::new(base, &s.k.strides),
            Slot::V => p.v = At::new(base, &s.v.strides),
            Slot::Out | Slot::Unpacked => p.out = At::new(base, &s.out.strides),
            Slot::Weights if fused => p.s = At::new(base, &dense),
            Slot::Weights | Slot::Logits => p.out = At::new(base, &dense),
            Slot::PartialOut => {
                let plane = s.problem.seq_q.wrapping_mul(s.problem.value_dim);
                let batch = s.problem.heads.wrapping_mul(plane);
                p.partials.next_out = s.problem.batch.wrapping_mul(batch);
                // Behind the parts of the dispatches before.
                let base = parts_before.wrapping_mul(p.partials.next_out);
                p.out = At { base, batch, head: plane, row: s.problem.value_dim };
            }
            Slot::PartialLse => {
                let batch = s.problem.heads.wrapping_mul(s.problem.seq_q);
                p.partials.next_lse = s.problem.batch.wrapping_mul(batch);
                let base = parts_before.wrapping_mul(p.partials.next_lse);
                p.lse = LineAt { base, batch, head: s.problem.seq_q };
            }
            Slot::Lse => {
                let row = s.problem.packed.map_or(s.problem.seq_q, |packed| packed.total_q);
                p.lse = LineAt { base, batch: s.problem.heads.wrapping_mul(row), head: row };
            }
            Slot::Mask => p.transform.mask = pair_at(base, &s.problem.mask.expect("matched above"), s.problem.seq_kv),
            Slot::Bias => {
                p.transform.bias = pair_at(base, &s.problem.bias.expect("matched above").shape, s.problem.seq_kv)
            }
            _ => {}
        }
    }
}

fn problem_flags(s: &Shape) -> u32 {
    let bias = s.problem.bias.map_or(0, |bias| {
        flags::BIAS
            | match bias.element {
                Element::F32 => flags::BIAS_F32,
                Element::F16 => 0,
                Element::Bf16 => flags::BIAS_BF16,
            }
    });
    let causal = match s.problem.causal {
        Causal::None => 0,
        Causal::TopLeft => flags::CAUSAL,
        Causal::BottomRight => flags::CAUSAL | flags::BOTTOM_RIGHT,
        Causal::Offset => flags::CAUSAL | flags::OFFSETS,
    };
    let set = [
        (s.problem.window.left.is_some(), flags::WINDOW_LEFT),
        (s.problem.window.right.is_some(), flags::WINDOW_RIGHT),
        (s.problem.key_lengths, flags::LENGTHS),
        (s.problem.key_positions, flags::POSITIONS),
        (s.problem.packed.is_some(), flags::PACKED),
        (s.problem.paged.is_some(), flags::PAGED),
        (s.problem.softcap.is_some(), flags::SOFTCAP),
        (s.problem.alibi, flags::ALIBI),
        (s.problem.sinks, flags::SINKS),
        (s.problem.mask.is_some(), flags::MASK),
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

/// Keys that a broadcast operand covers: all if its last axis is 1.
fn covered(Broadcast(shape): &Broadcast, seq_kv: u32) -> u32 {
    if shape[3] == 1 { seq_kv } else { shape[3] }
}
