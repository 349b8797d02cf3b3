//! Problems and plans in JSON files.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use wgpu_attention_heatmap::replace;

use crate::error::{Error, Result};

/// Reads a file that holds a `what`.
pub fn read<T: DeserializeOwned>(path: &Path, what: &'static str) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
    serde_json::from_str(&text).map_err(|source| Error::Json { path: path.into(), what, source })
}

/// Writes a value to a file.
pub fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let file = |source| Error::File { path: path.into(), source };
    let text = serde_json::to_string_pretty(value).map_err(|error| file(error.into()))? + "\n";
    replace(path, text.as_bytes()).map_err(file)
}
