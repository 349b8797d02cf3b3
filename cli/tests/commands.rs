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
        let says = format!("problem {shape} f32: no query sees a key, so that there is nothing to time");
        assert!(text(&got.stderr).contains(&says), "{}", text(&got.stderr));
        assert_eq!(got.status.code(), Some(2));
    }
}

/// A line of a record: a kernel on one problem, whose times are a little around `ms`.
fn measurement(kernel: &str, ms: f64) -> String {
    let times: Vec<f64> = (0..20).map(|run| ms * (1.0 + 0.01 * f64::from(run % 5))).collect();
    let machine = serde_json::json!({"cpu": "a CPU", "cores": 2, "memory_bytes": 1 << 30, "os": "an OS"});
    let line = serde_json::json!({
        "adapter": "a card", "backend": "vulkan", "driver": "a driver", "kernel": kernel, "choice": kernel, "planned": true,
        "shape": "1,8,8,512,512,64", "dtype": "f32", "causal": "none", "flops": 1e9, "bytes": 1_000_000, "first_ms": 50.0,
        "ceiling_gflops": 1000.0, "ceiling_gbs": 100.0, "error": 1e-6, "budget": 1e-5, "budget_used": 0.25,
        "timer": "wall clock", "version": "0.1.0", "date": "2026-01-02T03:04:05Z", "machine": machine, "times_ms": times,
    });
    format!("{line}\n")
}

#[test]
fn stored_measurements_are_shown_compared_and_drawn_without_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let [new, old, page] = ["new.jsonl", "old.jsonl", "page.html"].map(|name| folder.path().join(name));
    let all = ["flash", "rows", "split"].map(|kernel| measurement(kernel, 10.0));
    std::fs::write(&old, all.concat()).unwrap();
    let all = [("flash", 8.0), ("rows", 12.0), ("split", 10.02)].map(|(kernel, ms)| measurement(kernel, ms));
    std::fs::write(&new, all.concat()).unwrap();
    let [new, old, page] = [&new, &old, &page].map(|path| path.to_str().unwrap());

    let compared = ["bench", "--from", new, "--compare", old];
    let got = run(&[&compared[..], &["--report", page]].concat());
    assert!(got.status.success(), "{}", text(&got.stderr));
    let out = text(&got.stdout);
    for (kernel, verdict) in [("flash", "faster"), ("rows", "slower"), ("split", "no difference")] {
        let row = |line: &str| line.contains(kernel) && line.contains(verdict);
        assert!(out.lines().any(row), "{kernel} {verdict}: {out}");
    }
    let html = std::fs::read_to_string(page).unwrap();
    assert!(html.contains("1,8,8,512,512,64 f32") && html.trim_end().ends_with("</html>"), "{html}");

    let got = run(&[&compared[..], &["--format", "csv"]].concat());
    assert_eq!(text(&got.stdout).lines().filter(|line| line.ends_with(",faster")).count(), 1);
    let got = run(&[&compared[..], &["--json"]].concat());
    let verdict = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["compared"]["verdict"].clone();
    assert_eq!(text(&got.stdout).lines().map(verdict).collect::<Vec<_>>(), ["faster", "slower", "no-difference"]);

    for (wrong, says) in [
        (&["--json", "--format", "md"][..], "--json asks for the format jsonl, and --format for md"),
        (&["--shape", "1,1,1,4,4,4"], "cannot be used with"),
    ] {
        let got = run(&[&compared[..], wrong].concat());
        assert_eq!(got.status.code(), Some(2));
        assert!(text(&got.stderr).contains(says), "{}", text(&got.stderr));
    }
}

