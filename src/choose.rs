//! Which kernel runs a problem on a device, with which tile, and why not another.

use crate::caps::{CPU_TURNS, Caps};
use crate::error::{Error, Result};
use crate::kernel::body::{Body, LANE_DIMS, LANE_ROWS, Tile, WIDE_LANES, lane_bodies};
use crate::kernel::format::Format;
use crate::kernel::fused::Operands;
use crate::kernel::shader::Shader;
use crate::kernel::{Variant, flash, matrix, rows, scores, split, values};
use crate::options::{Form, Kernel, Options};
use crate::problem::{Causal, Element};
use crate::shape::{Shape, Tensor};
use crate::tuned::{Choice, Class, Tuning};
use crate::walk::most_keys;

fn lane_body(caps: &Caps) -> Body {
    match caps.lanes() {
        Some(lanes) => Body::Lanes { lanes, subgroup: true, wide: caps.int64 && lanes == WIDE_LANES },
        None => Body::Lanes { lanes: 8, subgroup: false, wide: false },
    }
}

/// Whether the device has what a lane body uses.
fn runs(body: Body, caps: &Caps) -> bool {
    let Body::Lanes { lanes, subgroup, wide } = body else { return false };
    (!subgroup || caps.lanes() == Some(lanes)) && (!wide || caps.int64)
}

pub(crate) fn choose_body(caps: &Caps, options: &Options) -> (Body, &'static str) {
    match (options.form, caps.cpu) {
        (Some(Form::Tiled), _) => (Body::Tiled, "as asked"),
        (Some(Form::Lanes), _) => (lane_body(caps), "as asked"),
        (None | Some(Form::Emulated), true) => {
            (lane_body(caps), "a CPU adapter: loads are the cost, workgroup memory is no faster")
        }
        (None | Some(Form::Emulated), false) => (Body::Tiled, "a GPU: tiles in workgroup memory and registers"),
    }
}

/// The fused kernels in the order in which the planner prefers them.
const FUSED: [Kernel; 4] = [Kernel::Rows, Kernel::Split, Kernel::Matrix, Kernel::Flash];

/// The fused kernel that is asked for, that a tuned row names, or that can run and is expected to be faster; `None` for `scores`,
/// `softmax` and `values`. Gives a reason for every kernel.
pub(crate) fn choose_fused(
    shape: &Shape,
    caps: &Caps,
    options: &Options,
    tuning: &Tuning,
    key_step: u32,
    reasons: &mut Vec<String>,
) -> Result<Option<Variant>> {
    if options.form == Some(Form::Emulated) && options.kernel != Some(Kernel::Matrix) {
        let kernel = options.kernel.unwrap_or(Kernel::Unfused).name();
        return Err(Error::Kernel { kernel, why: "it has no emulated form; matrix has one".into() });
    }
    let found = |kernel| variants(kernel, shape, caps, options, key_step);
    let tuned = tuned(shape, options, tuning, found, reasons);
    let is_tuned = tuned.is_some();
    let (chosen, variant, why) = match (tuned, options.kernel) {
        (Some(tuned), _) => tuned,
        (None, Some(kernel)) => {
            let variants = found(kernel).map_err(|why| Error::Kernel { kernel: kernel.name(), why })?;
            (kernel, variants.first().copied(), "as asked".into())
        }
        (None, None) if options.form.is_some() => {
            found(Kernel::Unfused).map_err(|why| Error::Kernel { kernel: Kernel::Unfused.name(), why })?;
            (Kernel::Unfused, None, "a form is asked for, which it alone has".into())
        }
        (None, None) => {
            let running: Vec<_> =
                FUSED.into_iter().filter_map(|kernel| Some((kernel, found(kernel).ok()?.first().copied()))).collect();
            let fast = running.iter().find(|&&(kernel, _)| slower(kernel, shape, caps, options).is_none());
            match (fast, found(Kernel::Unfused), running.last()) {
                (Some(&(kernel, variant)), ..) => (kernel, variant, "one pass over the keys, no score matrix".into()),
                (None, Ok(_), _) => (Kernel::Unfused, None, "it runs every problem on every device".into()),
                (None, Err(why), Some(&(kernel, variant))) => {
                    (kernel, variant, format!("unfused cannot run it: {why}"))
                }
                (None, Err(why), None) => {
                    let others = FUSED
                        .into_iter()
                        .filter_map(|kernel| Some(format!("; not kernel {}: {}", kernel.name(), found(kernel).err()?)));
                    let why = why + &others.collect::<String>();
                    return Err(Error::Kernel { kernel: Kernel::Unfused.name(), why });
                }
            }
        }
    };
    reasons.push(format!("kernel {}: {why}", chosen.name()));
    for kernel in Kernel::ALL.into_iter().filter(|&kernel| kernel != chosen) {
        let chosen = chosen.name();
        let why = match (found(kernel), slower(kernel, shape, caps, options)) {
            _ if options.kernel.is_some() => format!("{chosen} is asked for"),
            _ if options.form.is_some() => "a form of scores and values is asked for".into(),
            (Err(why), _) => why,
            _ if is_tuned => format!("a tuned row prefers {chosen}"),
            (Ok(_), Some(why)) => why.into(),
            (Ok(_), None) if kernel == Kernel::Unfused => "the scores would pass through memory".into(),
            (Ok(_), None) => format!("{chosen} is expected to be faster"),
        };
        reasons.push(format!("not kernel {}: {why}", kernel.name()));
    }
    Ok(variant)
}

