//! A safetensors file, decoded, with getters that name the file and the tensor when something is wrong.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use wgpu_attention::Broadcast;

use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::memory;

/// A decoded tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    dtype: Dtype,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    Floats(Floats),
    Bools(Vec<u8>),
    Integers(Vec<i64>),
    /// A type that this program does not read.
    Other,
}

/// A whole file.
#[derive(Debug)]
pub struct Archive {
    pub path: PathBuf,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

/// Decodes little-endian elements of any alignment.
fn decode<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| read(chunk)).collect()
}

impl Archive {
    pub fn read(path: &Path) -> Result<Self> {
        let file = |source| Error::File { path: path.into(), source };
        let length = std::fs::metadata(path).map_err(file)?.len();
        // Three copies: the bytes of the file, the decoded tensors, and the operands.
        memory::room("the file", 3 * length).map_err(|source| Error::Problem { path: path.into(), source })?;
        let bytes = std::fs::read(path).map_err(file)?;
        Self::parse(path, &bytes)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let format = |source| Error::Safetensors { path: path.into(), source };
        let views = SafeTensors::deserialize(bytes).map_err(format)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(format)?;
        let tensors = views.iter().map(|(name, view)| {
            let bytes = view.data();
            let data = match view.dtype() {
                Dtype::F32 => Data::Floats(Floats::F32(decode(bytes, f32::from_le_bytes))),
                Dtype::F16 => Data::Floats(Floats::F16(decode(bytes, f16::from_le_bytes))),
                Dtype::BF16 => Data::Floats(Floats::Bf16(decode(bytes, bf16::from_le_bytes))),
                Dtype::BOOL => Data::Bools(bytes.to_vec()),
                Dtype::I32 => Data::Integers(decode(bytes, |b| i32::from_le_bytes(b).into())),
                Dtype::U32 => Data::Integers(decode(bytes, |b| u32::from_le_bytes(b).into())),
                Dtype::I64 => Data::Integers(decode(bytes, i64::from_le_bytes)),
                _ => Data::Other,
            };
            (name.to_string(), Tensor { shape: view.shape().to_vec(), dtype: view.dtype(), data })
        });
        Ok(Archive {
            path: path.into(),
            tensors: tensors.collect(),
            metadata: header.metadata().clone().unwrap_or_default(),
        })
    }

    /// The file's name without its ending.
    pub fn stem(&self) -> String {
        self.path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The type of a tensor.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.tensor(name)?.dtype)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor { path: self.path.clone(), tensor: name.into() })
    }

    fn wrong_type(&self, name: &str, got: Dtype, want: &'static str) -> Error {
        Error::TensorType { path: self.path.clone(), tensor: name.into(), got, want }
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.tensor(name)?.shape)
    }

    pub fn wrong_shape(&self, name: &str, want: impl Into<String>) -> Error {
        let got = self.tensors.get(name).map(|t| t.shape.clone()).unwrap_or_default();
        Error::TensorShape { path: self.path.clone(), tensor: name.into(), got, want: want.into() }
    }

    /// Checks a tensor's shape.
    pub fn expect_shape(&self, name: &str, want: &[usize]) -> Result<()> {
        if self.shape(name)? == want { Ok(()) } else { Err(self.wrong_shape(name, format!("{want:?}"))) }
    }

    /// f32, f16 or bf16 elements.
    pub fn floats(&self, name: &str) -> Result<&Floats> {
        let tensor = self.tensor(name)?;
        match &tensor.data {
            Data::Floats(x) => Ok(x),
            _ => Err(self.wrong_type(name, tensor.dtype, "F32, F16 or BF16")),
        }
    }

    /// f32 elements.
    pub fn f32s(&self, name: &str) -> Result<&[f32]> {
        match self.floats(name)? {
            Floats::F32(x) => Ok(x),
            _ => Err(self.wrong_type(name, self.tensor(name)?.dtype, "F32")),
        }
    }

    /// f32 elements of a tensor of the given shape.
    pub fn f32s_of(&self, name: &str, shape: &[usize]) -> Result<&[f32]> {
        self.expect_shape(name, shape)?;
        self.f32s(name)
    }

    /// Whether a tensor is boolean.
    pub fn is_bool(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|t| t.dtype == Dtype::BOOL)
    }

    /// Boolean elements, one byte each.
    pub fn bools(&self, name: &str) -> Result<&[u8]> {
        let tensor = self.tensor(name)?;
        match &tensor.data {
            Data::Bools(x) => Ok(x),
            _ => Err(self.wrong_type(name, tensor.dtype, "BOOL")),
        }
    }

    /// Lengths or boundaries, one axis: integers from 0 to 2³¹ − 1.
    pub fn lengths(&self, name: &str) -> Result<Vec<u32>> {
        let values = self.indices(name)?;
        if self.shape(name)?.len() == 1 { Ok(values) } else { Err(self.wrong_shape(name, "of rank 1")) }
    }

    /// Integers from 0 to 2³¹ − 1 of any rank.
    pub fn indices(&self, name: &str) -> Result<Vec<u32>> {
        let tensor = self.tensor(name)?;
        let Data::Integers(values) = &tensor.data else {
            return Err(self.wrong_type(name, tensor.dtype, "I32, U32 or I64"));
        };
        let length = |(index, &value): (usize, &i64)| match i32::try_from(value) {
            Ok(n @ 0..) => Ok(n as u32),
            _ => Err(Error::TensorValue {
                path: self.path.clone(),
                tensor: name.into(),
                index,
                value,
                want: "from 0 to 2147483647".into(),
            }),
        };
        values.iter().enumerate().map(length).collect()
    }

    /// The shape of a mask or bias as the library's broadcast.
    pub fn broadcast(&self, field: &'static str, name: &str) -> Result<Broadcast> {
        let sizes = self.sizes(name)?;
        Broadcast::new(field, &sizes).map_err(|source| self.problem(source))
    }

    /// The shape of a tensor in u32.
    pub fn sizes(&self, name: &str) -> Result<Vec<u32>> {
        let axis = |&n: &usize| u32::try_from(n).map_err(|_| self.wrong_shape(name, "below 2³² on each axis"));
        self.shape(name)?.iter().map(axis).collect()
    }

    /// The shape of a tensor that must have rank `N`, in u32.
    pub fn sizes_of_rank<const N: usize>(&self, name: &str) -> Result<[u32; N]> {
        self.sizes(name)?.try_into().map_err(|_| self.wrong_shape(name, format!("of rank {N}")))
    }

    /// Wraps an error of the library with the path of this file.
    pub fn problem(&self, source: wgpu_attention::Error) -> Error {
        Error::Problem { path: self.path.clone(), source }
    }

    /// The text of a metadata value, if there is one.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A metadata value that holds JSON text.
    pub fn json<T: DeserializeOwned>(&self, key: &str, want: &str) -> Result<T> {
        let text = self.text(key).ok_or_else(|| Error::MissingMetadata { path: self.path.clone(), key: key.into() })?;
        serde_json::from_str(text).map_err(|_| self.bad_metadata(key, want))
    }

    /// Like [`Archive::json`], with a default for an absent key.
    pub fn json_or<T: DeserializeOwned>(&self, key: &str, want: &str, absent: T) -> Result<T> {
        if self.metadata.contains_key(key) { self.json(key, want) } else { Ok(absent) }
    }

    pub fn bad_metadata(&self, key: &str, want: &str) -> Error {
        let value = self.text(key).unwrap_or_default().chars().take(80).collect();
        Error::Metadata { path: self.path.clone(), key: key.into(), value, want: want.into() }
    }
}

