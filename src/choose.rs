//! Which kernel runs a problem on a device, with which tile, and why not another.

use crate::caps::Caps;
use crate::kernel::{Body, Format, Tile, Variant, flash, rows, scores, split, values};
use crate::plan::{Form, Kernel, Options};
use crate::problem::{Causal, Element};
use crate::shape::{Shape, Tensor};
use crate::{Error, Result, tuning};

fn lane_body(caps: &Caps) -> Body {
    match caps.lanes() {
        Some(lanes) => Body::Lanes { lanes, subgroup: true, wide: caps.int64 && lanes == tuning::WIDE_LANES },
        None => Body::Lanes { lanes: 8, subgroup: false, wide: false },
    }
}

pub(crate) fn choose_body(caps: &Caps, options: &Options) -> (Body, &'static str) {
    match (options.form, caps.cpu) {
        (Some(Form::Tiled), _) => (Body::Tiled, "as asked"),
        (Some(Form::Lanes), _) => (lane_body(caps), "as asked"),
        (None, true) => (lane_body(caps), "a CPU adapter: loads are the cost, workgroup memory is no faster"),
        (None, false) => (Body::Tiled, "a GPU: tiles in workgroup memory and registers"),
    }
}

/// The fused kernel, if one is asked for, or can run and is expected to be faster; with the reasons.
pub(crate) fn choose_fused(
    shape: &Shape,
    caps: &Caps,
    options: &Options,
    key_step: u32,
    reasons: &mut Vec<String>,
) -> Result<Option<Variant>> {
    let candidates = match options.kernel {
        Some(Kernel::Unfused) => return Ok(None),
        Some(kernel) => vec![kernel],
        None if options.form.is_some() => return Ok(None),
        None => vec![Kernel::Rows, Kernel::Split, Kernel::Flash],
    };
    for kernel in candidates {
        let forced = options.kernel.is_some();
        let found = match kernel {
            Kernel::Rows => rows(shape, caps, options, key_step),
            Kernel::Split => split(shape, caps, options, key_step),
            _ => flash(shape, caps, options, key_step),
        };
        let slower = match kernel {
            _ if forced => None,
            Kernel::Rows if !caps.cpu => Some("a GPU: a row per lane keeps too few lanes busy"),
            Kernel::Rows if caps.lanes().is_some_and(|lanes| lanes < 8) => {
                Some("a driver of four lanes takes minutes to compile it")
            }
            Kernel::Rows if matches!(lane_body(caps), Body::Lanes { lanes, .. } if shape.seq_q <= lanes) => {
                Some("so few queries leave its lanes idle")
            }
            Kernel::Split if caps.cpu && caps.lanes().is_some_and(|lanes| shape.seq_q > lanes) => {
                Some("so many queries would read the keys again and again")
            }
            Kernel::Split if !caps.cpu && lines(shape) > tuning::SPLIT_ROWS.into() => {
                Some("so many rows fill the tiles of flash")
            }
            Kernel::Flash if caps.cpu => Some("a CPU adapter: workgroup memory and barriers are its slowest parts"),
            _ => None,
        };
        match (found, slower) {
            (Err(why), _) if forced => return Err(Error::Kernel { kernel: kernel.name(), why }),
            (Ok(variant), None) => {
                let why = if forced { "as asked" } else { "one pass over the keys, no score matrix" };
                reasons.push(format!("kernel {}: {why}", kernel.name()));
                return Ok(Some(variant));
            }
            (Err(why), _) => reasons.push(format!("not kernel {}: {why}", kernel.name())),
            (Ok(_), Some(why)) => reasons.push(format!("not kernel {}: {why}", kernel.name())),
        }
    }
    Ok(None)
}

/// What keeps a kernel that binds so many storage buffers from running.
pub(crate) fn too_many_bindings(caps: &Caps, buffers: u32) -> Option<String> {
    let l = &caps.limits;
    let most = l.max_storage_buffers_per_shader_stage.min(l.max_bindings_per_bind_group.saturating_sub(1));
    (most < buffers).then(|| format!("it binds {buffers} storage buffers, the device {most}"))
}

/// What keeps any fused kernel with these operands from running.
fn fused_obstacle(shape: &Shape, caps: &Caps, key_step: u32, buffers: u32) -> Option<String> {
    if shape.weights || shape.logits.is_some() {
        Some("weights and logits need the score matrix".into())
    } else if let Some(why) = too_many_bindings(caps, buffers) {
        Some(why)
    } else if key_step < shape.seq_kv {
        Some("keys or values of one head exceed a binding".into())
    } else {
        None
    }
}

fn rows(shape: &Shape, caps: &Caps, options: &Options, key_step: u32) -> std::result::Result<Variant, String> {
    let full = transforms(shape);
    if let Some(why) = fused_obstacle(shape, caps, key_step, if full { 8 } else { 6 }) {
        return Err(why);
    }
    if options.native_f16 == Some(true) && shape.element == Element::F16 {
        return Err("it reads f16 packed".into());
    }
    let dim = shape.head_dim.max(shape.value_dim);
    let tile = tuning::rows_tiles(lane_body(caps)).find(|tile| dim <= tile.dims);
    let tile = tile.ok_or_else(|| format!("{dim} dims do not fit a lane's registers"))?;
    Ok(Variant::Rows(rows::Rows { tile, format: whole_format(shape, false), full }))
}

