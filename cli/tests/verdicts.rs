//! What `check`, `cases` and `bench` say on the first adapter to test on, where results are right, wrong or refused, and their exit codes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-attention"));
    command.args(arguments).env("WGPU_ATTENTION_CACHE", cache.path());
    if let Ok(adapters) = std::env::var("WGPU_ATTENTION_ADAPTERS") {
        command.args(["--adapter", adapters.split(',').next().unwrap()]);
    }
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn objects(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases").join(name).with_extension("safetensors")
}

/// A copy of a case in which the first expected element is another one.
fn wrong_case(from: &Path, to: &Path) {
    let bytes = std::fs::read(from).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let changed: Vec<_> = (file.iter())
        .map(|(name, view)| {
            let mut data = view.data().to_vec();
            if name == "out" {
                let first = f32::from_le_bytes(data[..4].try_into().unwrap());
                data[..4].copy_from_slice(&(first + 0.01).to_le_bytes());
            }
            (name, view.dtype(), view.shape().to_vec(), data)
        })
        .collect();
    let views = (changed.iter())
        .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(to, safetensors::serialize(views, header.metadata().clone()).unwrap()).unwrap();
}

#[test]
fn cases_counts_what_passes_fails_is_refused_and_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).with_extension("safetensors");
    let path = folder.path().to_str().unwrap();
    std::fs::copy(case("sdpa/scale_one"), place("right")).unwrap();
    wrong_case(&case("sdpa/scale_one"), &place("wrong"));
    // Its logits need the score matrix, which no fused kernel has.
    std::fs::copy(case("onnx_attention/test_attention_4d_with_qk_matmul"), place("staged")).unwrap();
    let view = TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap();
    std::fs::write(place("unknown"), safetensors::serialize([("x", view)], None).unwrap()).unwrap();

    let ends = |options: &[&str]| {
        let got = run(&[&["cases", path], options].concat());
        let out = text(&got.stdout);
        (out.lines().last().unwrap().to_owned(), got.status.code(), out)
    };
    let (last, code, out) = ends(&[]);
    assert_eq!((last.as_str(), code), ("2 passed, 1 failed, 1 skipped", Some(1)), "{out}");
    // The case is named as its file names it.
    let failures: Vec<_> = out.lines().filter(|line| line.starts_with("FAIL ")).collect();
    assert!(matches!(failures[..], [line] if line.contains(": out: 1 of 4224 elements beyond the tolerance")), "{out}");

    let (last, code, out) = ends(&["--kernel", "flash"]);
    assert_eq!((last.as_str(), code), ("1 passed, 1 failed, 2 skipped", Some(1)), "{out}");
    // What a kernel refuses is told by its reason, once, however many cases there are.
    std::fs::copy(place("staged"), place("staged2")).unwrap();
    let (_, _, out) = ends(&["--kernel", "flash"]);
    std::fs::remove_file(place("staged2")).unwrap();
    let refusals: Vec<_> = out.lines().filter(|line| line.contains("kernel flash cannot run here")).collect();
    assert!(matches!(refusals[..], [line] if line.starts_with("skip 2 cases on ")), "{out}");
    let got = run(&["cases", path, "--kernel", "flash", "--json"]);
    let verdict = |object: &Value| object["verdict"].as_str().map(String::from);
    let mut verdicts: Vec<String> = objects(&got).iter().filter_map(verdict).collect();
    verdicts.sort_unstable();
    assert_eq!(
        (verdicts, got.status.code()),
        (["failed", "passed", "skipped", "skipped"].map(String::from).to_vec(), Some(1))
    );
    assert_eq!(objects(&got).last().unwrap(), &serde_json::json!({"passed": 1, "failed": 1, "skipped": 2}));

    std::fs::remove_file(place("wrong")).unwrap();
    let (last, code, out) = ends(&["--kernel", "flash"]);
    assert_eq!((last.as_str(), code), ("1 passed, 0 failed, 2 skipped", Some(0)), "{out}");
    std::fs::remove_file(place("right")).unwrap();
    let (last, code, out) = ends(&["--kernel", "flash"]);
    assert_eq!((last.as_str(), code), ("0 passed, 0 failed, 2 skipped", Some(1)), "{out}");
}

#[test]
fn check_ends_well_only_where_every_result_is_right() {
    // Seven problems with four results each, on the adapter and on the CPU reference.
    let verdicts = |kernel: &str| {
        let got = run(&["check", "--json", "--kernel", kernel]);
        let verdicts = objects(&got).iter().map(|row| row["verdict"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
        (verdicts, got.status.code())
    };
    assert_eq!(verdicts("split"), (vec!["ok".to_owned(); 56], Some(0)));
    // The six problems in f32 are refused by every device, the one in f16 by those without matrices.
    let (verdicts, code) = verdicts("matrix");
    let refused = verdicts.iter().filter(|v| v.starts_with("error: kernel matrix cannot run here: ")).count();
    let right = verdicts.iter().filter(|verdict| *verdict == "ok").count();
    assert!([(7, 28), (6, 32)].contains(&(refused, right)), "{verdicts:?}");
    assert_eq!((verdicts.len(), code), (refused + right, Some(1)));
}

#[test]
fn bench_measures_every_kernel_that_can_run_and_marks_the_choice_of_the_planner() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("page.html");
    let shape = ["bench", "--json", "--repeats", "3", "--shape", "1,2,2,40,40,16"];
    let kernels = |options: &[&str]| -> Vec<(String, bool)> {
        let got = run(&[&shape[..], options].concat());
        assert!(got.status.success(), "{}", text(&got.stderr));
        let rows = objects(&got);
        assert!(rows.iter().all(|row| row["times_ms"].as_array().unwrap().len() == 3), "{rows:?}");
        rows.iter().map(|row| (row["choice"].as_str().unwrap().into(), row["planned"].as_bool().unwrap())).collect()
    };
    let [(own, true)] = &kernels(&[])[..] else { panic!("the planner's choice alone") };
    let all = kernels(&["--report", path.to_str().unwrap()]);
    let planned: Vec<&str> = all.iter().filter(|(_, planned)| *planned).map(|(kernel, _)| kernel.as_str()).collect();
    assert_eq!(planned, [own]);
    let mut names: Vec<&str> = all.iter().map(|(kernel, _)| kernel.as_str()).collect();
    names.sort_unstable();
    // No adapter has matrices of f32.
    assert_eq!(names, ["flash", "rows", "split", "unfused"]);
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(names.iter().all(|name| page.contains(&format!("{name} on "))), "{page}");
    assert_eq!(kernels(&["--kernel", "flash"]), [("flash".into(), false)]);
}
