//! Measurements on standard output: tables for people, CSV and lines of JSON for machines.

use std::io::{self, Write};

use comfy_table::{Table, presets};
use serde::Serialize;
use wgpu_attention_bench::Quantiles;

use super::compare::{self, Compared};
use super::record::Record;
use crate::engine::Label;
use crate::error::Result;
use crate::report::{self, short};

/// How measurements are written.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
pub enum Format {
    /// Tables for a terminal
    Table,
    /// Tables in Markdown
    Md,
    /// Comma-separated values with a header
    Csv,
    /// One JSON object a line with all single times, which --from and --compare read
    Jsonl,
}

/// A record as a line of JSON, with what follows from it.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    record: &'a Record,
    median_ms: f64,
    p5_ms: f64,
    p25_ms: f64,
    p75_ms: f64,
    p95_ms: f64,
    gflops: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    compared: Option<Compared>,
}

/// A record as a line of JSON, beside the old one if there are old ones.
pub fn line(record: &Record, old: Option<&[Record]>) -> Result<String> {
    let Quantiles { p5, p25, p50, p75, p95 } = record.times_ms.quantiles();
    let line = Line {
        record,
        median_ms: p50,
        p5_ms: p5,
        p25_ms: p25,
        p75_ms: p75,
        p95_ms: p95,
        gflops: record.gflops(),
        compared: old.and_then(|old| compare::compare(record, old)),
    };
    Ok(serde_json::to_string(&line).map_err(io::Error::from)?)
}

/// The text of all records in a format, beside the old ones if there are old ones.
pub fn text(format: Format, records: &[Record], old: Option<&[Record]>) -> Result<String> {
    match format {
        Format::Table | Format::Md => Ok(tables(format, records, old)),
        Format::Csv => csv(records, old),
        Format::Jsonl => {
            let lines: Vec<String> = records.iter().map(|record| line(record, old)).collect::<Result<_>>()?;
            Ok(lines.iter().map(|line| format!("{line}\n")).collect())
        }
    }
}

/// The adapters of some records, each once.
pub fn adapters(records: &[Record]) -> Vec<&Label> {
    let mut labels: Vec<&Label> = Vec::new();
    for record in records {
        if !labels.contains(&&record.label) {
            labels.push(&record.label);
        }
    }
    labels
}

fn tables(format: Format, records: &[Record], old: Option<&[Record]>) -> String {
    let mut text = String::new();
    for label in adapters(records) {
        let of: Vec<&Record> = records.iter().filter(|record| record.label == *label).collect();
        let (ceilings, timer) = ((of[0].ceiling_gflops, of[0].ceiling_gbs), &of[0].timer);
        let heading = format!("{label} ({})", label.driver);
        text += &match format {
            Format::Md => format!("\n### {}\n\n", escaped(&heading)),
            _ => format!("\n{heading}\n"),
        };
        text += &format!(
            "ceilings {} GFLOP/s multiply-add, {} GB/s copy; timed by {timer}\n",
            short(ceilings.0),
            short(ceilings.1)
        );
        text += &table(format, &HEADER, of.iter().map(|record| cells(record)).collect());
        if of.iter().any(|record| !record.planned) && of.iter().any(|record| record.planned) {
            text += "* the planner's choice\n";
        }
        if let Some(old) = old {
            let beside: Vec<_> =
                of.iter().filter_map(|new| Some(compared_cells(new, compare::compare(new, old)?))).collect();
            if !beside.is_empty() {
                text += "\nnew beside old\n";
                text += &table(format, &COMPARED, beside);
            }
        }
    }
    for remark in old.map(|old| compare::remarks(records, old)).unwrap_or_default() {
        text += &format!("\n{remark}\n");
    }
    text
}

/// Whether a column of a table is shown: narrow output leaves out what fewer people look for.
fn is_shown(column: &str) -> bool {
    match column {
        "5–95 %" => report::width() >= 100,
        "25–75 %" | "first ms" | "error" => report::width() >= 120,
        _ => true,
    }
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}

