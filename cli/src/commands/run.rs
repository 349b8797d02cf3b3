//! `run`: attention on the tensors of a file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

use clap::Args;
use safetensors::{Dtype, View};
use serde_json::json;
use wgpu_attention::Element;
use wgpu_attention_heatmap::replace;

use crate::Outcome;
use crate::archive::Archive;
use crate::engine::{EngineArgs, KernelArgs};
use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::options::TermArgs;
use crate::report::{self, Report};
use crate::request::Request;

#[derive(Args, Debug)]
pub struct Arguments {
    /// Tensors q, k, v and optionally mask, bias, kv_lens, alibi_slopes, sinks, cu_seqlens_q and cu_seqlens_k
    #[arg(long)]
    input: PathBuf,
    /// File for out and the other outputs; an existing file is replaced only when the new one is complete
    #[arg(long)]
    output: PathBuf,
    #[command(flatten)]
    terms: TermArgs,
    /// Also write the softmax weights, f32
    #[arg(long)]
    weights: bool,
    /// Also write the log-sum-exp of each row, f32
    #[arg(long)]
    lse: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// A tensor to write.
struct Written {
    shape: Vec<usize>,
    data: Floats,
}

impl View for &Written {
    fn dtype(&self) -> Dtype {
        match self.data.element() {
            Element::F32 => Dtype::F32,
            Element::F16 => Dtype::F16,
            Element::Bf16 => Dtype::BF16,
            _ => unreachable!("this code knows f32, f16 and bf16"),
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.data.elements().bytes().into()
    }

    fn data_len(&self) -> usize {
        self.data.elements().bytes().len()
    }
}

pub fn run(arguments: &Arguments, report: Report) -> Result<Outcome> {
    let archive = Archive::read(&arguments.input)?;
    let Request { mut problem, operands, out_shape, lse_shape } =
        Request::read(&archive, arguments.terms.layout.into())?;
    arguments.terms.apply(&mut problem);
    (problem.weights, problem.lse) = (arguments.weights, arguments.lse);
    let refused = |source| archive.problem(source);
    problem.check().map_err(refused)?.check_inputs(&operands.inputs()).map_err(refused)?;

    let engine = arguments.engine.open()?;
    let bar = report::slices();
    let mut progress = |done, of| report::advance(&bar, done, of);
    let outputs = engine.attention_in_slices(&problem, &operands.inputs(), &arguments.kernels, &mut progress)?;
    bar.finish_and_clear();
    let mut tensors = vec![("out", Written { shape: out_shape, data: Floats::rounded(&outputs.out, problem.element) })];
    if let Some(weights) = outputs.weights {
        let shape = [problem.batch, problem.heads, problem.seq_q, problem.seq_kv].map(|n| n as usize).to_vec();
        tensors.push(("weights", Written { shape, data: Floats::F32(weights) }));
    }
    if let Some(lse) = outputs.lse {
        tensors.push(("lse", Written { shape: lse_shape, data: Floats::F32(lse) }));
    }
    let label = engine.label();
    let metadata = HashMap::from([
        ("producer".to_string(), concat!("wgpu-attention ", env!("CARGO_PKG_VERSION")).to_string()),
        ("adapter".to_string(), label.to_string()),
    ]);
    let bytes = safetensors::serialize(tensors.iter().map(|(name, tensor)| (*name, tensor)), Some(metadata))
        .map_err(|source| Error::Safetensors { path: arguments.output.clone(), source })?;
    replace(&arguments.output, &bytes).map_err(|source| Error::File { path: arguments.output.clone(), source })?;

    let written: Vec<_> = tensors
        .iter()
        .map(
            |(name, tensor)| json!({"tensor": name, "dtype": tensor.data.element().to_string(), "shape": tensor.shape}),
        )
        .collect();
    report.object(&json!({
        "adapter": label.adapter, "backend": label.backend, "driver": label.driver,
        "output": arguments.output.to_string_lossy(), "tensors": written,
    }))?;
    for (name, tensor) in &tensors {
        report.line(format!("{name} {} {:?}", tensor.data.element(), tensor.shape))?;
    }
    report.line(format!("computed by {label}, written to {}", arguments.output.display()))?;
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

    fn run_on(file: &Builder, options: &[&str]) -> Result<Archive> {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("x.safetensors"), folder.path().join("y.safetensors"));
        std::fs::write(&input, file.bytes()).unwrap();
        let paths = ["run", "--cpu", "--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()];
        let line = Line::parse_from(paths.iter().chain(options));
        run(&line.arguments, Report { json: true })?;
        Archive::read(&output)
    }

    #[test]
    fn out_has_the_type_of_the_input() {
        let halves = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
        };
        let file = Builder::default()
            .tensor("q", Dtype::BF16, &[1, 1, 1, 2], &halves(&[0.0; 2]))
            .tensor("k", Dtype::BF16, &[1, 2, 1, 2], &halves(&[0.0; 4]))
            .tensor("v", Dtype::BF16, &[1, 2, 1, 1], &halves(&[1.0, 2.0]));
        let archive = run_on(&file, &["--layout", "bshd", "--weights", "--lse"]).unwrap();
        assert_eq!(*archive.floats("out").unwrap(), Floats::Bf16(vec![half::bf16::from_f32(1.5)]));
        assert_eq!(archive.shape("out").unwrap(), [1, 1, 1, 1]);
        assert_eq!(archive.f32s_of("weights", &[1, 1, 1, 2]).unwrap(), [0.5, 0.5]);
        assert_eq!(archive.f32s_of("lse", &[1, 1, 1]).unwrap(), [2f32.ln()]);
        let causal = run_on(&file, &["--layout", "bshd", "--causal", "top-left"]).unwrap();
        assert_eq!(causal.floats("out").unwrap().widened(), [1.0]);
        assert!(!causal.has("weights"));
    }

