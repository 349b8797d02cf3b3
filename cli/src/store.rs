//! The files in the user's cache folder, for each adapter: the tuning rows that `tune` measured, what trials showed of the driver, and
//! the driver's compiled pipelines.
//! No file is necessary; one that cannot be used is ignored with a warning.

use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use wgpu_attention::Gpu;
use wgpu_attention::proof::Proof;
use wgpu_attention::tuning::{Row, Tuning};
use wgpu_attention::wgpu::{AdapterInfo, util::pipeline_cache_key};
use wgpu_attention_heatmap::replace;

use crate::engine::{DeviceArgs, Label};
use crate::error::{Error, Result};
use crate::report;

/// The environment variable that names a folder to use instead of the user's cache folder.
pub const FOLDER: &str = "WGPU_ATTENTION_CACHE";

/// The cache folder; `None` on a system without one.
pub fn folder() -> Option<PathBuf> {
    match std::env::var_os(FOLDER) {
        Some(folder) if !folder.is_empty() => Some(folder.into()),
        _ => dirs::cache_dir().map(|folder| folder.join("wgpu-attention")),
    }
}

/// The path of the tuning rows of an adapter.
pub fn tuning_file(folder: &Path, info: &AdapterInfo) -> PathBuf {
    file(folder, "tuning", info)
}

fn file(folder: &Path, what: &str, info: &AdapterInfo) -> PathBuf {
    let name = format!("{} {}", info.backend, info.name).to_lowercase();
    let words: Vec<_> = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    folder.join(format!("{what}-{}.json", words.join("-")))
}

/// The adapter, driver and version that a file was written with. A file of another one is not used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Origin {
    version: String,
    #[serde(flatten)]
    label: Label,
}

impl Origin {
    fn of(info: &AdapterInfo) -> Self {
        Origin { version: env!("CARGO_PKG_VERSION").into(), label: Label::of(info) }
    }
}

/// The contents of a file: its origin, then the rest.
#[derive(Serialize)]
struct File<T> {
    #[serde(flatten)]
    origin: Origin,
    #[serde(flatten)]
    contents: T,
}

#[derive(Serialize, Deserialize)]
struct Rows {
    rows: Vec<Row>,
}

/// Why a file cannot be used on an adapter.
enum Unusable {
    /// It was written with another version, adapter or driver.
    Origin { field: &'static str, got: String, want: String },
    /// It cannot be read.
    Damaged(String),
}

/// The contents of a file; `None` if there is no file.
fn read<T: DeserializeOwned>(path: &Path, info: &AdapterInfo) -> Result<Option<T>, Unusable> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Unusable::Damaged(error.to_string())),
    };
    // The origin is read first: a file of another version may name kernels that this version does not know.
    let damaged = |error: serde_json::Error| Unusable::Damaged(error.to_string());
    let got: Origin = serde_json::from_str(&text).map_err(damaged)?;
    let want = Origin::of(info);
    let fields = [
        ("version", &got.version, &want.version),
        ("adapter", &got.label.adapter, &want.label.adapter),
        ("backend", &got.label.backend, &want.label.backend),
        ("driver", &got.label.driver, &want.label.driver),
    ];
    if let Some((field, got, want)) = fields.into_iter().find(|(_, got, want)| got != want) {
        return Err(Unusable::Origin { field, got: got.clone(), want: want.clone() });
    }
    serde_json::from_str(&text).map(Some).map_err(damaged)
}

/// Stores what was found on an adapter.
fn write_contents(path: &Path, info: &AdapterInfo, contents: impl Serialize) -> Result<()> {
    let file = File { origin: Origin::of(info), contents };
    let text = serde_json::to_string_pretty(&file).map_err(io::Error::from)?;
    write(path, text.as_bytes())
}

