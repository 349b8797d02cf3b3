//! What was measured, as a line of JSON, and files of such lines.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sysinfo::System;
use wgpu_attention::{Causal, Element, Precision, Problem};
use wgpu_attention_bench::Times;

use crate::engine::Label;
use crate::error::{Error, Result};
use crate::options::ShapeArg;
use crate::problem::terms;
use crate::report;

/// A problem as tables and records name it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    #[serde(with = "text")]
    pub shape: ShapeArg,
    pub dtype: Element,
    pub causal: Causal,
    /// What it has beside these, as [`terms`] names it.
    #[serde(default)]
    pub terms: String,
}

impl Case {
    pub fn of(problem: &Problem) -> Self {
        let Problem { element: dtype, causal, .. } = *problem;
        Case { shape: ShapeArg::of(problem), dtype, causal, terms: terms(problem) }
    }

    /// The causal rule and the other terms.
    pub fn terms(&self) -> String {
        let causal = (self.causal != Causal::None).then(|| format!("causal {}", self.causal));
        let terms = (!self.terms.is_empty()).then(|| self.terms.clone());
        causal.into_iter().chain(terms).collect::<Vec<_>>().join(", ")
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.shape, self.dtype)?;
        match self.terms().as_str() {
            "" => Ok(()),
            terms => write!(f, " {terms}"),
        }
    }
}

/// The computer that measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    /// Logical cores that the process may use.
    pub cores: usize,
    pub memory_bytes: u64,
    pub os: String,
}

impl Machine {
    /// This computer. What the system does not tell is `unknown`, or 0.
    pub fn this() -> Self {
        let mut system = System::new().ok();
        if let Some(system) = &mut system {
            system.refresh_memory();
            system.refresh_cpu_all();
        }
        let cpu = system.as_ref().and_then(|system| system.cpus().first()).map(|cpu| cpu.brand().trim().to_string());
        let unknown = || "unknown".to_string();
        Machine {
            cpu: cpu.filter(|cpu| !cpu.is_empty()).unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: system.map_or(0, |system| system.total_memory()),
            os: format!("{}, {}", System::long_os_version().unwrap_or_else(|_| unknown()), std::env::consts::ARCH),
        }
    }
}

/// One kernel measured on one problem and one adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    #[serde(flatten)]
    pub label: Label,
    /// The stages that ran, as a plan names them.
    pub kernel: String,
    /// The kernel as `--kernel` names it.
    pub choice: String,
    /// Whether the planner chose the kernel by itself.
    pub planned: bool,
    /// The precision that was asked for.
    #[serde(default)]
    pub precision: Precision,
    #[serde(flatten)]
    pub case: Case,
    pub flops: f64,
    /// Bytes of all operands and results.
    pub bytes: u64,
    /// The first call: compiling and running.
    pub first_ms: f64,
    pub ceiling_gflops: f64,
    pub ceiling_gbs: f64,
    /// Infinite where the result is not finite; JSON has `null` for that.
    #[serde(deserialize_with = "null_is_infinite")]
    pub error: f64,
    pub budget: f64,
    /// The largest share that an element uses of its own error budget: above 1 the result is wrong.
    #[serde(deserialize_with = "null_is_infinite")]
    pub budget_used: f64,
    pub timer: String,
    pub version: String,
    /// When it was measured, in UTC.
    pub date: String,
    pub machine: Machine,
    /// The single times in the order in which they were measured.
    pub times_ms: Times,
}

impl Record {
    pub fn gflops(&self) -> f64 {
        self.rate(self.times_ms.median())
    }

    /// The GFLOP/s of a run that takes so long.
    pub fn rate(&self, ms: f64) -> f64 {
        self.flops / ms / 1e6
    }

    /// The rate as a share of the multiply-add ceiling.
    pub fn of_ceiling(&self) -> f64 {
        self.gflops() / self.ceiling_gflops
    }

    pub fn within_budget(&self) -> bool {
        self.budget_used <= 1.0
    }

    /// Whether both measured the same: problem, kernel and adapter, by the same clock.
    pub fn matches(&self, other: &Record) -> bool {
        let adapter = |record: &Record| (record.label.adapter.clone(), record.label.backend.clone());
        adapter(self) == adapter(other)
            && (&self.kernel, self.precision) == (&other.kernel, other.precision)
            && (&self.case, &self.timer) == (&other.case, &other.timer)
    }

    /// Refuses numbers that no measurement gives, and that no chart can show.
    fn check(&self) -> Result<(), String> {
        let numbers = [
            ("flops", self.flops),
            ("bytes", self.bytes as f64),
            ("first_ms", self.first_ms),
            ("ceiling_gflops", self.ceiling_gflops),
            ("ceiling_gbs", self.ceiling_gbs),
        ];
        match numbers.into_iter().find(|(_, number)| !(number.is_finite() && *number > 0.0)) {
            Some((name, number)) => Err(format!("{name} is {number}; it must be finite and above 0")),
            None => Ok(()),
        }
    }
}

