//! How a problem is divided into parts that fit the device.

use super::Planner;
use super::spans::broadcast_span;
use crate::contract::error::Result;
use crate::contract::operands::Operand;
use crate::dispatch::part::{Axis, Cut, Excess, Part, count};
use crate::dispatch::steps::check_dispatches;
use crate::plan::route::Route;

impl Planner<'_> {
    /// The parts in order; none where there is no query row.
    pub(super) fn divide(&mut self) -> Result<Vec<Part>> {
        let s = self.shape;
        let mut parts = Vec::new();
        if s.problem.batch == 0 || s.problem.seq_q == 0 {
            self.reasons.push("there is no query row: nothing runs and nothing is written".into());
            return Ok(parts);
        }
        let excess = |part: &Part| {
            let (field, bytes, limit) = self.excess(part)?;
            Some(Excess { field, bytes, limit, cuts: self.cuts() })
        };
        Part::new(0..s.problem.batch, 0..s.problem.heads, 0..s.problem.seq_q).divide(&excess, &mut |part| {
            parts.push(part);
            check_dispatches(parts.len() as u64)
        })?;
        if parts.len() > 1 {
            let what = match self.route {
                Route::Staged { .. } => format!("the score matrix of {} bytes", 4 * s.scores_len()),
                Route::Fused { .. } => "the problem".into(),
            };
            self.reasons.push(format!(
                "{what} runs in {} parts under the scratch budget and binding limit of {} bytes",
                parts.len(),
                self.budget
            ));
        }
        Ok(parts)
    }

    fn cuts(&self) -> Vec<Cut> {
        vec![
            Cut::anywhere(Axis::Batch),
            Cut::at_multiples(Axis::Heads, if self.route.takes_group() { self.shape.group } else { 1 }),
            Cut::at_multiples(Axis::Rows, self.route.part_rows(self.shape)),
        ]
    }

    /// The first operand of a part that is too large, with its bytes and the limit.
    fn excess(&self, part: &Part) -> Option<(&'static str, u64, u64)> {
        let s = self.shape;
        let limit = self.caps.binding();
        let scores = self.score_bytes(part);
        if self.route.kernel().is_none() && scores > self.budget {
            return Some(("one row of scores", scores, self.budget));
        }
        let state = self.state_bytes(part);
        if state > self.budget {
            return Some(("state", state, self.budget));
        }
        let bytes = s.problem.element.bytes();
        let out_bytes = if self.route.unpacked(s) { 4 } else { bytes };
        let mut operands = vec![("q", self.query_span(&s.q, part), bytes)];
        if self.route.partials() == 0 {
            operands.push(("out", self.query_span(&s.out, part), out_bytes));
        }
        let split = self.route.key_step() < s.problem.seq_kv;
        let group = s.group;
        let one_head = count(&part.batch) == 1 && part.heads.start / group == (part.heads.end - 1) / group;
        if !(split && one_head) {
            operands.push(("k", self.key_span(&s.k, part, &(0..s.problem.seq_kv)), bytes));
            operands.push(("v", self.key_span(&s.v, part, &(0..s.problem.seq_kv)), bytes));
        }
        if let Some(mask) = s.problem.mask {
            operands.push((Operand::Mask.name(), broadcast_span(&mask, part), 1));
        }
        if let Some(bias) = s.problem.bias {
            operands.push((Operand::Bias.name(), broadcast_span(&bias.shape, part), bias.element.bytes()));
        }
        if s.problem.lse && self.route.partials() == 0 {
            operands.push(("lse", self.lse_span(part), 4));
        }
        if s.problem.weights || s.problem.logits.is_some() {
            operands.push(("weights or logits", self.dense_span(part), 4));
        }
        operands.into_iter().find_map(|(field, span, bytes)| {
            let (_, size, _) = self.bind(span, bytes, 0);
            (size > limit).then_some((field, size, limit))
        })
    }
}
