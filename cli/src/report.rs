//! Writes standard output: tables and lines for people, or one JSON object per line for machines.

use std::io::{self, Write};
use std::ops::Deref;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use comfy_table::{Table, presets};
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
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header.iter().copied());
        table.add_rows(rows.iter().cloned());
        self.line(table.trim_fmt())
    }
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
        0.01..10.0 => format!("{x:.2}"),
        10.0..100.0 => format!("{x:.1}"),
        100.0..100_000.0 => format!("{x:.0}"),
        _ => format!("{x:.1e}"),
    }
}