/// The rows of a file; `None` if there is no file, and the reason if the rows cannot be used on this adapter.
pub fn read_tuning(path: &Path, info: &AdapterInfo) -> Result<Option<Tuning>, String> {
    match read::<Rows>(path, info) {
        Ok(rows) => Ok(rows.map(|Rows { rows }| Tuning { source: path.display().to_string(), rows })),
        Err(Unusable::Origin { field, got, want }) => {
            Err(format!("measured with {field} {got:?}, this is {want:?}; `wgpu-attention tune` measures again"))
        }
        Err(Unusable::Damaged(why)) => Err(format!("not tuned rows: {why}")),
    }
}

/// Stores rows that were measured on an adapter.
pub fn write_tuning(path: &Path, info: &AdapterInfo, rows: &[Row]) -> Result<()> {
    write_contents(path, info, Rows { rows: rows.to_vec() })
}

/// What trials showed of an adapter's driver, with the path of the file. A file of another version, adapter or driver is nothing to warn
/// of: the trials run again.
fn read_proof(folder: &Path, info: &AdapterInfo) -> (PathBuf, Proof) {
    let path = file(folder, "proof", info);
    let proof = match read::<Proof>(&path, info) {
        Ok(stored) => stored.unwrap_or_default(),
        Err(Unusable::Origin { .. }) => Proof::default(),
        Err(Unusable::Damaged(why)) => {
            report::warn(format!("{}: ignored: {why}; it will be written again", path.display()));
            Proof::default()
        }
    };
    (path, proof)
}

/// What trials showed of an adapter's driver in earlier runs.
pub fn proof(info: &AdapterInfo) -> Proof {
    folder().map_or_else(Proof::default, |folder| read_proof(&folder, info).1)
}

/// Replaces a file, or creates it and its folder.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)
        .and_then(|()| replace(path, bytes))
        .map_err(|source| Error::File { path: path.into(), source })
}

/// A device that plans by the tuning rows of its adapter, and that loads and stores the pipelines that its driver compiles and what trials
/// showed of the driver.
#[derive(Debug)]
pub struct Device {
    gpu: Gpu,
    pipelines: Option<Pipelines>,
    proof: Option<StoredProof>,
}

/// What trials showed, on disk.
#[derive(Debug)]
struct StoredProof {
    path: PathBuf,
    stored: Proof,
}

/// A pipeline cache on disk.
#[derive(Debug)]
struct Pipelines {
    path: PathBuf,
    /// The contents of the file, if there is one.
    stored: Option<Vec<u8>>,
}

impl Device {
    pub fn new(gpu: Gpu, arguments: &DeviceArgs) -> Self {
        let folder = folder();
        let mut device = Device { gpu, pipelines: None, proof: None };
        let tuning = arguments.tuning.clone();
        if let Some(path) = tuning.or_else(|| folder.as_ref().map(|folder| tuning_file(folder, device.gpu.info())))
            && !arguments.untuned
        {
            device.tune(&path, arguments.tuning.is_some());
        }
        if let Some(folder) = folder {
            device.load_pipelines(&folder);
            // Other limits, features or checks are another device, on which other shaders run.
            if !arguments.low_limits && !arguments.checked {
                device.load_proof(&folder);
            }
        }
        device
    }

    fn load_proof(&mut self, folder: &Path) {
        let (path, stored) = read_proof(folder, self.gpu.info());
        self.gpu.library_mut().set_proof(stored.clone());
        self.proof = Some(StoredProof { path, stored });
    }

    fn tune(&mut self, path: &Path, must_exist: bool) {
        let ignored = |why: String| report::warn(format!("{}: ignored: {why}", path.display()));
        match read_tuning(path, self.gpu.info()) {
            Ok(Some(tuning)) => {
                let unknown = tuning.unknown().count();
                if unknown > 0 {
                    ignored(format!("{unknown} of {} rows, whose tiles do not exist", tuning.rows.len()));
                }
                self.gpu.library_mut().set_tuning(tuning);
            }
            Ok(None) if must_exist => ignored("there is no such file".into()),
            Ok(None) => {}
            Err(why) => ignored(why),
        }
    }

