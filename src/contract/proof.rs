//! What is known of a device's driver from trials: small problems whose results are stored with the crate.

pub(crate) mod problem;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::contract::options::{Form, Kernel, Options, Precision};
use crate::contract::problem::Element;
use crate::contract::shape::Shape;

/// What a problem has of a kernel beside the usual: each has shaders, or parts of them, of its own.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// None of the others.
    #[default]
    Usual,
    /// More keys than 4096: loops of tens of thousands of iterations, which some drivers end early.
    Long,
    /// The keys are walked in several dispatches, or by several workgroups whose results are merged.
    Several,
    /// Keys in pages.
    Paged,
    /// Packed sequences.
    Packed,
    /// Weights as an output.
    Weights,
    /// Logits as an output.
    Logits,
}

/// Most keys of a problem that needs no trial of [`Case::Long`]: no loop takes more than a few iterations a key.
const SHORT: u32 = 4096;

impl Case {
    /// Those of a problem that tell it from the usual one.
    pub(crate) fn of(shape: &Shape) -> impl Iterator<Item = Case> {
        let p = &shape.problem;
        let cases = [
            (Case::Paged, p.paged.is_some()),
            (Case::Packed, p.packed.is_some()),
            (Case::Weights, p.weights),
            (Case::Logits, p.logits.is_some()),
            (Case::Long, p.seq_kv > SHORT),
        ];
        cases.into_iter().filter_map(|(case, is)| is.then_some(case))
    }

    /// Whether a kernel has shaders for it.
    fn suits(self, kernel: Kernel) -> bool {
        match self {
            Case::Usual | Case::Long | Case::Weights => true,
            Case::Several => kernel != Kernel::Matrix,
            Case::Paged => kernel != Kernel::Unfused,
            Case::Packed => kernel != Kernel::Split,
            Case::Logits => kernel == Kernel::Unfused,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Case::Usual => "",
            Case::Long => ", many keys",
            Case::Several => ", keys in parts",
            Case::Paged => ", pages",
            Case::Packed => ", packed sequences",
            Case::Weights => ", weights",
            Case::Logits => ", logits",
        })
    }
}

/// A trial: a small problem for one kernel. Problems that differ in nothing but what is named here share their trial.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Trial {
    /// The kernel.
    pub kernel: Kernel,
    /// The form that [`Options`] ask for.
    pub form: Option<Form>,
    /// How [`Options`] ask for f16 to be read; `None` for the other element types.
    pub native_f16: Option<bool>,
    /// The precision that [`Options`] ask for; strict for what is always strict.
    #[serde(default)]
    pub precision: Precision,
    /// Type of q, k, v and out.
    pub element: Element,
    /// Whether the score transform is more than the scale and the key range, as in [`crate::tuning::Class`]. The trial then has a soft
    /// cap, ALiBi, a mask, a bias, key lengths, offsets, a window, sinks and lse, and none of these otherwise.
    pub operands: bool,
    /// The smallest of 32, 64, 128, 256 and 512 that holds head_dim and value_dim.
    pub dims: u32,
    /// What else the problem has.
    #[serde(default)]
    pub case: Case,
    /// The place of the tile in the kernel's table; `None` for the tile that the planner takes for the trial by itself.
    #[serde(default)]
    pub tile: Option<u32>,
}

impl Trial {
    /// The trial that tells whether a kernel computes a problem rightly, as far as it is a usual one.
    pub(crate) fn of(kernel: Kernel, shape: &Shape, options: &Options) -> Trial {
        let element = shape.problem.element;
        Trial {
            kernel,
            form: options.form,
            native_f16: options.native_f16.filter(|_| element == Element::F16),
            precision: if kernel == Kernel::Matrix { options.precision } else { Precision::Strict },
            element,
            operands: shape.transforms(),
            dims: shape.class_dims(),
            case: Case::Usual,
            tile: None,
        }
    }

    /// The same for another case. Whether a driver ends loops early does not depend on the problem: all of the kernel's share that trial.
    pub(crate) fn with(self, case: Case) -> Trial {
        match case {
            Case::Long => {
                let element = if self.kernel == Kernel::Matrix { Element::F16 } else { Element::F32 };
                Trial { native_f16: None, element, operands: false, dims: 32, case, tile: None, ..self }
            }
            _ => Trial { case, ..self },
        }
    }

    /// The trials of [`crate::Gpu::prove`]: every kernel with each element type, with and without operands, at 64 dims, and with f32
    /// (`matrix` with f16) at 32 and 128 dims and in each [`Case`].
    pub fn all() -> impl Iterator<Item = Trial> {
        let of = |kernel, element, operands, dims| Trial {
            kernel,
            form: None,
            native_f16: None,
            precision: Precision::Strict,
            element,
            operands,
            dims,
            case: Case::Usual,
            tile: None,
        };
        let usual = move |kernel| {
            let each = move |element| [false, true].map(move |operands| of(kernel, element, operands, 64));
            [Element::F32, Element::F16, Element::Bf16].into_iter().flat_map(each)
        };
        let others = move |kernel| {
            let element = if kernel == Kernel::Matrix { Element::F16 } else { Element::F32 };
            let cases = [Case::Long, Case::Several, Case::Paged, Case::Packed, Case::Weights, Case::Logits];
            let cases = cases.into_iter().filter(move |case| case.suits(kernel));
            let cases = cases.map(move |case| of(kernel, element, false, 64).with(case));
            [32, 128].map(|dims| of(kernel, element, false, dims)).into_iter().chain(cases)
        };
        Kernel::ALL.into_iter().flat_map(move |kernel| usual(kernel).chain(others(kernel)))
    }

