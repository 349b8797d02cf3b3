//! `conf-onnx-attention/1`: node tests of the ONNX operator `Attention` (opset 23 to 25).
//!
//! Inputs are `in.<name>`, expected outputs `out.<name>`; a file may hold `f64as32.<name>` and say `grade_against = f64as32`.
//! A cache given as past_key and past_value is joined with K and V on the host.

use std::collections::BTreeMap;

use serde::Deserialize;
use wgpu_attention::{Causal, Element, Layout, Logits, Operands, Problem};

use super::case::{Call, Case, Expectation, Quantity, Work};
use super::files::Loaded;
use crate::archive::Archive;
use crate::difference::Rule;
use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::operands::{Array, OwnedInputs, set_bias, set_key_lengths, set_mask};

pub const FORMAT: &str = "conf-onnx-attention/1";

/// The rule of ONNX's own backend tests.
const OFFICIAL: Rule = Rule { atol: 1e-7, rtol: 1e-3 };
/// Its relative tolerance for bf16 outputs.
const OFFICIAL_BF16: f64 = 1.0 / 64.0;

/// Attributes of the node. Softmax is in f32 whatever `softmax_precision` says.
#[derive(Deserialize)]
#[serde(default)]
struct Attributes {
    is_causal: i64,
    scale: Option<f64>,
    softcap: f64,
    q_num_heads: u32,
    kv_num_heads: u32,
    qk_matmul_output_mode: i64,
    left_window_size: i64,
    right_window_size: i64,
    #[serde(rename = "softmax_precision")]
    _softmax_precision: Option<i64>,
    #[serde(flatten)]
    unknown: BTreeMap<String, serde_json::Value>,
}

impl Default for Attributes {
    fn default() -> Self {
        Attributes {
            is_causal: 0,
            scale: None,
            softcap: 0.0,
            q_num_heads: 0,
            kv_num_heads: 0,
            qk_matmul_output_mode: 0,
            left_window_size: -1,
            right_window_size: -1,
            _softmax_precision: None,
            unknown: BTreeMap::new(),
        }
    }
}

/// Batch, heads, rows and last axis of a 4-D tensor, or of a 3-D one whose heads are merged into its last axis.
struct Operand {
    sizes: [u32; 4],
    layout: Layout,
}

impl Operand {
    fn read(archive: &Archive, name: &str, heads: u32) -> Result<Self> {
        match archive.sizes(name)?[..] {
            [batch, heads, rows, dim] => Ok(Operand { sizes: [batch, heads, rows, dim], layout: Layout::Bhsd }),
            [batch, rows, width] if heads > 0 && width.is_multiple_of(heads) => {
                Ok(Operand { sizes: [batch, heads, rows, width / heads], layout: Layout::Bshd })
            }
            _ => Err(archive.wrong_shape(name, format!("4-D, or 3-D with a last axis divisible by {heads} heads"))),
        }
    }
}

/// What determines the positions of the queries.
enum Anchor {
    Start,
    /// The length of the cache that comes before the keys.
    Past(u32),
    /// The end of the true lengths.
    Lengths,
}

