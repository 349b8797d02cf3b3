//! all-MiniLM-L6-v2 against what others computed and published. Needs the files that scripts/models fetches.

use std::ops::Range;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use safetensors::SafeTensors;
use serde_json::Value;
use wgpu_attention::Gpu;
use wgpu_attention_models::minilm::{Encoded, MiniLm};
use wgpu_attention_models::{Error, folder};

fn read(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// An f32 tensor of a safetensors file.
fn tensor(file: &[u8], name: &str) -> Vec<f32> {
    let view = SafeTensors::deserialize(file).unwrap();
    view.tensor(name).unwrap().data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn model() -> MiniLm {
    MiniLm::load(&folder("minilm"), &ProgressBar::hidden()).unwrap()
}

/// One of the adapters that the tests are run for, or the best one.
fn gpu() -> Gpu {
    match std::env::var("WGPU_ATTENTION_ADAPTERS") {
        Ok(names) => Gpu::named(names.split(',').next().unwrap()).unwrap(),
        Err(_) => Gpu::new().unwrap(),
    }
}

fn encode(sentences: &[String], weights_of: Range<usize>) -> Encoded {
    let model = model();
    model.encode(&gpu(), &model.tokenize(sentences).unwrap(), weights_of).unwrap()
}

fn largest_difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
#[ignore = "needs what scripts/models fetches"]
fn embeddings_and_weights_are_those_of_transformers() {
    let file = read("tests/minilm/embeddings.safetensors");
    let (_, header) = SafeTensors::read_metadata(&file).unwrap();
    let sentences: Vec<String> = serde_json::from_str(&header.metadata().as_ref().unwrap()["sentences"]).unwrap();
    let encoded = encode(&sentences, 5..6);
    let got: Vec<f32> = encoded.embeddings.flatten_all().unwrap().to_vec1().unwrap();
    let difference = largest_difference(&got, &tensor(&file, "embeddings"));
    println!("embeddings: largest difference {difference:.1e}");
    assert!(difference <= 1e-5, "{difference}");

    let (weights, shape) = (&encoded.weights[0], encoded.weights_shape);
    let want = tensor(&read("../tests/cases/minilm/sentences.safetensors"), "layer.5.probs");
    let tokens = model().tokenize(&sentences).unwrap().tokens;
    let [_, heads, rows, columns] = shape;
    // Rows of padding are nobody's business, and the file has the first sentences only.
    let real = |n: usize| n / columns % rows < tokens[n / columns / rows / heads].len();
    let pick = |all: &[f32]| -> Vec<f32> { (0..want.len()).filter(|&n| real(n)).map(|n| all[n]).collect() };
    let difference = largest_difference(&pick(weights), &pick(&want));
    println!("weights of layer 5: largest difference {difference:.1e}");
    assert!(difference <= 2e-5, "{difference}");
}

#[test]
#[ignore = "needs what scripts/models fetches"]
fn similarities_are_the_published_ones() {
    let file: Value = serde_json::from_slice(&read("tests/minilm/published_scores.json")).unwrap();
    let tolerance = file["tol_abs"].as_f64().unwrap();
    let strings = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).unwrap() };
    let mut compared = 0;
    for set in file["sets"].as_array().unwrap() {
        let (a, b) = (strings(&set["a"]), strings(&set["b"]));
        let similarity = encode(&[a.clone(), b.clone()].concat(), 0..0).similarity().unwrap();
        for i in 0..a.len() {
            for j in 0..b.len() {
                let got = f64::from(similarity[i][a.len() + j]);
                let published = set["published_cosine"][i][j].as_f64().unwrap();
                let computed = set["computed_f64"][i][j].as_f64().unwrap();
                assert!((got - published).abs() <= tolerance, "{} / {}: {got}, published {published}", a[i], b[j]);
                assert!((got - computed).abs() <= 1e-5, "{} / {}: {got}, computed {computed}", a[i], b[j]);
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 18);
}

#[test]
#[ignore = "needs what scripts/models fetches"]
fn wrong_input_is_refused() {
    let model = model();
    assert!(matches!(model.tokenize(&[]), Err(Error::NoText)));
    let long = "word ".repeat(300);
    let error = model.tokenize(&["short".into(), long]).err().unwrap().to_string();
    assert_eq!(error, "text 2 has 302 tokens; the model takes 256");
    let batch = model.tokenize(&["short".into()]).unwrap();
    assert!(matches!(model.encode(&gpu(), &batch, 6..7), Err(Error::Layer { layer: 6, last: 5 })));
}

#[test]
fn a_missing_file_is_named_with_what_fetches_it() {
    let error = MiniLm::load(&PathBuf::from("nowhere"), &ProgressBar::hidden()).err().unwrap().to_string();
    assert!(error.contains("nowhere") && error.contains("scripts/models"), "{error}");
}
