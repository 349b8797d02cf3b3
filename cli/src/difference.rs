//! Compares a result with what is expected: `|got − want| <= atol + rtol·|want|`, element by element.

/// How far one element may be from the expected one.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Deserialize)]
pub struct Rule {
    pub atol: f64,
    #[serde(default)]
    pub rtol: f64,
}

/// The comparison of two tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Difference {
    /// Largest absolute error; infinite where one side is NaN or infinite and the other is not.
    pub max_error: f64,
    /// Largest ratio of an element's error to its tolerance. Above 1 the comparison fails.
    pub worst: f64,
    /// Index of the element with this ratio.
    pub index: usize,
    /// The two values of this element.
    pub got: f64,
    pub want: f64,
    /// Number of elements beyond their tolerance.
    pub failures: usize,
    /// Number of elements compared.
    pub compared: usize,
}

impl Difference {
    /// Whether all compared elements are within their tolerance.
    pub fn passes(&self) -> bool {
        self.failures == 0
    }

    /// Adds one element.
    pub fn add(&mut self, index: usize, got: f64, want: f64, rule: Rule) {
        let first = self.compared == 0;
        self.compared += 1;
        // Equal infinities have no difference. NaN always fails, even where NaN is expected.
        let error = if got == want { 0.0 } else { (got - want).abs() };
        let error = if error.is_nan() { f64::INFINITY } else { error };
        let allowed = rule.atol + rule.rtol * want.abs();
        let ratio = match () {
            _ if error == 0.0 => 0.0,
            // An infinite `want` makes the tolerance infinite, so that only equality may pass.
            _ if error.is_infinite() || allowed <= 0.0 || allowed.is_nan() => f64::INFINITY,
            _ => error / allowed,
        };
        self.failures += usize::from(ratio > 1.0);
        self.max_error = self.max_error.max(error);
        if first || ratio > self.worst {
            (self.worst, self.index, self.got, self.want) = (ratio, index, got, want);
        }
    }
}

/// Compares the elements that `keep` selects, each under its own rule.
pub fn compare(got: &[f32], want: &[f32], rule: impl Fn(usize) -> Rule, keep: impl Fn(usize) -> bool) -> Difference {
    assert_eq!(got.len(), want.len(), "case loaders check the shapes of what is expected");
    let mut difference = Difference::default();
    for (index, (&got, &want)) in got.iter().zip(want).enumerate().filter(|&(index, _)| keep(index)) {
        difference.add(index, got.into(), want.into(), rule(index));
    }
    difference
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(got: f32, want: f32, atol: f64, rtol: f64) -> Difference {
        compare(&[got], &[want], |_| Rule { atol, rtol }, |_| true)
    }

    #[test]
    fn the_rule_is_absolute_plus_relative() {
        assert!(one(1.0, 1.0, 0.0, 0.0).passes());
        assert!(one(1.25, 1.0, 0.125, 0.125).passes());
        assert!(!one(1.5, 1.0, 0.125, 0.125).passes());
        assert_eq!(one(1.5, 1.0, 0.25, 0.0).worst, 2.0);
    }

    #[test]
    fn nan_never_passes_and_infinities_must_match() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        for (got, want) in [(nan, 1.0), (1.0, nan), (nan, nan), (inf, 1.0), (1.0, -inf), (inf, -inf), (f32::MIN, -inf)]
        {
            assert!(!one(got, want, 1e30, 1.0).passes(), "{got} {want}");
        }
        assert!(one(-inf, -inf, 0.0, 0.0).passes());
    }

    #[test]
    fn only_kept_elements_count() {
        let rule = |_| Rule { atol: 0.5, rtol: 0.0 };
        let difference = compare(&[1.0, f32::NAN, 3.0], &[1.0, 2.0, 4.0], rule, |i| i != 1);
        assert_eq!((difference.compared, difference.failures, difference.index), (2, 1, 2));
        assert_eq!(difference.max_error, 1.0);
    }
}
