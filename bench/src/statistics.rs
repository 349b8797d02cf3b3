//! Medians, quantiles and bootstrap confidence intervals of times.
//!
//! Times of a computer are not distributed normally: they have a floor and a long tail. So the statistics here are those of ranks, and
//! the confidence intervals come from resampling (the percentile bootstrap of Efron 1979) and assume no distribution.

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The number of samples that the bootstrap draws.
const RESAMPLES: usize = 2000;
/// The start of the random numbers, which is always the same, so that the same times give the same interval.
const SEED: u64 = 0x5eed;
/// The share of the resampled medians that an interval holds.
pub const CONFIDENCE: f64 = 0.95;

/// The times of repeated runs in milliseconds: at least one, each finite and above 0. They keep the order in which they were measured.
///
/// With serde this is an array of numbers, and reading an array that breaks these rules is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<f64>", into = "Vec<f64>")]
pub struct Times(Vec<f64>);

impl Times {
    /// Checks the times.
    ///
    /// # Errors
    ///
    /// [`Error::NoTimes`] if there is none, [`Error::Time`] for one that is not finite or not above 0.
    pub fn new(ms: Vec<f64>) -> Result<Self> {
        if ms.is_empty() {
            return Err(Error::NoTimes);
        }
        match ms.iter().position(|ms| !(ms.is_finite() && *ms > 0.0)) {
            Some(index) => Err(Error::Time { index, ms: ms[index] }),
            None => Ok(Times(ms)),
        }
    }

    /// The times in milliseconds, in the order in which they were measured.
    pub fn ms(&self) -> &[f64] {
        &self.0
    }

    /// The median in milliseconds.
    pub fn median(&self) -> f64 {
        quantile(&sorted(&self.0), 0.5)
    }

    /// The quantiles in milliseconds.
    pub fn quantiles(&self) -> Quantiles {
        let sorted = sorted(&self.0);
        let [p5, p25, p50, p75, p95] = [0.05, 0.25, 0.5, 0.75, 0.95].map(|share| quantile(&sorted, share));
        Quantiles { p5, p25, p50, p75, p95 }
    }

    /// The 95 % confidence interval of the median in milliseconds.
    pub fn median_interval(&self) -> Interval {
        let mut rng = Rng::with_seed(SEED);
        Interval::of((0..RESAMPLES).map(|_| self.resampled_median(&mut rng)))
    }

    /// The median of these times divided by that of `base`, with its 95 % confidence interval: below 1 these are faster.
    pub fn ratio_to(&self, base: &Times) -> Ratio {
        let mut rng = Rng::with_seed(SEED);
        let ratio = |_| self.resampled_median(&mut rng) / base.resampled_median(&mut rng);
        Ratio { value: self.median() / base.median(), interval: Interval::of((0..RESAMPLES).map(ratio)) }
    }

    fn resampled_median(&self, rng: &mut Rng) -> f64 {
        let sample: Vec<f64> = (0..self.0.len()).map(|_| self.0[rng.usize(..self.0.len())]).collect();
        quantile(&sorted(&sample), 0.5)
    }
}

impl TryFrom<Vec<f64>> for Times {
    type Error = Error;
    fn try_from(ms: Vec<f64>) -> Result<Self> {
        Times::new(ms)
    }
}

impl From<Times> for Vec<f64> {
    fn from(times: Times) -> Self {
        times.0
    }
}

/// Five quantiles: the time in milliseconds below which 5, 25, 50, 75 and 95 % of the runs are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The quantile of 5 %.
    pub p5: f64,
    /// The lower quartile.
    pub p25: f64,
    /// The median.
    pub p50: f64,
    /// The upper quartile.
    pub p75: f64,
    /// The quantile of 95 %.
    pub p95: f64,
}

/// A confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Interval {
    /// The middle of resampled statistics.
    fn of(statistics: impl Iterator<Item = f64>) -> Self {
        let sorted = sorted(&statistics.collect::<Vec<_>>());
        let [low, high] = [0.5 - CONFIDENCE / 2.0, 0.5 + CONFIDENCE / 2.0].map(|share| quantile(&sorted, share));
        Interval { low, high }
    }
}

/// A ratio of two medians.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// The ratio of the medians as measured.
    pub value: f64,
    /// Its confidence interval.
    pub interval: Interval,
}

