//! One case: calls to make, and their expected results.

use wgpu_attention::multihead::{Call as LayerCall, Layer, LayerInputs};
use wgpu_attention::operations::{Append, Rotation};
use wgpu_attention::{Element, Operands, Outputs, Problem, with};

use super::minilm::Projection;
use crate::difference::{self, Difference, Rule};
use crate::floats::{self, Floats};
use crate::operands::{Array, OwnedInputs, slices};

/// One case of a suite. It passes when all expectations of all its calls hold.
#[derive(Debug)]
pub struct Case {
    pub name: String,
    pub calls: Vec<Call>,
    /// Contents of the file that are not compared.
    pub notes: Vec<&'static str>,
}

/// One call of the library.
#[derive(Debug)]
pub struct Call {
    /// Distinguishes the calls of a case; empty if there is only one.
    pub label: &'static str,
    pub work: Work,
    pub expectations: Vec<Expectation>,
}

/// What a call runs.
#[derive(Debug)]
pub enum Work {
    Attention {
        problem: Box<Problem>,
        operands: Box<OwnedInputs>,
    },
    Layer(Box<LayerWork>),
    Rotation(Box<RotationWork>),
    Append(Box<AppendWork>),
    /// A score matrix that is given as the bias. It runs on the three kernels, because only they have a score matrix.
    Scores {
        problem: Box<Problem>,
        operands: Box<OwnedInputs>,
    },
}

/// A whole layer on its inputs.
#[derive(Debug)]
pub struct LayerWork {
    pub layer: Layer,
    pub problem: Problem,
    pub operands: Operands<Array>,
    pub call: LayerCall,
    pub query: Vec<f32>,
    pub key: Option<Vec<f32>>,
    pub value: Option<Vec<f32>>,
}

impl LayerWork {
    pub fn inputs(&self) -> LayerInputs<'_> {
        with!(LayerInputs::new(&self.query), key: self.key.as_deref(), value: self.value.as_deref(), operands: slices(&self.operands))
    }
}

/// A rotary embedding, in place.
#[derive(Debug)]
pub struct RotationWork {
    pub rotation: Rotation,
    pub x: Floats,
    pub table: Vec<f32>,
    pub positions: Vec<u32>,
}

/// New rows for a cache.
#[derive(Debug)]
pub struct AppendWork {
    pub append: Append,
    pub x: Floats,
    pub cache: Floats,
    pub starts: Vec<u32>,
}

/// Where the value to compare comes from.
#[derive(Debug)]
pub enum Quantity {
    Out,
    Lse,
    Weights,
    Logits,
    /// Computed on the host while loading.
    Host(Vec<f32>),
    /// `out`, after the rest of the attention layer was applied to it on the host.
    Projected(Projection),
}

/// One expected tensor.
#[derive(Debug)]
pub struct Expectation {
    /// The tensor's name in the file.
    pub name: String,
    pub quantity: Quantity,
    pub want: Vec<f32>,
    pub rule: Rule,
    /// The type to which results are rounded once before they are compared.
    pub element: Element,
    /// Rows to compare, if not all.
    pub rows: Option<Rows>,
}

/// A selection of rows of `width` elements.
#[derive(Debug)]
pub struct Rows {
    pub keep: Vec<bool>,
    pub width: usize,
}

/// The outcome of one comparison.
#[derive(Debug)]
pub struct Verdict {
    /// The names of the call and the tensor.
    pub name: String,
    pub difference: Difference,
}

impl Expectation {
    /// An expectation in f32, on all rows.
    pub fn new(name: &str, quantity: Quantity, want: Vec<f32>, rule: Rule) -> Self {
        Expectation { name: name.into(), quantity, want, rule, element: Element::F32, rows: None }
    }

    fn verdict(&self, label: &str, outputs: &Outputs) -> Verdict {
        let asked = "the loader asks for each output that it compares";
        let projected;
        let got = match &self.quantity {
            Quantity::Out => &outputs.out,
            Quantity::Lse => outputs.lse.as_ref().expect(asked),
            Quantity::Weights => outputs.weights.as_ref().expect(asked),
            Quantity::Logits => outputs.logits.as_ref().expect(asked),
            Quantity::Host(values) => values,
            Quantity::Projected(projection) => {
                projected = projection.apply(&outputs.out);
                &projected
            }
        };
        let rounded: Vec<f32> = got.iter().map(|&x| floats::round(x, self.element)).collect();
        let keep = |index: usize| self.rows.as_ref().is_none_or(|rows| rows.keep[index / rows.width]);
        let difference = difference::compare(&rounded, &self.want, self.rule, keep);
        let name = if label.is_empty() { self.name.clone() } else { format!("{} ({label})", self.name) };
        Verdict { name, difference }
    }
}

impl Call {
    /// Checks the problem and its operands as the library will.
    pub fn check(&self) -> wgpu_attention::Result<()> {
        match &self.work {
            Work::Attention { problem, operands } | Work::Scores { problem, operands } => {
                problem.check()?.check_inputs(&operands.inputs())
            }
            Work::Layer(work) => work.problem.check().map(|_| ()),
            Work::Rotation(work) => work.rotation.check(),
            Work::Append(work) => work.append.check(),
        }
    }

    /// Compares the outputs with what is expected.
    pub fn verdicts(&self, outputs: &Outputs) -> Vec<Verdict> {
        self.expectations.iter().map(|expectation| expectation.verdict(self.label, outputs)).collect()
    }
}