fn table(format: Format, header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    if format == Format::Md {
        table.load_style(presets::ASCII_MARKDOWN).set_header(header.iter().map(|cell| escaped(cell)));
        table.add_rows(rows.iter().map(|row| row.iter().map(|cell| escaped(cell)).collect::<Vec<_>>()));
        return format!("\n{table}\n");
    }
    let is_empty = |n: usize| rows.iter().all(|row| row[n].is_empty());
    let shown: Vec<usize> = (0..header.len()).filter(|&n| is_shown(header[n]) && !is_empty(n)).collect();
    let header: Vec<&str> = shown.iter().map(|&n| header[n]).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(|row| shown.iter().map(|&n| row[n].clone()).collect()).collect();
    format!("{}\n", report::table(&header, &rows))
}

const HEADER: [&str; 12] = [
    "B,H,HKV,SQ,SKV,D",
    "type",
    "terms",
    "kernel",
    "median ms",
    "25–75 %",
    "5–95 %",
    "first ms",
    "GFLOP/s",
    "ceiling",
    "error",
    "budget",
];

fn named(record: &Record) -> [String; 4] {
    let case = &record.case;
    let kernel = format!("{}{}", record.choice, if record.planned { " *" } else { "" });
    [case.shape.to_string(), case.dtype.to_string(), case.terms(), kernel]
}

fn cells(record: &Record) -> Vec<String> {
    let Quantiles { p5, p25, p50, p75, p95 } = record.times_ms.quantiles();
    let range = |low, high| format!("{}–{}", short(low), short(high));
    let used = format!("{:.0} %", 100.0 * record.budget_used);
    let numbers = [
        short(p50),
        range(p25, p75),
        range(p5, p95),
        short(record.first_ms),
        short(record.gflops()),
        format!("{:.1} %", 100.0 * record.of_ceiling()),
        format!("{:.1e}", record.error),
        if record.within_budget() { used } else { format!("{used} EXCEEDED") },
    ];
    named(record).into_iter().chain(numbers).collect()
}

/// The header of a table of comparisons.
pub const COMPARED: [&str; 8] =
    ["B,H,HKV,SQ,SKV,D", "type", "terms", "kernel", "old ms", "new ms", "new / old (95 % interval)", "verdict"];

/// The cells of a row under [`COMPARED`].
pub fn compared_cells(new: &Record, compared: Compared) -> Vec<String> {
    let Compared { old_median_ms, ratio, ratio_low, ratio_high, verdict } = compared;
    let numbers = [
        short(old_median_ms),
        short(new.times_ms.median()),
        format!("{ratio:.3} ({ratio_low:.3} to {ratio_high:.3})"),
        verdict.to_string(),
    ];
    named(new).into_iter().chain(numbers).collect()
}

/// The value of a column of the CSV.
type Column = (&'static str, fn(&Record) -> String);

const COLUMNS: [Column; 27] = [
    ("adapter", |r| r.label.adapter.clone()),
    ("backend", |r| r.label.backend.clone()),
    ("driver", |r| r.label.driver.clone()),
    ("kernel", |r| r.kernel.clone()),
    ("planned", |r| r.planned.to_string()),
    ("shape", |r| r.case.shape.to_string()),
    ("dtype", |r| r.case.dtype.to_string()),
    ("causal", |r| r.case.causal.to_string()),
    ("terms", |r| r.case.terms.clone()),
    ("runs", |r| r.times_ms.ms().len().to_string()),
    ("median_ms", |r| r.times_ms.median().to_string()),
    ("p5_ms", |r| r.times_ms.quantiles().p5.to_string()),
    ("p25_ms", |r| r.times_ms.quantiles().p25.to_string()),
    ("p75_ms", |r| r.times_ms.quantiles().p75.to_string()),
    ("p95_ms", |r| r.times_ms.quantiles().p95.to_string()),
    ("first_ms", |r| r.first_ms.to_string()),
    ("flops", |r| r.flops.to_string()),
    ("bytes", |r| r.bytes.to_string()),
    ("gflops", |r| r.gflops().to_string()),
    ("ceiling_gflops", |r| r.ceiling_gflops.to_string()),
    ("ceiling_gbs", |r| r.ceiling_gbs.to_string()),
    ("error", |r| r.error.to_string()),
    ("budget", |r| r.budget.to_string()),
    ("budget_used", |r| r.budget_used.to_string()),
    ("timer", |r| r.timer.clone()),
    ("version", |r| r.version.clone()),
    ("date", |r| r.date.clone()),
];
const COMPARED_COLUMNS: [&str; 5] = ["old_median_ms", "ratio", "ratio_low", "ratio_high", "verdict"];

fn csv(records: &[Record], old: Option<&[Record]>) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let compared = if old.is_some() { &COMPARED_COLUMNS[..] } else { &[] };
    let header = COLUMNS.iter().map(|(name, _)| *name).chain(compared.iter().copied());
    writer.write_record(header).map_err(io::Error::from)?;
    for record in records {
        let mut cells: Vec<String> = COLUMNS.iter().map(|(_, value)| value(record)).collect();
        match old.map(|old| compare::compare(record, old)) {
            Some(Some(c)) => {
                cells.extend([c.old_median_ms, c.ratio, c.ratio_low, c.ratio_high].map(|number| number.to_string()));
                cells.push(c.verdict.to_string());
            }
            Some(None) => cells.extend(COMPARED_COLUMNS.map(|_| String::new())),
            None => (),
        }
        writer.write_record(&cells).map_err(io::Error::from)?;
    }
    let bytes = writer.into_inner().map_err(|error| error.into_error())?;
    Ok(String::from_utf8(bytes).expect("every cell is a string"))
}