/// The first tuned row that fits the problem and what is asked for; with the reasons for and against each.
fn tuned(
    shape: &Shape,
    options: &Options,
    tuning: &Tuning,
    found: impl Fn(Kernel) -> std::result::Result<Vec<Variant>, String>,
    reasons: &mut Vec<String>,
) -> Option<(Kernel, Option<Variant>, String)> {
    let class = Class::of(shape);
    let mut rows = tuning.rows.iter().filter(|row| row.class == class).peekable();
    if rows.peek().is_none() && !tuning.rows.is_empty() {
        reasons.push(format!("no tuned row of {} is for problems of this class", tuning.source));
    }
    rows.find_map(|row| {
        let kernel = row.choice.kernel();
        let usable = match (options.kernel, options.form) {
            (Some(forced), _) if forced != kernel => Err(format!("kernel {} is asked for", forced.name())),
            (None, Some(_)) => Err("a form of scores and values is asked for".into()),
            _ if !row.choice.exists() => Err("there is no such tile".into()),
            _ if kernel == Kernel::Unfused => found(kernel).map(|_| None),
            _ => found(kernel).and_then(|variants| {
                let variant = variants.into_iter().find(|variant| Choice::of(variant) == row.choice);
                variant.map(Some).ok_or_else(|| "its tile does not suit this device and these dims".into())
            }),
        };
        match usable {
            Ok(variant) => {
                let why = format!("measured fastest in its class, {:.3} ms (tuned rows of {})", row.ms, tuning.source);
                Some((kernel, variant, why))
            }
            Err(why) => {
                reasons.push(format!("the tuned row for {} is passed over: {why}", kernel.name()));
                None
            }
        }
    })
}

/// What can be measured against each other for a problem, the planner's own choice first.
pub(crate) fn candidates(shape: &Shape, caps: &Caps) -> Result<Vec<Choice>> {
    caps.check()?;
    let (options, key_step) = (Options::default(), key_step(shape, caps)?);
    let own = choose_fused(shape, caps, &options, &Tuning::default(), key_step, &mut Vec::new())?;
    let mut choices = vec![own.as_ref().map_or(Choice::Unfused, Choice::of)];
    for kernel in Kernel::ALL.into_iter().filter(|&kernel| !caps.takes_minutes(kernel)) {
        // A kernel that cannot run is no candidate.
        let variants = variants(kernel, shape, caps, &options, key_step).unwrap_or_default();
        choices.extend(variants.iter().map(Choice::of));
    }
    if shape.paged.is_none() {
        choices.push(Choice::Unfused);
    }
    let mut seen = Vec::new();
    choices.retain(|choice| {
        !seen.contains(choice) && {
            seen.push(*choice);
            true
        }
    });
    Ok(choices)
}

/// Most rows for which `split` is preferred on a GPU, all query heads of a key/value head together: a tile of `flash` would be
/// mostly empty.
const SPLIT_ROWS: u32 = 16;

