//! Text generation: SmolLM2-135M-Instruct with its attention on the GPU.
//!
//! ```sh
//! scripts/models # fetches the model, once
//! cargo run --release -p wgpu-attention-models --bin generate -- "Why is the sky blue?"
//! ```

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use wgpu_attention::internal::describe;
use wgpu_attention_models::generation::{greedy, positions, prompt, rate};
use wgpu_attention_models::llama::Llama;
use wgpu_attention_models::{Attend, CpuAttention, Error, GpuAttention, Result, count_bar, folder, open};

/// Answers a question with the likeliest token after each token.
#[derive(Parser)]
struct Arguments {
    /// The question
    question: String,
    /// The most tokens of the answer
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// What computes attention; all else runs on the CPU by candle
    #[arg(long, value_enum, default_value_t)]
    attention: AttentionArg,
    /// GGUF file (default: where scripts/models puts it)
    #[arg(long)]
    model: Option<PathBuf>,
    /// Adapter: index, part of its name, or backend:part (default: the best one)
    #[arg(long)]
    adapter: Option<String>,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum AttentionArg {
    /// This crate, on the GPU
    #[default]
    Gpu,
    /// candle, on the CPU
    Cpu,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has seen enough, as in `… | head`.
        Err(Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let path = arguments.model.clone().unwrap_or_else(|| folder("smollm2").join("SmolLM2-135M-Instruct.Q4_1.gguf"));
    let bar = count_bar("loading SmolLM2-135M-Instruct");
    let model = Llama::load(&path, &bar)?;
    bar.finish_and_clear();
    let tokens = prompt(&model, &arguments.question)?;
    let capacity = positions(&model, &tokens, arguments.tokens)?;
    match arguments.attention {
        AttentionArg::Gpu => {
            let gpu = open(arguments.adapter.as_deref())?;
            let mut attention = GpuAttention::new(&gpu, model.heads, capacity);
            let label = describe(gpu.info());
            answer(arguments, &model, &tokens, &mut |layer, start, qkv| attention.attend(layer, start, qkv), &label)
        }
        AttentionArg::Cpu => {
            let mut attention = CpuAttention::new(model.heads, capacity)?;
            answer(
                arguments,
                &model,
                &tokens,
                &mut |layer, start, qkv| attention.attend(layer, start, qkv),
                "candle on the CPU",
            )
        }
    }
}

fn answer(arguments: &Arguments, model: &Llama, tokens: &[u32], attend: &mut Attend<'_>, label: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    // A token may hold a part of a letter: the stream gives text once it is whole.
    let mut stream = model.tokenizer.decode_stream(true);
    let timing = greedy(model, tokens, arguments.tokens, attend, &mut |choice| {
        if let Some(text) = stream.step(choice.token).map_err(|error| Error::Tokenizer(error.to_string()))? {
            write!(out, "{text}")?;
            out.flush()?;
        }
        Ok(())
    })?;
    writeln!(
        out,
        "\n\nattention by {label}\nprompt: {} tokens, {:.1} tokens/s; decoding: {} tokens, {:.1} tokens/s",
        timing.prompt_tokens,
        rate(timing.prompt_tokens, timing.prompt),
        timing.decoded_tokens,
        rate(timing.decoded_tokens, timing.decoding),
    )?;
    Ok(())
}
