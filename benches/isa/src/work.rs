//! What an invocation of each GPU kernel does for a tile of keys, from the parameters of the tile.
//!
//! Only what grows with the keys is counted: the products, the loads and stores that feed them, and the barriers between. Left out are
//! addresses, conversions, masks and what is done once for a row of tiles. So a bound that follows is one from above. The tests of
//! this module compare every number with a count of the shader's text.

use wgpu_attention::internal::Variant;
use wgpu_attention::internal::kernel::flash::{ACROSS, DOWN, Flash};
use wgpu_attention::internal::kernel::matrix::{KEYS, Matrix, THREADS};
use wgpu_attention::internal::kernel::scores::Scores;
use wgpu_attention::internal::kernel::split::{self, Split};
use wgpu_attention::internal::kernel::values::Values;

/// Dims of q and k for `scores`, which has no bucket of dims of its own. In the other kernels all dims of the tile are used.
pub const HEAD_DIM: u32 = 64;

/// Bytes of an f32.
const F32: f64 = 4.0;

/// The work of an invocation for a tile of keys; of all invocations the same, on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Keys of the tile.
    pub keys: u32,
    /// Multiply-adds that attention needs.
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
    /// Bytes that other workgroups load too, so that caches may have them.
    pub cached_bytes: f64,
    /// Bytes that pass through memory once.
    pub streamed_bytes: f64,
    /// Exponentials.
    pub exps: f64,
    /// Barriers of the workgroup.
    pub barriers: f64,
}

impl Work {
    /// The work of a variant of `scores`, `values`, `flash`, `matrix` or `split`; `lanes` are those of a subgroup.
    pub fn of(variant: &Variant, lanes: u32) -> Option<Work> {
        match variant {
            Variant::Scores(x) => Some(scores(x)),
            Variant::Values(x) => Some(values(x)),
            Variant::Flash(x) => Some(flash(x)),
            Variant::Matrix(x) => Some(matrix(x, lanes)),
            Variant::Split(x) => Some(split_keys(x)),
            _ => None,
        }
    }
}

/// Bytes of an element of a tensor.
fn bytes(element: &str) -> f64 {
    if element == "f32" { F32 } else { 2.0 }
}

/// R × C scores of an invocation take R + C loads a dim for R · C multiply-adds. All is kept as f32.
fn scores(x: &Scores) -> Work {
    let tile = x.tile;
    let (rows, cols, dims) = (f64::from(tile.rows), f64::from(tile.cols), f64::from(HEAD_DIM));
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
        cached_bytes: bytes(&x.format.element.to_string()) * staged,
        streamed_bytes: F32 * rows * cols,
        exps: 0.0,
        barriers: 1.0 + 2.0 * f64::from(HEAD_DIM / tile.depth),
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
        cached_bytes: bytes(&x.format.element.to_string()) * staged,
        streamed_bytes: F32 * weights,
        exps: 0.0,
        barriers: 2.0,
    }
}

/// R rows of an invocation take R + 4 loads a dim for 4 R scores, and R + D / 8 loads a key for R · D / 8 products with v. q, k and v
/// are kept as wide as they are in memory, weights as f32.
fn flash(x: &Flash) -> Work {
    let tile = x.tile;
    let (rows, dims, keys) = (f64::from(tile.rows), f64::from(tile.dims), f64::from(tile.tile_keys()));
    let (threads, own) = (f64::from(ACROSS * DOWN), dims / f64::from(ACROSS));
    let width = bytes(&x.format.element.to_string());
    let queries = if tile.resident { 0.0 } else { f64::from(tile.tile_rows()) * dims / threads };
    let staged = queries + 2.0 * keys * dims / threads;
    let (narrow, weights) = ((rows + 4.0) * dims + keys * own, keys * rows);
    // Without shuffles the maxima of the columns go through workgroup memory.
    let (stored, maxima) = if tile.shuffle { (0.0, 0.0) } else { (4.0, 4.0 * f64::from(ACROSS)) };
    let steps = tile.dims / tile.depth + tile.tile_keys() / tile.value_keys;
    Work {
        keys: tile.tile_keys(),
        madds: 2.0 * rows * keys * own,
        products: 2.0 * rows * keys * own,
        shared_loads: narrow + weights + maxima,
        shared_bytes: width * (narrow + staged) + F32 * (weights + 4.0 * rows + maxima + stored),
        fragment_bytes: 0.0,
        buffer_loads: staged,
        cached_bytes: width * staged,
        streamed_bytes: 0.0,
        exps: 5.0 * rows,
        barriers: 1.0 + f64::from(u32::from(!tile.shuffle)) + 2.0 * f64::from(steps),
    }
}