/// Why a kernel that can run is expected to be slower than another one.
fn slower(kernel: Kernel, shape: &Shape, caps: &Caps, options: &Options) -> Option<&'static str> {
    match kernel {
        Kernel::Rows | Kernel::Flash | Kernel::Matrix if shape.weights && !scores_again(shape, caps, options) => {
            Some("for the weights the scores would be formed twice")
        }
        Kernel::Rows if !caps.cpu => Some("a GPU: a row per lane keeps too few lanes busy"),
        Kernel::Rows if caps.takes_minutes(kernel) => Some("a driver of four lanes takes minutes to compile it"),
        Kernel::Rows if matches!(lane_body(caps), Body::Lanes { lanes, .. } if shape.seq_q <= lanes) => {
            Some("so few queries leave its lanes idle")
        }
        Kernel::Split if caps.cpu && matches!(lane_body(caps), Body::Lanes { lanes, .. } if shape.seq_q > lanes) => {
            Some("so many queries would read the keys again and again")
        }
        Kernel::Split if !caps.cpu && lines(shape) > SPLIT_ROWS.into() => Some("so many rows fill the tiles of flash"),
        // Emulated matrices show that the shader is right, but not that a driver compiles cooperative matrices rightly. `tune` checks the
        // results of the kernel before it stores it.
        Kernel::Matrix => Some("no graphics card is known to run it rightly: a tuned row takes it, or who asks for it"),
        Kernel::Flash if caps.cpu => Some("a CPU adapter: workgroup memory and barriers are its slowest parts"),
        _ => None,
    }
}

/// The variants of a kernel that can run, the planner's own choice first, or why none can: of several reasons the one that nobody
/// can change, as the dims, before an output or an option that is asked for. `scores`, `softmax` and `values` are
/// chosen one by one and have none here.
fn variants(
    kernel: Kernel,
    shape: &Shape,
    caps: &Caps,
    options: &Options,
    key_step: u32,
) -> std::result::Result<Vec<Variant>, String> {
    let found = match kernel {
        Kernel::Unfused if shape.paged.is_some() => Err("it reads no keys in pages".into()),
        Kernel::Unfused => Ok(Vec::new()),
        Kernel::Rows => rows(shape, caps, options),
        Kernel::Split => split(shape, caps, options),
        Kernel::Flash => flash(shape, caps, options),
        Kernel::Matrix => matrix(shape, caps, options),
    }?;
    let lanes = kernel != Kernel::Unfused && options.form == Some(Form::Lanes);
    if lanes && shape.weights && !shape.seq_kv.is_multiple_of(4) {
        return Err("the lane form of scores writes no rows of weights that are not whole vectors of four".into());
    }
    let mut able = Vec::new();
    let mut why = None;
    for variant in found {
        match within(variant, shape, caps, options, key_step) {
            Ok(variant) => able.push(variant),
            Err(obstacle) => why = why.or(Some(obstacle)),
        }
    }
    match why {
        Some(why) if able.is_empty() => Err(why),
        _ => Ok(able),
    }
}

/// The form of a fused kernel that walks the keys in as many dispatches as its loops and the bindings need, or why there is none.
fn within(
    variant: Variant,
    shape: &Shape,
    caps: &Caps,
    options: &Options,
    key_step: u32,
) -> std::result::Result<Variant, String> {
    if fused_step(&variant, shape, caps, key_step) >= shape.seq_kv {
        return Ok(variant);
    }
    let why = if key_step < shape.seq_kv {
        "keys or values of one head exceed a binding".into()
    } else {
        let turns = turns(&variant, shape, most_keys(shape, tile_rows(&variant)));
        format!("its loops take {turns} turns, and those of a CPU adapter {} at most", CPU_TURNS)
    };
    let room = caps.binding().min(options.scratch_budget);
    let (carried, state) = match variant {
        Variant::Rows(x) => (Variant::Rows(rows::Rows { carry: true, ..x }), x.state_bytes()),
        Variant::Flash(x) => (Variant::Flash(x.carried()), x.state_bytes()),
        // Its parts are merged.
        Variant::Split(x) => {
            let partials = needed(shape, caps, &x, key_step);
            let why = format!("{why}; the results of its parts exceed a binding or the scratch budget");
            return if longer_partial_bytes(shape, partials) > room { Err(why) } else { Ok(variant) };
        }
        _ => return Err(why),
    };
    if let Some(more) = too_many_bindings(caps, carried.bindings().len() as u32) {
        return Err(format!("{why}; in several dispatches {more}"));
    }
    if state > room {
        return Err(format!("{why}; what waits between dispatches exceeds a binding or the scratch budget"));
    }
    Ok(carried)
}

