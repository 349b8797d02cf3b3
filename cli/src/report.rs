//! What goes to standard output: tables and lines for people, or one JSON object a line for machines.

use std::io::{self, Write};
use std::ops::Deref;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

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

/// Time between the lines that stand in for a bar.
const EVERY: Duration = Duration::from_secs(5);

/// A bar on standard error. Where that is no terminal, a line says there now and then how far the command is, also when it does
/// not get any further.
pub struct Progress {
    bar: ProgressBar,
    /// The lines end with this.
    _until: Sender<()>,
}

impl Deref for Progress {
    type Target = ProgressBar;
    fn deref(&self) -> &ProgressBar {
        &self.bar
    }
}

/// A bar of so many steps.
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

/// A number of things: `1 slice`, `2 slices`.
pub fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
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
