//! Tuning files, on any text: rows that are read come back as they were written, and no plan fails because of them.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use wgpu_attention::wgpu::{AdapterInfo, Backend, DeviceType};
use wgpu_attention::{Causal, Element, Options, Plan, Problem, Shape};
use wgpu_attention::tuning::{Class, Tuning};
use wgpu_attention_fuzz::store::{read_tuning, write_tuning};
use wgpu_attention_fuzz::{devices, with_file};

static ADAPTER: LazyLock<AdapterInfo> = LazyLock::new(|| AdapterInfo::new(DeviceType::Cpu, Backend::Vulkan));

/// A file of this adapter and version, before and after its rows.
static AROUND: LazyLock<(String, String)> = LazyLock::new(|| {
    let text = with_file("empty.json", b"", |path| {
        write_tuning(path, &ADAPTER, &[]).expect("a file can be written");
        std::fs::read_to_string(path).expect("the file is there")
    });
    let (before, after) = text.split_once("[]").expect("a file without rows has an empty list");
    (before.into(), after.into())
});

static SHAPES: LazyLock<Vec<Shape>> = LazyLock::new(|| {
    let mut problems = Vec::new();
    for (rows, dim) in [(1, 32), (1, 512), (7, 64), (300, 128), (300, 256)] {
        for element in [Element::F32, Element::F16, Element::Bf16] {
            let mut problem = Problem::new(2, 4, rows, 300, dim);
            problem.element = element;
            problems.push(problem.clone());
            (problem.causal, problem.softcap) = (Causal::BottomRight, Some(20.0));
            problems.push(problem);
        }
    }
    problems.iter().map(|problem| problem.check().expect("the problem is valid")).collect()
});

fuzz_target!(|data: &[u8]| {
    let (before, after) = &*AROUND;
    // As a whole file, and as the rows of one whose origin is right.
    for file in [data.to_vec(), [before.as_bytes(), data, after.as_bytes()].concat()] {
        if let Ok(Some(tuning)) = with_file("tuning.json", &file, |path| read_tuning(path, &ADAPTER)) {
            follow(&tuning);
        }
    }
});

fn follow(tuning: &Tuning) {
    let again = with_file("again.json", b"", |path| {
        write_tuning(path, &ADAPTER, &tuning.rows).expect("a file can be written");
        read_tuning(path, &ADAPTER).expect("what was written is read").expect("the file is there")
    });
    assert_eq!(again.rows, tuning.rows);
    // Rows of other classes change no plan.
    for shape in SHAPES.iter().filter(|shape| tuning.rows.iter().any(|row| row.class == Class::of(shape))) {
        for caps in devices() {
            Plan::tuned(shape, &caps, &Options::default(), tuning).expect("every problem can be planned");
        }
    }
}