/// Rows of a tile of a fused kernel, at most.
fn tile_rows(variant: &Variant) -> u32 {
    match variant {
        Variant::Rows(x) => x.tile.tile_rows(),
        Variant::Flash(x) => x.tile.tile_rows(),
        Variant::Matrix(x) => x.tile.tile_rows(),
        Variant::Split(x) => x.tile.rows,
        _ => 1,
    }
}

/// Keys of one dispatch of a fused kernel: all, unless those of one head exceed a binding or a CPU adapter would end its loops.
pub(crate) fn fused_step(variant: &Variant, shape: &Shape, caps: &Caps, key_step: u32) -> u32 {
    let most = most_turning(variant, shape, caps);
    if most >= most_keys(shape, tile_rows(variant)) {
        return key_step;
    }
    // Dispatches of a length, so that the last one is not short.
    let dispatches = u64::from(shape.seq_kv).div_ceil(most);
    key_step.min(u64::from(shape.seq_kv).div_ceil(dispatches).next_multiple_of(KEY_TILE) as u32)
}

/// The most keys that a workgroup of a fused kernel can walk on the device: whole tiles of keys, one at least.
fn most_turning(variant: &Variant, shape: &Shape, caps: &Caps) -> u64 {
    let all = u64::from(shape.seq_kv);
    let fits = |keys: u64| !caps.cpu || turns(variant, shape, keys) <= CPU_TURNS;
    if fits(all) {
        return all;
    }
    // Turns never fall as keys rise.
    let (mut low, mut high) = (1, all / KEY_TILE);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        (low, high) = if fits(middle * KEY_TILE) { (middle, high) } else { (low, middle - 1) };
    }
    low * KEY_TILE
}

/// What keys of a dispatch are a multiple of: whole steps of every kernel, and whole vectors of weights.
const KEY_TILE: u64 = 64;

/// Turns that the loops of an invocation of a fused kernel take together for so many keys, wherever they begin, at most. The test that ends
/// a loop counts as a turn of it. llvmpipe counted up to an eighth more for `flash` than its text has: a quarter is added where there are
/// barriers.
fn turns(variant: &Variant, shape: &Shape, keys: u64) -> u64 {
    // Page by page, where there are any: each may begin and end in the middle of a step.
    let steps = |step: u32| {
        let (step, page) = (u64::from(step), shape.paged.map_or(keys, |paged| paged.page_size.into()));
        match page < keys {
            false => keys.div_ceil(step) + 4,
            true => {
                let whole = (keys.div_ceil(page) + 1) * (page.div_ceil(step) + 2);
                whole.min(keys / step + 3 * (keys / page + 2))
            }
        }
    };
    let rows = |full: bool, rows: u32| if full { 2 + u64::from(rows) } else { 1 };
    match variant {
        // A second walk, key by key, where there are NaN or infinities, with its loops over rows.
        Variant::Rows(x) => {
            (steps(x.tile.keys) + steps(1)) * rows(x.full, x.tile.rows) + 2 * u64::from(x.tile.rows) + 1
        }
        Variant::Split(x) => {
            let split::Tile { keys: each, streams, shuffle, .. } = x.tile;
            let sums = if shuffle { 0 } else { 1 + u64::from((x.tile.rows * each).div_ceil(split::ACROSS)) };
            let blocks = if streams == 1 { steps(each) } else { keys.div_ceil((each * streams).into()) + 4 };
            // Two loops that run once where there are NaN or infinities, with the tests that end them.
            let turns = blocks * (4 + rows(x.full, x.tile.rows) + sums);
            if shuffle { turns } else { turns * 5 / 4 }
        }
        Variant::Flash(x) => {
            (keys.div_ceil(x.tile.tile_keys().into()) + 1) * u64::from(x.turns(shape.head_dim)) * 5 / 4
        }
        // Its own count leaves out the tests.
        Variant::Matrix(x) => (keys.div_ceil(matrix::KEYS.into()) + 1) * u64::from(x.turns(shape.head_dim)) * 3 / 2,
        _ => 0,
    }
}

/// Whether `rows` or `flash` and, after it, scores formed again for the weights are preferred to the three kernels: on a GPU where
/// the score matrix would go through the scratch in parts. On CPU adapters the second product costs more than the softmax saves.
fn scores_again(shape: &Shape, caps: &Caps, options: &Options) -> bool {
    !caps.cpu && 4 * shape.scores_len() > options.scratch_budget
}

