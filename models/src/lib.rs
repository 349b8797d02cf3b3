//! Whole models with their attention on the GPU: tokens by `tokenizers`, all but attention by `candle` on the CPU.

mod attend;
mod error;
pub mod generation;
pub mod llama;
pub mod minilm;

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use wgpu_attention::Gpu;

pub use attend::{Attend, CpuAttention, GpuAttention, Heads};
pub use error::{Error, Result};

/// The environment variable that names the folder of the models.
pub const FOLDER: &str = "WGPU_ATTENTION_MODELS";

/// The files of a model: in the folder that [`FOLDER`] names, else in `models/files`, where `scripts/models` puts them, of the current
/// folder or of one above it.
pub fn folder(model: &str) -> PathBuf {
    let below = |folder: &Path| folder.join("models").join("files");
    let named = || std::env::var_os(FOLDER).map(PathBuf::from);
    let found = || {
        let here = std::env::current_dir().ok()?;
        here.ancestors().map(below).find(|files| files.is_dir())
    };
    named().or_else(found).unwrap_or_else(|| below(Path::new(""))).join(model)
}

/// The values of a tensor, in its own order.
fn values(tensor: &candle_core::Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// The adapter that `wanted` names, or the best one.
///
/// # Errors
///
/// [`Error::Attention`] with those of [`Gpu::named`] if `wanted` names an adapter, else with those of [`Gpu::new`].
pub fn open(wanted: Option<&str>) -> Result<Gpu> {
    Ok(wanted.map_or_else(Gpu::new, Gpu::named)?)
}

/// A bar for bytes on standard error; hidden when that is not a terminal.
pub fn bytes_bar(message: &'static str) -> ProgressBar {
    bar("{msg} {bar:30} {bytes}/{total_bytes}", message)
}

/// The same for things that are counted.
pub fn count_bar(message: &'static str) -> ProgressBar {
    bar("{msg} {bar:30} {pos}/{len}", message)
}

fn bar(template: &str, message: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the templates are constants");
    ProgressBar::new(0).with_style(style).with_message(message)
}