pub fn load(archive: &Archive) -> Result<Loaded> {
    let unsupported = |why: String| Ok(Loaded::Unsupported { name: archive.stem(), why });
    let attributes: Attributes =
        archive.json_or("attributes", "a JSON object of the node's attributes", Attributes::default())?;
    if let Some((name, _)) = attributes.unknown.iter().next() {
        return unsupported(format!("attribute {name}"));
    }
    if attributes.left_window_size.min(attributes.right_window_size) < -1 {
        return Err(archive.bad_metadata("attributes", "of window sizes from -1 (no bound) on"));
    }
    let known = ["in.Q", "in.K", "in.V", "in.attn_mask", "in.past_key", "in.past_value", "in.nonpad_kv_seqlen"];
    if let Some(name) = archive.names().find(|name| name.starts_with("in.") && !known.contains(name)) {
        return unsupported(format!("input {name}"));
    }
    let q = Operand::read(archive, "in.Q", attributes.q_num_heads)?;
    let mut k = Operand::read(archive, "in.K", attributes.kv_num_heads)?;
    let mut v = Operand::read(archive, "in.V", attributes.kv_num_heads)?;
    let [batch, heads, seq_q, head_dim] = q.sizes;
    if [k.sizes[0], k.sizes[3]] != [batch, head_dim] {
        return Err(archive.wrong_shape("in.K", "of the same batch and head dimension as Q"));
    }
    if v.sizes[..3] != k.sizes[..3] {
        return Err(archive.wrong_shape("in.V", "of the same batch, heads and rows as K"));
    }

    let mut operands = OwnedInputs::new(
        archive.floats("in.Q")?.clone(),
        archive.floats("in.K")?.clone(),
        archive.floats("in.V")?.clone(),
    );
    let mut anchor = Anchor::Start;
    if archive.has("in.past_key") || archive.has("in.past_value") {
        anchor = Anchor::Past(join(archive, "in.past_key", &mut k, &mut operands.k)?);
        join(archive, "in.past_value", &mut v, &mut operands.v)?;
        if v.sizes[2] != k.sizes[2] {
            return Err(archive.wrong_shape("in.past_value", "of the same rows as past_key"));
        }
    }
    // The present cache is 4-D, whatever the rank of K and V.
    if archive.has("out.present_key") {
        transpose(&mut k, &mut operands.k);
    }
    if archive.has("out.present_value") {
        transpose(&mut v, &mut operands.v);
    }

    let mut problem = Problem::new(batch, heads, seq_q, k.sizes[2], head_dim);
    (problem.kv_heads, problem.value_dim) = (k.sizes[1], v.sizes[3]);
    (problem.q, problem.k, problem.v, problem.out) = (q.layout, k.layout, v.layout, q.layout);
    problem.element = operands.q.element();
    problem.scale = attributes.scale.map(|scale| scale as f32);
    problem.softcap = (attributes.softcap != 0.0).then_some(attributes.softcap as f32);
    if archive.has("in.nonpad_kv_seqlen") {
        if let Anchor::Past(_) = anchor {
            return unsupported("past_key together with nonpad_kv_seqlen".into());
        }
        anchor = Anchor::Lengths;
        set_key_lengths(&mut problem, &mut operands.operands, archive.lengths("in.nonpad_kv_seqlen")?);
    }
    if archive.is_bool("in.attn_mask") {
        let shape = archive.broadcast("mask", "in.attn_mask")?;
        set_mask(&mut problem, &mut operands.operands, shape, archive.bools("in.attn_mask")?.to_vec());
    } else if archive.has("in.attn_mask") {
        let shape = archive.broadcast("bias", "in.attn_mask")?;
        set_bias(&mut problem, &mut operands.operands, shape, archive.floats("in.attn_mask")?.clone());
    }
    // The tensors made below are as large as the sizes of the problem, which are therefore checked first.
    let holds = |problem: &Problem| problem.check().map(|_| ()).map_err(|error| archive.problem(error));
    holds(&problem)?;
    visibility(&mut problem, &mut operands.operands, &attributes, &anchor);
    holds(&problem)?;
    expected(archive, problem, operands, &attributes)
}

