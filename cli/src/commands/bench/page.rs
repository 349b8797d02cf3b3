//! The page of a report: one file of HTML that needs no other.

use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;
use wgpu_attention_bench::Verdict;

use super::charts::{self, Chart};
use super::compare;
use super::output::{COMPARED, adapters, compared_cells};
use super::record::{Case, Machine, Record};
use crate::engine::Label;
use crate::error::{Error, Result};
use crate::report::short;

/// An adapter as the page lists it.
#[derive(Serialize)]
struct Adapter {
    name: String,
    backend: String,
    driver: String,
    ceiling_gflops: String,
    ceiling_gbs: String,
    timer: String,
}

/// What the template shows.
#[derive(Serialize)]
struct Page {
    version: String,
    dates: String,
    machines: Vec<Computer>,
    adapters: Vec<Adapter>,
    cases: Vec<Vec<String>>,
    legend: Vec<Chart>,
    rates: Section,
    sections: [Section; 3],
    /// The rows of each adapter.
    rows: Vec<(String, Vec<Row>)>,
    compared_header: [&'static str; COMPARED.len()],
    /// The rows of each adapter; `None` where nothing was compared.
    compared: Option<Vec<(String, Vec<Beside>)>>,
    remarks: Option<Vec<String>>,
}

/// Charts of one kind. A section without charts is left out.
#[derive(Serialize)]
struct Section {
    title: &'static str,
    text: &'static str,
    charts: Vec<Chart>,
}

/// A row of the table of all numbers.
#[derive(Serialize)]
struct Row {
    number: usize,
    kernel: String,
    planned: bool,
    first: String,
    /// Median, then the quantiles of 5, 25, 75 and 95 %.
    times: [String; 5],
    runs: usize,
    gflops: String,
    ceiling: String,
    error: String,
    used: String,
    right: bool,
}

/// A row of the comparison.
#[derive(Serialize)]
struct Beside {
    cells: Vec<String>,
    /// The class of the verdict in the style sheet.
    class: &'static str,
}

/// A machine in words.
#[derive(Serialize, PartialEq)]
struct Computer {
    cpu: String,
    cores: usize,
    memory: String,
    os: String,
}

/// The page of these measurements, beside old ones if there are old ones.
pub fn page(records: &[Record], old: Option<&[Record]>) -> Result<String> {
    let mut cases: Vec<Case> = Vec::new();
    for record in records {
        if !cases.contains(&record.case) {
            cases.push(record.case.clone());
        }
    }
    let labels = adapters(records);
    let of = |label: &Label| -> Vec<&Record> { records.iter().filter(|record| record.label == *label).collect() };
    let (mut rates, mut rooflines, mut lengths, mut budgets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, case) in cases.iter().enumerate() {
        let of: Vec<&Record> = records.iter().filter(|record| record.case == *case).collect();
        rates.push(charts::rates(index + 1, case, &of, &labels)?);
    }
    for label in &labels {
        rooflines.push(charts::roofline(label, &cases, &of(label))?);
        budgets.push(charts::budgets(label, &cases, &of(label))?);
        for sweep in charts::sweeps(&of(label)) {
            lengths.push(charts::lengths(label, &sweep)?);
        }
    }
    let page = Page {
        version: once(records.iter().map(|record| record.version.clone())).join(", "),
        dates: dates(records),
        machines: once(records.iter().map(|record| computer(&record.machine))),
        adapters: labels.iter().map(|label| adapter(of(label)[0])).collect(),
        cases: cases.iter().map(problem).collect(),
        legend: charts::legend(records)?,
        rates: Section { title: "Rate", text: RATE, charts: rates },
        sections: [
            Section { title: "Roofline", text: ROOFLINE, charts: rooflines },
            Section { title: "Time and length", text: LENGTHS, charts: lengths },
            Section { title: "Error", text: ERROR, charts: budgets },
        ],
        rows: labels
            .iter()
            .map(|label| (label.to_string(), of(label).iter().map(|record| row(record, &cases)).collect()))
            .collect(),
        compared_header: COMPARED,
        compared: old.map(|old| beside(records, old)),
        remarks: old.map(|old| compare::remarks(records, old)),
    };
    let refused = |error: minijinja::Error| Error::Page { why: error.to_string() };
    let mut environment = Environment::new();
    environment.add_template("page.html", include_str!("page.html")).map_err(refused)?;
    let page = Serde(page);
    environment.get_template("page.html").and_then(|template| template.render(page)).map_err(refused)
}

const RATE: &str = "Floating-point operations of the two products over the visible pairs of query and key, divided by the median \
                    time. The vertical line is the multiply-add rate that a plain shader reaches on the adapter. The thin line in a \
                    bar spans the quartiles. ★ marks the planner's choice.";
const ROOFLINE: &str = "The rate of each kernel over the operations per byte of the tensors, each of which is read or written once. \
                        The slope is the copy bandwidth of the adapter, the flat part its multiply-add rate. The numbers above are \
                        those of the problems. A point above the slope has its tensors in a cache.";
const LENGTHS: &str = "Median time of problems that differ in their length N only. Vertical lines span the times from the 5 % to \
                       the 95 % quantile.";
const ERROR: &str = "The largest share that an element of the output uses of its error budget. The budget is the error that \
                     arithmetic in f32 and the final rounding may make on the same numbers; a result beyond 100 % is wrong. A 16-bit \
                     output uses most of its budget, because the final rounding alone does.";

/// Each value once, in the order of the first.
fn once<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found: Vec<T> = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// From the first measurement to the last, in minutes.
fn dates(records: &[Record]) -> String {
    let minute = |date: &str| date.get(..16).unwrap_or(date).replace('T', " ") + " UTC";
    let dates = || records.iter().map(|record| minute(&record.date));
    match (dates().min(), dates().max()) {
        (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
        (first, _) => first.unwrap_or_default(),
    }
}

fn computer(machine: &Machine) -> Computer {
    let memory = match machine.memory_bytes {
        0 => "unknown".into(),
        bytes => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    };
    Computer { cpu: machine.cpu.clone(), cores: machine.cores, memory, os: machine.os.clone() }
}

fn adapter(record: &Record) -> Adapter {
    Adapter {
        name: record.label.adapter.clone(),
        backend: record.label.backend.clone(),
        driver: record.label.driver.clone(),
        ceiling_gflops: short(record.ceiling_gflops),
        ceiling_gbs: short(record.ceiling_gbs),
        timer: record.timer.clone(),
    }
}

/// The cells of a problem: its sizes, type, causal rule and other terms.
fn problem(case: &Case) -> Vec<String> {
    let sizes = case.shape.0.iter().map(u32::to_string);
    sizes.chain([case.dtype.to_string(), case.terms()]).collect()
}

fn row(record: &Record, cases: &[Case]) -> Row {
    let q = record.times_ms.quantiles();
    Row {
        number: 1 + cases.iter().position(|case| *case == record.case).unwrap_or_default(),
        kernel: record.kernel.clone(),
        planned: record.planned,
        first: short(record.first_ms),
        times: [q.p50, q.p5, q.p25, q.p75, q.p95].map(short),
        runs: record.times_ms.ms().len(),
        gflops: short(record.gflops()),
        ceiling: format!("{:.1} %", 100.0 * record.of_ceiling()),
        error: format!("{:.1e}", record.error),
        used: format!("{:.0} %", 100.0 * record.budget_used),
        right: record.within_budget(),
    }
}

fn beside(records: &[Record], old: &[Record]) -> Vec<(String, Vec<Beside>)> {
    let row = |new: &Record| {
        let compared = compare::compare(new, old)?;
        let class = match compared.verdict {
            Verdict::Faster => "good",
            Verdict::Slower => "bad",
            Verdict::NoDifference => "",
        };
        Some(Beside { cells: compared_cells(new, compared), class })
    };
    let of = |label: &Label| records.iter().filter(|record| record.label == *label).filter_map(row).collect();
    let rows = adapters(records).into_iter().map(|label| (label.to_string(), of(label)));
    rows.filter(|(_, rows): &(_, Vec<Beside>)| !rows.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use wgpu_attention::Causal;

    use super::super::record::sample::record;
    use super::*;

    fn records() -> Vec<Record> {
        let mut records: Vec<Record> = [512, 1024]
            .into_iter()
            .flat_map(|n| ["flash", "rows", "quantum"].map(|kernel| record(kernel, n, 2.0)))
            .collect();
        records[4].case.causal = Causal::TopLeft;
        (records[4].error, records[4].budget_used) = (f64::INFINITY, f64::INFINITY);
        records
    }

    #[test]
    fn a_page_is_well_formed_needs_no_other_file_and_holds_every_problem() {
        let records = records();
        let old = [record("flash", 512, 1.0)];
        let page = page(&records, Some(&old)).unwrap();
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        let document = roxmltree::Document::parse_with_options(&page, options).unwrap();
        for outside in ["http:", "https:", "url(", "@import", "<script", "<link", "<img"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for node in document.descendants() {
            for attribute in node.attributes() {
                let (name, value) = (attribute.name(), attribute.value());
                assert!(!["src", "srcset", "data"].contains(&name), "{name}={value}");
                assert!(name != "href" || value.starts_with('#'), "{name}={value}");
            }
        }
        let text: String = document.descendants().filter_map(|node| node.text()).collect();
        for says in ["1: 1,8,8,512,512,64 f32", "2: 1,8,8,1024,1024,64 f32", "1,8,8,1024,1024,64 f32 causal top-left"] {
            assert!(text.contains(says), "{says}");
        }
        for says in [
            "CPU & co",
            "Card <1>",
            "driver 1",
            "measured 2026-01-02 03:04 UTC",
            "quantum",
            "slower",
            "only in the new run",
        ] {
            assert!(text.contains(says), "{says}");
        }
    }

    #[test]
    fn every_chart_has_a_title_and_a_description() {
        let page = page(&records(), None).unwrap();
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        let document = roxmltree::Document::parse_with_options(&page, options).unwrap();
        let figures: Vec<_> = document.descendants().filter(|node| node.has_tag_name("figure")).collect();
        // Rates of three problems, one roofline, one sweep of lengths, and one chart of errors.
        assert_eq!(figures.len(), 6);
        let mut ids = Vec::new();
        for figure in figures {
            let svg = figure.children().find(|node| node.has_tag_name("svg")).unwrap();
            assert_eq!(svg.attribute("role"), Some("img"));
            let named: Vec<&str> = svg.attribute("aria-labelledby").unwrap().split(' ').collect();
            for (id, tag) in named.iter().zip(["title", "desc"]) {
                let node = svg.children().find(|node| node.attribute("id") == Some(id)).unwrap();
                assert!(node.has_tag_name(tag) && node.text().is_some_and(|text| text.len() > 10));
            }
            ids.extend(named);
        }
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!((all, ids.len()), (12, 12));
    }
}
