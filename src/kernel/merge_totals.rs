//! Host side of `shaders/merge_totals.wgsl`: maximum and sum of each row from several results, each over a part of the keys.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::merge::Merge;
use super::params::Merging;
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;

/// A variant of `merge_totals`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MergeTotals {
    /// Whether log-sum-exp is written.
    pub lse: bool,
    /// Whether the sinks join.
    pub sinks: bool,
}

params! {
    /// The parameters of `merge_totals`.
    MergeTotals {
        /// The partial results.
        merging: Merging,
        /// One bit a rule that is on.
        flags: u32,
    } reads ADD, TOTALS
}

impl Shader for MergeTotals {
    const NAME: &str = "merge_totals";
    const STAGE: &str = Merge::NAME;

    fn all() -> impl Iterator<Item = Self> {
        let of = [(false, false), (false, true), (true, false), (true, true)];
        of.into_iter().map(|(lse, sinks)| MergeTotals { lse, sinks })
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = vec![(Slot::PartialLse, false), (Slot::Totals, true)];
        slots.extend(self.lse.then_some((Slot::Lse, true)));
        slots.extend(self.sinks.then_some((Slot::Sinks, false)));
        slots
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        context! { threads => self.threads(), lse => self.lse, sinks => self.sinks }
    }
}

impl fmt::Display for MergeTotals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [lse, sinks] = [(self.lse, "; lse"), (self.sinks, "; sinks")].map(|(on, name)| if on { name } else { "" });
        write!(f, "merge[totals{lse}{sinks}]")
    }
}