    /// The options of the trial's own plan.
    pub(crate) fn options(&self) -> Options {
        let Trial { kernel, form, native_f16, precision, case, .. } = *self;
        let options = Options { kernel: Some(kernel), form, native_f16, precision, ..Options::default() };
        // `split` would share out the keys to so many workgroups that each has few; without room for their results it does not.
        let few = case == Case::Long && kernel == Kernel::Split;
        Options { scratch_budget: if few { 1024 } else { options.scratch_budget }, ..options }
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Trial { kernel, form, native_f16, precision, element, operands, dims, case, tile } = self;
        write!(f, "{kernel}")?;
        tile.map_or(Ok(()), |tile| write!(f, " tile {tile}"))?;
        form.map_or(Ok(()), |form| write!(f, " {form}"))?;
        native_f16.map_or(Ok(()), |native| f.write_str(if native { " native" } else { " packed" }))?;
        f.write_str(if *precision == Precision::Fast { " fast" } else { "" })?;
        write!(f, " {element}, {dims} dims{}{case}", if *operands { ", operands" } else { "" })
    }
}

/// A feature of a device that shaders use where it is there and do without where it is not.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// Loads of 64 bits.
    Int64,
    /// The adapter's own f16.
    F16,
    /// Subgroup operations.
    Subgroups,
}

impl Feature {
    pub(crate) const ALL: [Feature; 3] = [Feature::Int64, Feature::F16, Feature::Subgroups];

    /// Why plans do without it, after a trial failed.
    pub(crate) fn dropped(self) -> &'static str {
        match self {
            Feature::F16 => "not used, because it failed its proof on this driver",
            Feature::Int64 | Feature::Subgroups => "not used, because they failed their proof on this driver",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Feature::Int64 => "64-bit loads",
            Feature::F16 => "shader f16",
            Feature::Subgroups => "subgroup operations",
        })
    }
}

/// What a trial showed to be wrong. No plan for the device uses it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// A kernel, for the problems that share the trial.
    Kernel {
        /// The trial whose results were wrong.
        trial: Trial,
        /// What was wrong with them.
        why: String,
    },
    /// A feature: the results of the trial were wrong with it and right without it.
    Feature {
        /// The feature.
        feature: Feature,
        /// The trial.
        trial: Trial,
        /// What was wrong with its results.
        why: String,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Kernel { trial, why } => write!(f, "{trial}: {why}"),
            Failure::Feature { feature, trial, why } => write!(f, "{trial}, with {feature} alone: {why}"),
        }
    }
}

/// What is known of a device's driver from trials, see [`crate::Gpu::prove`]. It holds for one adapter, with one driver, and for one
/// version of this crate: whoever stores a proof stores these three with it.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// The trials whose results were right, with all features that plans may still use.
    pub right: Vec<Trial>,
    /// The trials that cannot run on the device, so that nothing is known: its limits are too low for them, or it lacks a feature.
    pub unable: Vec<Trial>,
    /// What was wrong.
    pub failures: Vec<Failure>,
}

impl Proof {
    /// Whether a trial need not run: its outcome is known.
    pub fn knows(&self, trial: &Trial) -> bool {
        let failed = |failure: &Failure| matches!(failure, Failure::Kernel { trial: of, .. } if of == trial);
        self.right.contains(trial) || self.unable.contains(trial) || self.failures.iter().any(failed)
    }

    /// Notes how a trial ended that began when there were so many failures. Where a trial at the same time noted another failure, it ran
    /// other shaders than plans use by now, and is worth nothing.
    pub(crate) fn note(&mut self, trial: Trial, ended: Ended, failures: usize) {
        if self.failures.len() != failures || self.knows(&trial) {
            return;
        }
        match ended {
            Ended::Right => self.right.push(trial),
            Ended::Unable => self.unable.push(trial),
            Ended::Wrong { why, feature: None } => self.failures.push(Failure::Kernel { trial, why }),
            Ended::Wrong { why, feature: Some(feature) } => {
                // What is known of the other trials holds for shaders that use the feature.
                self.right.clear();
                self.unable.clear();
                self.failures.push(Failure::Feature { feature, trial, why });
            }
        }
    }
}

/// How a trial ended.
pub(crate) enum Ended {
    /// Its results were right.
    Right,
    /// It cannot run on the device.
    Unable,
    /// Its results were wrong, and right without a feature, if there is one.
    Wrong { why: String, feature: Option<Feature> },
}