/// Puts a past [batch, heads, rows, dim] before the rows of K or V. The result is dense [batch, heads, rows, dim]. Returns the number of
/// past rows.
fn join(archive: &Archive, name: &'static str, operand: &mut Operand, data: &mut Floats) -> Result<u32> {
    let [batch, heads, rows, dim] = operand.sizes;
    let past = match archive.sizes(name)?[..] {
        [b, h, past, d] if [b, h, d] == [batch, heads, dim] => past,
        _ => return Err(archive.wrong_shape(name, format!("[{batch}, {heads}, rows, {dim}]"))),
    };
    let total = past.checked_add(rows).ok_or_else(|| archive.wrong_shape(name, "below 2³² rows with the new ones"))?;
    transpose(operand, data);
    let chunks = [past, rows].map(|n| n as usize * dim as usize);
    *data = match (archive.floats(name)?, &*data) {
        (Floats::F32(past), Floats::F32(new)) => Floats::F32(interleave(past, new, chunks)),
        (Floats::F16(past), Floats::F16(new)) => Floats::F16(interleave(past, new, chunks)),
        (Floats::Bf16(past), Floats::Bf16(new)) => Floats::Bf16(interleave(past, new, chunks)),
        (past, new) => {
            let field = name.trim_start_matches("in.");
            let source = wgpu_attention::Error::Element { field, got: past.element(), want: new.element() };
            return Err(archive.problem(source));
        }
    };
    operand.sizes[2] = total;
    Ok(past)
}

/// Alternates chunks of `past` and `new`: the cache of one head after the other.
fn interleave<T: Copy>(mut past: &[T], mut new: &[T], chunks: [usize; 2]) -> Vec<T> {
    let mut all = Vec::with_capacity(past.len() + new.len());
    while !(past.is_empty() && new.is_empty()) {
        let ((head, past_rest), (rows, new_rest)) = (past.split_at(chunks[0]), new.split_at(chunks[1]));
        all.extend_from_slice(head);
        all.extend_from_slice(rows);
        (past, new) = (past_rest, new_rest);
    }
    all
}

/// Rearranges merged heads into dense [batch, heads, rows, dim].
fn transpose(operand: &mut Operand, data: &mut Floats) {
    if operand.layout == Layout::Bshd {
        operand.layout = Layout::Bhsd;
        *data = match data {
            Floats::F32(x) => Floats::F32(heads_first(x, operand.sizes)),
            Floats::F16(x) => Floats::F16(heads_first(x, operand.sizes)),
            Floats::Bf16(x) => Floats::Bf16(heads_first(x, operand.sizes)),
        };
    }
}

fn heads_first<T: Copy>(x: &[T], sizes: [u32; 4]) -> Vec<T> {
    let [batch, heads, rows, dim] = sizes.map(|n| n as usize);
    let mut all = Vec::with_capacity(x.len());
    // An empty tensor may have axes of any size, so its rows are not visited.
    for b in 0..if x.is_empty() { 0 } else { batch } {
        for h in 0..heads {
            for row in 0..rows {
                let at = ((b * rows + row) * heads + h) * dim;
                all.extend_from_slice(&x[at..at + dim]);
            }
        }
    }
    all
}

/// Causal rule and window. ONNX anchors a window at the same offset as the causal rule, also where there is no causal rule.
fn visibility(problem: &mut Problem, operands: &mut Operands<Array>, attributes: &Attributes, anchor: &Anchor) {
    // A window as long as all queries and keys together hides nothing, so longer windows can be shortened to it.
    let all = problem.seq_q.saturating_add(problem.seq_kv);
    let side = |size: i64| u32::try_from(size).ok().map(|size| size.min(all));
    problem.window.left = side(attributes.left_window_size);
    problem.window.right = side(attributes.right_window_size);
    let windowed = problem.window != Default::default();
    if attributes.is_causal != 0 {
        problem.causal = match anchor {
            Anchor::Start => Causal::TopLeft,
            Anchor::Past(_) => Causal::Offset,
            Anchor::Lengths => Causal::BottomRight,
        };
        if let &Anchor::Past(rows) = anchor {
            let offsets = vec![rows.min(i32::MAX as u32) as i32; problem.batch as usize];
            operands.offsets = Some(Array::I32(offsets));
        }
    } else if windowed && !matches!(anchor, Anchor::Start) {
        // `p − left <= j <= p + right` is the causal rule at position p + right with the left side longer by `right`.
        let right = problem.window.right.unwrap_or(all);
        problem.causal = Causal::Offset;
        problem.window.left = problem.window.left.map(|left| left.saturating_add(right));
        problem.window.right = None;
        let offset = |base: i64| (base + i64::from(right)).clamp(i32::MIN.into(), i32::MAX.into()) as i32;
        let offsets = match (anchor, &operands.key_lengths) {
            (Anchor::Lengths, Some(Array::U32(lengths))) => {
                lengths.iter().map(|&length| offset(i64::from(length) - i64::from(problem.seq_q))).collect()
            }
            (Anchor::Past(rows), _) => vec![offset((*rows).into()); problem.batch as usize],
            _ => unreachable!("lengths anchor only where they are given"),
        };
        operands.offsets = Some(Array::I32(offsets));
    }
}

