//! `conf-mha/1`, `conf-keras-mha/1` and `conf-tf-tutorial-mha/1`: whole attention layers of PyTorch, Keras and the TensorFlow
//! transformer tutorial, with their weights.

use wgpu_attention::multihead::{Call as LayerCall, Layer, Sources, Weights};
use wgpu_attention::{Broadcast, Causal, Operands, load};

use super::case::{Call, Case, Expectation, LayerWork, Quantity, Rows, Work};
use super::files::Loaded;
use crate::archive::Archive;
use crate::difference::Rule;
use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::memory;
use crate::operands::{set_bias, set_mask};

pub const TORCH: &str = "conf-mha/1";
pub const KERAS: &str = "conf-keras-mha/1";
pub const TUTORIAL: &str = "conf-tf-tutorial-mha/1";

/// The number that the tutorial adds to the logit of a masked key.
const MASKED: f32 = -1e9;

/// A layer with its inputs, before masks and expectations.
struct Start {
    work: LayerWork,
    batch: usize,
    heads: usize,
    rows: usize,
    keys: usize,
}

fn weights(archive: &Archive, read: impl Fn(&[u8]) -> wgpu_attention::Result<Layer>) -> Result<Layer> {
    let bytes = std::fs::read(&archive.path).map_err(|source| Error::File { path: archive.path.clone(), source })?;
    read(&bytes).map_err(|source| archive.problem(source))
}

/// Sizes of one input as [batch, rows, width]; a rank of 2 is one batch.
fn input(archive: &Archive, name: &str, seq_first: bool) -> Result<[u32; 3]> {
    match archive.sizes(name)?[..] {
        [rows, batch, width] if seq_first => Ok([batch, rows, width]),
        [batch, rows, width] => Ok([batch, rows, width]),
        [rows, width] => Ok([1, rows, width]),
        _ => Err(archive.wrong_shape(name, "of rank 2 or 3")),
    }
}

fn start(archive: &Archive, layer: Layer, sources: Sources, seq_first: bool) -> Result<Start> {
    let [batch, rows, width] = input(archive, "query", seq_first)?;
    let [key_batch, keys, key_width] = input(archive, "key", seq_first)?;
    let value = input(archive, "value", seq_first)?;
    if width != layer.query.inputs {
        return Err(archive.wrong_shape("query", format!("as wide as the layer's {} inputs", layer.query.inputs)));
    }
    if [key_batch, key_width] != [batch, layer.key.inputs] {
        return Err(archive.wrong_shape("key", format!("of {batch} batches and {} columns", layer.key.inputs)));
    }
    if value != [batch, keys, layer.value.inputs] {
        return Err(
            archive.wrong_shape("value", format!("of {batch} batches, {keys} rows and {} columns", layer.value.inputs))
        );
    }
    // Masks are expanded to the whole score matrix.
    let scores = [batch, layer.heads, rows, keys].iter().map(|&n| u128::from(n)).product::<u128>();
    memory::room(format!("a mask of {scores} elements"), u64::try_from(4 * scores).unwrap_or(u64::MAX))
        .map_err(|source| archive.problem(source))?;
    let mut call = LayerCall::default();
    (call.sources, call.seq_first) = (sources, seq_first);
    let f32s = |name| Ok::<_, Error>(archive.f32s(name)?.to_vec());
    let work = LayerWork {
        problem: layer.problem(batch, rows, keys),
        operands: Operands::default(),
        call,
        query: f32s("query")?,
        key: if sources == Sources::Query { None } else { Some(f32s("key")?) },
        value: if sources == Sources::Each { Some(f32s("value")?) } else { None },
        layer,
    };
    let [batch, heads, rows, keys] = [batch, work.layer.heads, rows, keys].map(|n| n as usize);
    Ok(Start { work, batch, heads, rows, keys })
}

impl Start {
    /// An operand with the shape of the score matrix, computed element by element.
    fn full<T>(&self, each: impl Fn([usize; 4]) -> T) -> (Broadcast, Vec<T>) {
        let sizes = [self.batch, self.heads, self.rows, self.keys];
        let place = |n: usize| {
            let (rest, key) = (n / sizes[3], n % sizes[3]);
            let (rest, row) = (rest / sizes[2], rest % sizes[2]);
            [rest / sizes[1], rest % sizes[1], row, key]
        };
        let values = (0..sizes.iter().product()).map(|n| each(place(n))).collect();
        (Broadcast(sizes.map(|n| n as u32)), values)
    }