fn split(shape: &Shape, caps: &Caps, options: &Options, key_step: u32) -> std::result::Result<Variant, String> {
    let full = transforms(shape);
    if let Some(why) = fused_obstacle(shape, caps, key_step, if full { 8 } else { 6 }) {
        return Err(why);
    }
    if shape.packed.is_some() {
        return Err("it takes no packed sequences".into());
    }
    if options.native_f16 == Some(true) && shape.element == Element::F16 {
        return Err("it reads f16 packed".into());
    }
    let dim = shape.head_dim.max(shape.value_dim);
    let shuffle = caps.subgroup_min_size.is_some_and(|size| size >= split::ACROSS);
    let one_stream = caps.cpu && caps.int64 && caps.lanes() == Some(tuning::WIDE_LANES);
    let many_rows = lines(shape) > 2;
    let tiles = tuning::split_tiles()
        .filter(|tile| dim <= tile.dims && tile.shuffle == shuffle && (tile.streams == 1) == one_stream);
    let format = whole_format(shape, false);
    let variants = tiles.map(|tile| split::Split { tile, format, full });
    let fitting: Vec<_> = variants.filter(|x| fits(caps, x.threads(), x.workgroup_bytes())).collect();
    let dims = fitting.first().map(|x| x.tile.dims);
    let best = fitting.iter().filter(|x| Some(x.tile.dims) == dims).min_by_key(|x| (x.tile.rows > 1) != many_rows);
    let variant =
        *best.ok_or_else(|| format!("{dim} dims do not fit its lanes' registers, or its tiles not the device"))?;
    let [out, _] = partial_bytes(shape, 1);
    if shape.element != Element::F32 && out > caps.binding().min(options.scratch_budget) {
        return Err("its results in f32 exceed a binding or the scratch budget".into());
    }
    Ok(Variant::Split(variant))
}

/// Rows that share a key/value head.
fn lines(shape: &Shape) -> u64 {
    u64::from(shape.seq_q) * u64::from(shape.group)
}

/// Into how many parts `split` shares out the keys: enough workgroups to fill the device, few enough that merging costs little;
/// 0 where one part is enough and can be written as it is.
pub(crate) fn partials(shape: &Shape, caps: &Caps, options: &Options, split: &split::Split) -> u32 {
    let class = usize::from(!caps.cpu);
    let tiles = lines(shape).div_ceil(split.tile.rows.into());
    let batch = if options.batch_invariant { 1 } else { shape.batch };
    let workgroups = tiles.saturating_mul(u64::from(shape.kv_heads)).saturating_mul(u64::from(batch));
    let wanted = u64::from(tuning::SPLIT_WORKGROUPS[class]).div_ceil(workgroups);
    let most = u64::from(shape.seq_kv.div_ceil(tuning::SPLIT_KEYS[class]));
    let [one, _] = partial_bytes(shape, 1);
    let room = caps.binding().min(options.scratch_budget) / one;
    match wanted.min(most).min(room) {
        0 | 1 => u32::from(shape.element != Element::F32),
        parts => parts as u32,
    }
}

/// Bytes of the partial outputs and log-sum-exps of `split`.
pub(crate) fn partial_bytes(shape: &Shape, partials: u32) -> [u64; 2] {
    let rows = u64::from(partials) * shape.lse_len();
    [4 * rows * u64::from(shape.value_dim), 4 * rows]
}

fn flash(shape: &Shape, caps: &Caps, options: &Options, key_step: u32) -> std::result::Result<Variant, String> {
    let small_arrays =
        shape.lse || shape.sinks || shape.key_lengths || shape.packed.is_some() || shape.causal == Causal::Offset;
    let operands = match (transforms(shape), small_arrays) {
        (true, _) => flash::Operands::Full,
        (false, true) => flash::Operands::Lists,
        (false, false) => flash::Operands::Bare,
    };
    if let Some(why) = fused_obstacle(shape, caps, key_step, operands.buffers()) {
        return Err(why);
    }
    let native = shape.element == Element::F16 && caps.f16 && options.native_f16 != Some(false);
    if options.native_f16 == Some(true) && shape.element == Element::F16 && !caps.f16 {
        return Err("the device has no shader f16".into());
    }
    let format = whole_format(shape, native);
    let shuffles = caps.subgroup_min_size.is_some_and(|size| size >= flash::ACROSS);
    let largest = tuning::FLASH.iter().map(|tile| tile.dims).max().expect("the table has rows");
    let dims = shape.value_dim.min(largest);
    tuning::FLASH
        .into_iter()
        .map(|tile| flash::Flash { tile, format, operands })
        .find(|x| {
            dims <= x.tile.dims
                && (shuffles || !x.tile.shuffle)
                && (shape.head_dim <= x.tile.dims || !x.tile.resident)
                && fits(caps, flash::ACROSS * flash::DOWN, x.workgroup_bytes())
        })
        .map(Variant::Flash)
        .ok_or_else(|| "no tile fits the device's workgroup memory and invocations".into())
}

