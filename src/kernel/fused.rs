//! What the fused kernels share: which operands they bind, and when one of them can run.

use super::attention::{AttentionKernel, Grid, Picks};
use super::eligibility::{too_many_bindings, whole_vectors};
use super::format::Format;
use super::slot::Slot;
use crate::contract::caps::{Caps, LOOP_ITERATIONS};
use crate::contract::obstacle::Obstacle;
use crate::contract::options::{Form, Options};
use crate::contract::problem::Causal;
use crate::contract::shape::Shape;
use crate::contract::walk::most_keys;

/// Which operands a fused kernel binds beside q, k, v and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperandSet {
    /// None: four storage buffers.
    Bare,
    /// Log-sum-exp and the small per-batch and per-head arrays: six.
    Lists,
    /// Also mask and bias, and the whole score transform is applied: eight.
    Full,
}

impl OperandSet {
    /// Storage buffers that a fused kernel binds.
    pub fn buffers(self) -> u32 {
        match self {
            OperandSet::Bare => 4,
            OperandSet::Lists => 6,
            OperandSet::Full => 8,
        }
    }

    /// No more operands than the problem has.
    pub(crate) fn of(shape: &Shape) -> OperandSet {
        let small_arrays = shape.problem.lse
            || shape.problem.sinks
            || shape.problem.key_lengths
            || shape.problem.packed.is_some()
            || shape.problem.paged.is_some()
            || shape.problem.causal == Causal::Offset;
        match (shape.transforms(), small_arrays) {
            (true, _) => OperandSet::Full,
            (false, true) => OperandSet::Lists,
            (false, false) => OperandSet::Bare,
        }
    }

    /// The operands of a kernel that always binds log-sum-exp and the small arrays.
    pub(crate) fn with_lists(full: bool) -> OperandSet {
        if full { OperandSet::Full } else { OperandSet::Lists }
    }

    pub(crate) fn all() -> [OperandSet; 3] {
        [OperandSet::Bare, OperandSet::Lists, OperandSet::Full]
    }

    /// The bindings of a fused kernel.
    pub(crate) fn bindings(self) -> Vec<(Slot, bool)> {
        let slots = [
            (Slot::Q, false),
            (Slot::K, false),
            (Slot::V, false),
            (Slot::Out, true),
            (Slot::Lse, true),
            (Slot::Lists, false),
            (Slot::Mask, false),
            (Slot::Bias, false),
        ];
        slots[..self.buffers() as usize].to_vec()
    }
}

/// A kernel that computes the output in one pass over the keys, without a score matrix.
pub(crate) trait Fused {
    /// The variants that suit a problem, a device and the options, the best one first, while the keys fit one dispatch; or why there
    /// are none. Of several reasons it is the one that nobody can change, as the dims, before an output or an option that is asked for.
    fn candidates(shape: &Shape, caps: &Caps, options: &Options) -> Result<Vec<Self>, Obstacle>
    where
        Self: Sized;

    /// The variant that walks the keys in several dispatches of at most `key_step` keys. `one` is why one dispatch is not enough; the
    /// error says it too.
    fn in_several_dispatches(self, walk: &Walk<'_>, one: Obstacle) -> Result<Self, Obstacle>
    where
        Self: Sized;

    /// Query rows of a workgroup.
    fn tile_rows(&self) -> u32;

    /// Iterations of all loops of an invocation together for so many keys, wherever the keys begin, at most. The test that ends a loop
    /// counts as an iteration. llvmpipe counted up to an eighth more for `flash` than its text has: a quarter is added where there are
    /// barriers.
    fn loop_iterations(&self, shape: &Shape, keys: u64) -> u64;

    /// Value dims of a workgroup, if further ones are further workgroups; these form the scores again.
    fn value_dims(&self) -> Option<u32> {
        None
    }

    /// Whether the output is written in the type of the problem, also where that has 16 bits.
    fn writes_element(&self) -> bool;

    /// Whether its workgroups take the tiles of rows from both ends in turn.
    fn takes_both_ends(&self) -> bool {
        false
    }

    /// Bytes of a workgroup that wait between two dispatches over the keys.
    fn waiting_bytes(&self) -> u64 {
        0
    }
}

impl<K: Fused + Picks> AttentionKernel for K {
    fn grid(&self, shape: &Shape, _: u64) -> Grid {
        grid(self, shape)
    }

    fn takes_both_ends(&self) -> bool {
        Fused::takes_both_ends(self)
    }

    fn fused(&self) -> Option<&dyn Fused> {
        Some(self)
    }
}

/// How the work of a fused kernel is divided into workgroups.
pub(crate) fn grid(kernel: &dyn Fused, shape: &Shape) -> Grid {
    let blocks = kernel.value_dims().map_or(1, |dims| shape.problem.value_dim.div_ceil(dims));
    let flops = 2.0 * f64::from(blocks * shape.problem.head_dim + shape.problem.value_dim);
    Grid { tile_rows: kernel.tile_rows(), columns: blocks.into(), flops }
}

/// A walk over the keys of a problem on a device.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'a> {
    pub(crate) shape: &'a Shape,
    pub(crate) caps: &'a Caps,
    pub(crate) options: &'a Options,
    /// The most keys of a dispatch that the bindings allow.
    pub(crate) key_step: u32,
}