/// Writes a text to standard output.
pub fn write(text: &str) -> Result<()> {
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::super::record::sample::record;
    use super::*;

    fn records() -> Vec<Record> {
        let mut records = vec![record("flash", 512, 1.0), record("rows", 512, 2.0), record("flash", 1024, 4.0)];
        records[2].label.adapter = "Card, \"2\" | x".into();
        records
    }

    #[test]
    fn csv_is_read_back() {
        let (new, old) = (records(), [record("flash", 512, 2.0)]);
        for (old, columns) in [(None, COLUMNS.len()), (Some(&old[..]), COLUMNS.len() + 5)] {
            let text = csv(&new, old).unwrap();
            let mut reader = csv::Reader::from_reader(text.as_bytes());
            let header = reader.headers().unwrap().clone();
            let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
            assert_eq!((header.len(), rows.len()), (columns, 3));
            let cell = |row: usize, name| &rows[row][header.iter().position(|other| other == name).unwrap()];
            assert_eq!(cell(2, "adapter"), "Card, \"2\" | x");
            assert_eq!(cell(1, "median_ms").parse::<f64>().unwrap(), new[1].times_ms.median());
            if old.is_some() {
                assert_eq!((cell(0, "verdict"), cell(1, "verdict")), ("faster", ""));
            }
        }
    }

    #[test]
    fn markdown_has_as_many_cells_in_each_row_of_a_table() {
        let (new, old) = (records(), [record("flash", 512, 0.5)]);
        let text = tables(Format::Md, &new, Some(&old));
        let tables: Vec<Vec<usize>> = text
            .split("\n\n")
            .filter(|block| block.starts_with('|'))
            .map(|block| block.lines().map_while(|line| Some(line.strip_prefix('|')?.matches('|').count())).collect())
            .collect();
        let rows: Vec<usize> = tables.iter().map(Vec::len).collect();
        // Two adapters, of which one has old measurements too: header, rule, rows.
        assert_eq!(rows, [4, 3, 3], "{text}");
        for table in &tables {
            assert!(table.iter().all(|cells| *cells == table[0]), "{table:?}: {text}");
        }
        assert!(text.contains("### Card, \"2\" \\| x · vulkan (driver 1)"), "{text}");
        assert!(text.contains("| slower") && text.contains("flash *"), "{text}");
    }

    #[test]
    fn lines_of_json_hold_all_times_and_the_comparison() {
        let old = [record("flash", 512, 2.0)];
        let text = text(Format::Jsonl, &records(), Some(&old)).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["times_ms"].as_array().unwrap().len(), 20);
        assert_eq!(lines[0]["compared"]["verdict"], "faster");
        assert!(lines[1].get("compared").is_none());
        assert_eq!(lines[0]["median_ms"], 1.03125);
    }
}