/// Builds files for tests.
#[cfg(test)]
pub mod builder {
    use std::collections::HashMap;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    /// The tensors and metadata of a file to write.
    #[derive(Default)]
    pub struct Builder {
        tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
        metadata: HashMap<String, String>,
    }

    impl Builder {
        pub fn text(mut self, key: &str, value: &str) -> Self {
            self.metadata.insert(key.into(), value.into());
            self
        }

        pub fn f32s(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
            self.tensor(name, Dtype::F32, shape, bytemuck::cast_slice(values))
        }

        pub fn tensor(mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Self {
            self.tensors.insert(name.into(), (dtype, shape.to_vec(), bytes.to_vec()));
            self
        }

        pub fn without(mut self, name: &str) -> Self {
            self.tensors.remove(name);
            self
        }

        pub fn bytes(&self) -> Vec<u8> {
            let views = self
                .tensors
                .iter()
                .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
            safetensors::serialize(views, Some(self.metadata.clone())).unwrap()
        }

        pub fn archive(&self) -> Archive {
            Archive::parse(Path::new("case.safetensors"), &self.bytes()).unwrap()
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn archive(bytes: &[u8]) -> Result<Archive> {
        Archive::parse(Path::new("folder/case.safetensors"), bytes)
    }

    fn file(dtype: Dtype, shape: Vec<usize>, data: &[u8]) -> Vec<u8> {
        let view = TensorView::new(dtype, shape, data).unwrap();
        safetensors::serialize([("x", view)], None).unwrap()
    }

    #[test]
    fn truncated_files_are_errors_that_name_the_file() {
        let whole = file(Dtype::F32, vec![2], &[0; 8]);
        for keep in 0..whole.len() {
            let error = archive(&whole[..keep]).unwrap_err().to_string();
            assert!(error.contains("folder/case.safetensors"), "{error}");
        }
        assert!(archive(&whole).is_ok());
    }

    #[test]
    fn missing_and_wrong_tensors_are_named() {
        let floats = archive(&file(Dtype::F32, vec![1, 2], &[0; 8])).unwrap();
        let text = |error: Error| error.to_string();
        assert!(text(floats.floats("q").unwrap_err()).contains("\"q\" is missing"));
        assert!(text(floats.bools("x").unwrap_err()).contains("type F32; it must be BOOL"));
        assert!(text(floats.lengths("x").unwrap_err()).contains("it must be I32"));
        assert!(text(floats.expect_shape("x", &[2, 1]).unwrap_err()).contains("shape [1, 2]; it must be [2, 1]"));
        let negative = archive(&file(Dtype::I32, vec![2], &[1, 0, 0, 0, 255, 255, 255, 255])).unwrap();
        assert!(text(negative.lengths("x").unwrap_err()).contains("holds -1 at index 1"));
        let odd = archive(&file(Dtype::F64, vec![1], &[0; 8])).unwrap();
        assert!(text(odd.floats("x").unwrap_err()).contains("type F64"));
    }

    #[test]
    fn sixteen_bit_elements_are_decoded() {
        let bytes = [f16::from_f32(1.5).to_le_bytes(), f16::from_f32(-2.0).to_le_bytes()].concat();
        let archive = archive(&file(Dtype::F16, vec![2], &bytes)).unwrap();
        assert_eq!(archive.floats("x").unwrap().widened(), [1.5, -2.0]);
    }

    #[test]
    fn metadata_must_be_json() {
        let bytes = file(Dtype::F32, vec![1], &[0; 4]);
        let archive = archive(&bytes).unwrap();
        assert!(archive.json::<f64>("tol", "a number").unwrap_err().to_string().contains("\"tol\" is missing"));
    }
}
