//! Host side of `shaders/softmax.wgsl`: masked row softmax in place.

use std::fmt;

use minijinja::{Value, context};

use super::attention::{AttentionKernel, Grid};
use super::params::{At, LineAt, Lines, Lists, Visible};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;
use crate::contract::caps::{Caps, LOOP_ITERATIONS};
use crate::contract::shape::Shape;

/// A variant of `softmax`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Softmax {
    /// Invocations that share a row.
    pub threads: u32,
    /// Whether log-sum-exp is an output.
    pub lse: bool,
    /// Whether the rows are those of the caller's weights, after a fused kernel, and not of the scratch.
    pub output: bool,
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

impl Shader for Softmax {
    const NAME: &str = "softmax";

    fn all() -> impl Iterator<Item = Self> {
        let of = [(false, false), (true, false), (false, true)];
        THREADS.into_iter().flat_map(move |threads| of.map(|(lse, output)| Softmax { threads, lse, output }))
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        let mut slots = vec![(Slot::Scores, true), (Slot::Lists, false)];
        if self.lse {
            slots.push((Slot::Lse, true));
        }
        slots
    }

    fn threads(&self) -> u32 {
        self.threads
    }

    fn workgroup_bytes(&self) -> u32 {
        8 * self.threads
    }

    fn context(&self) -> Value {
        context! { lists => true, threads => self.threads, lse => self.lse, output => self.output }
    }

    fn attention(&self) -> Option<&dyn AttentionKernel> {
        Some(self)
    }
}

impl AttentionKernel for Softmax {
    fn grid(&self, _: &Shape, _: u64) -> Grid {
        Grid { tile_rows: 1, columns: 1, flops: 32.0 }
    }
}

impl fmt::Display for Softmax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [lse, output] =
            [(self.lse, "; lse"), (self.output, "; in weights")].map(|(on, name)| if on { name } else { "" });
        write!(f, "softmax[{} threads{lse}{output}]", self.threads)
    }
}

impl Softmax {
    /// The variant for a problem on a device, in the scratch or, with `output`, in the caller's weights. In the second case
    /// the fused kernel before it writes the log-sum-exp.
    pub(crate) fn new(shape: &Shape, caps: &Caps, output: bool) -> Softmax {
        let wanted = match (caps.cpu, shape.problem.seq_kv) {
            // Two loop iterations for 32 keys of a row.
            (true, keys) if u64::from(keys / 16) > LOOP_ITERATIONS => THREADS[2],
            (true, _) => THREADS[0],
            (false, ..=512) => THREADS[1],
            (false, _) => THREADS[2],
        };
        let most = caps.limits.max_compute_invocations_per_workgroup.min(caps.limits.max_compute_workgroup_size_x);
        let threads = THREADS.into_iter().rev().find(|&n| n <= wanted.min(most)).expect("8 is below every floor");
        Softmax { threads, lse: shape.problem.lse && !output, output }
    }
}