impl Walk<'_> {
    /// The variants of a fused kernel that can run, in as many dispatches as the loops and the bindings need, the best one first.
    pub(crate) fn variants<K: Fused>(&self) -> Result<Vec<K>, Obstacle> {
        let Walk { shape, caps, options, .. } = *self;
        let found = K::candidates(shape, caps, options)?;
        if options.form == Some(Form::Lanes) && shape.problem.weights && !shape.problem.seq_kv.is_multiple_of(4) {
            return Err(Obstacle::LanesWeights { seq_kv: shape.problem.seq_kv });
        }
        let mut able = Vec::new();
        let mut first = None;
        for kernel in found {
            match self.within(kernel) {
                Ok(kernel) => able.push(kernel),
                Err(obstacle) => first = first.or(Some(obstacle)),
            }
        }
        match first {
            Some(obstacle) if able.is_empty() => Err(obstacle),
            _ => Ok(able),
        }
    }

    fn within<K: Fused>(&self, kernel: K) -> Result<K, Obstacle> {
        let Walk { shape, caps, key_step, .. } = *self;
        if loop_step(&kernel, shape, caps, key_step) >= shape.problem.seq_kv {
            return Ok(kernel);
        }
        let one = if key_step < shape.problem.seq_kv {
            Obstacle::LongKeys
        } else {
            let iterations = kernel.loop_iterations(shape, most_keys(shape, kernel.tile_rows()));
            Obstacle::LoopIterations { iterations, limit: LOOP_ITERATIONS }
        };
        kernel.in_several_dispatches(self, one)
    }

    /// Whether a kernel can keep so many bytes of a workgroup between dispatches, in one more of so many bindings.
    pub(crate) fn check_state(&self, one: Obstacle, bindings: usize, bytes: u64) -> Result<(), Obstacle> {
        let limit = self.room();
        let several = too_many_bindings(self.caps, bindings as u32)
            .or_else(|| (bytes > limit).then_some(Obstacle::State { bytes, limit }));
        match several.map(Box::new) {
            Some(several) => Err(Obstacle::SeveralDispatches { one: Box::new(one), several }),
            None => Ok(()),
        }
    }

    /// The most bytes of a scratch.
    pub(crate) fn room(&self) -> u64 {
        self.caps.binding().min(self.options.scratch_budget)
    }
}

/// Keys of one dispatch of a fused kernel: all, unless those of one head exceed a binding or a CPU adapter would end its loops.
pub(crate) fn loop_step(kernel: &dyn Fused, shape: &Shape, caps: &Caps, key_step: u32) -> u32 {
    let most = most_loop_keys(kernel, shape, caps);
    if most >= most_keys(shape, kernel.tile_rows()) {
        return key_step;
    }
    // Dispatches of a length, so that the last one is not short.
    let dispatches = u64::from(shape.problem.seq_kv).div_ceil(most);
    key_step.min(u64::from(shape.problem.seq_kv).div_ceil(dispatches).next_multiple_of(KEY_TILE) as u32)
}

/// What keys of a dispatch are a multiple of: whole steps of every kernel, and whole vectors of weights.
const KEY_TILE: u64 = 64;

/// The most keys that a workgroup of a fused kernel can walk on the device: whole tiles of keys, one at least.
pub(crate) fn most_loop_keys(kernel: &dyn Fused, shape: &Shape, caps: &Caps) -> u64 {
    let all = u64::from(shape.problem.seq_kv);
    let fits = |keys: u64| !caps.cpu || kernel.loop_iterations(shape, keys) <= LOOP_ITERATIONS;
    if fits(all) {
        return all;
    }
    // Iterations never fall as keys rise.
    let (mut low, mut high) = (1, all / KEY_TILE);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        (low, high) = if fits(middle * KEY_TILE) { (middle, high) } else { (low, middle - 1) };
    }
    low * KEY_TILE
}

/// Iterations of a loop over so many keys in steps of `step`: page by page, where there are pages. Each page may begin and end in the
/// middle of a step.
pub(crate) fn key_loop(shape: &Shape, keys: u64, step: u32) -> u64 {
    let (step, page) = (u64::from(step), shape.problem.paged.map_or(keys, |paged| paged.page_size.into()));
    match page < keys {
        false => keys.div_ceil(step) + 4,
        true => {
            let whole = (keys.div_ceil(page) + 1) * (page.div_ceil(step) + 2);
            whole.min(keys / step + 3 * (keys / page + 2))
        }
    }
}

/// Iterations of the loops over the rows of an invocation: one for each, if the score transform is applied row by row.
pub(crate) fn row_loops(full: bool, rows: u32) -> u64 {
    if full { 2 + u64::from(rows) } else { 1 }
}

/// What keeps any fused kernel with these operands from running: what the device is before what is asked for.
pub(crate) fn check_operands(shape: &Shape, caps: &Caps, operands: OperandSet) -> Result<(), Obstacle> {
    let logits = || shape.problem.logits.is_some().then_some(Obstacle::Logits);
    too_many_bindings(caps, operands.buffers()).or_else(logits).map_or(Ok(()), Err)
}

/// One format for q, k, v and out.
pub(crate) fn whole_format(shape: &Shape, native: bool) -> Format {
    let vector = [&shape.q, &shape.k, &shape.v, &shape.out].into_iter().all(whole_vectors);
    Format { element: shape.problem.element, native, vector }
}
