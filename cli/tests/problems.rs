//! The options that describe a problem, problems and plans in files, and the comparison with the reference.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program, on the first adapter to test on unless the arguments say otherwise.
fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-attention"));
    command.args(arguments);
    let chosen = arguments.contains(&"--cpu") || arguments.contains(&"--read");
    if let (false, Ok(adapters)) = (chosen, std::env::var("WGPU_ATTENTION_ADAPTERS")) {
        command.args(["--adapter", adapters.split(',').next().unwrap()]);
    }
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The problem in a file that `run --save-problem` writes.
fn saved(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_option_of_a_problem_makes_one_that_agrees_with_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let [problem, mask, bias] =
        ["problem.json", "mask.safetensors", "bias.safetensors"].map(|name| folder.path().join(name));
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    let view = |name: &str, dtype, shape: &[usize], data: &[u8]| {
        let view = safetensors::tensor::TensorView::new(dtype, shape.to_vec(), data).unwrap();
        safetensors::serialize([(name, view)], None).unwrap()
    };
    std::fs::write(&mask, view("mask", safetensors::Dtype::BOOL, &[1, 9], &[1, 1, 0, 1, 0, 1, 1, 1, 0])).unwrap();
    std::fs::write(&bias, view("bias", safetensors::Dtype::F32, &[4, 1, 1], &bytes(&[0.0, 1.0, -2.0, 3.0]))).unwrap();
    let [mask, bias] = [&mask, &bias].map(|path| path.to_str().unwrap());
    let cases: &[(&[&str], &str, serde_json::Value)] = &[
        (&["--value-dim", "6"], "value_dim", 6.into()),
        (&["--dtype", "bf16"], "element", "bf16".into()),
        (&["--layout", "bshd"], "q", "bshd".into()),
        (&["--causal", "bottom-right"], "causal", "bottom-right".into()),
        (&["--causal-offset", "-2"], "causal", "offset".into()),
        (&["--window-left", "3"], "window", serde_json::json!({"left": 3, "right": null})),
        (&["--window-right", "1"], "window", serde_json::json!({"left": null, "right": 1})),
        (&["--score-scale", "0.5"], "scale", 0.5.into()),
        (&["--softcap", "2"], "softcap", 2.0.into()),
        (&["--alibi"], "alibi", true.into()),
        (&["--mask", "0.5"], "mask", serde_json::json!([1, 1, 5, 9])),
        (&["--mask", mask], "mask", serde_json::json!([1, 1, 1, 9])),
        (&["--bias", "random"], "bias", serde_json::json!({"shape": [1, 4, 5, 9], "element": "f32"})),
        (&["--bias", bias], "bias", serde_json::json!({"shape": [1, 4, 1, 1], "element": "f32"})),
        (&["--key-lengths", "7,0"], "key_lengths", true.into()),
        (&["--key-lengths", "4"], "key_lengths", true.into()),
        (&["--sinks"], "sinks", true.into()),
        (&["--packed"], "packed", serde_json::json!({"total_q": 8, "total_kv": 14})),
        (&["--packed", "--layout", "bshd"], "packed", serde_json::json!({"total_q": 8, "total_kv": 14})),
        (&["--page-size", "4"], "paged", serde_json::json!({"pages": 6, "page_size": 4})),
    ];
    for (options, field, want) in cases {
        let shape =
            ["run", "--shape", "2,4,2,5,9,8", "--compare", "--lse", "--save-problem", problem.to_str().unwrap()];
        let output = folder.path().join("out.safetensors");
        let _ = std::fs::remove_file(&problem);
        let got = run(&[&shape[..], &["--cpu", "--output", output.to_str().unwrap()], options].concat());
        assert!(got.status.success(), "{options:?}: {}{}", text(&got.stdout), text(&got.stderr));
        assert!(text(&got.stdout).contains("lse "), "{}", text(&got.stdout));
        assert_eq!(saved(&problem)[field], *want, "{options:?}");
        // The same on a GPU, from the file, with operands that are made up again.
        let got = run(&["run", "--problem", problem.to_str().unwrap(), "--compare"]);
        assert!(got.status.success(), "{options:?}: {}{}", text(&got.stdout), text(&got.stderr));
    }
    // Two files with the same problem hold the same operands.
    let error = |options: &[&str]| {
        let got = run(&[&["run", "--cpu"], options].concat());
        assert_eq!(got.status.code(), Some(2), "{options:?}");
        text(&got.stderr)
    };
    let shape = ["--shape", "2,4,2,5,9,8"];
    assert!(error(&[]).contains("0 problems are given, and this takes one"));
    assert!(error(&[shape, shape].concat()).contains("2 problems are given"));
    assert!(error(&[&shape[..], &["--mask", "1.5"]].concat()).contains("the share of visible keys is from 0 to 1"));
    assert!(error(&[&shape[..], &["--mask", "missing"]].concat()).contains("missing: "));
    assert!(error(&[&shape[..], &["--mask", bias]].concat()).contains("tensor \"mask\" is missing"));
    assert!(error(&[&shape[..], &["--key-lengths", "1,2,3"]].concat()).contains("has 3 lengths"));
    assert!(error(&[&shape[..], &["--key-lengths", "10"]].concat()).contains("key_lengths[0] is 10"));
    assert!(error(&[&shape[..], &["--page-size", "0"]].concat()).contains("page_size"));
    assert!(error(&["--problem", mask]).contains("mask.safetensors"));
    std::fs::write(&problem, r#"{"batch":1}"#).unwrap();
    assert!(error(&["--problem", problem.to_str().unwrap()]).contains("not a problem of this program: missing field"));
}

#[test]
fn a_plan_is_saved_printed_without_an_adapter_and_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    let path = path.to_str().unwrap();
    let got = run(&["plan", "--shape", "1,2,2,9,17,8", "--alibi", "--lse", "--save", path]);
    assert!(got.status.success(), "{}", text(&got.stderr));
    let read = run(&["plan", "--read", path]);
    let (made, read) = (text(&got.stdout), text(&read.stdout));
    assert!(!read.is_empty() && made.ends_with(&read), "{made}\n{read}");
    let got = run(&["run", "--plan", path, "--compare"]);
    assert!(got.status.success() && text(&got.stdout).contains("lse "), "{}{}", text(&got.stdout), text(&got.stderr));
    let mut changed = saved(Path::new(path));
    changed["dispatches"] = 17.into();
    std::fs::write(path, changed.to_string()).unwrap();
    for command in [&["plan", "--read", path][..], &["run", "--plan", path]] {
        let got = run(command);
        assert_eq!(got.status.code(), Some(2));
        assert!(
            text(&got.stderr).contains("not a plan of this program: the stored plan runs"),
            "{}",
            text(&got.stderr)
        );
    }
}

