//! The outcome of a comparison with the reference.

use std::fmt;

use super::budget::Tolerance;

/// The comparison of one tensor with the reference.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Elements compared.
    pub count: usize,
    /// Elements beyond their tolerance.
    pub failures: usize,
    /// Largest absolute error; infinite where only one side is finite.
    pub max_error: f64,
    /// Largest ratio of an error to what is allowed: up to 1 is within.
    pub worst_ratio: f64,
    /// The element with that ratio; `None` if every element is equal.
    pub worst: Option<Worst>,
}

/// The element of a tensor that uses most of its tolerance.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    /// Its index in the tensor.
    pub index: usize,
    /// What it is.
    pub got: f64,
    /// What the reference has there.
    pub want: f64,
    /// How far the two may be apart.
    pub allowed: f64,
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "element {} is {:e}, not {:e} ± {:.1e}", self.index, self.got, self.want, self.allowed)
    }
}

impl Comparison {
    /// Whether every element is within its tolerance.
    pub fn passed(&self) -> bool {
        self.failures == 0
    }

    /// Adds an element. NaN equals NaN and an infinity equals itself.
    pub(super) fn add(&mut self, index: usize, got: f64, want: f64, allowed: f64) {
        if allowed == Tolerance::NOT_JUDGED {
            return;
        }
        let equal = got == want || (got.is_nan() && want.is_nan());
        self.add_unless(equal, index, got, want, allowed);
    }

    /// Adds an element of which the caller knows whether it is what it should be.
    pub(super) fn add_unless(&mut self, equal: bool, index: usize, got: f64, want: f64, allowed: f64) {
        self.count += 1;
        if equal {
            return;
        }
        let finite = got.is_finite() && want.is_finite();
        let error = if finite { (got - want).abs() } else { f64::INFINITY };
        // An allowance of 0 or NaN lets nothing pass that is not equal.
        let ratio = if finite && allowed > 0.0 { error / allowed } else { f64::INFINITY };
        self.failures += usize::from(ratio > 1.0);
        self.max_error = self.max_error.max(error);
        if self.worst.is_none() || ratio > self.worst_ratio {
            (self.worst_ratio, self.worst) = (ratio, Some(Worst { index, got, want, allowed }));
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "max error {:.2e}, {:.3} of the tolerance", self.max_error, self.worst_ratio)?;
        if let (false, Some(worst)) = (self.passed(), self.worst) {
            write!(f, "; {} of {} beyond it, the worst: {worst}", self.failures, self.count)?;
        }
        Ok(())
    }
}

/// The comparison of one output of a call with the reference.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutputComparison {
    /// The output's name: that of its field in [`crate::Outputs`], or `cache`.
    pub name: &'static str,
    /// The comparison within the error budget. Beyond it the output is wrong.
    pub budget: Comparison,
    /// The comparison within the regression limit, for outputs that have one. Beyond it digits were lost.
    pub limit: Option<Comparison>,
}

/// The comparison of every output of a call with the reference. It prints as a table with a line for each output.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparisons {
    /// One comparison for each output.
    pub outputs: Vec<OutputComparison>,
}

impl Comparisons {
    /// Whether every element of every output is within its error budget.
    pub fn passed(&self) -> bool {
        self.outputs.iter().all(|output| output.budget.passed())
    }

    /// Whether some output that is within its error budget is beyond its regression limit: it is right, and less accurate than the
    /// kernels of this crate are.
    pub fn regressed(&self) -> bool {
        self.passed() && self.outputs.iter().any(OutputComparison::is_beyond_limit)
    }

    /// The comparison of an output, if the call has it.
    pub fn get(&self, name: &str) -> Option<&OutputComparison> {
        self.outputs.iter().find(|output| output.name == name)
    }

    pub(super) fn push(&mut self, name: &'static str, budget: Comparison) {
        self.outputs.push(OutputComparison { name, budget, limit: None });
    }
}

impl OutputComparison {
    fn is_beyond_limit(&self) -> bool {
        self.limit.is_some_and(|limit| !limit.passed())
    }
}

impl fmt::Display for OutputComparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |ratio: f64| if ratio.is_finite() { format!("{:.1} %", 100.0 * ratio) } else { "∞".into() };
        let (name, budget) = (self.name, &self.budget);
        let limit = self.limit.map_or("–".into(), |limit| percent(limit.worst_ratio));
        let used = percent(budget.worst_ratio);
        write!(f, "{name:<8} {:>10} {:>10.2e} {used:>10} {limit:>10}  ", budget.count, budget.max_error)?;
        match (budget.worst, self.limit.and_then(|limit| limit.worst)) {
            (Some(worst), _) if !budget.passed() => write!(f, "WRONG in {} elements: {worst}", budget.failures),
            (_, Some(worst)) if self.is_beyond_limit() => write!(f, "less accurate than expected: {worst}"),
            _ => f.write_str("ok"),
        }
    }
}

impl fmt::Display for Comparisons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "output     elements  max error  of budget   of limit  verdict")?;
        self.outputs.iter().try_for_each(|output| writeln!(f, "{output}"))
    }
}
