//! Which kernel runs a problem on a device, and why not another.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::obstacle::Obstacle;
use crate::contract::options::{Form, Kernel, Options};
use crate::contract::problem::Element;
use crate::contract::proof::{Case, Failure, Trial};
use crate::contract::shape::Shape;
use crate::kernel::Variant;
use crate::kernel::eligibility::key_step;
use crate::kernel::fused::{Fused, Walk, whole_format};
use crate::kernel::lanes::Lanes;
use crate::kernel::scores::Scores;
use crate::kernel::softmax::Softmax;
use crate::kernel::values::{self, Values};
use crate::plan::measured::{Choice, Class, Tuning};
use crate::plan::model::Unit;

/// The fused kernels in the order in which the planner prefers them, on a GPU where the [model](Unit) finds them equal.
const FUSED: [Kernel; 4] = [Kernel::Rows, Kernel::Split, Kernel::Matrix, Kernel::Flash];

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
            reasons.push(format!("{feature}: {} ({trial}: {why})", feature.dropped()));
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
        reasons.push(format!("not kernel {}: {}", kernel.name(), against(kernel, &chosen, is_tuned, walk)));
    }
    Ok(chosen.variant)
}

/// On a CPU adapter the first kernel that can run and is not expected to be slower than another one; on a GPU the one that the
/// [model](Unit) expects to be fastest.
fn fastest(walk: &Walk<'_>) -> Result<Chosen> {
    let mut able = Vec::new();
    let mut fused = Vec::new();
    for kernel in FUSED {
        match variants(kernel, walk) {
            Ok(variants) => able.push((kernel, variants.first().copied())),
            Err(why) => fused.push((kernel, why)),
        }
    }
    let unfused = variants(Kernel::Unfused, walk);
    let mut fast: Vec<_> = able.iter().copied().filter(|&(kernel, _)| slower(kernel, walk).is_none()).collect();
    if !walk.caps.cpu {
        if unfused.is_ok() && slower(Kernel::Unfused, walk).is_none() {
            fast.push((Kernel::Unfused, None));
        }
        let clocks = |&(_, variant): &(Kernel, Option<Variant>)| clocks(variant, walk);
        fast = fast.into_iter().min_by(|one, other| clocks(one).total_cmp(&clocks(other))).into_iter().collect();
    }
    let chosen = |kernel, variant, why| Ok(Chosen { kernel, variant, why });
    match (fast.first(), unfused, able.last()) {
        (Some(&(Kernel::Unfused, _)), ..) => {
            chosen(Kernel::Unfused, None, "products of tiles of a score matrix".into())
        }
        (Some(&(kernel, variant)), ..) => chosen(kernel, variant, "one pass over the keys, no score matrix".into()),
        (None, Ok(_), _) => {
            let why = "it runs on every device, and every problem but one whose keys are in pages";
            chosen(Kernel::Unfused, None, why.into())
        }
        (None, Err(why), Some(&(kernel, variant))) => chosen(kernel, variant, format!("unfused cannot run it: {why}")),
        (None, Err(why), None) => Err(refused(Kernel::Unfused, Obstacle::Every { unfused: Box::new(why), fused })),
    }
}

/// Clocks of a unit of the GPU that are expected for each pair of a query row and a key, by a fused kernel, or without one by `scores`,
/// `softmax` and `values`. Weights that are asked for take the first two of these after a fused kernel.
fn clocks(fused: Option<Variant>, walk: &Walk<'_>) -> f64 {
    let Walk { shape, caps, .. } = *walk;
    let format = whole_format(shape, false);
    let known = "their smallest tiles fit every device";
    let mut kernels: Vec<Variant> = fused.into_iter().collect();
    if fused.is_none() || shape.problem.weights {
        kernels.push(Scores::new(shape, caps, format, false).expect(known).into());
        kernels.push(Softmax::new(shape, caps, false).into());
    }
    if fused.is_none() {
        kernels.push(Values::new(shape, caps, format, Element::F32).expect(known).into());
    }
    Unit::of(caps).of_pair(&kernels, shape)
}

fn refused(kernel: Kernel, why: Obstacle) -> Error {
    Error::Kernel { kernel: kernel.name(), why }
}

/// Why a kernel was not chosen.
fn against(kernel: Kernel, chosen: &Chosen, is_tuned: bool, walk: &Walk<'_>) -> String {
    let name = chosen.kernel.name();
    match (variants(kernel, walk), slower(kernel, walk)) {
        _ if walk.options.kernel.is_some() => format!("{name} is asked for"),
        _ if walk.options.form.is_some() => "a form of scores and values is asked for".into(),
        (Err(why), _) => why.to_string(),
        _ if is_tuned => format!("a tuned row prefers {name}"),
        (Ok(_), Some(why)) => why.into(),
        (Ok(variants), None) if !walk.caps.cpu => {
            let [own, of_chosen] = [variants.first().copied(), chosen.variant].map(|variant| clocks(variant, walk));
            format!(
                "{own:.2} clocks of a unit are expected for each pair of a query and a key, and {of_chosen:.2} of {name}"
            )
        }
        (Ok(_), None) if kernel == Kernel::Unfused => "the scores would pass through memory".into(),
        (Ok(_), None) => format!("{name} is expected to be faster"),
    }
}

