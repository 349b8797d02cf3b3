//! `heatmap`: a picture of attention weights.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use wgpu_attention_heatmap::{Layer, Sequence, Style, draw, is_page, is_weight, used};

use crate::Outcome;
use crate::archive::Archive;
use crate::engine::{EngineArgs, KernelArgs};
use crate::error::{Error, Listed, Result};
use crate::options::TermArgs;
use crate::report::{self, Report};
use crate::request::Request;

#[derive(Args, Debug)]
pub struct Arguments {
    /// Weights as `run --weights` writes them, or q, k and the other tensors that `run` takes, to compute weights from
    #[arg(long)]
    input: PathBuf,
    /// The picture to write, .svg or .png, or the page to point at weights, .html; an existing file is replaced only when the
    /// new one is complete
    #[arg(long)]
    output: PathBuf,
    /// Draw this tensor, [batch, heads, queries, keys] or [heads, queries, keys] (default: weights, if the file has it, else
    /// computed from q and k); a page also has the other layers: tensors of the same shape, whose name has another number
    #[arg(long)]
    tensor: Option<String>,
    /// File with one token on each line, or with a JSON array of tokens; only as many rows and columns are drawn (default:
    /// the tokens of the batch in the file's metadata `tokens`, a JSON array of arrays, else numbers)
    #[arg(long)]
    tokens: Option<PathBuf>,
    /// File with the tokens of the keys, if they differ from those of the queries
    #[arg(long, requires = "tokens")]
    key_tokens: Option<PathBuf>,
    /// Index of the batch to draw, from 0. Its padding is not drawn: keys beyond the file's kv_lens, and as many queries if there
    /// are as many of both; without kv_lens, the last keys and queries whose weights are all 0
    #[arg(long, default_value_t = 0)]
    batch: usize,
    /// Title above the heads (default: the file's name)
    #[arg(long)]
    title: Option<String>,
    #[command(flatten)]
    terms: TermArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    kernels: KernelArgs,
    #[command(flatten)]
    style: Style,
}

/// The weights of a layer or more, of the same shape, and their origin.
struct Weights {
    /// Name and weights of each layer.
    layers: Vec<(String, Vec<f32>)>,
    shape: [usize; 4],
    /// Index of the layer that was asked for.
    shown: usize,
    source: String,
}

/// The shape of weights; a tensor of rank 3 is one batch.
fn shape(archive: &Archive, name: &str) -> Result<[usize; 4]> {
    match *archive.shape(name)? {
        [batch, heads, queries, keys] => Ok([batch, heads, queries, keys]),
        [heads, queries, keys] => Ok([1, heads, queries, keys]),
        _ => Err(archive.wrong_shape(name, "of rank 4 or 3, [batch, heads, queries, keys] or [heads, queries, keys]")),
    }
}

/// The error for a tensor that the file does not have, which lists those that it has.
fn no_weights(archive: &Archive, tensor: &str) -> Error {
    let listed = |name: &str| {
        let floats = archive.floats(name).ok().filter(|_| shape(archive, name).is_ok_and(|shape| !shape.contains(&0)));
        let weights = floats.is_some_and(|floats| floats.widened().into_iter().all(is_weight));
        Ok(Listed { name: name.into(), dtype: archive.dtype(name)?, shape: archive.shape(name)?.to_vec(), weights })
    };
    match archive.names().map(listed).collect::<Result<_>>() {
        Ok(tensors) => Error::NoWeights { path: archive.path.clone(), tensor: tensor.into(), tensors },
        Err(error) => error,
    }
}

/// The names that are equal but for their first number between dots, in the order of that number.
fn siblings<'a>(names: impl Iterator<Item = &'a str>, name: &str) -> Vec<&'a str> {
    let parts: Vec<&str> = name.split('.').collect();
    let Some(place) = parts.iter().position(|part| part.parse::<u32>().is_ok()) else { return Vec::new() };
    let number = |other: &str| {
        let mut others: Vec<&str> = other.split('.').collect();
        let number = others.get(place)?.parse::<u32>().ok()?;
        others[place] = parts[place];
        (others == parts).then_some(number)
    };
    let mut found: Vec<_> = names.filter_map(|other| Some((number(other)?, other))).collect();
    found.sort_unstable();
    found.into_iter().map(|(_, name)| name).collect()
}

