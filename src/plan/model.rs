//! What the kernels for GPUs are expected to take, by what a unit of a GPU does a clock. The planner chooses between them by it.
//!
//! The clocks are the fewest that there can be: everything overlaps, the busiest part of the unit decides, and what [`Work`] leaves out
//! costs nothing. So the model ranks kernels that have been counted in the same way, and predicts no time. docs/book/src/gpu-kernels.md has the numbers, with
//! their sources; `benches/isa` tests that the planner's choices are those of each class of cards there.

use crate::contract::caps::Caps;
use crate::contract::shape::Shape;
use crate::kernel::Variant;
use crate::kernel::eligibility::group_rows;
pub use crate::plan::work::Work;

/// What a unit (compute unit, streaming multiprocessor, core, dual subslice) does a clock.
///
/// Bytes of workgroup memory are those that reach registers: a lane that reads the same address as its neighbour counts too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unit {
    /// Multiply-adds of f32.
    pub fma: f64,
    /// Size of cooperative matrices, and their multiply-adds, f16 operands and f32 sums.
    pub matrix: Option<(u32, f64)>,
    /// Lanes of a subgroup.
    pub lanes: u32,
    /// How often each element of an operand of cooperative matrices is loaded by a subgroup.
    pub copies: f64,
    /// Bytes of workgroup memory.
    pub shared: f64,
    /// Exponentials.
    pub exps: f64,
    /// Bytes from the cache that all units share; infinite where nothing is known of it.
    pub cache: f64,
    /// Bytes from memory.
    pub memory: f64,
}

/// Instructions a product outside of matrices: four products are a multiplication, three multiply-adds and the addition of their sum,
/// which is what keeps sums of equal terms exact.
const OF_FOUR: f64 = 1.25;

/// Multiply-adds a clock of cooperative matrices, by their size. 16×16 are those of RDNA 3, Ada and Hopper, of which the slowest have
/// twice the rate of plain arithmetic. 8×8 are Apple's, which have the same units as plain arithmetic.
const MATRICES: [(u32, f64); 2] = [(16, 256.0), (8, 128.0)];

impl Unit {
    /// The unit that the planner expects on a device: of each rate the lowest among the classes of cards in the book, of matrices
    /// the lowest for their size. A device says no more of itself than the lanes of its subgroups and the sizes of its matrices.
    pub fn of(caps: &Caps) -> Unit {
        let most = caps.subgroup_max_size.unwrap_or(0);
        // AMD alone has subgroups of 64 lanes there; each 16 lanes load the same operands.
        let (lanes, copies) = if most > 32 { (64, 4.0) } else { (32, 1.0) };
        let matrix = MATRICES.into_iter().find(|(size, _)| caps.matrices.contains(size));
        Unit { fma: 128.0, matrix, lanes, copies, shared: 128.0, exps: 16.0, cache: 22.0, memory: 3.1 }
    }

    /// Whether cooperative matrices are faster than plain arithmetic.
    pub fn has_fast_matrices(&self) -> bool {
        self.matrix.is_some_and(|(_, rate)| rate > self.fma)
    }

    /// Clocks that an invocation's work takes: for arithmetic, workgroup memory, exponentials, the cache and memory. Infinitely many where
    /// the unit has no such matrices.
    pub fn clocks(&self, variant: &Variant, work: &Work) -> [f64; 5] {
        let arithmetic = match variant {
            Variant::Matrix(x) => {
                let rate = self.matrix.filter(|&(size, _)| size == x.tile.size).map_or(0.0, |(_, rate)| rate);
                work.products / rate
            }
            _ => OF_FOUR * work.products / self.fma,
        };
        let shared = work.shared_bytes + (self.copies - 1.0) * work.fragment_bytes;
        let memory = work.streamed_bytes / self.memory;
        [arithmetic, shared / self.shared, work.exps / self.exps, work.cached_bytes / self.cache, memory]
    }

    /// Clocks of a unit for each key and each query row that reads it, where kernels run one after the other.
    pub fn of_pair(&self, kernels: &[Variant], shape: &Shape) -> f64 {
        let rows = group_rows(shape).max(1) as f64;
        kernels.iter().map(|variant| self.of_key(variant, shape) / rows).sum()
    }

    /// Clocks of a unit for a key: of all query rows that share a key/value head. What is read once, whatever the kernel, is left
    /// out: every kernel waits for it.
    fn of_key(&self, variant: &Variant, shape: &Shape) -> f64 {
        let work = Work::of(variant, shape.problem.head_dim, self.lanes).expect("a kernel for GPUs is counted");
        let kernel = variant.attention().expect("a kernel of attention");
        let grid = kernel.grid(shape, work.keys.into());
        let tile = u64::from(grid.tile_rows);
        let tiles = match variant.takes_group() {
            true => group_rows(shape).div_ceil(tile),
            false => u64::from(shape.group) * u64::from(shape.problem.seq_q).div_ceil(tile),
        };
        // Workgroups that share a tile of rows read the same scores.
        let columns = grid.columns as f64;
        let [arithmetic, shared, exps, cache, memory] = self.clocks(variant, &work);
        let clocks = (columns * arithmetic.max(shared).max(exps).max(cache)).max(memory);
        (tiles * u64::from(variant.threads())) as f64 * clocks / f64::from(work.keys)
    }
}
