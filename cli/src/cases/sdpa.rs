//! `conf-sdpa/1`: scaled dot product attention with expected output and log-sum-exp.
//!
//! `q k v` with `layout` bhsd, bshd or thd (packed, with `cu_seqlens_q` and `cu_seqlens_k`), optional `mask`, `bias`, `kv_lens` and
//! `alibi_slopes`, expected `out` (f64 rounded once to f32), `lse` and `probs`, and a tolerance per tensor in the metadata `tol`.

use serde::Deserialize;
use wgpu_attention::{Causal, Layout, Problem};

use super::case::{Call, Case, Expectation, Quantity, Work};
use super::files::Loaded;
use crate::archive::Archive;
use crate::difference::Rule;
use crate::error::Result;
use crate::request::Request;

pub const FORMAT: &str = "conf-sdpa/1";

/// Absolute tolerance of `probs` where the file gives none.
const PROBS_ATOL: f64 = 5e-6;

#[derive(Deserialize)]
struct Tolerances {
    out: Rule,
    #[serde(default)]
    lse: Option<Rule>,
    #[serde(default)]
    probs: Option<Rule>,
}

pub fn load(archive: &Archive) -> Result<Loaded> {
    let layout = match archive.text("layout").unwrap_or("bhsd") {
        "bhsd" => Layout::Bhsd,
        // Packed files lay their tokens out the same way.
        "bshd" | "thd" => Layout::Bshd,
        _ => return Err(archive.bad_metadata("layout", "bhsd, bshd or thd")),
    };
    let Request { mut problem, operands, out_shape, lse_shape } = Request::read(archive, layout)?;
    options(archive, &mut problem)?;

    let tol: Tolerances = archive.json("tol", "a JSON object with \"out\": {\"atol\", \"rtol\"}")?;
    let want = archive.f32s_of("out", &out_shape)?.to_vec();
    let mut expectations = vec![Expectation::new("out", Quantity::Out, want, tol.out)];
    if archive.has("lse") {
        problem.lse = true;
        let rule = tol.lse.ok_or_else(|| archive.bad_metadata("tol", "a JSON object with \"lse\""))?;
        let want = archive.f32s_of("lse", &lse_shape)?.to_vec();
        expectations.push(Expectation::new("lse", Quantity::Lse, want, rule));
    }
    if archive.has("probs") {
        problem.weights = true;
        let shape = [problem.batch, problem.heads, problem.seq_q, problem.seq_kv].map(|n| n as usize);
        let want = archive.f32s_of("probs", &shape)?.to_vec();
        let rule = tol.probs.unwrap_or(Rule { atol: PROBS_ATOL, rtol: tol.out.rtol });
        expectations.push(Expectation::new("probs", Quantity::Weights, want, rule));
    }
    // Files whose gradients were left out still say that they had some.
    let gradients = archive.has("dout") || archive.json_or("has_grad", "true or false", false)?;
    let notes = if gradients { vec!["gradients are not computed"] } else { Vec::new() };
    let work = Work::Attention { problem: problem.into(), operands: operands.into() };
    let call = Call { label: "", work, expectations };
    Ok(Loaded::Cases(vec![Case { name: archive.stem(), calls: vec![call], notes }]))
}