    fn hide(&mut self, hidden: impl Fn([usize; 4]) -> bool) {
        let (shape, mask) = self.full(|place| u8::from(!hidden(place)));
        let work = &mut self.work;
        set_mask(&mut work.problem, &mut work.operands, shape, mask);
    }

    fn add(&mut self, added: impl Fn([usize; 4]) -> f32) {
        let (shape, bias) = self.full(added);
        let work = &mut self.work;
        set_bias(&mut work.problem, &mut work.operands, shape, Floats::F32(bias));
    }

    fn expect(&mut self, archive: &Archive, name: &str, weights: Option<Weights>, rule: Rule) -> Result<Expectation> {
        self.work.call.weights = self.work.call.weights.or(weights);
        let [batch, heads, rows, columns] =
            [self.batch, self.heads, self.rows, self.work.layer.weight_columns(self.keys as u32) as usize];
        let width = self.work.layer.out.outputs as usize;
        let count = match weights {
            None => batch * rows * width,
            Some(Weights::Heads) => batch * heads * rows * columns,
            Some(Weights::Mean) => batch * rows * columns,
        };
        let want = archive.f32s(name)?;
        if want.len() != count {
            return Err(archive.wrong_shape(name, format!("of {count} elements")));
        }
        let quantity = if weights.is_some() { Quantity::Weights } else { Quantity::Out };
        Ok(Expectation::new(name, quantity, want.to_vec(), rule))
    }

    fn case(self, archive: &Archive, expectations: Vec<Expectation>) -> Loaded {
        let notes = if archive.has("dout") { vec!["gradients are not computed"] } else { Vec::new() };
        let call = Call { label: "", work: Work::Layer(Box::new(self.work)), expectations };
        Loaded::Cases(vec![Case { name: archive.stem(), calls: vec![call], notes }])
    }
}

fn rule(archive: &Archive, name: &str) -> Result<Rule> {
    let tolerances: serde_json::Map<String, serde_json::Value> = archive.json("tol", "a JSON object")?;
    let rule = tolerances.get(name).and_then(|rule| serde_json::from_value(rule.clone()).ok());
    rule.ok_or_else(|| archive.bad_metadata("tol", &format!("a JSON object with {name:?}: {{\"atol\", \"rtol\"}}")))
}

fn flag(archive: &Archive, key: &str) -> Result<bool> {
    archive.json_or(key, "true or false", false)
}

/// Maps [batch, head, row, key] to the index of an element in a mask.
type Place = Box<dyn Fn([usize; 4]) -> usize>;

/// A PyTorch mask of [batch, keys], [rows, keys] or [batch · heads, rows, keys], and how to find an element in it.
fn torch_mask<'a>(archive: &Archive, name: &'a str, of: &Start) -> Result<Option<(&'a str, Place)>> {
    if !archive.has(name) {
        return Ok(None);
    }
    let Start { batch, heads, rows, keys, .. } = *of;
    let padding = name == "key_padding_mask";
    let shape = archive.shape(name)?;
    let (by_head, by_row) = match shape {
        [n, k] if padding && [*n, *k] == [batch, keys] => (false, false),
        [k] if padding && *k == keys && batch == 1 => (false, false),
        [r, k] if !padding && [*r, *k] == [rows, keys] => (false, true),
        [n, r, k] if !padding && [*n, *r, *k] == [batch * heads, rows, keys] => (true, true),
        _ => return Err(archive.wrong_shape(name, "[batch, keys], or [rows, keys] or [batch · heads, rows, keys]")),
    };
    let place = move |[b, h, row, key]: [usize; 4]| match (by_head, by_row) {
        (true, _) => ((b * heads + h) * rows + row) * keys + key,
        (false, true) => row * keys + key,
        (false, false) => b * keys + key,
    };
    Ok(Some((name, Box::new(place))))
}

