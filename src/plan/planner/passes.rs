//! Which kernels run over a part, and in which order.

use std::ops::Range;

use super::Planner;
use crate::contract::error::Result;
use crate::contract::problem::Logits;
use crate::dispatch::part::Part;
use crate::kernel::params::flags;
use crate::kernel::slot::Slot;
use crate::kernel::{Variant, export, logits};
use crate::plan::route::{Route, Weighing};

impl Planner<'_> {
    /// The dispatches of one part.
    pub(super) fn part(&mut self, part: &Part) -> Result<()> {
        match self.route {
            Route::Fused { kernel, weights, .. } => {
                self.fused(kernel, part)?;
                match weights {
                    // Rows without any key have no weights.
                    Some(weights) if self.shape.problem.seq_kv > 0 => self.weights(&weights, part),
                    _ => Ok(()),
                }
            }
            Route::Staged { weights, values, .. } => {
                self.scratch = self.scratch.max(self.score_bytes(part));
                let s = self.shape;
                let all = 0..s.problem.seq_kv;
                self.weights(&weights, part)?;
                if s.problem.weights {
                    self.step(Variant::Export(export::Export { to: Slot::Weights }), part, &all, 0)?;
                }
                for (i, keys) in self.ranges().iter().enumerate() {
                    self.step(values, part, keys, if i > 0 { flags::ADD } else { 0 })?;
                }
                Ok(())
            }
        }
    }

    fn fused(&mut self, kernel: Variant, part: &Part) -> Result<()> {
        let partial = if self.route.partials() > 0 { flags::PARTIAL } else { 0 };
        let lse = if self.shape.problem.lse { flags::LSE } else { 0 };
        self.state = self.state.max(self.state_bytes(part));
        for keys in self.ranges() {
            let carried = if keys.start > 0 { flags::CARRIED } else { 0 };
            self.step(kernel, part, &keys, lse | partial | carried)?;
        }
        Ok(())
    }

    /// The scores of one part, the passes of the score transform, the logits that are given out, and the weights, in place.
    fn weights(&mut self, weights: &Weighing, part: &Part) -> Result<()> {
        let s = self.shape;
        // What is exported from the scratch must stand there at every key.
        let [every_score, every_weight] = [s.problem.weights || s.problem.logits.is_some(), s.problem.weights]
            .map(|exported| if exported && !weights.softmax.output { flags::EVERY_KEY } else { 0 });
        let capped_first = weights.separate && s.wants(Logits::Capped) && s.problem.softcap.is_some();
        for keys in self.ranges() {
            self.step(weights.scores, part, &keys, every_score)?;
        }
        if capped_first {
            // Only the cap: no operand hides a key yet.
            self.transform(part, flags::PACKED | flags::SOFTCAP | flags::EVERY_KEY)?;
        }
        if s.problem.logits.is_some() {
            if weights.separate && s.wants(Logits::Masked) {
                self.transform(part, u32::MAX)?;
            }
            let logits = Variant::Export(export::Export { to: Slot::Logits });
            self.step(logits, part, &(0..s.problem.seq_kv), flags::EXPORT_LOGITS)?;
        }
        if weights.separate && !s.wants(Logits::Masked) {
            self.transform(part, if capped_first { !flags::SOFTCAP } else { u32::MAX })?;
        }
        self.step(Variant::Softmax(weights.softmax), part, &(0..s.problem.seq_kv), every_weight)
    }

    /// Keys of each dispatch.
    fn ranges(&self) -> Vec<Range<u32>> {
        let all = self.shape.problem.seq_kv;
        // Rows without any key have their output written all the same.
        let firsts = (0..all.max(1)).step_by(self.route.key_step() as usize);
        firsts.map(|first| first..all.min(first.saturating_add(self.route.key_step()))).collect()
    }

    /// The score transform as a pass of its own, with only the flags in `keep`.
    fn transform(&mut self, part: &Part, keep: u32) -> Result<()> {
        let from = self.steps.list.len();
        self.step(Variant::Logits(logits::Logits), part, &(0..self.shape.problem.seq_kv), 0)?;
        self.steps.list[from..].iter_mut().for_each(|step| step.uniform.keep_flags(keep));
        Ok(())
    }
}
