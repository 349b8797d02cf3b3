//! Which kernel runs a problem on a device, and why not another.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::obstacle::Obstacle;
use crate::contract::options::{Form, Kernel, Options};
use crate::contract::proof::{Failure, Trial};
use crate::contract::shape::Shape;
use crate::kernel::Variant;
use crate::kernel::eligibility::{group_rows, key_step};
use crate::kernel::fused::{Fused, Walk};
use crate::kernel::lanes::Lanes;
use crate::plan::measured::{Choice, Class, Tuning};

/// The fused kernels in the order in which the planner prefers them.
const FUSED: [Kernel; 4] = [Kernel::Rows, Kernel::Split, Kernel::Matrix, Kernel::Flash];

/// Most rows for which `split` is preferred on a GPU, all query heads of a key/value head together: a tile of `flash` would be
/// mostly empty.
const SPLIT_ROWS: u32 = 16;

/// A kernel, its variant if it is fused, and why it was chosen.
struct Chosen {
    kernel: Kernel,
    variant: Option<Variant>,
    why: String,
}

/// The fused kernel that is asked for, that a tuned row names, or that can run and is expected to be faster; `None` for `scores`,
/// `softmax` and `values`. Gives a reason for every kernel.
pub(crate) fn choose_fused(walk: &Walk<'_>, tuning: &Tuning, reasons: &mut Vec<String>) -> Result<Option<Variant>> {
    let options = walk.options;
    if options.form == Some(Form::Emulated) && options.kernel != Some(Kernel::Matrix) {
        return Err(refused(options.kernel.unwrap_or(Kernel::Unfused), Obstacle::NotEmulated));
    }
    for failure in &walk.caps.failures {
        if let Failure::Feature { feature, trial, why } = failure {
            reasons
                .push(format!("{feature}: not used, because they failed their proof on this driver ({trial}: {why})"));
        }
    }
    let tuned = tuned(walk, tuning, reasons);
    let is_tuned = tuned.is_some();
    let chosen = match (tuned, options.kernel) {
        (Some(tuned), _) => tuned,
        (None, Some(kernel)) => {
            let variants = variants(kernel, walk).map_err(|why| refused(kernel, why))?;
            Chosen { kernel, variant: variants.first().copied(), why: "as asked".into() }
        }
        (None, None) if options.form.is_some() => {
            let kernel = Kernel::Unfused;
            variants(kernel, walk).map_err(|why| refused(kernel, why))?;
            Chosen { kernel, variant: None, why: "a form is asked for, which it alone has".into() }
        }
        (None, None) => fastest(walk)?,
    };
    reasons.push(format!("kernel {}: {}", chosen.kernel.name(), chosen.why));
    for kernel in Kernel::ALL.into_iter().filter(|&kernel| kernel != chosen.kernel) {
        reasons.push(format!("not kernel {}: {}", kernel.name(), against(kernel, chosen.kernel, is_tuned, walk)));
    }
    Ok(chosen.variant)
}

/// The first kernel that can run and is not expected to be slower than another one.
fn fastest(walk: &Walk<'_>) -> Result<Chosen> {
    let mut able = Vec::new();
    let mut fused = Vec::new();
    for kernel in FUSED {
        match variants(kernel, walk) {
            Ok(variants) => able.push((kernel, variants.first().copied())),
            Err(why) => fused.push((kernel, why)),
        }
    }
    let fast = able.iter().find(|&&(kernel, _)| slower(kernel, walk).is_none());
    let chosen = |kernel, variant, why| Ok(Chosen { kernel, variant, why });
    match (fast, variants(Kernel::Unfused, walk), able.last()) {
        (Some(&(kernel, variant)), ..) => chosen(kernel, variant, "one pass over the keys, no score matrix".into()),
        (None, Ok(_), _) => {
            let why = "it runs on every device, and every problem but one whose keys are in pages";
            chosen(Kernel::Unfused, None, why.into())
        }
        (None, Err(why), Some(&(kernel, variant))) => chosen(kernel, variant, format!("unfused cannot run it: {why}")),
        (None, Err(why), None) => Err(refused(Kernel::Unfused, Obstacle::Every { unfused: Box::new(why), fused })),
    }
}

fn refused(kernel: Kernel, why: Obstacle) -> Error {
    Error::Kernel { kernel: kernel.name(), why }
}

/// Why a kernel was not chosen.
fn against(kernel: Kernel, chosen: Kernel, is_tuned: bool, walk: &Walk<'_>) -> String {
    let chosen = chosen.name();
    match (variants(kernel, walk), slower(kernel, walk)) {
        _ if walk.options.kernel.is_some() => format!("{chosen} is asked for"),
        _ if walk.options.form.is_some() => "a form of scores and values is asked for".into(),
        (Err(why), _) => why.to_string(),
        _ if is_tuned => format!("a tuned row prefers {chosen}"),
        (Ok(_), Some(why)) => why.into(),
        (Ok(_), None) if kernel == Kernel::Unfused => "the scores would pass through memory".into(),
        (Ok(_), None) => format!("{chosen} is expected to be faster"),
    }
}