pub fn torch(archive: &Archive) -> Result<Loaded> {
    let heads: u32 = archive.json("num_heads", "an integer")?;
    let mut layer = weights(archive, |bytes| load::pytorch(bytes, "w.", heads))?;
    layer.zero_attn = flag(archive, "add_zero_attn")?;
    let seq_first = !flag(archive, "batch_first")?;
    let same = flag(archive, "self_attention")?;
    let mut start = start(archive, layer, if same { Sources::Query } else { Sources::Each }, seq_first)?;
    // True is "not allowed" here; float masks are added.
    let masks = [torch_mask(archive, "key_padding_mask", &start)?, torch_mask(archive, "attn_mask", &start)?];
    let (mut hiding, mut adding) = (Vec::new(), Vec::new());
    for (name, at) in masks.into_iter().flatten() {
        if archive.is_bool(name) {
            hiding.push((archive.bools(name)?, at));
        } else {
            adding.push((archive.f32s(name)?, at));
        }
    }
    if !hiding.is_empty() {
        start.hide(|place| hiding.iter().any(|(mask, at)| mask[at(place)] != 0));
    }
    if !adding.is_empty() {
        start.add(|place| adding.iter().map(|(mask, at)| mask[at(place)]).sum());
    }
    let mean = archive.json_or("average_attn_weights", "true or false", true)?;
    let mut expectations = vec![start.expect(archive, "out", None, rule(archive, "out")?)?];
    if archive.has("attn_weights") {
        let which = if mean { Weights::Mean } else { Weights::Heads };
        expectations.push(start.expect(archive, "attn_weights", Some(which), rule(archive, "attn_weights")?)?);
    }
    Ok(start.case(archive, expectations))
}

pub fn keras(archive: &Archive) -> Result<Loaded> {
    for option in ["use_gate", "sliding_window"] {
        if !matches!(archive.text(option), None | Some("false" | "null")) {
            return Ok(Loaded::Unsupported { name: archive.stem(), why: format!("option {option}") });
        }
    }
    let layer = weights(archive, |bytes| load::keras(bytes, "w."))?;
    let sources = sources(archive)?;
    let mut start = start(archive, layer, sources, false)?;
    let (batch, rows, keys) = (start.batch, start.rows, start.keys);
    let mut masks: Vec<(&[u8], Place)> = Vec::new();
    if archive.has("attention_mask") {
        let shared = match archive.shape("attention_mask")? {
            [n, r, k] if [*r, *k] == [rows, keys] && [1, batch].contains(n) => *n == 1,
            _ => return Err(archive.wrong_shape("attention_mask", format!("[1 or {batch}, {rows}, {keys}]"))),
        };
        let at = move |[b, _, row, key]: [usize; 4]| (if shared { 0 } else { b } * rows + row) * keys + key;
        masks.push((archive.bools("attention_mask")?, Box::new(at)));
    }
    for (name, count, by_row) in [("query_mask", rows, true), ("key_mask", keys, false), ("value_mask", keys, false)] {
        if archive.has(name) {
            archive.expect_shape(name, &[batch, count])?;
            let at = move |[b, _, row, key]: [usize; 4]| b * count + if by_row { row } else { key };
            masks.push((archive.bools(name)?, Box::new(at)));
        }
    }
    if !masks.is_empty() {
        start.hide(|place| masks.iter().any(|(mask, at)| mask[at(place)] == 0));
    }
    if flag(archive, "use_causal_mask")? {
        start.work.problem.causal = Causal::TopLeft;
    }
    let mut expectations = vec![start.expect(archive, "out", None, rule(archive, "out")?)?];
    if archive.has("attention_scores") {
        let rule = rule(archive, "attention_scores")?;
        expectations.push(start.expect(archive, "attention_scores", Some(Weights::Heads), rule)?);
    }
    if archive.has("compare_rows") {
        archive.expect_shape("compare_rows", &[batch, rows])?;
        let keep: Vec<bool> = archive.bools("compare_rows")?.iter().map(|&row| row != 0).collect();
        let width = start.work.layer.out.outputs as usize;
        expectations[0].rows = Some(Rows { keep: keep.clone(), width });
        if let Some(scores) = expectations.get_mut(1) {
            let keep = keep.chunks(rows.max(1)).flat_map(|rows| rows.repeat(start.heads)).collect();
            scores.rows = Some(Rows { keep, width: keys });
        }
    }
    Ok(start.case(archive, expectations))
}

fn sources(archive: &Archive) -> Result<Sources> {
    match archive.text("inputs").unwrap_or("qkv") {
        "self" => Ok(Sources::Query),
        "cross" => Ok(Sources::Key),
        "qkv" => Ok(Sources::Each),
        _ => Err(archive.bad_metadata("inputs", "self, cross or qkv")),
    }
}