impl Ratio {
    /// What the ratio of a new time to an old one tells.
    pub fn verdict(&self) -> Verdict {
        match self.interval {
            Interval { high, .. } if high < 1.0 => Verdict::Faster,
            Interval { low, .. } if low > 1.0 => Verdict::Slower,
            _ => Verdict::NoDifference,
        }
    }
}

/// Whether two medians differ by more than the noise of their runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The interval of the ratio is below 1.
    Faster,
    /// The interval of the ratio is above 1.
    Slower,
    /// The interval of the ratio holds 1.
    NoDifference,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Verdict::Faster => "faster",
            Verdict::Slower => "slower",
            Verdict::NoDifference => "no difference",
        })
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The quantile of sorted values by linear interpolation between ranks (type 7 of Hyndman and Fan 1996, the default of R and NumPy).
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(ms: &[f64]) -> Times {
        Times::new(ms.to_vec()).unwrap()
    }

    /// A hundred times around `middle`, as a normal distribution with 5 % of it would give them.
    fn around(middle: f64, seed: u64) -> Times {
        let mut rng = Rng::with_seed(seed);
        let one = |_| middle * (1.0 + 0.05 * ((0..12).map(|_| rng.f64()).sum::<f64>() - 6.0));
        Times::new((0..100).map(one).collect()).unwrap()
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        // numpy.quantile([3, 1, 4, 1, 5, 9, 2, 6], [.05, .25, .5, .75, .95])
        let got = times(&[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]).quantiles();
        let want = [1.0, 1.75, 3.5, 5.25, 7.95];
        for (got, want) in [got.p5, got.p25, got.p50, got.p75, got.p95].into_iter().zip(want) {
            assert!((got - want).abs() < 1e-12, "{got} {want}");
        }
        assert_eq!(times(&[2.0, 1.0, 3.0]).median(), 2.0);
        assert_eq!(times(&[2.0, 1.0]).median(), 1.5);
    }

    #[test]
    fn one_time_is_its_own_median_with_an_interval_of_no_width() {
        let one = times(&[7.0]);
        assert_eq!(one.quantiles(), Quantiles { p5: 7.0, p25: 7.0, p50: 7.0, p75: 7.0, p95: 7.0 });
        assert_eq!(one.median_interval(), Interval { low: 7.0, high: 7.0 });
    }

    #[test]
    fn the_interval_of_the_median_is_the_same_each_time_and_as_wide_as_theory_says() {
        let times = around(10.0, 1);
        let Interval { low, high } = times.median_interval();
        assert_eq!(times.median_interval(), Interval { low, high });
        assert!(low < times.median() && times.median() < high);
        // The standard error of the median of n normal numbers is 1.253 σ / √n, so the interval is about 2 × 1.96 × 0.0627 wide.
        assert!((0.15..0.35).contains(&(high - low)), "{low} {high}");
    }

    #[test]
    fn intervals_hold_the_true_median_as_often_as_they_say() {
        let held = (0..200).filter(|&seed| {
            let Interval { low, high } = around(10.0, seed).median_interval();
            (low..high).contains(&10.0)
        });
        let held = held.count();
        assert!((180..=199).contains(&held), "{held} of 200");
    }

    #[test]
    fn a_difference_is_real_only_where_the_interval_excludes_1() {
        let base = around(10.0, 1);
        assert_eq!(around(9.0, 2).ratio_to(&base).verdict(), Verdict::Faster);
        assert_eq!(around(11.0, 3).ratio_to(&base).verdict(), Verdict::Slower);
        assert_eq!(around(10.0, 4).ratio_to(&base).verdict(), Verdict::NoDifference);
        let ratio = around(20.0, 5).ratio_to(&base);
        assert!((ratio.value - 2.0).abs() < 0.1, "{ratio:?}");
        assert!(ratio.interval.low < ratio.value && ratio.value < ratio.interval.high, "{ratio:?}");
    }

    #[test]
    fn what_no_clock_gives_is_refused() {
        assert_eq!(Times::new(vec![]), Err(Error::NoTimes));
        assert_eq!(Times::new(vec![1.0, 0.0]), Err(Error::Time { index: 1, ms: 0.0 }));
        for ms in [-1.0, f64::NAN, f64::INFINITY] {
            let error = Times::new(vec![ms]).unwrap_err().to_string();
            assert_eq!(error, format!("time 0 is {ms} ms; it must be finite and above 0"));
        }
    }
}