/// One format for q, k, v and out.
fn whole_format(shape: &Shape, native: bool) -> Format {
    let vector = [&shape.q, &shape.k, &shape.v, &shape.out].into_iter().all(whole_vectors);
    Format { element: shape.element, native, vector }
}

/// Whether the score transform is more than the scale and the key range.
pub(crate) fn transforms(s: &Shape) -> bool {
    s.softcap.is_some() || s.alibi || s.mask.is_some() || s.bias.is_some()
}

pub(crate) fn choose_native(shape: &Shape, caps: &Caps, body: Body, options: &Options) -> Result<bool> {
    let possible = shape.element == Element::F16 && caps.f16 && body == Body::Tiled;
    match options.native_f16 {
        Some(true) if !possible && shape.element == Element::F16 => {
            let why = if caps.f16 { "the lane form reads f16 packed" } else { "the device has no shader f16" };
            Err(Error::Kernel { kernel: "native f16", why: why.into() })
        }
        Some(false) => Ok(false),
        _ => Ok(possible),
    }
}

fn lane_tile(tile: fn(Body, u32, u32) -> Tile, body: Body, shape: &Shape, dim: u32, format: Format) -> Tile {
    let Body::Lanes { lanes, .. } = body else { unreachable!("called for lane bodies") };
    let [one, many] = tuning::LANE_ROWS;
    let [narrow, wide] = tuning::LANE_DIMS;
    let rows = if shape.seq_q <= lanes { one } else { many };
    let dims = if dim <= narrow && format.vector { narrow } else { wide };
    tile(body, rows, dims)
}

pub(crate) fn scores_tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile(tuning::scores_lanes, body, shape, shape.head_dim, format));
    }
    let fits = |tile: &Tile| {
        let variant = scores::Scores { tile: *tile, format, full: false };
        fits(caps, variant.threads(), variant.workgroup_bytes())
    };
    largest(&tuning::SCORES_TILED, shape.seq_q, fits, "scores")
}

pub(crate) fn values_tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile(tuning::values_lanes, body, shape, shape.value_dim, format));
    }
    let fits = |tile: &Tile| {
        let variant = values::Values { tile: *tile, format, out: Element::F32 };
        fits(caps, variant.threads(), variant.workgroup_bytes())
    };
    largest(&tuning::VALUES_TILED, shape.seq_q, fits, "values")
}

pub(crate) fn fits(caps: &Caps, threads: u32, workgroup_bytes: u32) -> bool {
    let l = &caps.limits;
    workgroup_bytes <= l.max_compute_workgroup_storage_size
        && threads <= l.max_compute_invocations_per_workgroup
        && threads <= l.max_compute_workgroup_size_x
}

/// The largest tile that fits the device and is not mostly empty for so few rows.
pub(crate) fn largest(tiles: &[Tile], rows: u32, fits: impl Fn(&Tile) -> bool, kernel: &'static str) -> Result<Tile> {
    let smallest = tiles.last().expect("the table has rows").tile_rows;
    let found = tiles.iter().find(|tile| fits(tile) && (rows > tile.tile_rows / 2 || tile.tile_rows == smallest));
    found.copied().ok_or_else(|| Error::Kernel {
        kernel,
        why: "no tile fits the device's workgroup memory and invocations".into(),
    })
}

/// Whether every row starts at a multiple of four elements and has a multiple of four of them.
pub(crate) fn whole_vectors(tensor: &Tensor) -> bool {
    let s = &tensor.strides;
    let steps = [s.batch, s.head, s.row];
    let aligned = steps.iter().zip(tensor.sizes).all(|(stride, size)| size == 1 || stride % 4 == 0);
    tensor.dim.is_multiple_of(4) && s.offset.is_multiple_of(4) && aligned
}

/// Keys of one dispatch: all, unless the keys or values of a single head exceed a binding.
pub(crate) fn key_step(shape: &Shape, caps: &Caps) -> Result<u32> {
    if shape.packed.is_some() {
        return Ok(shape.seq_kv);
    }
    let bytes = shape.element.bytes();
    let room = caps.binding() - caps.alignment();
    let mut step = u64::from(shape.seq_kv);
    for (field, tensor) in [("k", &shape.k), ("v", &shape.v)] {
        let dim = u64::from(tensor.dim);
        let keys = match (room / bytes).checked_sub(dim) {
            None => 0,
            Some(rest) => rest / tensor.strides.row.max(1) + 1,
        };
        if keys < u64::from(shape.seq_kv) {
            // Whole vectors of weights.
            let whole = keys / 4 * 4;
            if whole == 0 {
                let value = (tensor.strides.row * 3 + dim) * bytes;
                return Err(Error::TooLarge { field, value, limit: room });
            }
            step = step.min(whole);
        }
    }
    Ok(step as u32)
}