/// What keeps a kernel that binds so many storage buffers from running.
pub(crate) fn too_many_bindings(caps: &Caps, buffers: u32) -> Option<String> {
    let l = &caps.limits;
    let most = l.max_storage_buffers_per_shader_stage.min(l.max_bindings_per_bind_group.saturating_sub(1));
    (most < buffers).then(|| format!("it binds {buffers} storage buffers, the device {most}"))
}

/// What keeps any fused kernel with these operands from running: what the device is before what is asked for.
fn fused_obstacle(shape: &Shape, caps: &Caps, buffers: u32) -> Option<String> {
    let logits = || shape.logits.is_some().then(|| "logits need the score matrix".into());
    too_many_bindings(caps, buffers).or_else(logits)
}

fn rows(shape: &Shape, caps: &Caps, options: &Options) -> std::result::Result<Vec<Variant>, String> {
    let full = transforms(shape);
    let dim = shape.head_dim.max(shape.value_dim);
    let own = lane_body(caps);
    let others = lane_bodies().filter(|&body| body != own && runs(body, caps));
    let tiles = std::iter::once(own).chain(others).filter_map(|body| rows::tiles(body).find(|t| dim <= t.dims));
    let format = whole_format(shape, false);
    let found: Vec<_> = tiles.map(|tile| Variant::Rows(rows::Rows { tile, format, full, carry: false })).collect();
    if found.is_empty() {
        return Err(format!("{dim} dims do not fit a lane's registers"));
    }
    if let Some(why) = fused_obstacle(shape, caps, if full { 8 } else { 6 }) {
        return Err(why);
    }
    if options.native_f16 == Some(true) && shape.element == Element::F16 {
        return Err("it reads f16 packed".into());
    }
    Ok(found)
}

fn split(shape: &Shape, caps: &Caps, options: &Options) -> std::result::Result<Vec<Variant>, String> {
    let full = transforms(shape);
    if shape.packed.is_some() {
        return Err("it takes no packed sequences".into());
    }
    let dim = shape.head_dim.max(shape.value_dim);
    let shuffle = caps.subgroup_min_size.is_some_and(|size| size >= split::ACROSS);
    let wide = caps.int64 && caps.lanes() == Some(WIDE_LANES);
    let one_stream = caps.cpu && wide;
    let many_rows = lines(shape) > 2;
    let tiles = split::tiles().filter(|tile| dim <= tile.dims && (shuffle || !tile.shuffle) && (wide || !tile.wide()));
    let format = whole_format(shape, false);
    let variants = tiles.map(|tile| split::Split { tile, format, full });
    let mut fitting: Vec<_> = variants.filter(|x| fits(caps, x.threads(), x.workgroup_bytes())).collect();
    fitting.sort_by_key(|x| {
        let tile = &x.tile;
        (tile.dims, tile.shuffle != shuffle, (tile.streams == 1) != one_stream, (tile.rows > 1) != many_rows)
    });
    let dims = fitting.first().map(|x| x.tile.dims);
    fitting.retain(|x| Some(x.tile.dims) == dims);
    if fitting.is_empty() {
        return Err(format!("{dim} dims do not fit its lanes' registers, or its tiles not the device"));
    }
    if let Some(why) = fused_obstacle(shape, caps, if full { 8 } else { 6 }) {
        return Err(why);
    }
    if options.native_f16 == Some(true) && shape.element == Element::F16 {
        return Err("it reads f16 packed".into());
    }
    if shape.element != Element::F32 && longer_partial_bytes(shape, 1) > caps.binding().min(options.scratch_budget) {
        return Err("its results in f32 exceed a binding or the scratch budget".into());
    }
    Ok(fitting.into_iter().map(Variant::Split).collect())
}

/// Rows that share a key/value head.
fn lines(shape: &Shape) -> u64 {
    u64::from(shape.seq_q) * u64::from(shape.group)
}

