//! SmolLM2 with attention on the GPU, against candle. Needs the file that scripts/models fetches.

use std::io::Cursor;
use std::path::PathBuf;

use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use indicatif::ProgressBar;
use wgpu_attention::Gpu;
use wgpu_attention_models::generation::{Choice, greedy, positions, prompt};
use wgpu_attention_models::llama::Llama;
use wgpu_attention_models::{Attend, CpuAttention, Error, GpuAttention, folder};

const QUESTIONS: [&str; 3] = [
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper and a cat.",
    "Explain step by step how bread is made, from flour to loaf.",
];
const TOKENS: usize = 96;

fn path() -> PathBuf {
    folder("smollm2").join("SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn model() -> Llama {
    Llama::load(&path(), &ProgressBar::hidden()).unwrap()
}

/// One of the adapters that the tests are run for, or the best one.
fn gpu() -> Gpu {
    match std::env::var("WGPU_ATTENTION_ADAPTERS") {
        Ok(names) => Gpu::named(names.split(',').next().unwrap()).unwrap(),
        Err(_) => Gpu::new().unwrap(),
    }
}

fn answer(model: &Llama, tokens: &[u32], attend: &mut Attend<'_>) -> Vec<Choice> {
    let mut choices = Vec::new();
    greedy(model, tokens, TOKENS, attend, &mut |choice| {
        choices.push(choice);
        Ok(())
    })
    .unwrap();
    choices
}

#[test]
#[ignore = "needs what scripts/models fetches"]
fn greedy_tokens_are_those_of_attention_by_candle() {
    let (model, gpu) = (model(), gpu());
    for question in QUESTIONS {
        let tokens = prompt(&model, question).unwrap();
        let capacity = tokens.len() + TOKENS;
        let mut ours = GpuAttention::new(&gpu, model.heads, capacity);
        let mut theirs = CpuAttention::new(model.heads, capacity).unwrap();
        let ours = answer(&model, &tokens, &mut |layer, start, qkv| ours.attend(layer, start, qkv));
        let theirs = answer(&model, &tokens, &mut |layer, start, qkv| theirs.attend(layer, start, qkv));
        let same = ours.iter().zip(&theirs).take_while(|(a, b)| a.token == b.token).count();
        println!("{question} {} tokens, the first {same} alike", ours.len());
        assert!(ours.len() >= 64, "{}", ours.len());
        // What follows a near tie that fell to the other side is another text.
        if let (Some(a), Some(b)) = (ours.get(same), theirs.get(same)) {
            println!(
                "token {same}: the best two logits are {:e} apart with ours, {:e} with candle's",
                a.margin, b.margin
            );
            assert!(a.margin < 1e-3 && b.margin < 1e-3, "{a:?} {b:?}");
        } else {
            assert_eq!(ours.len(), theirs.len());
        }
    }
}

/// candle's `quantized_llama`, with weights that are f32 as in the model under test.
fn candles_own() -> ModelWeights {
    let mut packed = std::fs::File::open(path()).unwrap();
    let content = Content::read(&mut packed).unwrap();
    let unpack = |name: &String| {
        let tensor = content.tensor(&mut packed, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
    };
    let tensors: Vec<_> = content.tensor_infos.keys().map(unpack).collect();
    let named: Vec<_> = content.tensor_infos.keys().map(String::as_str).zip(&tensors).collect();
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &named).unwrap();
    file.set_position(0);
    let content = Content::read(&mut file).unwrap();
    ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap()
}

#[test]
#[ignore = "needs what scripts/models fetches"]
fn logits_are_those_of_candles_own_model() {
    let model = model();
    let mut whole = candles_own();

    let tokens = prompt(&model, QUESTIONS[0]).unwrap();
    let gpu = gpu();
    let mut ours = GpuAttention::new(&gpu, model.heads, tokens.len() + 2);
    let mut theirs = CpuAttention::new(model.heads, tokens.len() + 2).unwrap();
    // The prompt, then two tokens one by one: the cache is part of what is compared.
    let parts = [(&tokens[..], 0), (&[504][..], tokens.len()), (&[260][..], tokens.len() + 1)];
    for (part, start) in parts {
        let input = Tensor::new(part, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let want: Vec<f32> = whole.forward(&input, start).unwrap().squeeze(0).unwrap().to_vec1().unwrap();
        let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        let compare = |name: &str, attend: &mut Attend<'_>| {
            let got: Vec<f32> = model.forward(part, start, attend).unwrap().to_vec1().unwrap();
            assert_eq!(got.len(), want.len());
            let difference = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!(
                "{} tokens from {start}, attention by {name}: logits differ by {difference:.1e} of {largest:.0}",
                part.len()
            );
            assert!(difference <= 1e-5 * largest, "{difference} of {largest}");
        };
        compare("candle", &mut |layer, start, qkv| theirs.attend(layer, start, qkv));
        compare("this crate", &mut |layer, start, qkv| ours.attend(layer, start, qkv));
    }
}

#[test]
#[ignore = "needs what scripts/models fetches"]
fn text_is_cut_as_the_models_makers_do() {
    let model = model();
    let ids = |text: &str| model.tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let pieces = |text: &str| model.tokenizer.encode(text, false).unwrap().get_tokens().to_vec();
    assert_eq!(pieces("In 1987"), ["In", "Ġ", "1", "9", "8", "7"]);
    assert_eq!(ids("<|im_start|>user\n")[0], 1);
    assert_eq!(model.tokenizer.decode(&ids("Zürich: 27 °C ☀"), true).unwrap(), "Zürich: 27 °C ☀");
    assert_eq!(model.end, 2);
}

#[test]
#[ignore = "needs what scripts/models fetches"]
fn what_does_not_fit_is_refused() {
    let model = model();
    let mut never = |_: usize, _: usize, _: [&Tensor; 3]| -> wgpu_attention_models::Result<Tensor> { unreachable!() };
    let refused = |error| matches!(error, Err(Error::TooLong { tokens: 8193, limit: 8192, .. }));
    assert!(refused(greedy(&model, &[1], 8192, &mut never, &mut |_| Ok(()))));
    assert!(matches!(positions(&model, &[1], usize::MAX), Err(Error::TooLong { limit: 8192, .. })));
    assert!(matches!(greedy(&model, &[], 1, &mut never, &mut |_| Ok(())), Err(Error::NoText)));
}

#[test]
fn a_missing_file_is_named_with_what_fetches_it() {
    let error = Llama::load(&PathBuf::from("nowhere"), &ProgressBar::hidden()).err().unwrap().to_string();
    assert!(error.contains("nowhere") && error.contains("scripts/models"), "{error}");
}
