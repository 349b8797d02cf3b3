//! Case files, on any bytes: a case that loads also runs on the CPU and can be compared, unless the library refuses it.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use wgpu_attention::Problem;
use wgpu_attention_fuzz::cases::{Loaded, Work, load, sources};
use wgpu_attention_fuzz::engine::{Engine, KernelArgs};
use wgpu_attention_fuzz::{mutate_safetensors, with_file};

/// Scores of a problem that is still worth the time.
const SCORES: u64 = 1 << 14;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate_safetensors(data, size, max_size, seed)
});

fuzz_target!(|data: &[u8]| {
    with_file("case.safetensors", data, |path| {
        let sources = sources(&[path.to_path_buf()]).expect("the file is there");
        let Ok(Loaded::Cases(cases)) = load(&sources[0]) else { return };
        let (engine, kernels) = (Engine::Cpu, KernelArgs::default());
        for call in cases.iter().flat_map(|case| &case.calls) {
            let outputs = match &call.work {
                Work::Attention { problem, operands } | Work::Scores { problem, operands } if quick(problem) => {
                    engine.attention(problem, &operands.inputs(), &kernels)
                }
                Work::Layer(work) if quick(&work.problem) => engine.layer(work, &kernels),
                Work::Rotation(work) => engine.rotation(work),
                Work::Append(work) => engine.append(work),
                _ => continue,
            };
            if let Ok(outputs) = outputs {
                call.verdicts(&outputs);
            }
        }
    });
});

fn quick(problem: &Problem) -> bool {
    problem.check().is_ok_and(|shape| shape.scores_len() <= SCORES)
}