pub fn tutorial(archive: &Archive) -> Result<Loaded> {
    let heads: u32 = archive.json("num_heads", "an integer")?;
    let layer = weights(archive, |bytes| load::tensorflow_tutorial(bytes, "w.", heads))?;
    let sources = sources(archive)?;
    let mut start = start(archive, layer, sources, false)?;
    if archive.has("mask") {
        // 1 is "masked out".
        let mask = archive.f32s("mask")?;
        let shape = archive.broadcast("mask", "mask")?;
        let bias = mask.iter().map(|&masked| masked * MASKED).collect();
        let work = &mut start.work;
        set_bias(&mut work.problem, &mut work.operands, shape, Floats::F32(bias));
    }
    let mut expectations = vec![start.expect(archive, "out", None, rule(archive, "out")?)?];
    if archive.has("attention_weights") {
        let rule = rule(archive, "attention_weights")?;
        expectations.push(start.expect(archive, "attention_weights", Some(Weights::Heads), rule)?);
    }
    Ok(start.case(archive, expectations))
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use wgpu_attention::{Outputs, reference, with};

    use super::*;
    use crate::archive::builder::Builder;

    /// One head of width 1 with weights of 1: equal scores, so the output is the mean of the visible values.
    fn mean() -> Builder {
        Builder::default()
            .text("format", TORCH)
            .text("num_heads", "1")
            .text("tol", r#"{"out": {"atol": 1e-6}, "attn_weights": {"atol": 1e-6}}"#)
            .text("batch_first", "true")
            .f32s("query", &[1, 1, 1], &[0.0])
            .f32s("key", &[1, 2, 1], &[3.0, 4.0])
            .f32s("value", &[1, 2, 1], &[1.0, 5.0])
            .f32s("w.in_proj_weight", &[3, 1], &[1.0; 3])
            .f32s("w.out_proj.weight", &[1, 1], &[1.0])
            .f32s("out", &[1, 1, 1], &[3.0])
            .f32s("attn_weights", &[1, 1, 2], &[0.5, 0.5])
    }

    fn loaded(file: &Builder, load: fn(&Archive) -> Result<Loaded>) -> Result<Loaded> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("case.safetensors");
        std::fs::write(&path, file.bytes()).unwrap();
        load(&Archive::read(&path)?)
    }

    fn passes(file: &Builder, load: fn(&Archive) -> Result<Loaded>) -> bool {
        let Loaded::Cases(cases) = loaded(file, load).unwrap() else { panic!("not supported") };
        let call = &cases[0].calls[0];
        let Work::Layer(work) = &call.work else { panic!("not a layer") };
        let got = reference::layer::<f32>(&work.layer, &work.problem, &work.call, &work.inputs()).unwrap();
        let outputs = with!(Outputs::new(got.out), weights: got.weights);
        call.verdicts(&outputs, &[]).iter().all(|verdict| verdict.difference.passes())
    }

    #[test]
    fn torch_masks_hide_where_true_and_add_where_float() {
        assert!(passes(&mean(), torch));
        assert!(!passes(&mean().f32s("out", &[1, 1, 1], &[3.1]), torch));
        assert!(!passes(&mean().f32s("attn_weights", &[1, 1, 2], &[0.6, 0.4]), torch));
        let second = || mean().f32s("out", &[1, 1, 1], &[5.0]).f32s("attn_weights", &[1, 1, 2], &[0.0, 1.0]);
        assert!(passes(&second().tensor("key_padding_mask", Dtype::BOOL, &[1, 2], &[1, 0]), torch));
        assert!(passes(&second().f32s("attn_mask", &[1, 2], &[f32::NEG_INFINITY, 0.0]), torch));
        assert!(passes(&second().tensor("attn_mask", Dtype::BOOL, &[1, 1, 2], &[1, 0]), torch));
        let zero = mean().text("add_zero_attn", "true").f32s("out", &[1, 1, 1], &[2.0]);
        assert!(passes(&zero.f32s("attn_weights", &[1, 1, 3], &[1.0 / 3.0; 3]), torch));
        // Axes of 0: no key, none but the one that the layer adds, and no query.
        let keys =
            || mean().f32s("key", &[1, 0, 1], &[]).f32s("value", &[1, 0, 1], &[]).f32s("out", &[1, 1, 1], &[0.0]);
        assert!(passes(&keys().f32s("attn_weights", &[1, 1, 0], &[]), torch));
        assert!(passes(&keys().text("add_zero_attn", "true").f32s("attn_weights", &[1, 1, 1], &[1.0]), torch));
        let rows = mean().f32s("query", &[1, 0, 1], &[]).f32s("out", &[1, 0, 1], &[]);
        assert!(passes(&rows.f32s("attn_weights", &[1, 0, 2], &[]), torch));
    }

    #[test]
    fn keras_and_the_tutorial_have_masks_of_their_own() {
        let keras_file = |want| {
            let file = mean().without("attn_weights").text("inputs", "qkv").f32s("out", &[1, 1, 1], &[want]);
            let file = file.f32s("w.query/kernel", &[1, 1, 1], &[1.0]).f32s("w.key/kernel", &[1, 1, 1], &[1.0]);
            let file = file.f32s("w.value/kernel", &[1, 1, 1], &[1.0]);
            let file = file.f32s("w.attention_output/kernel", &[1, 1, 1], &[1.0]);
            file.without("w.in_proj_weight").without("w.out_proj.weight")
        };
        assert!(passes(&keras_file(3.0), keras));
        assert!(passes(&keras_file(5.0).tensor("value_mask", Dtype::BOOL, &[1, 2], &[0, 1]), keras));
        assert!(passes(&keras_file(1.0).text("use_causal_mask", "true"), keras));
        assert!(!passes(&keras_file(3.0).tensor("attention_mask", Dtype::BOOL, &[1, 1, 2], &[0, 1]), keras));
        let skipped = keras_file(9.0).tensor("compare_rows", Dtype::BOOL, &[1, 1], &[0]);
        assert!(passes(&skipped, keras));
        let rows = keras_file(0.0).f32s("query", &[1, 0, 1], &[]).f32s("out", &[1, 0, 1], &[]);
        let rows = rows.text("tol", r#"{"out": {"atol": 0}, "attention_scores": {"atol": 0}}"#);
        let rows = rows.f32s("attention_scores", &[1, 1, 0, 2], &[]);
        assert!(passes(&rows.tensor("compare_rows", Dtype::BOOL, &[1, 0], &[]), keras));
        let tutorial_file = |want| {
            let file = ["w.wq.kernel", "w.wk.kernel", "w.wv.kernel", "w.dense.kernel"]
                .into_iter()
                .fold(mean().without("attn_weights"), |file, name| file.f32s(name, &[1, 1], &[1.0]));
            file.without("w.in_proj_weight").without("w.out_proj.weight").f32s("out", &[1, 1, 1], &[want])
        };
        assert!(passes(&tutorial_file(3.0), tutorial));
        assert!(passes(&tutorial_file(5.0).f32s("mask", &[1, 1, 1, 2], &[1.0, 0.0]), tutorial));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |file: Builder| loaded(&file, torch).unwrap_err().to_string();
        assert!(error(mean().without("value")).contains("tensor \"value\" is missing"));
        assert!(error(mean().without("w.in_proj_weight")).contains("tensor \"w.q_proj_weight\" is missing"));
        assert!(error(mean().f32s("w.other", &[1], &[0.0])).contains("tensor \"w.other\" is not part of the layer"));
        assert!(error(mean().f32s("key", &[1, 2, 2], &[0.0; 4])).contains("tensor \"key\" has shape [1, 2, 2]"));
        assert!(error(mean().f32s("attn_mask", &[2, 2], &[0.0; 4])).contains("tensor \"attn_mask\" has shape [2, 2]"));
        assert!(error(mean().text("num_heads", "0")).contains("heads is 0"));
        assert!(error(mean().text("tol", "{}")).contains("metadata \"tol\""));
    }

    #[test]
    fn a_mask_that_cannot_be_held_is_refused() {
        // Megabytes of inputs, and a mask that no machine holds.
        let (shape, zeros) = ([1, 2_000_000, 1], vec![0.0; 2_000_000]);
        let file = ["query", "key", "value"].into_iter().fold(mean(), |file, name| file.f32s(name, &shape, &zeros));
        let padding = vec![0; 2_000_000];
        let file = file.tensor("key_padding_mask", Dtype::BOOL, &[1, 2_000_000], &padding);
        let error = loaded(&file, torch).unwrap_err().to_string();
        assert!(error.contains("a mask of 4000000000000 elements takes about 16000000000000 bytes"), "{error}");
    }
}