/// Reads the expected outputs and asks the problem for them.
fn expected(archive: &Archive, mut problem: Problem, operands: OwnedInputs, attributes: &Attributes) -> Result<Loaded> {
    let element = problem.element;
    let prefix = match archive.text("grade_against") {
        None => "out",
        Some(prefix @ ("out" | "f64as32")) => prefix,
        Some(_) => return Err(archive.bad_metadata("grade_against", "out or f64as32")),
    };
    let rtol = archive.json_or("rtol", "a number", OFFICIAL.rtol)?;
    let mut rule = Rule { atol: archive.json_or("atol", "a number", OFFICIAL.atol)?, rtol };
    if prefix == "out" && element == Element::Bf16 {
        rule.rtol = archive.json_or("bf16_rtol", "a number", OFFICIAL_BF16)?;
    }
    let [batch, heads, kv_heads, seq_q, seq_kv, head_dim, value_dim] = [
        problem.batch,
        problem.heads,
        problem.kv_heads,
        problem.seq_q,
        problem.seq_kv,
        problem.head_dim,
        problem.value_dim,
    ]
    .map(|n| n as usize);
    let y_shape = match problem.out {
        Layout::Bshd => vec![batch, seq_q, heads * value_dim],
        _ => vec![batch, heads, seq_q, value_dim],
    };
    let outputs = [
        ("Y", y_shape),
        ("present_key", vec![batch, kv_heads, seq_kv, head_dim]),
        ("present_value", vec![batch, kv_heads, seq_kv, value_dim]),
        ("qk_matmul_output", vec![batch, heads, seq_q, seq_kv]),
    ];
    let mut expectations = Vec::new();
    for (output, shape) in outputs {
        let graded = format!("out.{output}");
        if !archive.has(&graded) {
            continue;
        }
        // The type of an output is part of what is expected; the graded tensor may be wider.
        let got = archive.floats(&graded)?.element();
        if got != element {
            let source = wgpu_attention::Error::Element { field: output, got, want: element };
            return Err(archive.problem(source));
        }
        let name = format!("{prefix}.{output}");
        archive.expect_shape(&name, &shape)?;
        let quantity = match output {
            "Y" => Quantity::Out,
            "present_key" => Quantity::Host(operands.k.widened()),
            "present_value" => Quantity::Host(operands.v.widened()),
            _ => match attributes.qk_matmul_output_mode {
                3 => {
                    problem.weights = true;
                    Quantity::Weights
                }
                mode => {
                    problem.logits = Some(match mode {
                        0 => Logits::Raw,
                        1 => Logits::Capped,
                        2 => Logits::Masked,
                        _ => return Err(archive.bad_metadata("attributes", "of qk_matmul_output_mode 0 to 3")),
                    });
                    Quantity::Logits
                }
            },
        };
        let want = archive.floats(&name)?.widened();
        expectations.push(Expectation { element, ..Expectation::new(&name, quantity, want, rule) });
    }
    if expectations.is_empty() {
        return Err(Error::MissingTensor { path: archive.path.clone(), tensor: "out.Y".into() });
    }
    let work = Work::Attention { problem: problem.into(), operands: operands.into() };
    let call = Call { label: "", work, expectations };
    Ok(Loaded::Cases(vec![Case { name: archive.stem(), calls: vec![call], notes: Vec::new() }]))
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use wgpu_attention::reference;

    use super::*;
    use crate::archive::builder::Builder;

    /// Keys 0 to 3 of equal score, two of them in the cache; two queries; the values are the keys' numbers.
    fn cached(attributes: &str, y: [f32; 2]) -> Builder {
        Builder::default()
            .text("format", FORMAT)
            .text("op", "Attention")
            .text("attributes", attributes)
            .f32s("in.Q", &[1, 1, 2, 1], &[0.0; 2])
            .f32s("in.K", &[1, 1, 2, 1], &[1.0; 2])
            .f32s("in.V", &[1, 1, 2, 1], &[2.0, 3.0])
            .f32s("in.past_key", &[1, 1, 2, 1], &[0.0; 2])
            .f32s("in.past_value", &[1, 1, 2, 1], &[0.0, 1.0])
            .f32s("out.Y", &[1, 1, 2, 1], &y)
            .f32s("out.present_key", &[1, 1, 4, 1], &[0.0, 0.0, 1.0, 1.0])
            .f32s("out.present_value", &[1, 1, 4, 1], &[0.0, 1.0, 2.0, 3.0])
    }

    fn passes(file: &Builder) -> bool {
        let Loaded::Cases(cases) = load(&file.archive()).unwrap() else { panic!("this is supported") };
        let call = &cases[0].calls[0];
        call.check().unwrap();
        let Work::Attention { problem, operands } = &call.work else { panic!("not attention") };
        let outputs = reference::attention::<f32>(problem, &operands.inputs()).unwrap();
        call.verdicts(&outputs, &[]).iter().all(|verdict| verdict.difference.passes())
    }

    #[test]
    fn the_cache_moves_the_causal_rule_and_the_window() {
        assert!(passes(&cached("{}", [1.5, 1.5])));
        assert!(passes(&cached(r#"{"is_causal": 1}"#, [1.0, 1.5])));
        assert!(passes(&cached(r#"{"is_causal": 1, "left_window_size": 0}"#, [2.0, 3.0])));
        // Without the causal rule the window has the same offset.
        assert!(passes(&cached(r#"{"left_window_size": 0, "right_window_size": 0}"#, [2.0, 3.0])));
        assert!(passes(&cached(r#"{"left_window_size": 1, "right_window_size": -1}"#, [2.0, 2.5])));
        assert!(passes(&cached(r#"{"right_window_size": 0}"#, [1.0, 1.5])));
        let huge = r#"{"left_window_size": 9223372036854775807, "right_window_size": 4294967295}"#;
        assert!(passes(&cached(huge, [1.5, 1.5])));
        assert!(!passes(&cached("{}", [1.0, 1.5])));
        assert!(!passes(&cached("{}", [1.5, 1.5]).f32s("out.present_value", &[1, 1, 4, 1], &[2.0, 3.0, 0.0, 1.0])));
    }

    #[test]
    fn lengths_anchor_at_their_end() {
        let keys = |attributes: &str, y: [f32; 2]| {
            Builder::default()
                .text("op", "Attention")
                .text("attributes", attributes)
                .f32s("in.Q", &[1, 1, 2, 1], &[0.0; 2])
                .f32s("in.K", &[1, 1, 4, 1], &[0.0; 4])
                .f32s("in.V", &[1, 1, 4, 1], &[0.0, 1.0, 2.0, 3.0])
                .tensor("in.nonpad_kv_seqlen", Dtype::I64, &[1], &3i64.to_le_bytes())
                .f32s("out.Y", &[1, 1, 2, 1], &y)
        };
        assert!(passes(&keys("{}", [1.0, 1.0])));
        assert!(passes(&keys(r#"{"is_causal": 1}"#, [0.5, 1.0])));
        assert!(passes(&keys(r#"{"left_window_size": 0, "right_window_size": 0}"#, [1.0, 2.0])));
    }

    #[test]
    fn merged_heads_and_their_cache_are_read() {
        // Two heads of one element each, merged in Q, K, V and Y; each head sees its own cache row first.
        let file = Builder::default()
            .text("op", "Attention")
            .text("attributes", r#"{"q_num_heads": 2, "kv_num_heads": 2}"#)
            .f32s("in.Q", &[1, 1, 2], &[0.0; 2])
            .f32s("in.K", &[1, 2, 2], &[1.0, 2.0, 3.0, 4.0])
            .f32s("in.V", &[1, 2, 2], &[3.0, 30.0, 6.0, 60.0])
            .f32s("in.past_key", &[1, 2, 1, 1], &[0.0, 9.0])
            .f32s("in.past_value", &[1, 2, 1, 1], &[0.0, 0.0])
            .f32s("out.Y", &[1, 1, 2], &[3.0, 30.0])
            .f32s("out.present_key", &[1, 2, 3, 1], &[0.0, 1.0, 3.0, 9.0, 2.0, 4.0]);
        assert!(passes(&file));
    }

    #[test]
    fn what_is_wrong_is_named_and_what_is_unknown_is_skipped() {
        let error = |file: Builder| load(&file.archive()).unwrap_err().to_string();
        let file = || cached("{}", [1.5, 1.5]);
        assert!(error(file().without("in.K")).contains("\"in.K\" is missing"));
        assert!(error(file().without("in.past_value")).contains("\"in.past_value\" is missing"));
        assert!(
            error(file().without("out.Y").without("out.present_key").without("out.present_value")).contains("out.Y")
        );
        assert!(error(file().f32s("in.Q", &[1, 2, 1], &[0.0; 2])).contains("divisible by 0 heads"));
        assert!(error(file().f32s("in.past_key", &[1, 2, 1, 1], &[0.0; 2])).contains("\"in.past_key\" has shape"));
        assert!(error(file().tensor("in.past_key", Dtype::F16, &[1, 1, 2, 1], &[0; 4])).contains("past_key holds f16"));
        assert!(error(file().tensor("out.Y", Dtype::F16, &[1, 1, 2, 1], &[0; 4])).contains("Y holds f16"));
        assert!(error(file().text("attributes", "[")).contains("attributes"));
        assert!(error(file().text("attributes", r#"{"left_window_size": -2}"#)).contains("window sizes from -1"));
        assert!(error(file().text("attributes", r#"{"right_window_size": -2}"#)).contains("window sizes from -1"));
        let unknown = load(&cached(r#"{"rotary": 1}"#, [0.0; 2]).archive()).unwrap();
        assert!(matches!(unknown, Loaded::Unsupported { why, .. } if why == "attribute rotary"));
    }

    #[test]
    fn sizes_of_empty_tensors_are_neither_walked_nor_held() {
        let most = u32::MAX as usize;
        let empty = |file: Builder, names: &[&str], shape: &[usize]| {
            names.iter().fold(file, |file, name| file.f32s(name, shape, &[]))
        };
        let error = |file: Builder| load(&file.archive()).unwrap_err().to_string();
        // An offset for each batch would be 16 GiB.
        let batches = cached(r#"{"is_causal": 1}"#, [0.0; 2]);
        let batches = empty(batches, &["in.Q", "in.K", "in.V", "in.past_key", "in.past_value"], &[most, 1, 1, 0]);
        assert!(error(batches).contains("batch is 4294967295"));
        let merged = cached(r#"{"q_num_heads": 1, "kv_num_heads": 1}"#, [0.0; 2]);
        let merged = empty(merged, &["in.Q", "in.K", "in.V"], &[most, most, 0]);
        let merged = merged.without("in.past_key").without("in.past_value");
        assert!(error(merged).contains("batch is 4294967295"));
    }
}