/// Reads the measurements of a file. Objects of other programs, headers and errors are left out, and a note on standard error says how many.
/// A later measurement of the same problem, kernel and adapter replaces an earlier one.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
    let (mut records, mut others, mut replaced) = (Vec::<Record>::new(), 0, 0);
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let refused = |why| Error::Record { path: path.into(), line: index + 1, why };
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(line).map_err(|error| refused(format!("not an object of JSON: {error}")))?;
        if !object.contains_key("times_ms") {
            others += 1;
            continue;
        }
        let record: Record = serde_json::from_value(object.into()).map_err(|error| refused(error.to_string()))?;
        record.check().map_err(refused)?;
        let before = records.len();
        records.retain(|earlier| !earlier.matches(&record));
        replaced += before - records.len();
        records.push(record);
    }
    if records.is_empty() {
        return Err(Error::NoRecords { path: path.into() });
    }
    let shown = path.display();
    if others > 0 {
        let objects =
            report::count(others, "object that is no measurement was", "objects that are no measurements were");
        report::warn(format!("{shown}: {objects} left out"));
    }
    if replaced > 0 {
        let measurements = report::count(replaced, "measurement was", "measurements were");
        report::warn(format!("{shown}: {measurements} replaced by later ones of the same problem, kernel and adapter"));
    }
    Ok(records)
}

fn null_is_infinite<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::INFINITY))
}

/// A value as its text.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// Made-up records for tests.
#[cfg(test)]
pub mod sample {
    use super::*;

    /// A kernel on a problem with n queries and keys, whose times are a little around `ms`.
    pub fn record(kernel: &str, n: u32, ms: f64) -> Record {
        let shape = ShapeArg([1, 8, 8, n, n, 64]);
        let checked = shape.problem().check().unwrap();
        let times = (0..20).map(|run| ms * (1.0 + f64::from(run % 5) / 64.0)).collect();
        Record {
            label: Label { adapter: "Card <1>".into(), backend: "vulkan".into(), driver: "driver 1".into() },
            kernel: kernel.into(),
            choice: kernel.into(),
            planned: kernel == "flash",
            precision: Precision::Strict,
            case: Case::of(&shape.problem()),
            flops: checked.flops(),
            bytes: crate::memory::of_tensors(&checked),
            first_ms: 100.0,
            ceiling_gflops: 1e4,
            ceiling_gbs: 500.0,
            error: 1e-6,
            budget: 1e-5,
            budget_used: 0.125,
            timer: "GPU timestamps".into(),
            version: "0.1.0".into(),
            date: "2026-01-02T03:04:05Z".into(),
            machine: Machine { cpu: "CPU & co".into(), cores: 8, memory_bytes: 16 << 30, os: "Linux".into() },
            times_ms: Times::new(times).unwrap(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sample::record;
    use super::*;

    fn read_lines(lines: &[String]) -> Result<Vec<Record>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        std::fs::write(&path, lines.join("\n")).unwrap();
        read(&path)
    }

    fn line(record: &Record) -> String {
        serde_json::to_string(record).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let mut wrong = record("rows", 512, 2.0);
        (wrong.error, wrong.budget_used) = (f64::INFINITY, f64::INFINITY);
        let records = [record("flash", 512, 1.0), wrong];
        assert_eq!(read_lines(&records.each_ref().map(line)).unwrap(), records);
    }

    #[test]
    fn a_later_measurement_replaces_an_earlier_one_and_other_objects_are_left_out() {
        let (old, new, other) = (record("flash", 512, 1.0), record("flash", 512, 2.0), record("flash", 512, 3.0));
        let other = Record { timer: "wall clock".into(), ..other };
        let lines = [r#"{"date": "today"}"#.into(), line(&old), line(&other), String::new(), line(&new)];
        assert_eq!(read_lines(&lines).unwrap(), [other, new]);
    }

    #[test]
    fn what_is_no_record_is_refused_with_its_line() {
        let good = line(&record("flash", 512, 1.0));
        let error = |wrong: String| read_lines(&[good.clone(), wrong]).unwrap_err().to_string();
        for (wrong, says) in [
            ("12".into(), "not an object of JSON: "),
            (good.replace("1,8,8,512,512,64", "1,8"), "six whole numbers B,H,HKV,SQ,SKV,D"),
            (
                good.replace("\"times_ms\":[1.0,", "\"times_ms\":[-1.0,"),
                "time 0 is -1 ms; it must be finite and above 0",
            ),
            (
                good.replace("\"ceiling_gbs\":500.0", "\"ceiling_gbs\":0.0"),
                "ceiling_gbs is 0; it must be finite and above 0",
            ),
            (good.replace("\"machine\"", "\"mill\""), "missing field `machine`"),
        ] {
            let error = error(wrong);
            assert!(error.contains("x.jsonl: line 2: ") && error.contains(says), "{error}");
        }
        let none = read_lines(&[r#"{"median_ms": 1.0}"#.into()]).unwrap_err().to_string();
        assert!(none.contains("no line is a measurement"), "{none}");
    }
}
