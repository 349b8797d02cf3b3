//! Finds case files and picks the loader by what their metadata says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Case, append, layers, minilm, onnx, rotary, sdpa, softmax};
use crate::archive::Archive;
use crate::error::{Error, Result};

/// A file to load, or a folder that is one suite.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    File(PathBuf),
    Minilm(PathBuf),
}

impl Source {
    pub fn path(&self) -> &Path {
        match self {
            Source::File(path) | Source::Minilm(path) => path,
        }
    }
}

/// What a source holds.
#[derive(Debug)]
pub enum Loaded {
    Cases(Vec<Case>),
    /// A case that this program does not run, and why.
    Unsupported {
        name: String,
        why: String,
    },
}

/// The case files of a folder and of the folders in it, in order. Links to folders are not followed, because they may form a loop.
fn in_folder(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(|entry| entry.path());
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            files.extend(in_folder(&path)?);
        } else if path.extension().is_some_and(|ending| ending == "safetensors") {
            files.push(path);
        }
    }
    Ok(files)
}

/// Every case file in the given folders and their subfolders, and every given file, in order and without repetition.
pub fn sources(paths: &[PathBuf]) -> Result<Vec<Source>> {
    let mut found = Vec::new();
    let mut folders = BTreeSet::new();
    for path in paths {
        let at = |source| Error::File { path: path.clone(), source };
        let folder = std::fs::metadata(path).map_err(at)?.is_dir();
        let files = if folder { in_folder(path).map_err(at)? } else { vec![path.clone()] };
        if files.is_empty() {
            return Err(Error::NoCases { path: path.clone() });
        }
        for file in files {
            let folder = file.parent().unwrap_or(Path::new("")).to_path_buf();
            if !minilm::is_part(&file, &folder) {
                found.push(Source::File(file));
            } else if folders.insert(folder.clone()) {
                found.push(Source::Minilm(folder));
            }
        }
    }
    Ok(found)
}

/// Loads the cases of one source and checks each against the library's rules.
pub fn load(source: &Source) -> Result<Loaded> {
    let loaded = match source {
        Source::Minilm(folder) => Loaded::Cases(minilm::load(folder)?),
        Source::File(path) => load_file(path)?,
    };
    if let Loaded::Cases(cases) = &loaded {
        for call in cases.iter().flat_map(|case| &case.calls) {
            call.check().map_err(|error| Error::Problem { path: source.path().into(), source: error })?;
        }
    }
    Ok(loaded)
}

fn load_file(path: &Path) -> Result<Loaded> {
    let archive = Archive::read(path)?;
    let unsupported = |why: String| Ok(Loaded::Unsupported { name: archive.stem(), why });
    match (archive.text("format"), archive.text("op")) {
        (Some(sdpa::FORMAT), _) => sdpa::load(&archive),
        (Some(onnx::FORMAT) | None, Some("Attention")) => onnx::load(&archive),
        (Some(onnx::FORMAT) | None, Some("RotaryEmbedding")) => rotary::load(&archive),
        (Some(onnx::FORMAT) | None, Some("Softmax")) => softmax::load(&archive),
        (Some(onnx::FORMAT) | None, Some("TensorScatter")) => append::load(&archive),
        (Some(layers::TORCH), _) => layers::torch(&archive),
        (Some(layers::KERAS), _) => layers::keras(&archive),
        (Some(layers::TUTORIAL), _) => layers::tutorial(&archive),
        // Other operators in the same tensor naming get their loader here.
        (Some(onnx::FORMAT) | None, Some(op)) => unsupported(format!("operator {op}")),
        (Some(minilm::FORMAT), _) => unsupported("weights or sentences without the other file beside it".into()),
        (Some(format), _) => unsupported(format!("format {format}")),
        (None, None) => unsupported("no metadata says what the file holds".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    #[test]
    fn folders_in_a_folder_are_searched() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases");
        let entries = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path());
        let parts: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
        let all = sources(&[root]).unwrap();
        assert!(parts.len() > 5 && all.len() > 200);
        assert_eq!(all.len(), sources(&parts).unwrap().len());
    }

    #[test]
    fn folders_and_files_are_listed_once_and_unknown_ones_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test_flexattention.safetensors");
        let metadata = HashMap::from([("op".to_string(), "FlexAttention".to_string())]);
        let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
        std::fs::write(&path, safetensors::serialize([("in.x", view)], Some(metadata)).unwrap()).unwrap();
        std::fs::write(folder.path().join("index.json"), "{}").unwrap();
        let list = sources(&[folder.path().to_path_buf()]).unwrap();
        assert_eq!(list, [Source::File(path)]);
        let Loaded::Unsupported { name, why } = load(&list[0]).unwrap() else { panic!("subgraphs are not supported") };
        assert_eq!((name.as_str(), why.as_str()), ("test_flexattention", "operator FlexAttention"));
    }

    #[test]
    fn a_missing_folder_is_an_error() {
        let error = sources(&["no/such/folder".into()]).unwrap_err().to_string();
        assert!(error.starts_with("no/such/folder: "), "{error}");
    }

    #[test]
    fn a_broken_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.safetensors");
        std::fs::write(&path, [1, 2, 3]).unwrap();
        let error = load(&Source::File(path)).unwrap_err().to_string();
        assert!(error.contains("broken.safetensors: not a safetensors file"), "{error}");
    }
}
