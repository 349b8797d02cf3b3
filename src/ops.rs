//! The operations beside attention, as pure data: what each is asked for, its check, and its dispatches.

pub(crate) mod advance;
pub(crate) mod append;
pub(crate) mod average;
pub(crate) mod extra;
pub(crate) mod merge;
pub(crate) mod pack;
pub(crate) mod project;
pub(crate) mod rotary;

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::dispatch::step::Step;
use crate::dispatch::steps::Steps;

/// The dispatches that `add` adds to the steps of a device.
fn plan(caps: &Caps, options: &Options, add: impl FnOnce(&mut Steps<'_>) -> Result<()>) -> Result<Vec<Step>> {
    caps.check()?;
    let mut steps = Steps::new(caps, options);
    add(&mut steps)?;
    Ok(steps.finish().0)
}

/// Checks host slices: each operand's name, the elements given and those needed.
fn check_lengths(operands: &[(&'static str, usize, u64)]) -> Result<()> {
    match operands.iter().find(|&&(_, got, want)| got as u64 != want) {
        Some(&(field, got, want)) => Err(Error::Length { field, got, want: want as usize }),
        None => Ok(()),
    }
}
