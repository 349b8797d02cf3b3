//! Node tests of the ONNX operator `Softmax` (opset 13), run as attention with a given score matrix.
//!
//! The scores are the bias of products that are all 0, and the weights are the result, so that the kernel `softmax` does the work. There
//! is one difference to the operator: a score of −∞ hides its key, so that a row of only −∞ gives 0 and not NaN.

use serde::Deserialize;
use wgpu_attention::{Broadcast, Problem};

use super::case::{Call, Case, Expectation, Quantity, Work};
use super::files::Loaded;
use crate::archive::Archive;
use crate::difference::Rule;
use crate::error::Result;
use crate::floats::Floats;
use crate::operands::{OwnedInputs, set_bias};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    axis: i64,
}

impl Default for Attributes {
    fn default() -> Self {
        Attributes { axis: -1 }
    }
}

pub fn load(archive: &Archive) -> Result<Loaded> {
    let name = archive.stem();
    let opset: u32 = archive.json_or("opset", "a number", 13)?;
    if opset < 13 {
        return Ok(Loaded::Unsupported { name, why: format!("Softmax of opset {opset} takes several axes at once") });
    }
    let Attributes { axis } = archive.json_or("attributes", "a JSON object with axis", Attributes::default())?;
    let shape = archive.sizes("in.x")?;
    archive.expect_shape("out.y", archive.shape("in.x")?)?;
    let rank = shape.len() as i64;
    let axis = if axis < 0 { axis + rank } else { axis };
    let Some(&size) = usize::try_from(axis).ok().and_then(|axis| shape.get(axis)) else {
        return Err(archive.bad_metadata("attributes", "an axis of the tensor"));
    };
    let x = archive.f32s("in.x")?;
    let Ok(count) = u32::try_from(x.len()) else {
        return Err(archive.wrong_shape("in.x", "of less than 2³² elements"));
    };
    // An empty tensor may have axes of any size, so they are not used as sizes.
    let keys = if count == 0 { 0 } else { size };
    let behind = if count == 0 { 0 } else { shape[axis as usize + 1..].iter().product::<u32>() };
    let last = |x: &[f32]| rows_last(x, keys as usize, behind as usize);
    let scores = last(x);
    let rows = count / keys.max(1);

    let mut problem = Problem::new(1, 1, rows, keys, 1);
    problem.weights = true;
    let zeros = |count: u32| Floats::F32(vec![0.0; count as usize]);
    let mut operands = OwnedInputs::new(zeros(rows), zeros(keys), zeros(keys));
    set_bias(&mut problem, &mut operands.operands, Broadcast([1, 1, rows, keys]), Floats::F32(scores));
    let rule = Rule { atol: archive.json("atol", "a number")?, rtol: archive.json("rtol", "a number")? };
    let expectation = Expectation::new("out.y", Quantity::Weights, last(archive.f32s("out.y")?), rule);
    let work = Work::Scores { problem: problem.into(), operands: operands.into() };
    let call = Call { label: "", work, expectations: vec![expectation] };
    Ok(Loaded::Cases(vec![Case { name, calls: vec![call], notes: Vec::new() }]))
}

/// A [before, keys, behind] tensor as [before, behind, keys].
fn rows_last(x: &[f32], keys: usize, behind: usize) -> Vec<f32> {
    let block = (keys * behind).max(1);
    x.chunks_exact(block)
        .flat_map(|block| (0..behind).flat_map(move |i| (0..keys).map(move |key| block[key * behind + i])))
        .collect()
}

#[cfg(test)]
mod tests {
    use wgpu_attention::reference;

    use super::*;
    use crate::archive::builder::Builder;

    fn columns() -> Builder {
        let (low, high) = (1.0 / 3.0, 2.0 / 3.0);
        Builder::default()
            .text("op", "Softmax")
            .text("opset", "13")
            .text("attributes", r#"{"axis": 0}"#)
            .text("rtol", "1e-6")
            .text("atol", "0.0")
            .f32s("in.x", &[2, 2], &[0.0, 9.0, 2f32.ln(), 9.0])
            .f32s("out.y", &[2, 2], &[low, 0.5, high, 0.5])
    }

    fn passes(file: &Builder) -> bool {
        let Loaded::Cases(cases) = load(&file.archive()).unwrap() else { panic!("not supported") };
        let call = &cases[0].calls[0];
        let Work::Scores { problem, operands } = &call.work else { panic!("not a score matrix") };
        let outputs = reference::attention::<f32>(problem, &operands.inputs()).unwrap();
        call.verdicts(&outputs, &[]).iter().all(|verdict| verdict.difference.passes())
    }

    #[test]
    fn a_case_passes_or_not() {
        assert!(passes(&columns()));
        assert!(passes(&columns().text("attributes", r#"{"axis": -2}"#)));
        assert!(!passes(&columns().text("attributes", "{}")));
        // Axes of 0: no score in a column, and no column.
        assert!(passes(&columns().f32s("in.x", &[0, 2], &[]).f32s("out.y", &[0, 2], &[])));
        assert!(passes(&columns().f32s("in.x", &[2, 0], &[]).f32s("out.y", &[2, 0], &[])));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |file: Builder| load(&file.archive()).unwrap_err().to_string();
        assert!(error(columns().text("attributes", r#"{"axis": 2}"#)).contains("an axis of the tensor"));
        assert!(error(columns().f32s("out.y", &[4], &[0.0; 4])).contains("\"out.y\" has shape [4]"));
        let old = load(&columns().text("opset", "11").archive()).unwrap();
        assert!(matches!(old, Loaded::Unsupported { why, .. } if why.contains("opset 11")));
    }

    #[test]
    fn sizes_of_an_empty_tensor_are_not_held() {
        for (shape, axis) in [([0, u32::MAX as usize, 1], 1), ([65537, 65537, 0], 0), ([0, 65537, 65537], 0)] {
            let file = columns().text("attributes", &format!(r#"{{"axis": {axis}}}"#));
            let file = file.f32s("in.x", &shape, &[]).f32s("out.y", &shape, &[]);
            let Loaded::Cases(cases) = load(&file.archive()).unwrap() else { panic!("not supported") };
            let Work::Scores { problem, operands } = &cases[0].calls[0].work else { panic!("not a score matrix") };
            assert_eq!((problem.seq_q, problem.seq_kv, operands.k.elements().len()), (0, 0, 0), "{shape:?}");
        }
    }
}
