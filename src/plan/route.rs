//! The kernels that compute a problem on a device, and the keys of each of their dispatches.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::obstacle::Obstacle;
use crate::contract::options::Options;
use crate::contract::problem::{Element, Logits};
use crate::contract::proof::Trial;
use crate::contract::shape::Shape;
use crate::contract::tensor::Tensor;
use crate::kernel::body::Body;
use crate::kernel::eligibility::{key_step, whole_vectors};
use crate::kernel::format::Format;
use crate::kernel::fused::{self, Fused, Walk};
use crate::kernel::scores::Scores;
use crate::kernel::scores_lanes::ScoresLanes;
use crate::kernel::softmax::Softmax;
use crate::kernel::values::{self, Values};
use crate::kernel::values_lanes::ValuesLanes;
use crate::kernel::{Variant, split};
use crate::plan::choose::{choose_fused, trials};
use crate::plan::measured::{Choice, Tuning};

/// How a problem is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Route {
    /// By a fused kernel in one pass over the keys.
    Fused {
        kernel: Variant,
        /// Keys of one dispatch.
        key_step: u32,
        /// Parts that `split` makes of the keys, whose results are merged; 0 where the kernel writes the output itself.
        partials: u32,
        /// What forms the weights, from scores of its own, if they are asked for.
        weights: Option<Weighing>,
        /// The rows of a part are a multiple of this.
        part_rows: u32,
    },
    /// By `scores`, `softmax` and `values`, with the score matrix in between.
    Staged {
        weights: Weighing,
        values: Variant,
        /// `values` writes f32, which is packed afterwards.
        unpacked: bool,
        /// Keys of one dispatch of `scores` and `values`.
        key_step: u32,
    },
}

/// The kernels that form the weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weighing {
    pub(crate) scores: Variant,
    /// The score transform is a pass of its own.
    pub(crate) separate: bool,
    pub(crate) softmax: Softmax,
}

impl Route {
    /// Chooses the kernels, and adds the reasons.
    pub(crate) fn new(
        shape: &Shape,
        caps: &Caps,
        options: &Options,
        tuning: &Tuning,
        reasons: &mut Vec<String>,
    ) -> Result<Route> {
        let walk = Walk { shape, caps, options, key_step: key_step(shape, caps)? };
        match choose_fused(&walk, tuning, reasons)? {
            Some(kernel) => Route::fused(kernel, &walk, reasons),
            None => Route::staged(&walk, reasons),
        }
    }

    fn fused(kernel: Variant, walk: &Walk<'_>, reasons: &mut Vec<String>) -> Result<Route> {
        let Walk { shape, caps, options, .. } = *walk;
        let fused = kernel.fused().expect("a fused kernel is chosen");
        let (key_step, partials) = match &kernel {
            // Its parts are shorter than what its loops take.
            Variant::Split(split) => (walk.key_step, split.partials(walk)),
            _ => (fused::loop_step(fused, shape, caps, walk.key_step), 0),
        };
        let (mut body, _) = Body::choose(caps, options);
        if shape.problem.weights {
            if !shape.problem.seq_kv.is_multiple_of(4) || (options.native_f16 == Some(true) && options.form.is_none()) {
                // The lane form writes whole vectors, also across the ends of rows, and reads f16 packed.
                body = Body::Tiled;
            }
            reasons.push(format!(
                "weights are formed in place, from scores: no score matrix beside them (scores in the form: {body})"
            ));
        }
        // The fused kernel has seen to its own format.
        let native = shape.problem.weights && choose_native(walk, body)?;
        let [qk, vo] = formats(shape, native, reasons);
        explain_key_step(key_step, shape, reasons);
        if partials > 0 {
            reasons.push(match partials {
                1 => "the keys of a row go to one workgroup, whose f32 result the merge rounds".into(),
                _ => format!("the keys of a row go to {partials} workgroups, whose results are merged"),
            });
        }
        if unpacks(fused, partials, shape) {
            check_unpacked(shape, reasons)?;
        }
        let scores = scores(walk, body, qk, false)?;
        let part_rows = tile_rows(&scores, shape).max(tile_rows(&values(walk, body, vo, Element::F32)?, shape));
        let weights = if shape.problem.weights { Some(Weighing::new(walk, body, qk, true, reasons)?) } else { None };
        Ok(Route::Fused { kernel, key_step, partials, weights, part_rows })
    }