#[test]
fn machines_read_one_object_a_line_errors_too() {
    let file = case(CASE);
    let file = file.to_str().unwrap();
    let commands: [(&[&str], bool); 10] = [
        (&[], false),
        (&["adapters"], false),
        (&["bench"], true),
        (&["bench", "--shape", "1,2"], true),
        (&["bench", "--from", "no-such-file"], true),
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

/// A safetensors file of zeros in f32.
fn zeros(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| vec![0; 4 * shape.iter().product::<usize>()]).collect();
    let view = |name, shape: &[usize], data| (name, TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap());
    let views = tensors.iter().zip(&data).map(|(&(name, shape), data)| view(name, shape, data));
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn results_that_the_host_cannot_hold_are_refused_before_they_are_computed() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = ["in.safetensors", "out.safetensors"].map(|name| folder.path().join(name));
    // Weights of 16 TB.
    let shape = [1, 1, 2_000_000, 1];
    std::fs::write(&input, zeros(&[("q", &shape), ("k", &shape), ("v", &shape)])).unwrap();
    let [input, picture] = [input, folder.path().join("out.svg")].map(|path| path.to_str().unwrap().to_owned());
    for arguments in [
        ["run", "--cpu", "--weights", "--input", &input, "--output", output.to_str().unwrap()],
        ["heatmap", "--cpu", "--causal=none", "--input", &input, "--output", &picture],
    ] {
        let got = run(&arguments);
        let err = text(&got.stderr);
        assert_eq!(got.status.code(), Some(2), "{err}");
        assert!(err.contains("out of memory: the call takes about 4800"), "{err}");
        assert!(err.contains(" bytes on the host; ") && err.contains(" bytes are left there"), "{err}");
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
}

#[test]
fn a_folder_without_case_files_is_an_error_that_says_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.txt"), "").unwrap();
    let got = run(&["cases", "--cpu", case(CASE).to_str().unwrap(), folder.path().to_str().unwrap()]);
    let err = text(&got.stderr);
    assert_eq!((got.status.code(), text(&got.stdout).as_str()), (Some(2), ""), "{err}");
    let says = format!("{}: this folder has no case files; a case file ends in .safetensors", folder.path().display());
    assert!(err.contains(&says), "{err}");
    // Files of which none is a case.
    std::fs::write(folder.path().join("x.safetensors"), zeros(&[("x", &[1])])).unwrap();
    let got = run(&["cases", "--cpu", folder.path().to_str().unwrap()]);
    assert_eq!(got.status.code(), Some(1));
    assert!(text(&got.stderr).contains("error: no case ran: all were skipped"));
}

/// The program where no file may grow: as on a full disk, writing fails.
#[cfg(unix)]
fn run_on_a_full_disk(arguments: &[&str]) -> Output {
    let script = "trap '' XFSZ; ulimit -f 0; exec \"$@\"";
    let program = env!("CARGO_BIN_EXE_wgpu-attention");
    Command::new("sh").args(["-c", script, "sh", program]).args(arguments).output().unwrap()
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_file_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("weights.safetensors");
    std::fs::write(&weights, zeros(&[("weights", &[1, 1, 2, 2])])).unwrap();
    let (file, weights) = (case(CASE), weights.to_str().unwrap());
    for (command, input, name) in [
        ("run", file.to_str().unwrap(), "out.safetensors"),
        ("heatmap", weights, "out.svg"),
        ("heatmap", weights, "out.png"),
        ("heatmap", weights, "out.html"),
    ] {
        let output = folder.path().join(name);
        let arguments = [command, "--cpu", "--input", input, "--output", output.to_str().unwrap()];
        std::fs::write(&output, "what was there").unwrap();
        let got = run_on_a_full_disk(&arguments);
        let err = text(&got.stderr);
        assert_eq!(got.status.code(), Some(2), "{err}");
        assert!(err.contains(&format!("error: {}: ", output.display())), "{err}");
        assert_eq!(std::fs::read_to_string(&output).unwrap(), "what was there");
        // And without the limit it is written.
        assert!(run(&arguments).status.success());
        assert_ne!(std::fs::read(&output).unwrap(), b"what was there");
        std::fs::remove_file(&output).unwrap();
    }
    // Nothing else is left.
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn cases_that_stands_still_has_told_what_failed_and_tells_where_it_stands() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    use std::sync::mpsc;
    use std::time::Duration;
    let folder = tempfile::tempdir().unwrap();
    let [broken, endless] = ["broken.safetensors", "endless.safetensors"].map(|name| folder.path().join(name));
    std::fs::write(&broken, "").unwrap();
    // Whoever reads it waits for a writer that never comes.
    assert!(Command::new("mkfifo").arg(&endless).status().unwrap().success());
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-attention"));
    command.args(["cases", "--cpu", case(CASE).to_str().unwrap()]).args([&broken, &endless]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (send, lines) = mpsc::channel();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    std::thread::spawn(move || stderr.lines().map(Result::unwrap).try_for_each(|line| send.send(line)));
    let next = || lines.recv_timeout(Duration::from_secs(60)).expect("a line within a minute");
    let failure = next();
    assert!(failure.starts_with(&format!("error: {}: ", broken.display())), "{failure}");
    let stands = next();
    assert!(stands.starts_with("2 of 3 after "), "{stands}");
    assert!(stands.ends_with(&format!(" s: reading {}", endless.display())), "{stands}");
    assert_eq!(child.try_wait().unwrap(), None);
    child.kill().unwrap();
    child.wait().unwrap();
}