/// A subgroup loads a matrix of k or v once for all its blocks of rows, and one of q for each tile of keys,
/// if it does not hold that. Matrices of the weights are loaded again for each group of matrices of v. Where the weights are two matrices, their
/// products are carried out twice. Scores go through workgroup memory as f32. The barriers are those that every tile takes:
/// that a maximum rises by more than the lazy rule allows is rare.
fn matrix(x: &Matrix, lanes: u32) -> Work {
    let tile = x.tile;
    let (size, rows, dims) = (f64::from(tile.size), f64::from(tile.tile_rows()), f64::from(tile.dims));
    let (keys, threads) = (f64::from(KEYS), f64::from(THREADS));
    let (blocks, subgroups) = (rows / size, f64::from(THREADS / lanes));
    let (deep, wide) = (dims / size, keys / size);
    let (weights, times) = (f64::from(x.weight_matrices()), deep / f64::from(x.together()));
    let queries = if x.holds_q() { 0.0 } else { deep * blocks };
    let matrices = queries + deep * subgroups * wide + wide * (blocks * weights * times + subgroups * deep);
    let staged = 2.0 * keys * dims + if tile.resident { 0.0 } else { rows * dims };
    let maxima = threads / rows * threads;
    let halves = matrices * size * size + staged + weights * rows * keys;
    let singles = 2.0 * rows * keys + threads + maxima;
    Work {
        keys: KEYS,
        madds: 2.0 * rows * keys * dims / threads,
        products: (1.0 + weights) * rows * keys * dims / threads,
        shared_loads: (matrices * size * size + rows * keys + maxima) / threads,
        shared_bytes: (2.0 * halves + F32 * singles) / threads,
        fragment_bytes: 2.0 * matrices * size * size / threads,
        buffer_loads: staged / threads,
        cached_bytes: 2.0 * staged / threads,
        streamed_bytes: 0.0,
        exps: rows * keys / threads,
        barriers: 4.0 + 2.0 * f64::from(tile.dims / tile.depth),
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
        cached_bytes: 0.0,
        streamed_bytes: bytes(&x.format.element.to_string()) * 2.0 * keys * own,
        exps: rows * (keys + 1.0),
        barriers: if tile.shuffle { 0.0 } else { 2.0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part of the head of a loop or branch, and how often its body runs.
    type Trips<'a> = [(&'a str, f64)];

    /// How often texts stand in the block that begins in the line that holds `start`, each with its weight, and as often as the loops
    /// around it run. Every loop has to be named.
    fn count(wgsl: &str, start: &str, trips: &Trips<'_>, texts: &[(&str, f64)]) -> f64 {
        let mut total = 0.0;
        let mut around: Vec<f64> = Vec::new();
        for line in wgsl.lines().skip_while(|line| !line.contains(start)) {
            let code = line.split("//").next().unwrap_or_default().trim();
            let times: f64 = around.iter().product();
            total += times * texts.iter().map(|(text, weight)| code.matches(text).count() as f64 * weight).sum::<f64>();
            let named = trips.iter().find(|(head, _)| code.contains(head)).map(|&(_, times)| times);
            let is_loop = code.starts_with("for ") && !around.is_empty();
            assert!(!is_loop || named.is_some(), "a loop without trips: {code}");
            for brace in code.chars().filter(|c| "{}".contains(*c)) {
                if brace == '{' {
                    around.push(if around.is_empty() { 1.0 } else { named.unwrap_or(1.0) });
                } else {
                    around.pop();
                }
            }
            if around.is_empty() && code.contains('}') {
                return total;
            }
        }
        panic!("no block begins with {start:?}");
    }

    /// Compares what the text of a variant has with what is derived: multiply-adds carried out, loads from workgroup memory and from
    /// buffers, exponentials, barriers.
    fn check(variant: &Variant, lanes: u32, start: &str, trips: &Trips<'_>, texts: [&[(&str, f64)]; 4]) {
        let work = Work::of(variant, lanes).expect("the kernel is one of these");
        let wgsl = variant.wgsl();
        let derived = [work.products, work.shared_loads, work.buffer_loads, work.exps];
        let names = ["multiply-adds", "workgroup loads", "buffer loads", "exponentials"];
        for ((name, derived), texts) in names.iter().zip(derived).zip(texts) {
            assert_eq!(count(&wgsl, start, trips, texts), derived, "{name} of {variant}");
        }
        // A uniform load stands between two barriers of its own.
        let barriers = [("workgroupBarrier()", 1.0), ("workgroupUniformLoad(", 2.0)];
        assert_eq!(count(&wgsl, start, trips, &barriers), work.barriers, "barriers of {variant}");
    }

    /// For every variant with whole vectors and without further operands.
    fn each(check: impl Fn(&Variant) -> bool) {
        let found = crate::numbers::representatives().iter().filter(|variant| check(variant)).count();
        assert!(found > 0, "no variant was compared");
    }

    #[test]
    fn scores_as_in_its_text() {
        each(|variant| {
            let Variant::Scores(Scores { tile, .. }) = variant else { return false };
            let threads = f64::from(variant.threads());
            let staged = |rows: u32| f64::from(rows * tile.depth / 4) / threads;
            let trips = [
                ("var dim", f64::from(HEAD_DIM / tile.depth)),
                ("part < TILE_Q ", staged(tile.tile_rows)),
                ("part < TILE_KV ", staged(tile.tile_cols)),
                ("var i ", 1.0),
            ];
            let loads = [(" = sh_q[", 4.0), (" = sh_k[", 4.0)];
            let staging = [("load_q(", 4.0), ("load_k(", 4.0)];
            check(variant, 32, "fn main(", &trips, [&[("dot(q_", 4.0)], &loads, &staging, &[("exp", 1.0)]]);
            true
        });
    }

    #[test]
    fn values_as_in_its_text() {
        each(|variant| {
            let Variant::Values(Values { tile, .. }) = variant else { return false };
            let threads = f64::from(variant.threads());
            let staged = |rows: u32| f64::from(rows * tile.depth / 4) / threads;
            let trips =
                [("part < TILE_Q ", staged(tile.tile_rows)), ("part < KEYS ", staged(tile.tile_cols)), ("var j ", 0.0)];
            let loads = [(" = sh_w[", 4.0), ("sh_v[", 4.0), ("sh_v[part]", -4.0)];
            let staging = [("load_s(", 4.0), ("load_v(", 4.0)];
            check(variant, 32, "for (var key ", &trips, [&[(" * v_", 4.0)], &loads, &staging, &[("exp", 1.0)]]);
            true
        });
    }

    #[test]
    fn flash_as_in_its_text() {
        each(|variant| {
            let Variant::Flash(Flash { tile, .. }) = variant else { return false };
            let threads = f64::from(variant.threads());
            let staged = |rows: u32, dims: u32| f64::from(rows * dims / 4) / threads;
            let trips = [
                ("var dim ", f64::from(tile.dims / tile.depth)),
                ("part < TILE_Q ", staged(tile.tile_rows(), tile.depth)),
                ("part < TILE_KV ", staged(tile.tile_keys(), tile.depth)),
                ("part < KEYS ", staged(tile.value_keys, tile.dims)),
                ("var skip ", f64::from(tile.tile_keys() / tile.value_keys)),
                ("var once ", 0.0),
                ("var j ", 0.0),
            ];
            let loads = [
                ("widen(sh_q[", 4.0),
                ("widen(sh_kv[", 4.0),
                (" = sh_p[", 4.0),
                ("max(top, sh_kv[", 4.0),
                ("max(top, sh_top[", 4.0),
            ];
            let staging = [("stage_q(", 4.0), ("stage_k(", 4.0), ("stage_v(", 4.0)];
            let exps = [("weigh(", 4.0), (" exp(", 1.0)];
            let madds = [("dot(q_", 4.0), (" * v_", 4.0)];
            check(variant, 32, "for (var key ", &trips, [&madds, &loads, &staging, &exps]);
            true
        });
    }

    #[test]
    fn matrix_as_in_its_text() {
        each(|variant| {
            let Variant::Matrix(any) = *variant else { return false };
            let Matrix { tile, .. } = any;
            let threads = f64::from(variant.threads());
            let staged = |rows: u32, dims: u32| f64::from(rows * dims / 4) / threads;
            let trips = [
                ("if (workgroupUniformLoad", 0.0),
                ("var dim ", f64::from(tile.dims / tile.depth)),
                ("d < depth", f64::from(tile.depth / tile.size)),
                ("part < TILE_Q ", staged(tile.tile_rows(), tile.depth)),
                ("part < TILE_KV * (DEPTH", staged(KEYS, tile.depth)),
                // Four vectors at once.
                ("part < (TILE_KV / 4u)", staged(KEYS, tile.dims) / 4.0),
                ("if (bad_there", 0.0),
                ("var j ", f64::from(KEYS / tile.size)),
                ("d < min(DIMS", 0.0),
                ("var i ", 0.0),
            ];
            let staging = [("load_q(", 4.0), ("load_k(", 4.0), ("load_v(", 4.0)];
            // With 64 lanes a subgroup owns two blocks, with 32 lanes one, and the text of that variant has no other.
            for (varying, lanes) in [(true, 64), (false, 32)] {
                let variant = Variant::from(Matrix { varying, ..any });
                let square = f64::from(tile.size * tile.size) / f64::from(lanes);
                let madds = [("coopMultiplyAdd(", square * f64::from(tile.size))];
                let loads = [("coopLoad", square), (" = sh_s[", 1.0), ("bitcast<f32>(sh_row[", 1.0)];
                check(&variant, lanes, "for (var key ", &trips, [&madds, &loads, &staging, &[("exp(max(s_", 1.0)]]);
            }
            true
        });
    }

    #[test]
    fn split_as_in_its_text() {
        each(|variant| {
            let Variant::Split(Split { tile, .. }) = variant else { return false };
            let pairs = f64::from(tile.rows * tile.keys);
            let trips = [("var once ", 0.0), ("var pair ", pairs / f64::from(split::ACROSS))];
            let loads = [("parts[at", 1.0), ("marks[stream", 1.0), (" = sums[", 1.0)];
            let staging = [("load_k(", 4.0), ("load_v(", 4.0)];
            let madds = [("dot(q_", 4.0), (" * v_", 4.0)];
            check(variant, 32, "for (var step ", &trips, [&madds, &loads, &staging, &[("weigh(", 1.0)]]);
            true
        });
    }
}
