//! What an invocation of each GPU kernel does for a tile of keys, from the parameters of the tile.
//!
//! Only what grows with the keys is counted: the products, the loads and stores that feed them, and the barriers between. Left out are
//! addresses, conversions, masks and what is done once for a row of tiles. So a bound that follows is one from above. The tests of
//! `benches/isa` compare every number with a count of the shader's text.

use crate::contract::problem::Element;
use crate::kernel::Variant;
use crate::kernel::flash::{ACROSS, DOWN, Flash};
use crate::kernel::format::Format;
use crate::kernel::matrix::{KEYS, Matrix, THREADS};
use crate::kernel::scores::Scores;
use crate::kernel::softmax::Softmax;
use crate::kernel::split::{self, Split};
use crate::kernel::values::Values;

/// Bytes of an f32.
const F32: f64 = 4.0;

/// The work of an invocation for a tile of keys; of all invocations the same, on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Keys of the tile.
    pub keys: u32,
    /// Multiply-adds that attention needs, with all dims of the tile in use.
    pub madds: f64,
    /// Multiply-adds that are carried out.
    pub products: f64,
    /// Elements loaded from workgroup memory.
    pub shared_loads: f64,
    /// Bytes loaded from and stored to workgroup memory.
    pub shared_bytes: f64,
    /// Those among them that are loaded as operands of cooperative matrices.
    pub fragment_bytes: f64,
    /// Elements loaded from buffers.
    pub buffer_loads: f64,
    /// Bytes of q, k and v. Workgroups of other rows load the same keys, so that caches may have them.
    pub cached_bytes: f64,
    /// Bytes of scores and weights, which pass through memory once.
    pub streamed_bytes: f64,
    /// Exponentials.
    pub exps: f64,
    /// Barriers of the workgroup.
    pub barriers: f64,
}

impl Work {
    /// The work of a variant of `scores`, `softmax`, `values`, `flash`, `matrix` or `split` for q and k of so many dims; `lanes` are those
    /// of a subgroup.
    pub fn of(variant: &Variant, head_dim: u32, lanes: u32) -> Option<Work> {
        match variant {
            Variant::Scores(x) => Some(scores(x, head_dim)),
            Variant::Softmax(x) => Some(softmax(x)),
            Variant::Values(x) => Some(values(x)),
            Variant::Flash(x) => Some(flash(x, head_dim)),
            Variant::Matrix(x) => Some(matrix(x, head_dim, lanes)),
            Variant::Split(x) => Some(split_keys(x)),
            _ => None,
        }
    }
}

/// Bytes of an element of q, k and v.
fn bytes(format: &Format) -> f64 {
    if format.element == Element::F32 { F32 } else { 2.0 }
}

/// Dims of q and k that are computed: whole steps.
fn whole(head_dim: u32, depth: u32) -> f64 {
    f64::from(head_dim.max(1).next_multiple_of(depth))
}

/// R × C scores of an invocation take R + C loads a dim for R · C multiply-adds. All is kept as f32.
fn scores(x: &Scores, head_dim: u32) -> Work {
    let tile = x.tile;
    let (rows, cols, dims) = (f64::from(tile.rows), f64::from(tile.cols), whole(head_dim, tile.depth));
    let threads = f64::from(tile.tile_rows / tile.rows * (tile.tile_cols / tile.cols));
    let staged = f64::from(tile.tile_rows + tile.tile_cols) * dims / threads;
    let loads = (rows + cols) * dims;
    Work {
        keys: tile.tile_cols,
        madds: rows * cols * dims,
        products: rows * cols * dims,
        shared_loads: loads,
        shared_bytes: F32 * (loads + staged),
        fragment_bytes: 0.0,
        buffer_loads: staged,
        cached_bytes: bytes(&x.format) * staged,
        streamed_bytes: F32 * rows * cols,
        exps: 0.0,
        barriers: 1.0 + 2.0 * dims / f64::from(tile.depth),
    }
}

/// Each row is read twice, the second time from a cache, and written once. An invocation takes four keys at once.
fn softmax(x: &Softmax) -> Work {
    Work {
        keys: 4 * x.threads,
        madds: 0.0,
        products: 0.0,
        shared_loads: 0.0,
        shared_bytes: 0.0,
        fragment_bytes: 0.0,
        buffer_loads: 8.0,
        cached_bytes: 0.0,
        streamed_bytes: 8.0 * F32,
        exps: 9.0,
        barriers: 0.0,
    }
}

/// R rows × C vectors of four dims of an invocation take R + 4 C loads a key for 4 R · C multiply-adds. All is kept as f32.
fn values(x: &Values) -> Work {
    let tile = x.tile;
    let (rows, cols, keys) = (f64::from(tile.rows), f64::from(tile.cols), f64::from(tile.depth));
    let threads = f64::from(tile.tile_rows / tile.rows * (tile.tile_cols / (4 * tile.cols)));
    let [weights, staged] = [tile.tile_rows, tile.tile_cols].map(|of| f64::from(of) * keys / threads);
    let loads = keys * (rows + 4.0 * cols);
    Work {
        keys: tile.depth,
        madds: 4.0 * rows * cols * keys,
        products: 4.0 * rows * cols * keys,
        shared_loads: loads,
        shared_bytes: F32 * (loads + weights + staged),
        fragment_bytes: 0.0,
        buffer_loads: weights + staged,
        cached_bytes: bytes(&x.format) * staged,
        streamed_bytes: F32 * weights,
        exps: 0.0,
        barriers: 2.0,
    }
}

