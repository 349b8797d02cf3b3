//! Every example runs to its end on every adapter. Each is a module of this binary, so that none is compiled and linked anew.

mod support;

use std::collections::BTreeSet;
use std::env;
use std::error::Error;
use std::path::Path;
use std::process::Command;

use support::gpus;

/// An example chooses its adapter by the variables that wgpu reads, which belong to a process: so each runs in one of its own.
fn on_each_adapter<E: Into<Box<dyn Error>>>(test: &str, main: fn() -> Result<(), E>) {
    if env::var_os("WGPU_ATTENTION_EXAMPLE").is_some() {
        return main().map_err(Into::into).unwrap();
    }
    for gpu in gpus() {
        let info = gpu.info();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "--nocapture", test])
            .env("WGPU_ATTENTION_EXAMPLE", "1")
            .env("WGPU_BACKEND", info.backend.to_str())
            .env("WGPU_ADAPTER_NAME", &info.name)
            .output()
            .unwrap();
        let [stdout, stderr] = [child.stdout, child.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(child.status.success(), "{test} on {}: {}\n{stdout}\n{stderr}", gpu.name, child.status);
        assert!(stdout.contains("1 passed"), "{test} on {}:\n{stdout}", gpu.name);
    }
}

macro_rules! examples {
    ($($(#[$attribute:meta])* $name:ident in $path:literal;)*) => {
        const NAMES: &[&str] = &[$(stringify!($name)),*];

        $(
            $(#[$attribute])*
            #[path = $path]
            mod $name;
        )*

        mod runs {
            $(
                $(#[$attribute])*
                #[test]
                fn $name() {
                    super::on_each_adapter(concat!("runs::", stringify!($name)), super::$name::main);
                }
            )*
        }
    };
}

examples! {
    slices in "../examples/slices.rs";
    own_device in "../examples/own_device.rs";
    decoding in "../examples/decoding.rs";
    // The package has the feature wherever the whole workspace is built, as scripts/test does.
    #[cfg(feature = "safetensors")]
    layer_from_file in "../examples/layer_from_file.rs";
    compare in "../examples/compare.rs";
    tokio in "../examples/tokio.rs";
    tree_mask in "../examples/tree_mask.rs";
    shared_prefix in "../examples/shared_prefix.rs";
}

#[test]
fn every_example_is_run_and_short() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() < 60, "{name} has {} lines", text.lines().count());
        assert!(text.starts_with("//! ") && text.contains(&format!("--example {name}\n")), "{name} says how to run it");
        assert!(text.contains("assert"), "{name} asserts its result");
        found.insert(name);
    }
    assert_eq!(found, NAMES.iter().map(|&name| name.to_owned()).collect());
}