/// Into how many parts `split` shares out the keys: enough workgroups to fill the device, few enough that merging costs little, but
/// none longer than a binding or the loops of a CPU adapter take, and as many for each dispatch of `key_step` keys; 0 where one part is
/// enough and can be written as it is.
pub(crate) fn partials(shape: &Shape, caps: &Caps, options: &Options, split: &split::Split, key_step: u32) -> u32 {
    let class = usize::from(!caps.cpu);
    let tiles = lines(shape).div_ceil(split.tile.rows.into());
    let batch = if options.batch_invariant { 1 } else { shape.batch };
    let workgroups = tiles.saturating_mul(u64::from(shape.kv_heads)).saturating_mul(u64::from(batch));
    let wanted = u64::from(split::WORKGROUPS[class]).div_ceil(workgroups.max(1));
    let most = most_keys(shape, split.tile.rows).div_ceil(split::LEAST_KEYS[class].into());
    let room = caps.binding().min(options.scratch_budget) / longer_partial_bytes(shape, 1).max(1);
    let dispatches = shape.seq_kv.div_ceil(key_step);
    let each = (wanted.min(most).min(room) as u32 / dispatches.max(1)).max(1) * dispatches;
    match each.max(needed(shape, caps, split, key_step)) {
        0 | 1 => u32::from(shape.element != Element::F32),
        parts => parts,
    }
}

/// The fewest parts of `split`, so that none is longer than what a binding and the loops of a CPU adapter take.
fn needed(shape: &Shape, caps: &Caps, split: &split::Split, key_step: u32) -> u32 {
    let variant = Variant::Split(*split);
    let longest = most_keys(shape, split.tile.rows).min(key_step.into());
    let each = longest.div_ceil(most_turning(&variant, shape, caps).max(1)).max(1) as u32;
    each.saturating_mul(shape.seq_kv.div_ceil(key_step))
}

/// Bytes of the partial outputs of `split`, and of the maximum and the sum of each of their rows.
pub(crate) fn partial_bytes(shape: &Shape, partials: u32) -> [u64; 2] {
    let rows = u64::from(partials) * shape.lse_len();
    [4 * rows * u64::from(shape.value_dim), 8 * rows]
}

/// Bytes of the longer of the two buffers that the parts of `split` fill.
fn longer_partial_bytes(shape: &Shape, partials: u32) -> u64 {
    let [out, totals] = partial_bytes(shape, partials);
    out.max(totals)
}

fn flash(shape: &Shape, caps: &Caps, options: &Options) -> std::result::Result<Vec<Variant>, String> {
    let operands = operands(shape);
    let native = shape.element == Element::F16 && caps.f16 && options.native_f16 != Some(false);
    let format = whole_format(shape, native);
    let shuffles = caps.subgroup_min_size.is_some_and(|size| size >= flash::ACROSS);
    let largest = flash::TILES.iter().map(|tile| tile.dims).max().expect("the table has rows");
    let dims = shape.value_dim.min(largest);
    let mut found: Vec<_> = flash::TILES
        .into_iter()
        .map(|tile| flash::Flash { tile, format, operands, carry: false })
        .filter(|x| {
            dims <= x.tile.dims
                && (shuffles || !x.tile.shuffle)
                && (shape.head_dim <= x.tile.dims || !x.tile.resident)
                && fits(caps, flash::ACROSS * flash::DOWN, x.workgroup_bytes())
        })
        .collect();
    let smallest = found.first().map(|x| x.tile.dims);
    found.retain(|x| Some(x.tile.dims) == smallest);
    if found.is_empty() {
        return Err("no tile fits the device's workgroup memory and invocations".into());
    }
    if let Some(why) = fused_obstacle(shape, caps, operands.buffers()) {
        return Err(why);
    }
    if options.native_f16 == Some(true) && shape.element == Element::F16 && !caps.f16 {
        return Err("the device has no shader f16".into());
    }
    Ok(found.into_iter().map(Variant::Flash).collect())
}

