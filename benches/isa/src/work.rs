//! What the library counts of a tile of keys ([`Work`]) is what stands in the texts of the shaders.

use wgpu_attention::internal::Variant;
use wgpu_attention::internal::kernel::flash::Flash;
use wgpu_attention::internal::kernel::matrix::{KEYS, Matrix};
use wgpu_attention::internal::kernel::scores::Scores;
use wgpu_attention::internal::kernel::softmax::Softmax;
use wgpu_attention::internal::kernel::split::{self, Split};
use wgpu_attention::internal::kernel::values::Values;
use wgpu_attention::internal::model::Work;

use crate::numbers::{HEAD_DIM, head_dim};

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
    let work = Work::of(variant, head_dim(variant), lanes).expect("the kernel is one of these");
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

/// Vectors of four dims that an invocation stages where its workgroup stages so many rows of so many dims.
fn staged(variant: &Variant, rows: u32, dims: u32) -> f64 {
    f64::from(rows * dims / 4) / f64::from(variant.threads())
}

#[test]
fn scores_as_in_its_text() {
    each(|variant| {
        let Variant::Scores(Scores { tile, .. }) = variant else { return false };
        let trips = [
            ("var dim", f64::from(HEAD_DIM / tile.depth)),
            ("part < TILE_Q ", staged(variant, tile.tile_rows, tile.depth)),
            ("part < TILE_KV ", staged(variant, tile.tile_cols, tile.depth)),
            ("var i ", 1.0),
        ];
        let loads = [(" = sh_q[", 4.0), (" = sh_k[", 4.0)];
        let staging = [("load_q(", 4.0), ("load_k(", 4.0)];
        check(variant, 32, "fn main(", &trips, [&[("dot(q_", 4.0)], &loads, &staging, &[("exp", 1.0)]]);
        true
    });
}

#[test]
fn softmax_as_in_its_text() {
    for variant in Variant::all() {
        let Variant::Softmax(Softmax { output: false, .. }) = variant else { continue };
        let work = Work::of(&variant, HEAD_DIM, 32).expect("the kernel is one of these");
        let wgsl = variant.wgsl();
        let start = "for (var key ";
        let second = wgsl.find(start).expect("a pass over the row") + start.len();
        let loops = [&wgsl[..], &wgsl[second..]];
        let both = |texts: &[(&str, f64)]| loops.map(|wgsl| count(wgsl, start, &[], texts)).into_iter().sum::<f64>();
        assert_eq!(both(&[("logits_of(", 4.0)]), work.buffer_loads, "{variant}");
        assert_eq!(both(&[("weigh_codes(", 4.0), (" exp(", 1.0)]), work.exps, "{variant}");
        assert_eq!(both(&[("workgroupBarrier()", 1.0)]), work.barriers, "{variant}");
        // The first pass reads, the second writes: what it reads again is in a cache.
        let stored = count(loops[1], start, &[], &[("s[(row_base + key) >> 2u] =", 4.0)]);
        assert_eq!(4.0 * (work.buffer_loads / 2.0 + stored), work.streamed_bytes, "{variant}");
    }
}

#[test]
fn values_as_in_its_text() {
    each(|variant| {
        let Variant::Values(Values { tile, .. }) = variant else { return false };
        let trips = [
            ("part < TILE_Q ", staged(variant, tile.tile_rows, tile.depth)),
            ("part < KEYS ", staged(variant, tile.tile_cols, tile.depth)),
            ("var j ", 0.0),
        ];
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
        let trips = [
            ("var dim ", f64::from(tile.dims / tile.depth)),
            ("part < TILE_Q ", staged(variant, tile.tile_rows(), tile.depth)),
            ("part < TILE_KV ", staged(variant, tile.tile_keys(), tile.depth)),
            ("part < KEYS ", staged(variant, tile.value_keys, tile.dims)),
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
        let trips = [
            ("if (workgroupUniformLoad", 0.0),
            ("var dim ", f64::from(tile.dims / tile.depth)),
            ("d < depth", f64::from(tile.depth / tile.size)),
            ("part < TILE_Q ", staged(variant, tile.tile_rows(), tile.depth)),
            ("part < TILE_KV * (DEPTH", staged(variant, KEYS, tile.depth)),
            // Four vectors at once.
            ("part < (TILE_KV / 4u)", staged(variant, KEYS, tile.dims) / 4.0),
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