    #[test]
    fn tensors_may_have_axes_of_zero() {
        let file = |[batch, rows, keys]: [usize; 3]| {
            let zeros = vec![0.0; 1024];
            let tensor = |n: usize| &zeros[..batch * n * 2];
            let file = Builder::default().f32s("q", &[batch, 1, rows, 2], tensor(rows));
            file.f32s("k", &[batch, 1, keys, 2], tensor(keys)).f32s("v", &[batch, 1, keys, 2], tensor(keys))
        };
        for [batch, rows, keys] in [[2, 3, 0], [2, 0, 3], [0, 2, 3], [0, 0, 0]] {
            let written = run_on(&file([batch, rows, keys]), &["--weights", "--lse"]).unwrap();
            assert_eq!(written.f32s_of("out", &[batch, 1, rows, 2]).unwrap(), vec![0.0; batch * rows * 2]);
            assert_eq!(written.f32s_of("lse", &[batch, 1, rows]).unwrap(), vec![f32::NEG_INFINITY; batch * rows]);
            assert!(written.f32s_of("weights", &[batch, 1, rows, keys]).unwrap().is_empty());
        }
        // No sequence, one without a token, and one without a key.
        for (bounds_q, bounds_k) in [(&[0u32][..], &[0u32][..]), (&[0, 0], &[0, 0]), (&[0, 1], &[0, 0])] {
            let [total_q, total_kv] = [bounds_q, bounds_k].map(|bounds| bounds[bounds.len() - 1] as usize);
            let zeros = |n: usize| vec![0.0; 2 * n];
            let file = Builder::default()
                .f32s("q", &[total_q, 1, 2], &zeros(total_q))
                .f32s("k", &[total_kv, 1, 2], &zeros(total_kv))
                .f32s("v", &[total_kv, 1, 2], &zeros(total_kv))
                .tensor("cu_seqlens_q", Dtype::U32, &[bounds_q.len()], bytemuck::cast_slice(bounds_q))
                .tensor("cu_seqlens_k", Dtype::U32, &[bounds_k.len()], bytemuck::cast_slice(bounds_k));
            let written = run_on(&file, &["--lse"]).unwrap();
            assert_eq!(written.f32s_of("out", &[total_q, 1, 2]).unwrap(), zeros(total_q));
            assert_eq!(written.f32s_of("lse", &[1, total_q]).unwrap(), vec![f32::NEG_INFINITY; total_q]);
        }
        let error = run_on(&file([1, 1, 1]).f32s("q", &[1, 0, 1, 2], &[]), &[]).unwrap_err().to_string();
        assert!(error.contains("heads is 0; it must be at least 1"), "{error}");
    }

    #[test]
    fn wrong_input_is_refused() {
        let file = Builder::default().f32s("q", &[1, 1, 1, 2], &[0.0; 2]).f32s("k", &[1, 1, 1, 2], &[0.0; 2]).f32s(
            "v",
            &[1, 1, 1, 2],
            &[0.0; 2],
        );
        let error = run_on(&file, &["--softcap", "-1"]).unwrap_err().to_string();
        assert!(error.contains("x.safetensors: softcap is -1"), "{error}");
        let error = run_on(&file.without("v"), &[]).unwrap_err().to_string();
        assert!(error.contains("tensor \"v\" is missing"), "{error}");
    }
}
