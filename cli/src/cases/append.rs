//! Node tests of the ONNX operator `TensorScatter` (opset 24): new rows for a cache.

use serde::Deserialize;
use wgpu_attention::operations::Append;

use super::case::{AppendWork, Call, Case, Expectation, Quantity, Work};
use super::files::Loaded;
use crate::archive::Archive;
use crate::difference::Rule;
use crate::error::Result;

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    #[default]
    Linear,
    Circular,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    axis: i64,
    mode: Mode,
}

impl Default for Attributes {
    fn default() -> Self {
        Attributes { axis: -2, mode: Mode::Linear }
    }
}

pub fn load(archive: &Archive) -> Result<Loaded> {
    let want = "a JSON object with axis and mode, linear or circular";
    let Attributes { axis, mode } = archive.json_or("attributes", want, Attributes::default())?;
    let (cache, x) = (archive.floats("in.past_cache")?.clone(), archive.floats("in.update")?.clone());
    let sizes = archive.sizes("in.past_cache")?;
    let rank = sizes.len() as i64;
    let axis = if axis < 0 { axis + rank } else { axis };
    if !(1..rank).contains(&axis) {
        return Err(archive.bad_metadata("attributes", "an axis of the cache behind the first"));
    }
    let axis = axis as usize;
    let new = archive.sizes("in.update")?;
    let rows = *new.get(axis).ok_or_else(|| archive.wrong_shape("in.update", "of the cache's rank"))?;
    let mut want = archive.shape("in.past_cache")?.to_vec();
    archive.expect_shape("out.present_cache", &want)?;
    want[axis] = rows as usize;
    archive.expect_shape("in.update", &want)?;

    // An empty cache may have axes of any size; the library refuses those that are too large.
    let product = |sizes: &[u32]| sizes.iter().fold(1, |product: u32, &n| product.saturating_mul(n));
    let [batch, heads, dim] = [sizes[0], product(&sizes[1..axis]), product(&sizes[axis + 1..])];
    let mut append = Append::new(batch, heads, rows, sizes[axis], dim);
    (append.element, append.circular) = (cache.element(), matches!(mode, Mode::Circular));
    let starts = match archive.has("in.write_indices") {
        true => archive.lengths("in.write_indices")?,
        false => vec![0; batch as usize],
    };
    // A copy is exact, whatever tolerance the file gives.
    let (want, rule) = (archive.floats("out.present_cache")?.widened(), Rule { atol: 0.0, rtol: 0.0 });
    let expectation = Expectation::new("out.present_cache", Quantity::Out, want, rule);
    let work = Work::Append(Box::new(AppendWork { append, x, cache, starts }));
    let call = Call { label: "", work, expectations: vec![expectation] };
    Ok(Loaded::Cases(vec![Case { name: archive.stem(), calls: vec![call], notes: Vec::new() }]))
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use wgpu_attention::{Outputs, reference};

    use super::*;
    use crate::archive::builder::Builder;

    /// Two new rows of one element for a cache of three rows; the first one goes to the last row.
    fn circular() -> Builder {
        Builder::default()
            .text("op", "TensorScatter")
            .text("attributes", r#"{"mode": "circular"}"#)
            .f32s("in.past_cache", &[1, 3, 1], &[1.0, 2.0, 3.0])
            .f32s("in.update", &[1, 2, 1], &[8.0, 9.0])
            .tensor("in.write_indices", Dtype::I64, &[1], &2i64.to_le_bytes())
            .f32s("out.present_cache", &[1, 3, 1], &[9.0, 2.0, 8.0])
    }

    fn passes(file: &Builder) -> bool {
        let Loaded::Cases(cases) = load(&file.archive()).unwrap() else { panic!("not supported") };
        let call = &cases[0].calls[0];
        let Work::Append(work) = &call.work else { panic!("not an append") };
        let mut out = work.cache.widened();
        reference::append(&work.append, &work.x.widened(), &mut out, &work.starts, None).unwrap();
        let outputs = Outputs::new(out);
        call.verdicts(&outputs, &[]).iter().all(|verdict| verdict.difference.passes())
    }

    #[test]
    fn a_case_passes_or_not() {
        assert!(passes(&circular()));
        assert!(!passes(&circular().text("attributes", "{}")));
        assert!(passes(&circular().text("attributes", r#"{"axis": 1, "mode": "circular"}"#)));
        let first = circular().without("in.write_indices").f32s("out.present_cache", &[1, 3, 1], &[8.0, 9.0, 3.0]);
        assert!(passes(&first));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |file: Builder| load(&file.archive()).unwrap_err().to_string();
        for attributes in [r#"{"axis": 0}"#, r#"{"axis": 3}"#, r#"{"axis": -4}"#] {
            assert!(error(circular().text("attributes", attributes)).contains("an axis of the cache"), "{attributes}");
        }
        assert!(error(circular().text("attributes", r#"{"mode": "spiral"}"#)).contains("linear or circular"));
        assert!(error(circular().f32s("in.update", &[1, 2], &[0.0; 2])).contains("\"in.update\" has shape [1, 2]"));
        assert!(error(circular().f32s("in.update", &[2, 2, 1], &[0.0; 4])).contains("\"in.update\" has shape"));
    }

    #[test]
    fn sizes_of_an_empty_cache_do_not_wrap_around() {
        let wide = [1, 65537, 65537, 3, 0];
        let file = circular().text("attributes", r#"{"axis": 3}"#).f32s("in.past_cache", &wide, &[]);
        let file = file.f32s("in.update", &[1, 65537, 65537, 2, 0], &[]).f32s("out.present_cache", &wide, &[]);
        let Loaded::Cases(cases) = load(&file.archive()).unwrap() else { panic!("not supported") };
        let Work::Append(work) = &cases[0].calls[0].work else { panic!("not an append") };
        assert_eq!(work.append.heads, u32::MAX);
    }
}