/// Why a kernel that can run is expected to be slower than another one, whatever the model of a GPU says.
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
        Kernel::Unfused if shape.problem.weights && scores_again => {
            Some("the scores would pass through memory in parts")
        }
        Kernel::Rows if !caps.cpu => Some("a GPU: a row per lane keeps too few lanes busy"),
        Kernel::Rows if caps.takes_minutes(kernel) => Some("a driver of four lanes takes minutes to compile it"),
        Kernel::Rows if !more_queries_than_lanes() => Some("so few queries leave its lanes idle"),
        Kernel::Split if caps.cpu && more_queries_than_lanes() => {
            Some("so many queries would read the keys again and again")
        }
        Kernel::Matrix if caps.cpu => Some("a CPU adapter: its matrices are plain arithmetic"),
        Kernel::Matrix if !Unit::of(caps).has_fast_matrices() => Some("matrices of this size are plain arithmetic"),
        Kernel::Matrix if !proved(kernel, walk) => {
            Some("no trial has proved it on this driver: a tuned row takes it, or who asks for it")
        }
        Kernel::Flash if caps.cpu => Some("a CPU adapter: workgroup memory and barriers are its slowest parts"),
        _ => None,
    }
}

/// Whether all trials of a kernel's best variant have passed.
fn proved(kernel: Kernel, walk: &Walk<'_>) -> bool {
    let variants = variants(kernel, walk).unwrap_or_default();
    trials(kernel, variants.first(), walk).iter().all(|trial| walk.caps.proved.contains(trial))
}

/// The variants of a kernel that can run and did not fail, the best one first, or why there are none. `scores`, `softmax` and `values` are
/// chosen one by one and have none here.
fn variants(kernel: Kernel, walk: &Walk<'_>) -> Result<Vec<Variant>, Obstacle> {
    let mut found = able(kernel, walk)?;
    if walk.caps.failures.is_empty() {
        return Ok(found);
    }
    let failed = |variant: Option<&Variant>| {
        let trials = trials(kernel, variant, walk).into_iter();
        // What is wrong with the planner's own tile is wrong with the kernel.
        trials.flat_map(|trial| [trial, Trial { tile: None, ..trial }]).find_map(|trial| walk.caps.failed(&trial))
    };
    let first = failed(found.first());
    found.retain(|variant| failed(Some(variant)).is_none());
    match first {
        Some(why) if found.is_empty() => Err(Obstacle::Unproved { why: why.into() }),
        _ => Ok(found),
    }
}

/// The variants of a kernel that can run, whatever trials showed of them.
fn able(kernel: Kernel, walk: &Walk<'_>) -> Result<Vec<Variant>, Obstacle> {
    fn of<K: Fused>(walk: &Walk<'_>, variant: fn(K) -> Variant) -> Result<Vec<Variant>, Obstacle> {
        Ok(walk.variants()?.into_iter().map(variant).collect())
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

/// The place in the kernel's table of a tile that is not the one that the planner takes for the trial by itself.
fn other_tile(variant: &Variant, trial: &Trial, caps: &Caps) -> Option<u32> {
    let (shape, options) = (trial.problem().check().ok()?, trial.options());
    let walk = Walk { shape: &shape, caps, options: &options, key_step: key_step(&shape, caps).ok()? };
    let own = able(trial.kernel, &walk).ok()?.first().map(Choice::of);
    let choice = Choice::of(variant);
    (own != Some(choice)).then(|| choice.number()).flatten()
}

/// The trials that tell whether a kernel, in this variant if it is fused, computes a problem rightly.
pub(crate) fn trials(kernel: Kernel, variant: Option<&Variant>, walk: &Walk<'_>) -> Vec<Trial> {
    let Walk { shape, caps, options, key_step } = *walk;
    let several = match variant {
        Some(Variant::Rows(rows)) => rows.carry,
        Some(Variant::Flash(flash)) => flash.carry,
        Some(Variant::Split(split)) => split.partials(walk) > 1,
        _ => kernel == Kernel::Unfused && values::loop_step(shape, caps, key_step) < shape.problem.seq_kv,
    };
    let usual = Trial::of(kernel, shape, options);
    let usual = Trial { tile: variant.and_then(|variant| other_tile(variant, &usual, caps)), ..usual };
    let mut trials: Vec<_> =
        Case::of(shape).chain(several.then_some(Case::Several)).map(|case| usual.with(case)).collect();
    // Each of the others shows what a usual one does, but for long loops.
    if trials.iter().all(|trial| trial.case == Case::Long) {
        trials.insert(0, usual);
    }
    trials
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
