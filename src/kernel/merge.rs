//! Host side of `shaders/merge_totals.wgsl` and `shaders/merge.wgsl`: one result from several, each over a part of the keys.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, LineAt, Partials};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::problem::Element;

/// A variant of `merge`: one of its two passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Merge {
    /// Maximum and sum of each row.
    Totals {
        /// Whether log-sum-exp is written.
        lse: bool,
        /// Whether the sinks join.
        sinks: bool,
    },
    /// The output.
    Out {
        /// Its type.
        element: Element,
        /// Whether all rows are whole vectors of four; 16-bit types are written only where they are.
        vector: bool,
    },
}

params! {
    /// The parameters of `merge`.
    Merge {
        /// First partial that is bound.
        partial0: u32,
        /// End of the partials.
        partial_end: u32,
        /// Outputs of partial 0.
        first_out: At,
        /// Place of the log-sum-exps of partial 0.
        first_lse: u32,
        /// Distances between partial results.
        partials: Partials,
        /// The output.
        out: At,
        /// Log-sum-exp, and maximum and sum.
        lse: LineAt,
        /// Last axis of out.
        value_dim: u32,
        /// Items that are numbered through.
        items: u32,
        /// One bit a rule that is on.
        flags: u32,
    } reads ADD, TOTALS
}

impl Shader for Merge {
    const NAME: &str = "merge";

    fn all() -> impl Iterator<Item = Self> {
        let totals = [(false, false), (false, true), (true, false), (true, true)];
        let outs = [(Element::F32, true), (Element::F32, false), (Element::F16, true), (Element::Bf16, true)];
        let totals = totals.map(|(lse, sinks)| Merge::Totals { lse, sinks });
        totals.into_iter().chain(outs.map(|(element, vector)| Merge::Out { element, vector }))
    }

    fn shader(&self) -> &'static str {
        if matches!(self, Merge::Totals { .. }) { "merge_totals" } else { Self::NAME }
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        match *self {
            Merge::Totals { lse, sinks } => {
                let mut slots = vec![(Slot::PartialLse, false), (Slot::Totals, true)];
                slots.extend(lse.then_some((Slot::Lse, true)));
                slots.extend(sinks.then_some((Slot::Sinks, false)));
                slots
            }
            Merge::Out { .. } => {
                vec![(Slot::PartialOut, false), (Slot::PartialLse, false), (Slot::Totals, false), (Slot::Out, true)]
            }
        }
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        match *self {
            Merge::Totals { lse, sinks } => context! { threads => self.threads(), totals => true, lse, sinks },
            Merge::Out { element, vector } => {
                context! { threads => self.threads(), totals => false, element => element.to_string(), vector }
            }
        }
    }
}

impl fmt::Display for Merge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Merge::Totals { lse, sinks } => {
                let (lse, sinks) = (if lse { "; lse" } else { "" }, if sinks { "; sinks" } else { "" });
                write!(f, "merge[totals{lse}{sinks}]")
            }
            Merge::Out { element, vector } => {
                write!(f, "merge[out {element}{}]", if vector { "" } else { " unaligned" })
            }
        }
    }
}