#[test]
fn a_profile_lists_each_dispatch_with_its_time() {
    let options = ["run", "--shape", "1,2,2,9,17,8", "--kernel", "unfused", "--compare", "--profile"];
    let got = run(&options);
    let table = text(&got.stdout);
    assert!(got.status.success(), "{table}{}", text(&got.stderr));
    let rows: Vec<&str> = table.lines().skip_while(|line| !line.starts_with("time of each step by ")).collect();
    assert!(rows[1].ends_with("  step") && rows[2].contains("  scores"), "{table}");
    assert!(rows.iter().any(|row| row.contains(" 100.0 %") && row.contains("  total of 3 steps")), "{table}");
    let got = run(&[&options[..], &["--json"]].concat());
    let object: serde_json::Value = serde_json::from_slice(&got.stdout).unwrap();
    let steps = object["profile"]["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3, "{object}");
    for (step, kernel) in steps.iter().zip(["scores", "softmax", "values"]) {
        assert!(step["label"].as_str().unwrap().starts_with(kernel), "{object}");
        assert!(step["milliseconds"].as_f64().unwrap() >= 0.0 && step["flops"].as_f64().unwrap() > 0.0, "{object}");
    }
    assert!(["timestamps", "wall"].contains(&object["profile"]["clock"].as_str().unwrap()), "{object}");
    let got = run(&[&options[..], &["--cpu"]].concat());
    assert_eq!(got.status.code(), Some(2));
    assert!(text(&got.stderr).contains("'--profile' cannot be used with"), "{}", text(&got.stderr));
}

#[test]
fn spans_and_events_go_to_standard_error_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let tuning = folder.path().join("tuning.json");
    std::fs::write(&tuning, "{}").unwrap();
    let start = |filter: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-attention"));
        command.args(["run", "--shape", "1,2,2,9,17,8", "--tuning", tuning.to_str().unwrap()]);
        command.env("RUST_LOG", filter).env("WGPU_ATTENTION_CACHE", folder.path());
        if let Ok(adapters) = std::env::var("WGPU_ATTENTION_ADAPTERS") {
            command.args(["--adapter", adapters.split(',').next().unwrap()]);
        }
        let got = command.output().unwrap();
        assert!(got.status.success(), "{}", text(&got.stderr));
        text(&got.stderr)
    };
    let err = start("wgpu_attention=debug");
    for told in ["plan{operation=\"attention\"", "prepare{", "pipeline{", "encode{", "run{", "kernel "] {
        assert!(err.contains(told), "{told:?} is not in\n{err}");
    }
    // The warning stays, and is an event too.
    let ignored = format!("{}: ignored: not tuned rows", tuning.display());
    assert!(err.contains(&format!("warning: {ignored}")), "{err}");
    assert!(err.lines().any(|line| line.contains(" WARN ") && line.contains(&ignored)), "{err}");
    let err = start("wgpu_attention=loud");
    assert!(err.contains("warning: RUST_LOG: ignored: ") && !err.contains("plan{"), "{err}");
}

#[test]
fn options_that_would_change_nothing_are_refused() {
    let made: [&[&str]; 12] = [
        &["--shape", "1,1,1,1,1,1"],
        &["--value-dim", "4"],
        &["--dtype", "f16"],
        &["--alibi"],
        &["--mask", "0.5"],
        &["--bias", "random"],
        &["--key-lengths", "1"],
        &["--sinks"],
        &["--packed"],
        &["--page-size", "4"],
        &["--problem", "x"],
        &["--save-problem", "x"],
    ];
    let terms: [&[&str]; 2] = [&["--causal", "top-left"], &["--softcap", "2"]];
    let refused = |command: &[&str], option: &[&str]| {
        let got = run(&[command, option].concat());
        let err = text(&got.stderr);
        assert_eq!(got.status.code(), Some(2), "{command:?} {option:?}: {err}");
        assert!(err.contains("cannot be used with"), "{command:?} {option:?}: {err}");
    };
    for option in made {
        refused(&["run", "--input", "x"], option);
    }
    for option in made.into_iter().chain(terms) {
        refused(&["run", "--plan", "x"], option);
        refused(&["plan", "--read", "x"], option);
        refused(&["bench", "--from", "x"], option);
    }
    for option in terms {
        refused(&["run", "--problem", "x"], option);
    }
}
