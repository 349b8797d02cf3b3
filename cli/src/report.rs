//! What goes to standard output: tables and lines for people, or one JSON object a line for machines.

use std::io::{self, Write};

use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::error::Result;

/// Writes in the form that was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    pub json: bool,
}

impl Report {
    /// A line for people; machines do not see it.
    pub fn line(&self, text: impl std::fmt::Display) -> Result<()> {
        if !self.json {
            writeln!(io::stdout().lock(), "{text}")?;
        }
        Ok(())
    }

    /// A remark that nobody may miss: where machines read standard output, it goes to standard error.
    pub fn note(&self, text: impl std::fmt::Display) -> Result<()> {
        if self.json {
            // Nothing is left to do where standard error is closed.
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
        self.line(text)
    }

    /// A problem that ends the command or a part of it: text on standard error, and an object where machines read.
    pub fn error(&self, message: impl std::fmt::Display) {
        // Where standard output is closed too, the exit code is left.
        let _ = self.object(&serde_json::json!({"error": message.to_string()}));
        complain(message);
    }

    /// An object for machines; people do not see it.
    pub fn object(&self, object: &impl Serialize) -> Result<()> {
        if self.json {
            let text = serde_json::to_string(object).map_err(io::Error::from)?;
            writeln!(io::stdout().lock(), "{text}")?;
        }
        Ok(())
    }

    /// A table for people.
    pub fn table(&self, header: &[&str], rows: &[Vec<String>]) -> Result<()> {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header.iter().copied());
        table.add_rows(rows.iter().cloned());
        self.line(table.trim_fmt())
    }
}

/// The text of a problem, on standard error.
pub fn complain(message: impl std::fmt::Display) {
    // Nothing is left to do where standard error is closed.
    let _ = writeln!(io::stderr().lock(), "error: {message}");
}

/// Something that was left aside, on standard error.
pub fn warn(message: impl std::fmt::Display) {
    // Nothing is left to do where standard error is closed.
    let _ = writeln!(io::stderr().lock(), "warning: {message}");
}

/// A bar on standard error; hidden when that is not a terminal.
pub fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").expect("the template is a constant");
    ProgressBar::new(steps as u64).with_style(style)
}

/// A bar over the slices of one long run, with the time that is left; [`advance`] draws it.
pub fn slices() -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} slices, {eta} left").expect("the template is a constant");
    ProgressBar::new(0).with_style(style)
}

/// Shows on a bar of [`slices`] that so many of them are done.
pub fn advance(bar: &ProgressBar, done: usize, of: usize) {
    bar.set_length(of as u64);
    bar.set_position(done as u64);
}

/// Three significant digits.
pub fn short(x: f64) -> String {
    match x.abs() {
        _ if x == 0.0 => "0".into(),
        0.01..10.0 => format!("{x:.2}"),
        10.0..100.0 => format!("{x:.1}"),
        100.0..100_000.0 => format!("{x:.0}"),
        _ => format!("{x:.1e}"),
    }
}
