//! The built program as a user meets it, on a machine without any GPU adapter: what it says, and its exit codes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Runs the program where wgpu finds no adapter.
fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-attention"));
    let hidden =
        [("WGPU_BACKEND", "vulkan"), ("VK_DRIVER_FILES", "/nonexistent"), ("VK_ICD_FILENAMES", "/nonexistent")];
    command.args(arguments).envs(hidden).env_remove("WGPU_ADAPTER_NAME").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/sdpa").join(name)
}

const CASE: &str = "scale_one.safetensors";

#[test]
fn without_an_adapter_each_command_says_so() {
    let (file, folder) = (case(CASE), tempfile::tempdir().unwrap());
    let output = folder.path().join("out.safetensors");
    let (file, output) = (file.to_str().unwrap(), output.to_str().unwrap());
    let commands: [(&[&str], i32, &str); 7] = [
        (&[], 0, "only the CPU reference ran, nothing was checked on a GPU"),
        (&["adapters"], 0, "No GPU adapter was found"),
        (&["bench"], 1, "no GPU adapter was found, there is nothing to time"),
        (&["cases", file], 1, "nothing ran; --cpu runs the CPU reference"),
        (&["run", "--input", file, "--output", output], 2, "--cpu computes on the CPU reference instead"),
        (&["plan", "--shape", "1,1,1,4,4,4"], 2, "no GPU adapter"),
        (&["run", "--cpu", "--input", file, "--output", output], 0, "computed by CPU reference"),
    ];
    for (arguments, code, says) in commands {
        let got = run(arguments);
        let all = text(&got.stdout) + &text(&got.stderr);
        assert!(all.contains(says), "{arguments:?}: {all}");
        assert_eq!(got.status.code(), Some(code), "{arguments:?}: {all}");
        // How to get one on this system.
        let helps = ["apt install", "Metal", "Direct3D", "Vulkan driver"].iter().any(|help| all.contains(help));
        assert_eq!(helps, !arguments.contains(&"--cpu"), "{arguments:?}: {all}");
    }
}

#[test]
fn a_variable_that_cannot_be_understood_is_named() {
    let file = case(CASE);
    let commands: [&[&str]; 7] = [
        &[],
        &["adapters"],
        &["bench"],
        &["cases", file.to_str().unwrap()],
        &["plan", "--shape", "1,1,1,4,4,4"],
        &["plan", "--shape", "1,1,1,4,4,4", "--adapter", "0"],
        &["run", "--input", file.to_str().unwrap(), "--output", "x.safetensors"],
    ];
    for (variable, value) in [("WGPU_BACKEND", "vulkna"), ("WGPU_POWER_PREF", "frugal")] {
        for arguments in commands {
            let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-attention"));
            let hidden = [("VK_DRIVER_FILES", "/nonexistent"), ("VK_ICD_FILENAMES", "/nonexistent")];
            command.args(arguments).envs(hidden).env("WGPU_BACKEND", "vulkan").env(variable, value);
            let got = command.output().unwrap();
            let says = format!("the environment variable {variable} is {value:?}; it must be ");
            assert!(text(&got.stderr).contains(&says), "{arguments:?}: {}", text(&got.stderr));
            assert_eq!(got.status.code(), Some(2), "{arguments:?}");
        }
    }
}

#[test]
fn a_shape_without_work_is_nothing_to_time() {
    for shape in ["0,1,1,4,4,4", "1,1,1,0,4,4", "1,1,1,4,0,4"] {
        let got = run(&["bench", "--shape", shape]);
        let says = format!("shape {shape}: no query sees a key, so that there is nothing to time");
        assert!(text(&got.stderr).contains(&says), "{}", text(&got.stderr));
        assert_eq!(got.status.code(), Some(2));
    }
}

#[test]
fn machines_read_one_object_a_line_errors_too() {
    let file = case(CASE);
    let file = file.to_str().unwrap();
    let commands: [(&[&str], bool); 9] = [
        (&[], false),
        (&["adapters"], false),
        (&["bench"], true),
        (&["bench", "--shape", "1,2"], true),
        (&["cases", file], true),
        (&["cases", "--cpu", file], false),
        (&["run", "--cpu", "--input", "no-such-file", "--output", "x"], true),
        (&["heatmap", "--cpu", "--input", "no-such-file", "--output", "x.svg"], true),
        (&["plan", "--shape", "1,8,3,4,4,4"], true),
    ];
    for (arguments, fails) in commands {
        let got = run(&[arguments, &["--json"]].concat());
        let objects: Vec<serde_json::Map<String, serde_json::Value>> =
            text(&got.stdout).lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        let error = objects.iter().any(|object| object.get("error").is_some_and(|error| error.is_string()));
        assert_eq!((error, got.status.success()), (fails, !fails), "{arguments:?}: {objects:?}");
        assert_eq!(got.stderr.is_empty(), !fails && arguments.contains(&"--cpu"), "{arguments:?}");
    }
}

#[test]
fn cases_end_with_what_passed_failed_and_was_skipped() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(case(CASE), folder.path().join("good.safetensors")).unwrap();
    let cases = || {
        let got = run(&["cases", "--cpu", folder.path().to_str().unwrap()]);
        (text(&got.stdout).lines().last().unwrap().to_owned(), got.status.code())
    };
    assert_eq!(cases(), ("1 passed, 0 failed".into(), Some(0)));
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    let unknown = safetensors::serialize([("x", view)], None).unwrap();
    std::fs::write(folder.path().join("unknown.safetensors"), unknown).unwrap();
    assert_eq!(cases(), ("1 passed, 0 failed, 1 skipped".into(), Some(0)));
    std::fs::write(folder.path().join("broken.safetensors"), [1, 2, 3]).unwrap();
    assert_eq!(cases(), ("1 passed, 1 failed, 1 skipped".into(), Some(1)));
}
