//! Writes standard output: tables and lines for people, or one JSON object per line for machines.

use std::io::{self, Write};
use std::ops::Deref;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use comfy_table::{Attribute, Cell, CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::error::Result;

/// Writes for people or for machines, as the caller asked.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    pub json: bool,
}

impl Report {
    /// Writes a line for people; omitted for machines.
    pub fn line(&self, text: impl std::fmt::Display) -> Result<()> {
        if !self.json {
            writeln!(io::stdout().lock(), "{text}")?;
        }
        Ok(())
    }

    /// Writes a remark that people must see: where machines read standard output, it goes to standard error.
    pub fn note(&self, text: impl std::fmt::Display) -> Result<()> {
        if self.json {
            // Nothing is left to do where standard error is closed.
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
        self.line(text)
    }

    /// Writes an error that ends the command or a part of it: as text on standard error and, for machines, as an object too.
    pub fn error(&self, message: impl std::fmt::Display) {
        // Where standard output is closed too, only the exit code can tell.
        let _ = self.object(&serde_json::json!({"error": message.to_string()}));
        complain(message);
    }

    /// Writes an object for machines; omitted for people.
    pub fn object(&self, object: &impl Serialize) -> Result<()> {
        if self.json {
            let text = serde_json::to_string(object).map_err(io::Error::from)?;
            writeln!(io::stdout().lock(), "{text}")?;
        }
        Ok(())
    }

    /// Writes a table for people.
    pub fn table(&self, header: &[&str], rows: &[Vec<String>]) -> Result<()> {
        self.line(table(header, rows))
    }
}

/// When output has colours.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    /// Sets what [`table`] does.
    pub fn apply(self) {
        let choice = match self {
            Color::Auto => ColorChoice::Auto,
            Color::Always => ColorChoice::AlwaysAnsi,
            Color::Never => ColorChoice::Never,
        };
        choice.write_global();
    }
}

/// Columns of the output: those of the terminal, else of the variable COLUMNS, else 80.
pub fn width() -> u16 {
    let columns = || std::env::var("COLUMNS").ok()?.parse().ok().filter(|&columns| columns > 0);
    terminal_size::terminal_size().map(|(width, _)| width.0).or_else(columns).unwrap_or(80)
}

/// The colour of a verdict, if it is one.
fn verdict_color(text: &str) -> Option<comfy_table::Color> {
    let begins = |words: &[&str]| words.iter().any(|word| text.starts_with(word));
    if ["ok", "chosen", "faster"].contains(&text) {
        Some(comfy_table::Color::Green)
    } else if begins(&["DIFFERS", "WRONG", "error", "failed", "slower"]) || text.ends_with("EXCEEDED") {
        Some(comfy_table::Color::Red)
    } else if begins(&["not run"]) {
        Some(comfy_table::Color::Yellow)
    } else {
        None
    }
}

/// A table that fits the width of the output. Columns of numbers are aligned at the right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    let line = LineStyle::none().fill('─').junction('─');
    table.load_style(TableStyle::new().header_separator(line)).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(width());
    match AutoStream::choice(&io::stdout()) {
        ColorChoice::Never => table.force_no_tty(),
        _ => table.enforce_styling(),
    };
    let is_number = |cell: &String| cell.trim_end_matches([' ', '%']).parse::<f64>().is_ok();
    let numeric = |n: usize| rows.iter().filter_map(|row| row.get(n)).all(|cell| cell.is_empty() || is_number(cell));
    let aligned = |n: usize, cell: Cell| if numeric(n) { cell.set_alignment(CellAlignment::Right) } else { cell };
    let header = header.iter().enumerate().map(|(n, name)| aligned(n, Cell::new(name).add_attribute(Attribute::Bold)));
    table.set_header(header);
    for row in rows {
        let cell = |(n, text): (usize, &String)| {
            let cell = aligned(n, Cell::new(text));
            verdict_color(text).map_or(cell.clone(), |color| cell.fg(color))
        };
        table.add_row(row.iter().enumerate().map(cell));
    }
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 1));
    });
    table.trim_fmt()
}

/// Writes the text of an error to standard error.
pub fn complain(message: impl std::fmt::Display) {
    // Nothing is left to do where standard error is closed.
    let _ = writeln!(io::stderr().lock(), "error: {message}");
}

/// Writes a warning to standard error, and tells it as an event to whoever follows them.
pub fn warn(message: impl std::fmt::Display) {
    tracing::warn!("{message}");
    // Nothing is left to do where standard error is closed.
    let _ = writeln!(io::stderr().lock(), "warning: {message}");
}

/// Time between two lines, where lines replace the bar.
const EVERY: Duration = Duration::from_secs(5);

/// A progress bar on standard error. Where that is not a terminal, a line every few seconds says how far the command is, even if
/// there is no progress.
pub struct Progress {
    bar: ProgressBar,
    /// The lines stop when this is dropped.
    _until: Sender<()>,
}

impl Deref for Progress {
    type Target = ProgressBar;
    fn deref(&self) -> &ProgressBar {
        &self.bar
    }
}

/// A progress bar of `steps` steps.
pub fn progress(steps: usize) -> Progress {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").expect("the template is a constant");
    let bar = ProgressBar::new(steps as u64).with_style(style);
    let (_until, ended) = mpsc::channel();
    let seen = bar.clone();
    std::thread::spawn(move || {
        while ended.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
            if seen.is_hidden() {
                let (done, seconds) = (seen.position(), seen.elapsed().as_secs());
                // Nothing is left to do where standard error is closed.
                let _ = writeln!(io::stderr().lock(), "{done} of {steps} after {seconds} s: {}", seen.message());
            }
        }
    });
    Progress { bar, _until }
}

/// A progress bar over the slices of one long run, with the time that is left. [`advance`] draws it.
pub fn slices() -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} slices, {eta} left").expect("the template is a constant");
    ProgressBar::new(0).with_style(style)
}

/// Shows on a bar of [`slices`] that `done` of `of` slices are done.
pub fn advance(bar: &ProgressBar, done: usize, of: usize) {
    bar.set_length(of as u64);
    bar.set_position(done as u64);
}

/// A number with its noun: `1 slice`, `2 slices`.
pub fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// A number with three significant digits.
pub fn short(x: f64) -> String {
    match x.abs() {
        _ if x == 0.0 => "0".into(),
        0.001..0.01 => format!("{x:.5}"),
        0.01..0.1 => format!("{x:.4}"),
        0.1..1.0 => format!("{x:.3}"),
        1.0..10.0 => format!("{x:.2}"),
        10.0..100.0 => format!("{x:.1}"),
        100.0..100_000.0 => format!("{x:.0}"),
        _ => format!("{x:.1e}"),
    }
}