/// R rows of an invocation take R + 4 loads a dim for 4 R scores, and R + V / 8 loads a key for R · V / 8 products with V dims of v. q, k and v
/// are kept as wide as they are in memory, weights as f32.
fn flash(x: &Flash, head_dim: u32) -> Work {
    let tile = x.tile;
    let (rows, dims, keys) = (f64::from(tile.rows), f64::from(tile.dims), f64::from(tile.tile_keys()));
    let deep = whole(head_dim, tile.depth);
    let (threads, own) = (f64::from(ACROSS * DOWN), dims / f64::from(ACROSS));
    let width = bytes(&x.format);
    let queries = if tile.resident { 0.0 } else { f64::from(tile.tile_rows()) * deep / threads };
    let staged = queries + keys * (deep + dims) / threads;
    let (narrow, weights) = ((rows + 4.0) * deep + keys * own, keys * rows);
    let madds = 4.0 * rows * deep + rows * keys * own;
    // Without shuffles the maxima of the columns go through workgroup memory.
    let (stored, maxima) = if tile.shuffle { (0.0, 0.0) } else { (4.0, 4.0 * f64::from(ACROSS)) };
    let steps = deep / f64::from(tile.depth) + keys / f64::from(tile.value_keys);
    Work {
        keys: tile.tile_keys(),
        madds,
        products: madds,
        shared_loads: narrow + weights + maxima,
        shared_bytes: width * (narrow + staged) + F32 * (weights + 4.0 * rows + maxima + stored),
        fragment_bytes: 0.0,
        buffer_loads: staged,
        cached_bytes: width * staged,
        streamed_bytes: 0.0,
        exps: 5.0 * rows,
        barriers: 1.0 + f64::from(u32::from(!tile.shuffle)) + 2.0 * steps,
    }
}

/// A subgroup loads a matrix of k or v once for all its blocks of rows, and one of q for each tile of keys unless it holds that. Matrices
/// of the weights are loaded again for each group of matrices of v. Where the weights are two matrices, their products are carried out
/// twice. Scores go through workgroup memory as f32. The barriers are those that every tile takes:
/// that a maximum rises by more than the lazy rule allows is rare.
fn matrix(x: &Matrix, head_dim: u32, lanes: u32) -> Work {
    let tile = x.tile;
    let (size, rows, dims) = (f64::from(tile.size), f64::from(tile.tile_rows()), f64::from(tile.dims));
    let head = whole(head_dim, tile.depth);
    let (keys, threads) = (f64::from(KEYS), f64::from(THREADS));
    let (blocks, subgroups) = (rows / size, f64::from(THREADS / lanes));
    let (deep, wide) = (head / size, keys / size);
    let (weights, times) = (f64::from(x.weight_matrices()), dims / size / f64::from(x.together()));
    let queries = if x.holds_q() { 0.0 } else { deep * blocks };
    let matrices = queries + deep * subgroups * wide + wide * (blocks * weights * times + subgroups * dims / size);
    let staged = keys * (head + dims) + if tile.resident { 0.0 } else { rows * head };
    let maxima = threads / rows * threads;
    let halves = matrices * size * size + staged + weights * rows * keys;
    let singles = 2.0 * rows * keys + threads + maxima;
    Work {
        keys: KEYS,
        madds: rows * keys * (head + dims) / threads,
        products: rows * keys * (head + weights * dims) / threads,
        shared_loads: (matrices * size * size + rows * keys + maxima) / threads,
        shared_bytes: (2.0 * halves + F32 * singles) / threads,
        fragment_bytes: 2.0 * matrices * size * size / threads,
        buffer_loads: staged / threads,
        cached_bytes: 2.0 * staged / threads,
        streamed_bytes: 0.0,
        exps: rows * keys / threads,
        barriers: 4.0 + 2.0 * head / f64::from(tile.depth),
    }
}

/// Each key is loaded once for all rows of the workgroup. Without shuffles the parts of dot products go through workgroup memory.
fn split_keys(x: &Split) -> Work {
    let tile = x.tile;
    let across = f64::from(split::ACROSS);
    let (rows, keys, own) = (f64::from(tile.rows), f64::from(tile.keys), f64::from(tile.dims) / across);
    let pairs = rows * keys;
    let (loads, stores) = if tile.shuffle { (0.0, 0.0) } else { (2.0 * pairs + across, pairs + 1.0 + pairs / across) };
    Work {
        keys: tile.keys * tile.streams,
        madds: 2.0 * pairs * own,
        products: 2.0 * pairs * own,
        shared_loads: loads,
        shared_bytes: F32 * (loads + stores),
        fragment_bytes: 0.0,
        buffer_loads: 2.0 * keys * own,
        cached_bytes: bytes(&x.format) * 2.0 * keys * own,
        streamed_bytes: 0.0,
        exps: rows * (keys + 1.0),
        barriers: if tile.shuffle { 0.0 } else { 2.0 },
    }
}