    fn load_pipelines(&mut self, folder: &Path) {
        let Some(name) = pipeline_cache_key(self.gpu.info()) else { return };
        let path = folder.join(name);
        let stored = std::fs::read(&path).ok();
        if let Some(data) = &stored {
            // SAFETY: the file is in the user's own cache folder, where this program wrote data that the library returned. The
            // library's checksum detects damage since then. Whoever else can write to that folder can replace this program too.
            let used = unsafe { self.gpu.library_mut().load_pipeline_cache(data) };
            if !used && self.gpu.library().pipeline_cache_data().is_some() {
                report::warn(format!(
                    "{}: ignored: damaged, or of another adapter or driver; it will be written again",
                    path.display()
                ));
            }
        }
        self.pipelines = Some(Pipelines { path, stored });
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(Pipelines { path, stored }) = &self.pipelines
            && let Some(data) = self.gpu.library().pipeline_cache_data()
            && Some(&data) != stored.as_ref()
        {
            write(path, &data).unwrap_or_else(report::warn);
        }
        if let Some(StoredProof { path, stored }) = &self.proof {
            let proof = self.gpu.library().proof();
            if proof != *stored {
                write_contents(path, self.gpu.info(), proof).unwrap_or_else(report::warn);
            }
        }
    }
}

impl Deref for Device {
    type Target = Gpu;
    fn deref(&self) -> &Gpu {
        &self.gpu
    }
}

#[cfg(test)]
mod tests {
    use wgpu_attention::Problem;
    use wgpu_attention::tuning::{Choice, Class};
    use wgpu_attention::wgpu::{Backend, DeviceType};

    use super::*;

    fn info(name: &str, driver: &str) -> AdapterInfo {
        let mut info = AdapterInfo::new(DeviceType::Cpu, Backend::Vulkan);
        (info.name, info.driver) = (name.into(), driver.into());
        info
    }

    fn row() -> Row {
        let class = Class::of(&Problem::new(1, 2, 3, 4, 5).check().unwrap());
        Row { class, choice: Choice::Unfused, ms: 0.125 }
    }

    #[test]
    fn rows_come_back_from_the_folder_of_their_adapter() {
        let folder = tempfile::tempdir().unwrap();
        let one = info("Arc(tm) A770 / 8 GB", "mesa");
        let path = tuning_file(&folder.path().join("new"), &one);
        assert!(path.ends_with("new/tuning-vulkan-arc-tm-a770-8-gb.json"), "{path:?}");
        assert_eq!(read_tuning(&path, &one), Ok(None));
        for rows in [vec![row()], vec![row(), row()]] {
            write_tuning(&path, &one, &rows).unwrap();
            let tuning = read_tuning(&path, &one).unwrap().unwrap();
            assert_eq!((tuning.rows, tuning.source), (rows, path.display().to_string()));
        }
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn rows_of_another_driver_or_adapter_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        write_tuning(&path, &info("a", "old"), &[row()]).unwrap();
        let why = read_tuning(&path, &info("a", "new")).unwrap_err();
        assert!(why.contains("driver \"old\", this is \"new\""), "{why}");
        let why = read_tuning(&path, &info("b", "old")).unwrap_err();
        assert!(why.contains("adapter \"a\", this is \"b\""), "{why}");
        // Rows of another version are reported as such, even if this version cannot read them.
        std::fs::write(&path, r#"{"version":"9","adapter":"a","backend":"vulkan","driver":"old","rows":[{"x":1}]}"#)
            .unwrap();
        let why = read_tuning(&path, &info("a", "old")).unwrap_err();
        assert!(why.contains("version \"9\""), "{why}");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let path = folder.path().join("file/x.json");
        let error = write_tuning(&path, &info("a", "b"), &[row()]).unwrap_err();
        assert!(matches!(&error, Error::File { path: named, .. } if *named == path), "{error}");
    }
}
