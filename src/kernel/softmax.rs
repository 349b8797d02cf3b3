//! Host side of `shaders/softmax.wgsl`: masked row softmax in place.

use std::fmt;

use minijinja::{Value, context};

use super::params::{At, LineAt, Lines, Lists, Visible};
use super::slot::Slot;
use super::uniform::params;

/// A variant of `softmax`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Softmax {
    /// Invocations that share a row.
    pub threads: u32,
    /// Whether log-sum-exp is an output.
    pub lse: bool,
}

/// Invocations that share a row: CPU adapters, short rows, long rows.
pub const THREADS: [u32; 3] = [8, 64, 256];

params! {
    /// The parameters of `softmax`.
    Softmax of attention {
        /// Lengths and positions.
        visible: Visible,
        /// Places of the small arrays.
        list: Lists,
        /// One bit a rule or operand that is on.
        flags: u32,
        /// Query heads per key/value head.
        group: u32,
        /// Those of this part.
        lines: Lines,
        /// Scores.
        s: At,
        /// Log-sum-exp.
        lse: LineAt,
        /// Lines of a tile of `values`, see shaders/shared/lines.wgsl; where its heads stand apart, rows.
        values_rows: u32,
        /// Lines of a row there: query heads that share a tile.
        values_each: u32,
    } reads SINKS
}

impl Softmax {
    pub(crate) fn all() -> impl Iterator<Item = Softmax> {
        THREADS.into_iter().flat_map(|threads| [false, true].map(|lse| Softmax { threads, lse }))
    }

    pub(crate) fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = vec![(Slot::Scores, true), (Slot::Lists, false)];
        if self.lse {
            slots.push((Slot::Lse, true));
        }
        slots
    }

    pub(crate) fn threads(&self) -> u32 {
        self.threads
    }

    pub(crate) fn workgroup_bytes(&self) -> u32 {
        8 * self.threads
    }

    pub(crate) fn context(&self) -> Value {
        context! { lists => true, threads => self.threads, lse => self.lse }
    }
}

impl fmt::Display for Softmax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "softmax[{} threads{}]", self.threads, if self.lse { "; lse" } else { "" })
    }
}
