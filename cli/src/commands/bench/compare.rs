//! New measurements beside old ones.

use serde::Serialize;
use wgpu_attention_bench::Verdict;

use super::record::Record;

/// A new measurement beside the old one of the same problem, kernel and adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Compared {
    pub old_median_ms: f64,
    /// The new median divided by the old one.
    pub ratio: f64,
    /// The 95 % confidence interval of the ratio.
    pub ratio_low: f64,
    pub ratio_high: f64,
    pub verdict: Verdict,
}

/// The comparison with the measurement in `old` that matches; `None` if there is none.
pub fn compare(new: &Record, old: &[Record]) -> Option<Compared> {
    let old = old.iter().find(|old| old.matches(new))?;
    let ratio = new.times_ms.ratio_to(&old.times_ms);
    Some(Compared {
        old_median_ms: old.times_ms.median(),
        ratio: ratio.value,
        ratio_low: ratio.interval.low,
        ratio_high: ratio.interval.high,
        verdict: ratio.verdict(),
    })
}

/// The most measurements that a remark names.
const NAMED: usize = 3;

/// What a reader must know of two sets of measurements beside their ratios, a sentence each.
pub fn remarks(new: &[Record], old: &[Record]) -> Vec<String> {
    let mut remarks = Vec::new();
    let name = |record: &Record| format!("{} with {} on {}", record.case, record.kernel, record.label);
    for (when, records, others) in [("new", new, old), ("old", old, new)] {
        let alone: Vec<String> =
            records.iter().filter(|record| !others.iter().any(|other| other.matches(record))).map(name).collect();
        let more = match alone.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        if !alone.is_empty() {
            let names = alone[..alone.len().min(NAMED)].join("; ");
            remarks.push(format!("Measured only in the {when} run, or by another clock: {names}{more}."));
        }
    }
    let pairs = || new.iter().filter_map(|new| old.iter().find(|old| old.matches(new)).map(|old| (new, old)));
    if pairs().any(|(new, old)| new.machine != old.machine) {
        remarks.push("The two runs are of different machines.".into());
    }
    if pairs().any(|(new, old)| new.label.driver != old.label.driver) {
        remarks.push("The two runs had different drivers.".into());
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::super::record::sample::record;
    use super::*;

    #[test]
    fn verdicts_follow_the_interval_of_the_ratio() {
        let old = [record("flash", 512, 10.0)];
        for (ms, verdict) in [(5.0, Verdict::Faster), (10.01, Verdict::NoDifference), (12.0, Verdict::Slower)] {
            let compared = compare(&record("flash", 512, ms), &old).unwrap();
            assert_eq!(compared.verdict, verdict, "{compared:?}");
            assert!((compared.ratio - ms / 10.0).abs() < 1e-9, "{compared:?}");
            assert!(compared.ratio_low <= compared.ratio && compared.ratio <= compared.ratio_high, "{compared:?}");
        }
    }

    #[test]
    fn a_remark_names_some_of_many_measurements() {
        let new = [64, 128, 256, 512, 1024].map(|n| record("flash", n, 1.0));
        let [remark] = &remarks(&new, &new[..1])[..] else { panic!("one remark") };
        assert!(remark.contains("1,8,8,512,512,64") && remark.ends_with("; and 1 more."), "{remark}");
        assert!(!remark.contains("1024"), "{remark}");
    }

    #[test]
    fn only_the_same_problem_kernel_adapter_and_clock_are_compared() {
        let new = record("flash", 512, 10.0);
        let changed = |change: fn(&mut Record)| {
            let mut old = new.clone();
            change(&mut old);
            let (new, old) = (std::slice::from_ref(&new), std::slice::from_ref(&old));
            (compare(&new[0], old).is_some(), remarks(new, old).join(" "))
        };
        assert_eq!(changed(|_| ()), (true, String::new()));
        let only = |(compared, remarks): (bool, String)| {
            assert!(!compared && remarks.contains("only in the new run") && remarks.contains("only in the old run"));
        };
        only(changed(|old| old.kernel = "rows".into()));
        only(changed(|old| old.case.shape.0[5] = 32));
        only(changed(|old| old.case.causal = wgpu_attention::Causal::TopLeft));
        only(changed(|old| old.label.backend = "gl".into()));
        only(changed(|old| old.timer = "wall clock".into()));
        assert_eq!(changed(|old| old.machine.cores = 4), (true, "The two runs are of different machines.".into()));
        assert_eq!(changed(|old| old.label.driver.clear()), (true, "The two runs had different drivers.".into()));
    }
}