/// The weights of a tensor and, where `all` is set, those of the other layers.
fn stored(archive: &Archive, name: &str, all: bool) -> Result<Weights> {
    if !archive.has(name) {
        return Err(no_weights(archive, name));
    }
    let shape = shape(archive, name)?;
    let mut names = siblings(archive.names().filter(|_| all), name);
    names.retain(|other| archive.shape(other).ok() == archive.shape(name).ok() && archive.floats(other).is_ok());
    let shown = names.iter().position(|other| *other == name).unwrap_or_else(|| {
        names = vec![name];
        0
    });
    let layer = |name: &&str| Ok((name.to_string(), archive.floats(name)?.widened()));
    let source = match names[..] {
        [] | [_] => format!("tensor {name:?}"),
        [first, .., last] => format!("tensors {first:?} to {last:?}"),
    };
    Ok(Weights { layers: names.iter().map(layer).collect::<Result<_>>()?, shape, shown, source })
}

fn computed(arguments: &Arguments, archive: &Archive) -> Result<Weights> {
    let mut request = Request::read_for_weights(archive, arguments.terms.layout.into())?;
    request.apply(&arguments.terms);
    let Request { mut problem, operands, .. } = request;
    problem.weights = true;
    let refused = |source| archive.problem(source);
    problem.check().map_err(refused)?.check_inputs(&operands.inputs()).map_err(refused)?;
    let engine = arguments.engine.open()?;
    let outputs = engine.attention(&problem, &operands.inputs(), &arguments.kernels)?;
    let shape = [problem.batch, problem.heads, problem.seq_q, problem.seq_kv].map(|n| n as usize);
    let values = outputs.weights.expect("the problem asks for weights");
    let source = format!("computed by {}", engine.label());
    Ok(Weights { layers: vec![(String::new(), values)], shape, shown: 0, source })
}

/// How many queries and keys of a batch are no padding.
fn lengths(archive: &Archive, weights: &Weights, batch: usize) -> Result<[usize; 2]> {
    let [batches, _, seq_q, seq_kv] = weights.shape;
    if !archive.has("kv_lens") {
        let used = weights.layers.iter().map(|(_, values)| used(values, weights.shape, batch));
        return Ok(used.fold([1, 1], |[rows, columns], [r, c]| [rows.max(r), columns.max(c)]));
    }
    archive.expect_shape("kv_lens", &[batches])?;
    let keys = archive.lengths("kv_lens")?[batch] as usize;
    if keys > seq_kv {
        let (path, tensor, want) = (archive.path.clone(), "kv_lens".into(), format!("at most {seq_kv}, the keys"));
        return Err(Error::TensorValue { path, tensor, index: batch, value: keys as i64, want });
    }
    let keys = keys.max(1);
    Ok([if seq_q == seq_kv { keys } else { seq_q }, keys])
}

/// The tokens of a file.
fn tokens(path: &Path, limit: usize) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
    // A line may well begin like an array: [CLS].
    let tokens = serde_json::from_str(&text).unwrap_or_else(|_| text.lines().map(String::from).collect::<Vec<_>>());
    if tokens.is_empty() || tokens.len() > limit {
        return Err(Error::Tokens { path: path.into(), got: tokens.len(), limit });
    }
    Ok(tokens)
}