fn matrix(shape: &Shape, caps: &Caps, options: &Options) -> std::result::Result<Vec<Variant>, String> {
    let operands = operands(shape);
    let emulated = options.form == Some(Form::Emulated);
    let most = caps.subgroup_max_size;
    let why = if shape.element != Element::F16 {
        Some(format!("its operands are f16; {} would lose digits or range", shape.element))
    } else if !caps.f16 {
        Some("the device has no shader f16".into())
    } else if emulated {
        None
    } else if caps.matrices.is_empty() {
        Some("the device has no cooperative matrices of f16 with f32 sums, or its adapter is not known".into())
    } else if most.is_none_or(|most| most > matrix::MOST_LANES) {
        Some(format!("subgroups of at most {} lanes are needed", matrix::MOST_LANES))
    } else {
        None
    };
    if let Some(why) = why {
        return Err(why);
    }
    let vector = whole_format(shape, true).vector;
    let varying = caps.subgroup_size != Some(matrix::LANES);
    let has = |tile: &matrix::Tile| match emulated {
        true => matrix::emulates(tile) && (caps.matrices.is_empty() || caps.matrices.contains(&tile.size)),
        false => caps.matrices.contains(&tile.size),
    };
    let fitting: Vec<_> = matrix::tiles()
        .filter(|tile| has(tile) && (shape.head_dim <= tile.depth || !tile.resident))
        .map(|tile| matrix::Matrix { tile, varying, emulated, vector, operands })
        .filter(|x| fits(caps, x.threads(), x.workgroup_bytes()))
        .collect();
    // Tiles that hold the value dims, else those of the most: further dims are further workgroups.
    let most = fitting.iter().map(|x| x.tile.dims).max();
    let dims = fitting.iter().map(|x| x.tile.dims).filter(|dims| shape.value_dim <= *dims).min().or(most);
    let variants: Vec<_> = fitting.into_iter().filter(|x| Some(x.tile.dims) == dims).map(Variant::Matrix).collect();
    if variants.is_empty() {
        return Err("no tile fits the device's workgroup memory and invocations".into());
    }
    if let Some(why) = fused_obstacle(shape, caps, operands.buffers()) {
        return Err(why);
    }
    if options.native_f16 == Some(false) {
        return Err("it reads f16 with the adapter's own type".into());
    }
    Ok(variants)
}

/// The operands that `flash` and `matrix` bind beside q, k, v and out: no more than the problem has.
fn operands(shape: &Shape) -> Operands {
    let small_arrays = shape.weights
        || shape.lse
        || shape.sinks
        || shape.key_lengths
        || shape.packed.is_some()
        || shape.paged.is_some()
        || shape.causal == Causal::Offset;
    match (transforms(shape), small_arrays) {
        (true, _) => Operands::Full,
        (false, true) => Operands::Lists,
        (false, false) => Operands::Bare,
    }
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
    let [one, many] = LANE_ROWS;
    let [narrow, wide] = LANE_DIMS;
    let rows = if lines(shape) <= u64::from(lanes) { one } else { many };
    let dims = if dim <= narrow && format.vector { narrow } else { wide };
    tile(body, rows, dims)
}

pub(crate) fn scores_tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile(scores::lane_tile, body, shape, shape.head_dim, format));
    }
    let fits = |tile: &Tile| {
        let variant = scores::Scores { tile: *tile, format, full: false };
        fits(caps, variant.threads(), variant.workgroup_bytes())
    };
    largest(&scores::TILED, shape.seq_q, fits, "scores")
}

pub(crate) fn values_tile(shape: &Shape, caps: &Caps, body: Body, format: Format) -> Result<Tile> {
    if body != Body::Tiled {
        return Ok(lane_tile(values::lane_tile, body, shape, shape.value_dim, format));
    }
    let fits = |tile: &Tile| {
        let variant = values::Values { tile: *tile, format, out: Element::F32 };
        fits(caps, variant.threads(), variant.workgroup_bytes())
    };
    largest(&values::TILED, shape.seq_q, fits, "values")
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

/// Keys of one dispatch: all (1 where there are none), unless the keys or values of a single head exceed a binding.
pub(crate) fn key_step(shape: &Shape, caps: &Caps) -> Result<u32> {
    let keys = shape.seq_kv.max(1);
    if shape.packed.is_some() {
        return Ok(keys);
    }
    let bytes = shape.element.bytes();
    let room = caps.binding() - caps.alignment();
    if shape.paged.is_some() {
        // Any page may hold keys of any sequence, so that all of them are bound, of one head at least.
        let pool = |tensor: &Tensor| {
            if tensor.is_empty() {
                return 0;
            }
            let [pages, _, rows] = tensor.sizes;
            (tensor.at(pages - 1, 0, rows - 1) + u64::from(tensor.dim) - tensor.strides.offset) * bytes
        };
        let pools = [("k", pool(&shape.k)), ("v", pool(&shape.v))];
        return match pools.into_iter().find(|&(_, value)| value > room) {
            Some((field, size)) => {
                let advice = "use a pool of fewer pages, or one pool for each part of the key/value heads";
                Err(Error::Room { field, size, unit: "bytes", limit: room, advice })
            }
            None => Ok(keys),
        };
    }
    let mut step = u64::from(keys);
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
                return Err(Error::bytes(field, value, room));
            }
            step = step.min(whole);
        }
    }
    Ok(step as u32)
}