    fn staged(walk: &Walk<'_>, reasons: &mut Vec<String>) -> Result<Route> {
        let Walk { shape, caps, options, .. } = *walk;
        let key_step = values::loop_step(shape, caps, walk.key_step);
        let (body, why) = Body::choose(caps, options);
        reasons.push(format!("scores and values in the form: {body} ({why})"));
        let native = choose_native(walk, body)?;
        let [qk, vo] = formats(shape, native, reasons);
        let weights = Weighing::new(walk, body, qk, false, reasons)?;
        explain_key_step(key_step, shape, reasons);
        let unpacked = shape.problem.element != Element::F32 && (!vo.vector || key_step < shape.problem.seq_kv);
        if unpacked {
            check_unpacked(shape, reasons)?;
        }
        let values = values(walk, body, vo, if unpacked { Element::F32 } else { shape.problem.element })?;
        Ok(Route::Staged { weights, values, unpacked, key_step })
    }

    /// The trials that tell whether the kernels compute a problem rightly.
    pub(crate) fn trials(&self, shape: &Shape, caps: &Caps, options: &Options) -> Result<Vec<Trial>> {
        let walk = Walk { shape, caps, options, key_step: key_step(shape, caps)? };
        let variant = match self {
            Route::Fused { kernel, .. } => Some(kernel),
            Route::Staged { .. } => None,
        };
        Ok(trials(self.choice().kernel(), variant, &walk))
    }

    pub(crate) fn choice(&self) -> Choice {
        match self {
            Route::Fused { kernel, .. } => Choice::of(kernel),
            Route::Staged { .. } => Choice::Unfused,
        }
    }

    /// Keys of one dispatch.
    pub(crate) fn key_step(&self) -> u32 {
        match *self {
            Route::Fused { key_step, .. } | Route::Staged { key_step, .. } => key_step,
        }
    }

    /// The fused kernel, if there is one.
    pub(crate) fn kernel(&self) -> Option<&dyn Fused> {
        match self {
            Route::Fused { kernel, .. } => kernel.fused(),
            Route::Staged { .. } => None,
        }
    }

    /// The kernel that multiplies the weights by the values, if it is one of its own.
    pub(crate) fn values(&self) -> Option<Variant> {
        match *self {
            Route::Fused { .. } => None,
            Route::Staged { values, .. } => Some(values),
        }
    }

    /// The results that are merged, 0 where there is nothing to merge.
    pub(crate) fn partials(&self) -> u32 {
        match *self {
            Route::Fused { partials, .. } => partials,
            Route::Staged { .. } => 0,
        }
    }

    /// Whether `out` is written in f32 and packed afterwards. `merge` sees to its output itself.
    pub(crate) fn unpacked(&self, shape: &Shape) -> bool {
        match self {
            Route::Fused { kernel, partials, .. } => {
                kernel.fused().is_some_and(|fused| unpacks(fused, *partials, shape))
            }
            Route::Staged { unpacked, .. } => *unpacked,
        }
    }

    /// Whether parts end where a group of query heads does: some kernels take the query heads of a key/value head together.
    pub(crate) fn takes_group(&self) -> bool {
        match *self {
            Route::Fused { kernel, weights, .. } => {
                kernel.takes_group() || weights.is_some_and(|weights| weights.scores.takes_group())
            }
            Route::Staged { weights, .. } => weights.scores.takes_group(),
        }
    }

    /// The rows of a part are a multiple of this.
    pub(crate) fn part_rows(&self, shape: &Shape) -> u32 {
        match self {
            Route::Fused { part_rows, .. } => *part_rows,
            Route::Staged { weights, values, .. } => tile_rows(&weights.scores, shape).max(tile_rows(values, shape)),
        }
    }

    /// Bytes of the partial outputs and of their maxima and sums.
    pub(crate) fn partial_bytes(&self, shape: &Shape) -> [u64; 2] {
        split::partial_bytes(shape, self.partials())
    }
}

impl Weighing {
    /// Weights in the scratch or, with `output`, in the caller's buffer.
    fn new(walk: &Walk<'_>, body: Body, format: Format, output: bool, reasons: &mut Vec<String>) -> Result<Weighing> {
        let Walk { shape, caps, .. } = *walk;
        let operands = shape.transforms() || shape.wants(Logits::Masked);
        let separate = operands && is_separate(shape, caps, body, reasons);
        let scores = scores(walk, body, format, operands && !separate)?;
        Ok(Weighing { scores, separate, softmax: Softmax::new(shape, caps, output) })
    }
}

