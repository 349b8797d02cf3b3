//! Node tests of the ONNX operator `RotaryEmbedding` (opset 23).

use serde::Deserialize;
use wgpu_attention::Strides;
use wgpu_attention::operations::Rotation;

use super::case::{Call, Case, Expectation, Quantity, RotationWork, Work};
use super::files::Loaded;
use crate::archive::Archive;
use crate::difference::Rule;
use crate::error::Result;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    interleaved: u32,
    num_heads: u32,
    rotary_embedding_dim: u32,
}

pub fn load(archive: &Archive) -> Result<Loaded> {
    let want = "a JSON object with interleaved, num_heads and rotary_embedding_dim";
    let attributes: Attributes = archive.json_or("attributes", want, Attributes::default())?;
    let x = archive.floats("in.input")?.clone();
    let merged = |batch: u32, rows: u32, width: u32| {
        let (heads, wide) = (attributes.num_heads, u64::from(width));
        let dim = width / heads;
        let x = Strides { offset: 0, batch: u64::from(rows) * wide, head: dim.into(), row: wide };
        (batch, heads, rows, dim, x)
    };
    let (batch, heads, rows, dim, strides) = match archive.sizes("in.input")?[..] {
        [batch, heads, rows, dim] => (batch, heads, rows, dim, Rotation::new(batch, heads, rows, dim, 1).x),
        [batch, rows, width] if attributes.num_heads > 0 && width.is_multiple_of(attributes.num_heads) => {
            merged(batch, rows, width)
        }
        _ => return Err(archive.wrong_shape("in.input", "4-D, or 3-D with a last axis divisible by num_heads")),
    };
    let rotary_dim = if attributes.rotary_embedding_dim == 0 { dim } else { attributes.rotary_embedding_dim };
    let half = (rotary_dim / 2) as usize;
    let explicit = archive.has("in.position_ids");
    let shape = archive.shape("in.cos_cache")?.to_vec();
    let fits = match shape[..] {
        [_, last] => explicit && last == half,
        [b, r, last] => !explicit && [b, r, last] == [batch as usize, rows as usize, half],
        _ => false,
    };
    if !fits || half == 0 {
        let want = if explicit { format!("[positions, {half}]") } else { format!("[{batch}, {rows}, {half}]") };
        return Err(archive.wrong_shape("in.cos_cache", want));
    }
    let (cos, sin) = (archive.f32s("in.cos_cache")?, archive.f32s_of("in.sin_cache", &shape)?);
    let table = cos.chunks(half).zip(sin.chunks(half)).flat_map(|(cos, sin)| [cos, sin].concat()).collect();
    let positions = if explicit {
        archive.expect_shape("in.position_ids", &[batch as usize, rows as usize])?;
        archive.indices("in.position_ids")?
    } else {
        (0..batch * rows).collect()
    };
    let mut rotation = Rotation::new(batch, heads, rows, dim, (cos.len() / half) as u32);
    (rotation.x, rotation.rotary_dim, rotation.element) = (strides, rotary_dim, x.element());
    rotation.interleaved = attributes.interleaved != 0;
    let rule = Rule { atol: archive.json("atol", "a number")?, rtol: archive.json("rtol", "a number")? };
    archive.expect_shape("out.output", archive.shape("in.input")?)?;
    let want = archive.floats("out.output")?.widened();
    let expectation = Expectation::new("out.output", Quantity::Out, want, rule);
    let work = Work::Rotation(Box::new(RotationWork { rotation, x, table, positions }));
    let call = Call { label: "", work, expectations: vec![expectation] };
    Ok(Loaded::Cases(vec![Case { name: archive.stem(), calls: vec![call], notes: Vec::new() }]))
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use wgpu_attention::{Outputs, reference};

    use super::*;
    use crate::archive::builder::Builder;

    /// A rotation of (1, 2) by a right angle, then two elements that are not rotated.
    fn quarter() -> Builder {
        Builder::default()
            .text("op", "RotaryEmbedding")
            .text("attributes", r#"{"rotary_embedding_dim": 2}"#)
            .text("rtol", "0.0")
            .text("atol", "1e-7")
            .f32s("in.input", &[1, 1, 1, 4], &[1.0, 2.0, 3.0, 4.0])
            .f32s("in.cos_cache", &[2, 1], &[1.0, 0.0])
            .f32s("in.sin_cache", &[2, 1], &[0.0, 1.0])
            .tensor("in.position_ids", Dtype::I64, &[1, 1], &1i64.to_le_bytes())
            .f32s("out.output", &[1, 1, 1, 4], &[-2.0, 1.0, 3.0, 4.0])
    }

    fn passes(file: &Builder) -> bool {
        let Loaded::Cases(cases) = load(&file.archive()).unwrap() else { panic!("not supported") };
        let call = &cases[0].calls[0];
        let Work::Rotation(work) = &call.work else { panic!("not a rotation") };
        let (out, _) =
            reference::rotary::<f32>(&work.rotation, work.x.elements(), &work.table, &work.positions).unwrap();
        let outputs = Outputs::new(out);
        call.verdicts(&outputs, &[]).iter().all(|verdict| verdict.difference.passes())
    }

    #[test]
    fn a_case_passes_or_not() {
        assert!(passes(&quarter()));
        assert!(!passes(&quarter().f32s("out.output", &[1, 1, 1, 4], &[2.0, 1.0, 3.0, 4.0])));
        assert!(!passes(&quarter().tensor("in.position_ids", Dtype::I64, &[1, 1], &[0; 8])));
        // Without a row there is no angle either.
        let none = quarter().without("in.position_ids").f32s("in.input", &[1, 1, 0, 4], &[]);
        let none = none.f32s("in.cos_cache", &[1, 0, 1], &[]).f32s("in.sin_cache", &[1, 0, 1], &[]);
        assert!(passes(&none.f32s("out.output", &[1, 1, 0, 4], &[])));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |file: Builder| load(&file.archive()).unwrap_err().to_string();
        assert!(error(quarter().without("in.position_ids")).contains("\"in.cos_cache\" has shape [2, 1]"));
        assert!(error(quarter().f32s("in.sin_cache", &[1, 1], &[0.0])).contains("\"in.sin_cache\" has shape [1, 1]"));
        assert!(error(quarter().text("attributes", r#"{"scale": 2}"#)).contains("metadata \"attributes\""));
        assert!(error(quarter().f32s("in.input", &[4], &[0.0; 4])).contains("\"in.input\" has shape [4]"));
    }

    #[test]
    fn what_no_rotation_can_be_is_refused_before_it_runs() {
        let refused = |file: Builder| {
            let Loaded::Cases(cases) = load(&file.archive()).unwrap() else { panic!("not supported") };
            cases[0].calls[0].check().unwrap_err().to_string()
        };
        let table = |file: Builder, shape: &[usize]| {
            let values = vec![0.0; shape.iter().product()];
            file.f32s("in.cos_cache", shape, &values).f32s("in.sin_cache", shape, &values)
        };
        let wide = table(quarter().text("attributes", r#"{"rotary_embedding_dim": 6}"#), &[2, 3]);
        assert!(refused(wide).contains("rotary_dim is 6"));
        let odd = quarter().text("attributes", r#"{"rotary_embedding_dim": 3}"#);
        assert!(refused(odd).contains("rotary_dim is 3"));
        assert!(refused(table(quarter(), &[0, 1])).contains("table_rows is 0"));
    }
}
