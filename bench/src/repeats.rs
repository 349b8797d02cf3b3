//! How often a call is timed.

use crate::error::Result;
use crate::statistics::Times;

/// How often a call is timed: as often as fits `seconds`, but at least `least` and at most `most` times. The default is 2 seconds, 5 to
/// 50 times.
///
/// A run to warm up comes first. It does not count, and its time tells how many runs fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Repeats {
    /// The time that all runs together may take.
    pub seconds: f64,
    /// The fewest runs, however long they take.
    pub least: u32,
    /// The most runs, however short they are.
    pub most: u32,
}

impl Default for Repeats {
    fn default() -> Self {
        Repeats { seconds: 2.0, least: 5, most: 50 }
    }
}

impl Repeats {
    /// Always this number of runs, after one to warm up.
    pub fn exactly(runs: u32) -> Self {
        Repeats { least: runs, most: runs, ..Repeats::default() }
    }

    /// Times a call; `time` makes it once and returns milliseconds, as [`Timer::call`](crate::Timer::call) does.
    ///
    /// # Errors
    ///
    /// What `time` returns; [`Error::NoTimes`](crate::Error::NoTimes) where `most` is 0, and [`Error::Time`](crate::Error::Time)
    /// where `time` returned what no clock gives.
    pub fn measure<E>(&self, mut time: impl FnMut() -> Result<f64, E>) -> Result<Times>
    where
        crate::Error: From<E>,
    {
        let runs = self.runs(time()?);
        Times::new((0..runs).map(|_| time()).collect::<Result<_, _>>()?)
    }

    /// The number of runs of a call that takes so long.
    fn runs(&self, ms: f64) -> u32 {
        // A call that seems to take no time at all runs `most` times.
        ((self.seconds * 1e3 / ms) as u32).max(self.least).min(self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn as_many_runs_are_timed_as_fit_and_the_first_does_not_count() {
        for (first, runs) in [(1e4, 5), (200.0, 10), (40.0, 50), (1e-9, 50), (0.0, 50)] {
            let mut calls = 0;
            let time = || {
                calls += 1;
                Ok::<_, Error>(if calls == 1 { first } else { f64::from(calls) })
            };
            let times = Repeats::default().measure(time).unwrap();
            let want: Vec<f64> = (2..runs + 2).map(f64::from).collect();
            assert_eq!(times.ms(), want, "{first} ms");
        }
        assert_eq!(Repeats::exactly(3).measure(|| Ok::<_, Error>(1e6)).unwrap().ms().len(), 3);
    }

    #[test]
    fn what_the_call_says_is_returned() {
        let refused = Error::Attention(wgpu_attention::Error::DeviceLost("unplugged".into()));
        assert_eq!(Repeats::default().measure(|| Err::<f64, _>(refused.clone())), Err(refused));
        assert_eq!(Repeats::exactly(0).measure(|| Ok::<_, Error>(1.0)), Err(Error::NoTimes));
    }
}
