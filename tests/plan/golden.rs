//! The kernels and tiles that the planner chooses for the shapes of the README, held against a file: a change of the code's structure must
//! not change them. Where a change is meant, run the test with `WGPU_ATTENTION_WRITE_GOLDEN=1` and read the difference.

use std::fmt::Write;
use std::path::Path;

use wgpu_attention::{Caps, Causal, Element, Kernel, Options, Plan, Problem, with};

use crate::{gpu, matrix_gpu};

/// Batch, heads, key/value heads, queries, keys, dims.
const SHAPES: [([u32; 6], Causal); 10] = [
    ([1, 8, 8, 512, 512, 64], Causal::None),
    ([1, 8, 8, 1024, 1024, 64], Causal::None),
    ([1, 8, 8, 1024, 1024, 64], Causal::TopLeft),
    ([1, 8, 8, 2048, 2048, 64], Causal::TopLeft),
    ([1, 16, 16, 1024, 1024, 128], Causal::TopLeft),
    ([1, 12, 12, 128, 128, 32], Causal::None),
    ([1, 32, 8, 1, 4096, 128], Causal::None),
    ([1, 32, 8, 1, 8192, 128], Causal::None),
    ([2, 4, 2, 65, 127, 63], Causal::BottomRight),
    ([1, 1, 1, 131072, 131072, 64], Causal::TopLeft),
];

fn devices() -> [(&'static str, Caps); 5] {
    let cpu = |lanes: Option<u32>, int64: bool| with!(gpu(), cpu: true, int64, subgroup_size: lanes, subgroup_min_size: lanes, subgroup_max_size: lanes);
    [
        ("any GPU", gpu()),
        ("GPU with matrices", matrix_gpu()),
        ("CPU, 8 lanes", cpu(Some(8), true)),
        ("CPU, 4 lanes", cpu(Some(4), false)),
        ("CPU without subgroups", cpu(None, false)),
    ]
}

fn line(shape: &Problem, caps: &Caps, kernel: Option<Kernel>) -> String {
    let options = with!(Options::default(), kernel);
    let plan = match Plan::new(&shape.check().unwrap(), caps, &options) {
        Ok(plan) => plan,
        Err(_) => return "refused".into(),
    };
    let mut parts: Vec<(String, usize)> = Vec::new();
    for step in plan.steps() {
        let variant = step.variant.to_string();
        match parts.iter_mut().find(|(known, _)| *known == variant) {
            Some((_, count)) => *count += 1,
            None => parts.push((variant, 1)),
        }
    }
    let parts: Vec<_> = parts.iter().map(|(variant, count)| format!("{count} {variant}")).collect();
    format!("{} slices, {} scratch bytes: {}", plan.slices(), plan.scratch_bytes(), parts.join(", "))
}

#[test]
fn the_shapes_of_the_readme_get_the_kernels_and_tiles_that_they_had() {
    let mut text = String::new();
    for (device, caps) in devices() {
        writeln!(text, "{device}").unwrap();
        for ([batch, heads, kv_heads, seq_q, seq_kv, dim], causal) in SHAPES {
            for (element, weights) in [(Element::F32, false), (Element::F16, false), (Element::F32, true)] {
                let mut problem = Problem::new(batch, heads, seq_q, seq_kv, dim);
                (problem.kv_heads, problem.causal) = (kv_heads, causal);
                (problem.element, problem.weights) = (element, weights);
                let what = if weights { " with weights" } else { "" };
                writeln!(text, "  {batch},{heads},{kv_heads},{seq_q},{seq_kv},{dim} {causal:?} {element}{what}")
                    .unwrap();
                for kernel in std::iter::once(None).chain(Kernel::ALL.map(Some)) {
                    let name = kernel.map_or("chosen", |kernel| kernel.name());
                    writeln!(text, "    {name}: {}", line(&problem, &caps, kernel)).unwrap();
                }
            }
        }
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan/golden.txt");
    if std::env::var_os("WGPU_ATTENTION_WRITE_GOLDEN").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let want = std::fs::read_to_string(&file).unwrap();
    let lines = text.lines().zip(want.lines()).enumerate();
    for (n, (got, want)) in lines {
        assert_eq!(got, want, "line {} of {}", n + 1, file.display());
    }
    assert_eq!(text.lines().count(), want.lines().count());
}
