//! Which kernels run over a part, and in which order.

use std::ops::Range;

use super::Planner;
use crate::error::Result;
use crate::kernel::params::flags;
use crate::kernel::scores::Scores;
use crate::kernel::slot::Slot;
use crate::kernel::{Variant, export, logits, weights};
use crate::part::Part;
use crate::problem::Logits;
use crate::route::Route;

impl Planner<'_> {
    /// The dispatches of one part.
    pub(super) fn part(&mut self, part: &Part) -> Result<()> {
        match self.route {
            Route::Fused { kernel, .. } => self.fused(kernel, part),
            Route::Staged { scores, softmax, values, separate, .. } => {
                self.scratch = self.scratch.max(self.score_bytes(part));
                self.scores(scores, separate, part)?;
                let s = self.shape;
                let all = 0..s.seq_kv;
                let whole_rows = if s.weights { flags::EVERY_KEY } else { 0 };
                self.step(Variant::Softmax(softmax), part, &all, whole_rows)?;
                if s.weights {
                    self.step(Variant::Export(export::Export { to: Slot::Weights }), part, &all, 0)?;
                }
                for (i, keys) in self.ranges().iter().enumerate() {
                    self.step(Variant::Values(values), part, keys, if i > 0 { flags::ADD } else { 0 })?;
                }
                Ok(())
            }
        }
    }

    fn fused(&mut self, kernel: Variant, part: &Part) -> Result<()> {
        let partial = if self.route.partials() > 0 { flags::PARTIAL } else { 0 };
        // m + ln l would lose l where m is large.
        let totals = if self.totals() || partial > 0 { flags::LSE | flags::TOTALS } else { 0 };
        let lse = if self.shape.lse { flags::LSE } else { 0 };
        self.state = self.state.max(self.state_bytes(part));
        for keys in self.ranges() {
            let add = if keys.start > 0 { flags::ADD } else { 0 };
            self.step(kernel, part, &keys, lse | totals | partial | add)?;
        }
        Ok(())
    }

    /// The scores of one part, the passes of the score transform, and the logits that are given out.
    fn scores(&mut self, scores: Scores, separate: bool, part: &Part) -> Result<()> {
        let s = self.shape;
        let every = if s.weights || s.logits.is_some() { flags::EVERY_KEY } else { 0 };
        let capped_first = separate && s.wants(Logits::Capped) && s.softcap.is_some();
        for keys in self.ranges() {
            self.step(Variant::Scores(scores), part, &keys, every)?;
        }
        if capped_first {
            // Only the cap: no operand hides a key yet.
            self.transform(part, flags::PACKED | flags::SOFTCAP | flags::EVERY_KEY)?;
        }
        if s.logits.is_some() {
            if separate && s.wants(Logits::Masked) {
                self.transform(part, u32::MAX)?;
            }
            let logits = Variant::Export(export::Export { to: Slot::Logits });
            self.step(logits, part, &(0..s.seq_kv), flags::EXPORT_LOGITS)?;
        }
        if separate && !s.wants(Logits::Masked) {
            self.transform(part, if capped_first { !flags::SOFTCAP } else { u32::MAX })?;
        }
        Ok(())
    }

    /// Keys of each dispatch.
    fn ranges(&self) -> Vec<Range<u32>> {
        let all = self.shape.seq_kv;
        // Rows without any key have their output written all the same.
        let firsts = (0..all.max(1)).step_by(self.route.key_step() as usize);
        firsts.map(|first| first..all.min(first.saturating_add(self.route.key_step()))).collect()
    }

    pub(super) fn totals(&self) -> bool {
        self.route.totals(self.shape)
    }

    /// The weights of one part, after the fused kernel: raw scores into the caller's buffer, and `weights` on them in place.
    pub(super) fn weigh(&mut self, scores: Scores, part: &Part) -> Result<()> {
        let all = 0..self.shape.seq_kv;
        for keys in self.ranges() {
            self.step(Variant::Scores(scores), part, &keys, 0)?;
        }
        let lse = if self.shape.lse && self.route.partials() == 0 { flags::LSE } else { 0 };
        self.step(Variant::Weights(weights::Weights), part, &all, lse)
    }

    /// The score transform as a pass of its own, with only the flags in `keep`.
    fn transform(&mut self, part: &Part, keep: u32) -> Result<()> {
        let from = self.steps.list.len();
        self.step(Variant::Logits(logits::Logits), part, &(0..self.shape.seq_kv), 0)?;
        for step in &mut self.steps.list[from..] {
            step.params.flags &= keep;
        }
        Ok(())
    }
}