/// The labels of both axes, which say how much is drawn of each.
fn labels(arguments: &Arguments, archive: &Archive, weights: &Weights) -> Result<[Vec<String>; 2]> {
    let [_, _, seq_q, seq_kv] = weights.shape;
    if let Some(path) = &arguments.tokens {
        return Ok([tokens(path, seq_q)?, tokens(arguments.key_tokens.as_ref().unwrap_or(path), seq_kv)?]);
    }
    let known = archive.json::<Vec<Vec<String>>>("tokens", "arrays of tokens").unwrap_or_default();
    let known = known.get(arguments.batch).map_or(&[][..], Vec::as_slice);
    let named = |n: usize| match known.get(..n) {
        Some(tokens) => tokens.to_vec(),
        None => (0..n).map(|row| row.to_string()).collect(),
    };
    Ok(lengths(archive, weights, arguments.batch)?.map(named))
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let page = is_page(&arguments.output)?;
    let archive = Archive::read(&arguments.input)?;
    let weights = match arguments.tensor.as_deref() {
        None if !archive.has("weights") && (archive.has("q") || archive.has("k")) => computed(arguments, &archive)?,
        name => stored(&archive, name.unwrap_or("weights"), page)?,
    };
    let batches = weights.shape[0];
    if arguments.batch >= batches {
        return Err(Error::Batch { path: arguments.input.clone(), batch: arguments.batch, batches });
    }
    let [queries, keys] = labels(arguments, &archive, &weights)?;
    let title = arguments.title.clone().unwrap_or_else(|| archive.stem());
    let size = [queries.len(), keys.len()];
    let cut = |(name, values): (String, Vec<f32>)| Layer::cut(name, &values, weights.shape, arguments.batch, size);
    let layers: Vec<Layer> = weights.layers.into_iter().map(cut).collect();
    let (count, heads) = (layers.len(), layers[0].heads);
    let sequence = Sequence { title, queries, keys, layers, shown: weights.shown };
    draw(&arguments.output, std::slice::from_ref(&sequence), &arguments.style)?;

    let [rows, columns] = size;
    report.object(&json!({
        "output": arguments.output.to_string_lossy(), "source": weights.source,
        "layers": count, "heads": heads, "queries": rows, "keys": columns,
    }))?;
    let (source, output) = (weights.source, arguments.output.display());
    let [count, heads, rows, columns] =
        [(count, "layer", "layers"), (heads, "head", "heads"), (rows, "query", "queries"), (columns, "key", "keys")]
            .map(|(n, one, many)| report::count(n, one, many));
    report.line(format!("{count}, {heads}, {rows} × {columns}, {source}, drawn in {output}"))?;
    Ok(Outcome::Right)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::archive::builder::Builder;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// What is drawn from a file, with `tokens` in a second file.
    fn draw_in(output: &str, file: &Builder, tokens: Option<&str>, options: &[&str]) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let [input, output, list] = ["x.safetensors", output, "tokens.txt"].map(|name| folder.path().join(name));
        std::fs::write(&input, file.bytes()).unwrap();
        let mut line =
            vec!["heatmap", "--cpu", "--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()];
        if let Some(tokens) = tokens {
            std::fs::write(&list, tokens).unwrap();
            line.extend(["--tokens", list.to_str().unwrap()]);
        }
        line.extend(options);
        run(&Line::parse_from(line).arguments, Report { json: true })?;
        Ok(std::fs::read_to_string(&output).unwrap())
    }

    fn draw_of(file: &Builder, tokens: Option<&str>, options: &[&str]) -> Result<String> {
        draw_in("y.svg", file, tokens, options)
    }

    #[test]
    fn weights_are_computed_from_q_and_k() {
        let file = Builder::default().f32s("q", &[1, 2, 3, 1], &[0.0; 6]).f32s("k", &[1, 2, 3, 1], &[0.0; 6]);
        let svg = draw_of(&file, None, &["--causal", "top-left", "--title", "the title"]).unwrap();
        // The first row sees one key with all its weight, which is the largest.
        for text in ["head 1", "the title", "1.00", "query", "key"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        let plain = draw_of(&file, None, &[]).unwrap();
        assert!(plain.contains("0.33") && !plain.contains("1.00"), "{plain}");
    }

    #[test]
    fn the_scale_of_scores_and_that_of_colours_are_two_options() {
        let file = Builder::default().f32s("q", &[1, 1, 1, 1], &[1.0]).f32s("k", &[1, 1, 2, 1], &[1.0, 0.0]);
        // A large factor gives one key all the weight, and half of the bar is a quarter of the weight.
        let svg = draw_of(&file, None, &["--score-scale", "100", "--scale", "sqrt", "--title", "x"]).unwrap();
        assert!(svg.contains(">1.00<") && svg.contains(">0.25<") && svg.contains(">weight (sqrt)<"), "{svg}");
    }

    /// How often each text stands in a drawing.
    fn counts<const N: usize>(svg: &str, texts: [&str; N]) -> [usize; N] {
        texts.map(|text| svg.matches(&format!(">{text}<")).count())
    }

    #[test]
    fn tokens_name_the_axes_and_cut_padding_off() {
        let file = Builder::default().f32s("layer.0.probs", &[2, 1, 3, 3], &[[1.0, 0.0, 0.0]; 6].concat());
        for tokens in ["[CLS]\nword\n", "[\"[CLS]\", \"word\"]"] {
            let svg = draw_of(&file, Some(tokens), &["--tensor", "layer.0.probs", "--batch", "1"]).unwrap();
            assert_eq!(counts(&svg, ["[CLS]", "word", "2"]), [2, 2, 0], "{svg}");
        }
    }

    #[test]
    fn padding_is_known_by_the_key_lengths_or_by_its_zeros() {
        let weights = [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]].concat();
        let file = Builder::default().f32s("weights", &[1, 1, 3, 3], &weights);
        let numbers = |file: &Builder| counts(&draw_of(file, None, &["--title", "x"]).unwrap(), ["0", "1", "2"]);
        // The colour bar begins with 0.
        assert_eq!(numbers(&file), [3, 2, 1]);
        let lengths = |n: i32| {
            Builder::default().f32s("weights", &[1, 1, 3, 3], &weights).tensor(
                "kv_lens",
                safetensors::Dtype::I32,
                &[1],
                &n.to_le_bytes(),
            )
        };
        assert_eq!(numbers(&lengths(2)), [3, 2, 0]);
        assert_eq!(numbers(&lengths(3)), [3, 2, 2]);
        assert!(
            draw_of(&lengths(4), None, &[])
                .unwrap_err()
                .to_string()
                .contains("holds 4 at index 0; it must be at most 3")
        );
        // Tokens of the metadata stand for the numbers.
        let named = lengths(2).text("tokens", "[[\"the\", \"cat\", \"[PAD]\"]]");
        assert_eq!(counts(&draw_of(&named, None, &[]).unwrap(), ["the", "cat", "[PAD]"]), [2, 2, 0]);
    }

    #[test]
    fn a_page_has_all_layers_and_a_picture_the_one_asked_for() {
        let mut file =
            Builder::default().f32s("layer.10.scale", &[1, 1, 1], &[1.0]).f32s("layer.x.probs", &[1, 1, 1], &[1.0]);
        for name in ["layer.10.probs", "layer.2.probs", "layer.1.probs"] {
            file = file.f32s(name, &[1, 1, 1], &[1.0]);
        }
        file = file.f32s("layer.3.probs", &[2, 1, 1], &[1.0; 2]);
        let html = draw_in("y.html", &file, None, &["--tensor", "layer.2.probs"]).unwrap();
        let places = ["layer.1.probs", "layer.2.probs", "layer.10.probs"].map(|name| html.find(name).expect(name));
        assert!(places.is_sorted() && html.contains("\"shown\":1"), "{html}");
        for other in ["layer.3.probs", "layer.x.probs", "layer.10.scale"] {
            assert!(!html.contains(other), "{other}");
        }
        let svg = draw_of(&file, None, &["--tensor", "layer.2.probs"]).unwrap();
        assert!(svg.contains("layer.2.probs") && !svg.contains("layer.1.probs"), "{svg}");
    }

    #[test]
    fn a_missing_tensor_is_answered_with_those_of_the_file() {
        let file = Builder::default()
            .f32s("layer.0.probs", &[2, 3, 1], &[0.5; 6])
            .f32s("hidden", &[1, 1, 2], &[0.5, -1.0])
            .f32s("flat", &[1], &[0.5]);
        let error = draw_of(&file, None, &[]).unwrap_err().to_string();
        let (_, text) = error.split_once(": ").unwrap();
        assert_eq!(
            text,
            "tensor \"weights\" is missing; the file has\
             \n  flat           F32   [1]\
             \n  hidden         F32   [1, 1, 2]\
             \n  layer.0.probs  F32   [2, 3, 1]  can be drawn: --tensor layer.0.probs"
        );
        let none = Builder::default().f32s("flat", &[1], &[0.5]);
        let error = draw_of(&none, None, &["--tensor", "x"]).unwrap_err().to_string();
        assert!(error.contains("tensor \"x\" is missing; the file has no weights, which are F32"), "{error}");
    }

    #[test]
    fn wrong_input_is_refused() {
        let file = Builder::default().f32s("weights", &[1, 1, 2, 2], &[0.5; 4]);
        let error = |tokens, options: &[&str]| draw_of(&file, tokens, options).unwrap_err().to_string();
        assert!(
            error(Some("a\nb\nc\n"), &[]).contains("tokens.txt: the number of tokens is 3; it must be from 1 to 2")
        );
        assert!(
            error(None, &["--batch", "1"])
                .contains("x.safetensors: batch is 1; it is counted from 0, and must be below 1")
        );
        assert!(error(None, &["--max", "2"]).contains("--max is 2; it must be above 0 and at most 1"));
        let keys = Builder::default().f32s("k", &[1, 1, 1, 1], &[0.0]);
        assert!(draw_of(&keys, None, &[]).unwrap_err().to_string().contains("tensor \"q\" is missing"));
        let flat = Builder::default().f32s("weights", &[2, 2], &[0.5; 4]);
        assert!(draw_of(&flat, None, &[]).unwrap_err().to_string().contains("of rank 4 or 3"));
        let scores = Builder::default().f32s("weights", &[1, 1, 1, 1], &[7.0]);
        assert!(draw_of(&scores, None, &[]).unwrap_err().to_string().contains("must be from 0 to 1"));
    }
}
