//! What the fuzz targets share: the loaders of the command line, which is no library and so is compiled anew here, a mutator
//! of safetensors files, and devices to plan for.
#![allow(dead_code, missing_docs)]

// The modules of cli/src/main.rs that the loaders need.
#[path = "../../cli/src/archive.rs"]
pub mod archive;
#[path = "../../cli/src/cases/mod.rs"]
pub mod cases;
#[path = "../../cli/src/difference.rs"]
pub mod difference;
#[path = "../../cli/src/engine.rs"]
pub mod engine;
#[path = "../../cli/src/error.rs"]
pub mod error;
#[path = "../../cli/src/floats.rs"]
pub mod floats;
#[path = "../../cli/src/memory.rs"]
pub mod memory;
#[path = "../../cli/src/operands.rs"]
pub mod operands;
#[path = "../../cli/src/options.rs"]
pub mod options;
#[path = "../../cli/src/report.rs"]
pub mod report;
#[path = "../../cli/src/request.rs"]
pub mod request;
#[path = "../../cli/src/store.rs"]
pub mod store;

use std::path::Path;
use std::sync::LazyLock;

use wgpu_attention::{Caps, with};
use wgpu_attention::wgpu::Limits;

/// In memory where the system has such a folder: a disk is waited for whenever a file is replaced.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder can be made"));

/// Calls `read` with the path of a file that holds these bytes.
pub fn with_file<T>(name: &str, bytes: &[u8], read: impl FnOnce(&Path) -> T) -> T {
    let path = FOLDER.path().join(name);
    std::fs::write(&path, bytes).expect("a file can be written");
    read(&path)
}

/// Mutates a safetensors file so that most results still have a header that can be read: its header with the length before it
/// put right, or its data without a change of length. A third of the results are changed anywhere.
pub fn mutate_safetensors(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let length = data[..size].first_chunk().map(|&length| u64::from_le_bytes(length));
    let header = length.and_then(|length| usize::try_from(length).ok()).filter(|&n| n <= size.saturating_sub(8));
    // There is nothing to mutate in an empty part.
    let header = header.filter(|&header| [true, header > 0, 8 + header < size][seed as usize % 3]);
    let (Some(header), 1..) = (header, seed % 3) else {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    };
    let mut text = data[8..][..header].to_vec();
    let mut rest = data[8 + header..size].to_vec();
    if seed % 3 == 1 {
        text.resize(header + (max_size - size).min(64), b' ');
        let max_size = text.len();
        let size = libfuzzer_sys::fuzzer_mutate(&mut text, header, max_size);
        text.truncate(size);
    } else {
        let size = rest.len();
        libfuzzer_sys::fuzzer_mutate(&mut rest, size, size);
    }
    let file = [&(text.len() as u64).to_le_bytes()[..], &text, &rest].concat();
    data[..file.len()].copy_from_slice(&file);
    file.len()
}

/// Devices to plan for: a plain GPU, one with everything, a CPU adapter and the least that runs anything.
pub fn devices() -> [Caps; 4] {
    let plain = Caps::new(Limits::default());
    let lanes = |size| (Some(size), Some(size), Some(size));
    let mut rich = with!(plain.clone(), f16: true, int64: true, matrices: vec![8, 16]);
    (rich.subgroup_size, rich.subgroup_min_size, rich.subgroup_max_size) = lanes(32);
    rich.limits.max_compute_workgroup_storage_size = 65536;
    let mut cpu = with!(plain.clone(), cpu: true, f16: true, int64: true);
    (cpu.subgroup_size, cpu.subgroup_min_size, cpu.subgroup_max_size) = lanes(8);
    let least = with!(plain.clone(), limits: Limits::downlevel_defaults());
    [plain, rich, cpu, least]
}
