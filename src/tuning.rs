//! Tile parameters: the one table of measured or reasoned rows that the planner picks from.

use crate::kernel::body::{Body, SUBGROUP_SIZES, Tile};
use crate::kernel::format::Format;
use crate::kernel::{flash, matrix, rows, split};

/// Invocations of a workgroup in the element-wise kernels.
pub const ELEMENTWISE: u32 = 64;

/// Turns that all loops of an invocation may take together on a CPU adapter, the test that ends each among them: llvmpipe ends them after
/// 2^16, and what they did not reach stays undone.
pub const CPU_TURNS: u64 = 65_000;

/// Most keys of a dispatch of `values` on a CPU adapter, so that its loops stay below that.
pub const CPU_KEYS: u32 = 1 << 15;

/// Invocations that share a row in `softmax`: CPU adapters, short rows, long rows.
pub const SOFTMAX_THREADS: [u32; 3] = [8, 64, 256];

/// Work that one second is assumed to hold when dispatches are sliced: below what any adapter of the class measured.
pub const CPU_FLOPS: f64 = 10e9;
/// The same for GPUs: an old integrated one.
pub const GPU_FLOPS: f64 = 200e9;

const fn tiled(tile_rows: u32, tile_cols: u32, depth: u32, rows: u32, cols: u32) -> Tile {
    Tile { body: Body::Tiled, rows, cols, tile_rows, tile_cols, depth }
}

/// Tiled rows of `scores`, largest first: 8×4 scores per invocation need 0.375 workgroup-memory loads a multiply-add, 4×4 need 0.5.
pub const SCORES_TILED: [Tile; 2] = [tiled(64, 64, 16, 8, 4), tiled(32, 32, 16, 4, 4)];

/// Tiled rows of `values`, largest first: 8 rows × 4 dims per invocation.
pub const VALUES_TILED: [Tile; 2] = [tiled(64, 64, 16, 8, 1), tiled(32, 32, 16, 4, 1)];

/// Subgroup size of the CPU adapters that load component by component.
pub const WIDE_LANES: u32 = 8;

pub(crate) fn lane_bodies() -> impl Iterator<Item = Body> {
    let lanes = |lanes, subgroup, wide| Body::Lanes { lanes, subgroup, wide };
    let spread = SUBGROUP_SIZES.map(|size| lanes(size, true, false));
    spread.into_iter().chain([lanes(WIDE_LANES, true, true), lanes(8, false, false)])
}

/// The lane-per-row tile of `scores`: rows per lane and dims in registers.
pub fn scores_lanes(body: Body, rows: u32, dims: u32) -> Tile {
    let Body::Lanes { lanes, .. } = body else { panic!("not a lane body: {body:?}") };
    Tile { body, rows, cols: 1, tile_rows: rows * lanes, tile_cols: 256, depth: dims }
}

/// The lane-per-row tile of `values`: rows per lane and dims in registers.
pub fn values_lanes(body: Body, rows: u32, dims: u32) -> Tile {
    let Body::Lanes { lanes, .. } = body else { panic!("not a lane body: {body:?}") };
    Tile { body, rows, cols: 1, tile_rows: rows * lanes, tile_cols: dims, depth: dims }
}

/// Dims that a lane keeps in registers: the smallest that holds them all, or several passes of the largest.
pub const LANE_DIMS: [u32; 2] = [32, 64];

/// Rows per lane: one for few queries, else as many as the first-level cache holds of them.
pub const LANE_ROWS: [u32; 2] = [1, 4];

/// Every tile of `scores`.
pub(crate) fn scores_tiles() -> Vec<Tile> {
    lane_tiles(scores_lanes).chain(SCORES_TILED).collect()
}

/// Every tile of `values`.
pub(crate) fn values_tiles() -> Vec<Tile> {
    lane_tiles(values_lanes).chain(VALUES_TILED).collect()
}

/// Tiled rows of `project`, largest first, like those of `scores`.
pub const PROJECT_TILED: [Tile; 2] = SCORES_TILED;

/// Lane-per-row tiles of `project`, many rows first.
pub(crate) fn project_lanes(body: Body) -> [Tile; 2] {
    let Body::Lanes { lanes, subgroup, .. } = body else { panic!("not a lane body: {body:?}") };
    let cols = if subgroup { 32 } else { 16 };
    PROJECT_ROWS.map(|rows| Tile { body, rows, cols: 1, tile_rows: rows * lanes, tile_cols: cols, depth: 4 })
}

/// Rows per lane in `project`.
const PROJECT_ROWS: [u32; 2] = [8, 1];

/// Every tile of `project`.
pub(crate) fn project_tiles() -> impl Iterator<Item = Tile> {
    lane_bodies().flat_map(project_lanes).chain(PROJECT_TILED)
}

fn lane_tiles(tile: fn(Body, u32, u32) -> Tile) -> impl Iterator<Item = Tile> {
    lane_bodies().flat_map(move |body| {
        LANE_DIMS.into_iter().flat_map(move |dims| LANE_ROWS.into_iter().map(move |rows| tile(body, rows, dims)))
    })
}