/// Why a kernel that can run is expected to be slower than another one.
fn slower(kernel: Kernel, walk: &Walk<'_>) -> Option<&'static str> {
    let Walk { shape, caps, options, .. } = *walk;
    let more_queries_than_lanes = || shape.problem.seq_q > Lanes::of(caps).lanes;
    // On a GPU scores that are formed again for the weights cost less than a score matrix that goes through the scratch in parts. On a
    // CPU adapter the second product costs more than the softmax saves.
    let scores_again = !caps.cpu && 4 * shape.scores_len() > options.scratch_budget;
    match kernel {
        Kernel::Rows | Kernel::Flash | Kernel::Matrix if shape.problem.weights && !scores_again => {
            Some("for the weights the scores would be formed twice")
        }
        Kernel::Rows if !caps.cpu => Some("a GPU: a row per lane keeps too few lanes busy"),
        Kernel::Rows if caps.takes_minutes(kernel) => Some("a driver of four lanes takes minutes to compile it"),
        Kernel::Rows if !more_queries_than_lanes() => Some("so few queries leave its lanes idle"),
        Kernel::Split if caps.cpu && more_queries_than_lanes() => {
            Some("so many queries would read the keys again and again")
        }
        Kernel::Split if !caps.cpu && group_rows(shape) > SPLIT_ROWS.into() => {
            Some("so many rows fill the tiles of flash")
        }
        // Emulated matrices show that the shader is right, but not that a driver compiles cooperative matrices rightly. `tune` checks the
        // results of the kernel before it stores it.
        Kernel::Matrix => Some("no graphics card is known to run it rightly: a tuned row takes it, or who asks for it"),
        Kernel::Flash if caps.cpu => Some("a CPU adapter: workgroup memory and barriers are its slowest parts"),
        _ => None,
    }
}

/// The variants of a kernel that can run, the best one first, or why none can. `scores`, `softmax` and `values` are chosen one by one
/// and have none here.
fn variants(kernel: Kernel, walk: &Walk<'_>) -> Result<Vec<Variant>, Obstacle> {
    fn of<K: Fused>(walk: &Walk<'_>, variant: fn(K) -> Variant) -> Result<Vec<Variant>, Obstacle> {
        Ok(walk.variants()?.into_iter().map(variant).collect())
    }
    if let Some(why) = walk.caps.failed(&Trial::of(kernel, walk.shape, walk.options)) {
        return Err(Obstacle::Unproved { why: why.into() });
    }
    match kernel {
        Kernel::Unfused if walk.shape.problem.paged.is_some() => Err(Obstacle::Pages),
        Kernel::Unfused => Ok(Vec::new()),
        Kernel::Rows => of(walk, Variant::Rows),
        Kernel::Split => of(walk, Variant::Split),
        Kernel::Flash => of(walk, Variant::Flash),
        Kernel::Matrix => of(walk, Variant::Matrix),
    }
}

/// The first tuned row that fits the problem and what is asked for; with the reasons for and against each.
fn tuned(walk: &Walk<'_>, tuning: &Tuning, reasons: &mut Vec<String>) -> Option<Chosen> {
    let class = Class::of(walk.shape);
    let mut rows = tuning.rows.iter().filter(|row| row.class == class).peekable();
    if rows.peek().is_none() && !tuning.rows.is_empty() {
        reasons.push(format!("no tuned row of {} is for problems of this class", tuning.source));
    }
    rows.find_map(|row| match tuned_variant(&row.choice, walk) {
        Ok(variant) => {
            let why = format!("measured fastest in its class, {:.3} ms (tuned rows of {})", row.ms, tuning.source);
            Some(Chosen { kernel: row.choice.kernel(), variant, why })
        }
        Err(why) => {
            reasons.push(format!("the tuned row for {} is passed over: {why}", row.choice.kernel().name()));
            None
        }
    })
}

/// The variant that a tuned row names, or why it cannot be followed.
fn tuned_variant(choice: &Choice, walk: &Walk<'_>) -> Result<Option<Variant>, String> {
    let kernel = choice.kernel();
    match (walk.options.kernel, walk.options.form) {
        (Some(forced), _) if forced != kernel => return Err(format!("kernel {} is asked for", forced.name())),
        (None, Some(_)) => return Err("a form of scores and values is asked for".into()),
        _ if !choice.exists() => return Err("there is no such tile".into()),
        _ => {}
    }
    let variants = variants(kernel, walk).map_err(|why| why.to_string())?;
    if kernel == Kernel::Unfused {
        return Ok(None);
    }
    let variant = variants.into_iter().find(|variant| Choice::of(variant) == *choice);
    variant.map(Some).ok_or_else(|| "its tile does not suit this device and these dims".into())
}

impl Tuning {
    /// The choices to measure for a problem on a device: every kernel and tile for its dimensions that can run, except those that a
    /// driver takes minutes to compile. The planner's own choice comes first.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] if no kernel can run the problem on the device, and [`Error::Device`] or [`Error::Room`] as
    /// [`crate::Plan::new`] has them.
    pub fn candidates(shape: &Shape, caps: &Caps) -> Result<Vec<Choice>> {
        caps.check()?;
        let walk = Walk { shape, caps, options: &Options::default(), key_step: key_step(shape, caps)? };
        let own = choose_fused(&walk, &Tuning::default(), &mut Vec::new())?;
        let mut choices = vec![own.as_ref().map_or(Choice::Unfused, Choice::of)];
        for kernel in Kernel::ALL.into_iter().filter(|&kernel| !caps.takes_minutes(kernel)) {
            // A kernel that cannot run is no candidate.
            choices.extend(variants(kernel, &walk).unwrap_or_default().iter().map(Choice::of));
        }
        if shape.problem.paged.is_none() {
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
}
