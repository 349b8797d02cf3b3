//! One case: calls to make, and their expected results.

use wgpu_attention::multihead::{Call as LayerCall, Layer, LayerInputs};
use wgpu_attention::operations::{Append, Rotation};
use wgpu_attention::reference::budget;
use wgpu_attention::{Element, Operands, Outputs, Precision, Problem, with};

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

    fn verdict(&self, label: &str, outputs: &Outputs, rounding: &[f64]) -> Verdict {
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
        let rounding = if matches!(self.quantity, Quantity::Out) { rounding } else { &[] };
        let rule =
            |index: usize| Rule { atol: self.rule.atol + rounding.get(index).unwrap_or(&0.0), rtol: self.rule.rtol };
        let difference = difference::compare(&rounded, &self.want, rule, keep);
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

    /// How far each element of `out` may be off beyond its rule at this precision; empty where that is nothing.
    pub fn rounding(&self, precision: Precision) -> wgpu_attention::Result<Vec<f64>> {
        match &self.work {
            Work::Attention { problem, operands }
                if precision == Precision::Fast && problem.element == Element::F16 =>
            {
                let (tensor, fast) = (*problem.check()?.out(), budget(problem, &operands.inputs())?.fast);
                let mut rounding = vec![0.0; tensor.extent() as usize];
                let [_, heads, rows] = tensor.sizes.map(u64::from);
                for (n, fast) in (0..).zip(fast) {
                    let [batch, head, row] = [n / (heads * rows), n / rows % heads, n % rows].map(|n| n as u32);
                    rounding[tensor.at(batch, head, row) as usize..][..tensor.dim as usize].fill(fast);
                }
                Ok(rounding)
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Compares the outputs with what is expected, where each element of `out` may be off by its `rounding` beyond the rule.
    pub fn verdicts(&self, outputs: &Outputs, rounding: &[f64]) -> Vec<Verdict> {
        self.expectations.iter().map(|expectation| expectation.verdict(self.label, outputs, rounding)).collect()
    }
}

#[cfg(test)]
mod tests {
    use wgpu_attention::Layout;

    use super::*;
    use crate::sample::Sample;

    #[test]
    fn rounded_weights_widen_the_rule_of_each_row_of_out() {
        let problem = with!(Problem::new(1, 2, 3, 5, 4).with_layout(Layout::Bshd), element: Element::F16);
        let operands = Sample(1).operands(&problem.clone().into()).unwrap();
        let fast = budget(&problem, &operands.inputs()).unwrap().fast;
        let expectations = vec![Expectation::new("out", Quantity::Out, vec![0.0; 24], Rule::default())];
        let work = Work::Attention { problem: problem.into(), operands: operands.into() };
        let call = Call { label: "", work, expectations };
        assert!(call.rounding(Precision::Strict).unwrap().is_empty());
        let rounding = call.rounding(Precision::Fast).unwrap();
        for (n, x) in rounding.iter().enumerate() {
            let (row, head) = (n / 8, n / 4 % 2);
            assert_eq!(*x, fast[head * 3 + row]);
        }
        let outputs = |factor| Outputs::new(rounding.iter().map(|x| (factor * x) as f32).collect());
        let passes = |outputs: Outputs, rounding: &[f64]| call.verdicts(&outputs, rounding)[0].difference.passes();
        assert!(passes(outputs(0.99), &rounding) && !passes(outputs(1.01), &rounding) && !passes(outputs(0.99), &[]));
    }
}