/// The kernel that forms scores; `full`: with the whole score transform.
fn scores(walk: &Walk<'_>, body: Body, format: Format, full: bool) -> Result<Variant> {
    Ok(match body {
        Body::Tiled => Scores::new(walk.shape, walk.caps, format, full)?.into(),
        Body::Lanes(lanes) => ScoresLanes::new(walk.shape, lanes, format).into(),
    })
}

/// The kernel that multiplies weights by values.
fn values(walk: &Walk<'_>, body: Body, format: Format, out: Element) -> Result<Variant> {
    Ok(match body {
        Body::Tiled => Values::new(walk.shape, walk.caps, format, out)?.into(),
        Body::Lanes(lanes) => ValuesLanes::new(walk.shape, lanes, format, out).into(),
    })
}

/// Query rows of a workgroup of a kernel of attention.
pub(crate) fn tile_rows(variant: &Variant, shape: &Shape) -> u32 {
    variant.attention().map_or(1, |kernel| kernel.grid(shape, 1).tile_rows)
}

/// Whether a fused kernel leaves a 16-bit output to `pack`.
fn unpacks(kernel: &dyn Fused, partials: u32, shape: &Shape) -> bool {
    shape.problem.element != Element::F32 && partials == 0 && !kernel.writes_element()
}

fn check_unpacked(shape: &Shape, reasons: &mut Vec<String>) -> Result<()> {
    if !shape.out.is_dense() {
        return Err(Error::Conflict {
            left: "element",
            right: "out",
            why: "16-bit rows that are not whole vectors of four, or whose keys are split over dispatches, need a dense out",
        });
    }
    reasons.push("out is summed in an f32 scratch and packed to 16 bits afterwards".into());
    Ok(())
}

/// The formats of q and k, and of v and out.
fn formats(shape: &Shape, native: bool, reasons: &mut Vec<String>) -> [Format; 2] {
    let mut format = |what: &str, tensors: [&Tensor; 2]| {
        let vector = tensors.into_iter().all(whole_vectors);
        if !vector {
            reasons.push(format!("{what} has rows that are not whole vectors of four: elements are read one by one"));
        }
        Format { element: shape.problem.element, native, vector }
    };
    [format("q or k", [&shape.q, &shape.k]), format("v or out", [&shape.v, &shape.out])]
}

fn explain_key_step(key_step: u32, shape: &Shape, reasons: &mut Vec<String>) {
    if key_step < shape.problem.seq_kv {
        reasons.push(format!(
            "{key_step} keys a dispatch: those of one head exceed a binding, or what the loops of a CPU adapter take"
        ));
    }
}

/// Whether the score transform, which there is, is a pass of its own.
fn is_separate(shape: &Shape, caps: &Caps, body: Body, reasons: &mut Vec<String>) -> bool {
    let buffers = caps.limits.max_storage_buffers_per_shader_stage;
    let room = buffers >= 6 && caps.limits.max_bindings_per_bind_group >= 7;
    let early = shape.wants(Logits::Raw) || shape.wants(Logits::Capped);
    let why = if early {
        "because scores before it are asked for".into()
    } else if !room {
        format!("scores cannot bind q, k, scores, lists, mask and bias under {buffers} storage buffers")
    } else if body != Body::Tiled {
        "unrolled in the lane form it would compile for seconds".into()
    } else {
        return false;
    };
    let mark = if early { "," } else { ":" };
    reasons.push(format!("the score transform is a pass of its own{mark} {why}"));
    true
}

/// Whether `scores` and `values` read f16 with the adapter's own type.
fn choose_native(walk: &Walk<'_>, body: Body) -> Result<bool> {
    let is_f16 = walk.shape.problem.element == Element::F16;
    let possible = is_f16 && walk.caps.f16 && body == Body::Tiled;
    match walk.options.native_f16 {
        Some(true) if !possible && is_f16 => {
            let why = if walk.caps.f16 { Obstacle::LanesPackedF16 } else { Obstacle::NoF16 };
            Err(Error::Kernel { kernel: "native f16", why })
        }
        Some(false) => Ok(false),
        _ => Ok(possible),
    }
}