/// Rows of the table of `rows`: dims, rows per lane and keys per step with subgroups, and without. More rows share each load and
/// broadcast: with subgroups q and o of a workgroup take 32 KiB, and 16 dot products a step are as many as compile in two seconds
/// with 128 dims; without, every load feeds as many rows as compile in a second.
const ROWS: [(u32, [u32; 2], [u32; 2]); 4] =
    [(32, [8, 4], [8, 2]), (64, [8, 4], [8, 1]), (128, [4, 2], [4, 1]), (256, [2, 2], [2, 1])];

/// The tiles of `rows`, fewest dims first.
pub(crate) fn rows_tiles(body: Body) -> impl Iterator<Item = rows::Tile> {
    let Body::Lanes { subgroup, .. } = body else { panic!("not a lane body: {body:?}") };
    ROWS.into_iter().map(move |(dims, spread, alone)| {
        let [rows, keys] = if subgroup { spread } else { alone };
        rows::Tile { body, rows, keys, dims }
    })
}

/// Tiles of `flash`, fewest dims first: for each bucket of value dims one for devices with subgroups and 32 KiB of workgroup
/// memory, then one that runs on every device. 64 rows × 32 keys, four rows of four keys an invocation: half a load from
/// workgroup memory a multiply-add; with 256 dims half the rows, so that o stays in 64 registers.
pub const FLASH: [flash::Tile; 8] = [
    flash::Tile { dims: 32, rows: 4, depth: 32, value_keys: 32, resident: true, shuffle: true },
    flash::Tile { dims: 32, rows: 4, depth: 16, value_keys: 16, resident: false, shuffle: false },
    flash::Tile { dims: 64, rows: 4, depth: 32, value_keys: 16, resident: true, shuffle: true },
    flash::Tile { dims: 64, rows: 4, depth: 16, value_keys: 8, resident: false, shuffle: false },
    flash::Tile { dims: 128, rows: 4, depth: 32, value_keys: 16, resident: false, shuffle: true },
    flash::Tile { dims: 128, rows: 4, depth: 16, value_keys: 4, resident: false, shuffle: false },
    flash::Tile { dims: 256, rows: 2, depth: 32, value_keys: 8, resident: false, shuffle: true },
    flash::Tile { dims: 256, rows: 2, depth: 16, value_keys: 4, resident: false, shuffle: false },
];

/// Rows of the table of `matrix`, fewest dims first: dims, dims of q and k staged at once, whether q stays. By its place, not
/// measured: q stays where it fits beside the rest; the last row is for devices with 32 KiB of workgroup memory and 16×16 matrices.
const MATRIX: [(u32, u32, bool); 5] =
    [(32, 32, true), (64, 64, true), (128, 128, true), (128, 64, false), (32, 32, false)];

/// The tiles of `matrix`: for each size of matrices, largest first, those of [`MATRIX`] in order.
pub(crate) fn matrix_tiles() -> impl Iterator<Item = matrix::Tile> {
    matrix::SIZES
        .into_iter()
        .flat_map(|size| MATRIX.map(|(dims, depth, resident)| matrix::Tile { size, dims, depth, resident }))
}

/// Whether a tile of `matrix` has an emulated form: those that fit the CPU adapters and compile in seconds there.
pub(crate) fn emulates(tile: &matrix::Tile) -> bool {
    tile.dims == MATRIX[0].0
}

/// Rows of the table of `split`: dims, rows of a workgroup, keys per step. A lane keeps 1/8 of the dims of q, k and o of each row.
/// Then the streams of a workgroup on GPUs: 128 invocations keep enough loads under way, and their outputs fit any device.
const SPLIT: [(u32, u32, u32, u32); 5] =
    [(64, 1, 4, 16), (64, 4, 2, 16), (128, 1, 4, 16), (128, 4, 2, 16), (256, 1, 2, 8)];

/// The tiles of `split`, fewest dims first and then fewest rows. CPU adapters run the subgroups of a workgroup one after the
/// other: a single stream spares them the merge; it loads by 64 bits.
pub(crate) fn split_tiles() -> impl Iterator<Item = split::Tile> {
    SPLIT.into_iter().flat_map(move |(dims, rows, keys, many)| {
        let forms = [(1, true), (many, true), (many, false)];
        forms.map(|(streams, shuffle)| split::Tile { dims, rows, keys, streams, shuffle })
    })
}

/// Workgroups that keep every unit of a CPU adapter, and of a GPU, busy: `split` shares out keys until there are as many.
pub const SPLIT_WORKGROUPS: [u32; 2] = [16, 512];

/// Fewest keys of a workgroup of `split`, on CPU adapters and on GPUs: below, starting and merging cost more than they save.
pub const SPLIT_KEYS: [u32; 2] = [512, 256];

/// Most rows for which `split` is preferred on a GPU, all query heads of a key/value head together: a tile of `flash` would be
/// mostly empty.
pub const SPLIT_ROWS: u32 = 16;

/// Whether a tile is rendered for a format: lane forms read f16 packed (conversion is not their cost), and unaligned rows
/// only with the larger bucket of dims.
pub(crate) fn renders(tile: Tile, format: Format) -> bool {
    match tile.body {
        Body::Tiled => true,
        Body::Lanes { .. } => !format.native && (format.vector || tile.depth == LANE_DIMS[1]),
    }
}