/// Scale, soft cap, causal rule and window.
fn options(archive: &Archive, problem: &mut Problem) -> Result<()> {
    if !archive.json_or("scale_is_default", "true or false", false)? {
        let scale = archive.json_or::<Option<f64>>("scale", "a number or null", None)?;
        problem.scale = scale.map(|scale| scale as f32);
    }
    let softcap = archive.json_or("softcap", "a number", 0.0f64)?;
    problem.softcap = (softcap != 0.0).then_some(softcap as f32);
    problem.causal = match archive.text("causal").unwrap_or("none") {
        "none" => Causal::None,
        "top_left" => Causal::TopLeft,
        "bottom_right" => Causal::BottomRight,
        _ => return Err(archive.bad_metadata("causal", "none, top_left or bottom_right")),
    };
    for (key, side) in [("window_left", &mut problem.window.left), ("window_right", &mut problem.window.right)] {
        let size = archive.json_or(key, "an integer", -1i64)?;
        if size != -1 {
            *side = Some(u32::try_from(size).map_err(|_| archive.bad_metadata(key, "-1 or from 0 to below 2³²"))?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use wgpu_attention::reference;

    use super::*;
    use crate::archive::builder::Builder;

    /// One query, two keys of equal score: the output is the mean of the values.
    fn mean() -> Builder {
        Builder::default()
            .text("format", FORMAT)
            .text("causal", "none")
            .text("tol", r#"{"out": {"atol": 1e-6, "rtol": 0.0}, "lse": {"atol": 1e-6}, "probs": null}"#)
            .f32s("q", &[1, 1, 1, 2], &[0.0, 0.0])
            .f32s("k", &[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0])
            .f32s("v", &[1, 1, 2, 1], &[1.0, 5.0])
            .f32s("out", &[1, 1, 1, 1], &[3.0])
            .f32s("lse", &[1, 1, 1], &[2f32.ln()])
            .f32s("probs", &[1, 1, 1, 2], &[0.5, 0.5])
    }

    fn case(file: &Builder) -> Result<Case> {
        match load(&file.archive())? {
            Loaded::Cases(mut cases) => Ok(cases.remove(0)),
            Loaded::Unsupported { why, .. } => panic!("{why}"),
        }
    }

    fn passes(file: &Builder) -> bool {
        let case = case(file).unwrap();
        let call = &case.calls[0];
        call.check().unwrap();
        let Work::Attention { problem, operands } = &call.work else { panic!("not attention") };
        let outputs = reference::attention::<f32>(problem, &operands.inputs()).unwrap();
        call.verdicts(&outputs, &[]).iter().all(|verdict| verdict.difference.passes())
    }

    #[test]
    fn a_case_passes_or_not() {
        assert!(passes(&mean()));
        assert!(!passes(&mean().f32s("out", &[1, 1, 1, 1], &[3.1])));
        assert!(!passes(&mean().f32s("lse", &[1, 1, 1], &[0.0])));
        assert!(!passes(&mean().f32s("probs", &[1, 1, 1, 2], &[0.6, 0.4])));
        let second = mean().tensor("mask", Dtype::BOOL, &[2], &[0, 1]).without("probs");
        let second = second.f32s("out", &[1, 1, 1, 1], &[5.0]).f32s("lse", &[1, 1, 1], &[0.0]);
        assert!(passes(&second));
    }

    #[test]
    fn files_may_have_axes_of_zero() {
        let keys =
            || mean().f32s("k", &[1, 1, 0, 2], &[]).f32s("v", &[1, 1, 0, 1], &[]).f32s("probs", &[1, 1, 1, 0], &[]);
        let keys = || keys().f32s("lse", &[1, 1, 1], &[f32::NEG_INFINITY]);
        assert!(passes(&keys().f32s("out", &[1, 1, 1, 1], &[0.0])));
        assert!(!passes(&keys().f32s("out", &[1, 1, 1, 1], &[0.5])));
        assert!(!passes(&keys().f32s("out", &[1, 1, 1, 1], &[0.0]).f32s("lse", &[1, 1, 1], &[0.0])));
        let rows = mean().f32s("q", &[1, 1, 0, 2], &[]).f32s("out", &[1, 1, 0, 1], &[]).f32s("lse", &[1, 1, 0], &[]);
        assert!(passes(&rows.f32s("probs", &[1, 1, 0, 2], &[])));
    }

    #[test]
    fn gradients_are_reported_whether_they_are_there_or_were_left_out() {
        let notes = |file: Builder| case(&file).unwrap().notes;
        assert!(notes(mean()).is_empty() && notes(mean().text("has_grad", "false")).is_empty());
        assert_eq!(notes(mean().text("has_grad", "true")), ["gradients are not computed"]);
        assert_eq!(notes(mean().f32s("dout", &[1, 1, 1, 1], &[1.0])), ["gradients are not computed"]);
    }

    #[test]
    fn packed_sequences_are_read() {
        let bounds = |values: [i32; 3]| values.map(i32::to_le_bytes).concat();
        let file = mean()
            .without("probs")
            .text("layout", "thd")
            .f32s("q", &[2, 1, 2], &[0.0; 4])
            .f32s("k", &[2, 1, 2], &[0.0; 4])
            .f32s("v", &[2, 1, 1], &[1.0, 5.0])
            .tensor("cu_seqlens_q", Dtype::I32, &[3], &bounds([0, 1, 2]))
            .tensor("cu_seqlens_k", Dtype::I32, &[3], &bounds([0, 1, 2]))
            .f32s("out", &[2, 1, 1], &[1.0, 5.0])
            .f32s("lse", &[1, 2], &[0.0, 0.0]);
        assert!(passes(&file));
        let falling = file.tensor("cu_seqlens_k", Dtype::I32, &[3], &bounds([0, 2, 1]));
        assert!(case(&falling).unwrap().calls[0].check().is_err());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |file: Builder| case(&file).unwrap_err().to_string();
        assert!(error(mean().without("k")).contains("tensor \"k\" is missing"));
        assert!(error(mean().tensor("v", Dtype::I32, &[1, 1, 2, 1], &[0; 8])).contains("\"v\" has type I32"));
        assert!(error(mean().f32s("k", &[1, 2, 2], &[0.0; 4])).contains("\"k\" has shape [1, 2, 2]"));
        assert!(error(mean().f32s("out", &[1], &[3.0])).contains("\"out\" has shape [1]; it must be [1, 1, 1, 1]"));
        assert!(error(mean().text("causal", "sideways")).contains("metadata \"causal\" is \"sideways\""));
        assert!(error(mean().text("tol", "{}")).contains("metadata \"tol\""));
        assert!(error(mean().text("window_left", "x")).contains("metadata \"window_left\""));
        assert!(error(mean().text("window_right", "-2")).contains("metadata \"window_right\" is \"-2\""));
        assert!(error(mean().text("layout", "dshb")).contains("bhsd, bshd or thd"));
    }
}
