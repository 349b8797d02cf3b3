//! The program as its user meets it: `tune` stores rows, later plans follow them, and files that do not fit harm nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A cache folder of its own, on the first adapter to test on.
struct Session {
    folder: tempfile::TempDir,
}

impl Session {
    fn new() -> Self {
        Session { folder: tempfile::tempdir().unwrap() }
    }

    fn run(&self, arguments: &str) -> Output {
        self.start(Command::new(env!("CARGO_BIN_EXE_wgpu-attention")), arguments)
    }

    fn start(&self, mut command: Command, arguments: &str) -> Output {
        command.args(arguments.split(' ')).env("WGPU_ATTENTION_CACHE", self.folder.path());
        if let Ok(adapters) = std::env::var("WGPU_ATTENTION_ADAPTERS") {
            command.args(["--adapter", adapters.split(',').next().unwrap()]);
        }
        command.output().unwrap()
    }

    /// Standard output and standard error of a run that ends well.
    fn good(&self, arguments: &str) -> [String; 2] {
        let output = self.run(arguments);
        let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert!(output.status.success(), "{arguments}: {:?}\n{out}\n{err}", output.status);
        [out, err]
    }

    /// The kernel of a plan, its reasons, and what stood on standard error.
    fn plan(&self, options: &str) -> (String, Vec<String>, String) {
        let [out, err] = self.good(&format!("plan --json --shape 1,2,2,40,40,32{options}"));
        let plan: Value = serde_json::from_str(&out).unwrap();
        let reasons = plan["reasons"].as_array().unwrap().iter().map(|reason| reason.as_str().unwrap().into());
        (plan["kernel"].as_str().unwrap().into(), reasons.collect(), err)
    }

    /// Files of the folder whose names begin so.
    fn files(&self, begin: &str) -> Vec<PathBuf> {
        let paths = std::fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(begin)).collect()
    }
}

fn warns_once(err: &str, path: &Path, why: &str) {
    assert_eq!(err.matches("warning: ").count(), 1, "{err}");
    assert!(err.contains(path.to_str().unwrap()) && err.contains(why), "{why:?} is not in\n{err}");
}

#[test]
fn tuned_rows_are_measured_stored_and_followed_until_they_do_not_fit() {
    let session = Session::new();
    let (own, reasons, err) = session.plan("");
    assert!(err.is_empty() && !reasons.iter().any(|reason| reason.contains("tuned")), "{reasons:?} {err}");

    let [out, _] = session.good("tune --json --seconds 600 --shape 1,2,2,64,64,32");
    let rows: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let verdicts: Vec<&str> = rows.iter().map(|row| row["verdict"].as_str().unwrap()).collect();
    assert!(rows.len() > 1, "{out}");
    assert_eq!(verdicts.iter().filter(|verdict| **verdict == "chosen").count(), 1, "{verdicts:?}");
    assert!(verdicts.iter().all(|verdict| ["chosen", "slower"].contains(verdict)), "{verdicts:?}");
    assert!(rows.iter().all(|row| row["ms"].as_f64().unwrap() > 0.0), "{out}");

    // Another problem of the same class.
    let [file] = &session.files("tuning-")[..] else { panic!("one file: {:?}", session.files("")) };
    let name = file.to_str().unwrap();
    let (_, reasons, err) = session.plan("");
    let follows = |reasons: &[String], name: &str| {
        reasons
            .iter()
            .any(|reason| reason.starts_with("kernel ") && reason.ends_with(&format!("(tuned rows of {name})")))
    };
    assert!(err.is_empty() && follows(&reasons, name), "{reasons:?} {err}");
    let (_, reasons, _) = session.plan(" --dtype f16");
    assert!(reasons.contains(&format!("no tuned row of {name} is for problems of this class")), "{reasons:?}");
    let (kernel, reasons, _) = session.plan(" --untuned");
    assert!(kernel == own && !reasons.iter().any(|reason| reason.contains("tuned")), "{reasons:?}");

    // Rows of other classes stay; a file of another name is read when it is named.
    let text = std::fs::read_to_string(file).unwrap();
    let rows_of = |path: &Path| {
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        file["rows"].as_array().unwrap().clone()
    };
    session.good("tune --seconds 600 --shape 1,2,2,1,64,32");
    assert_eq!(rows_of(file).len(), 2);
    let other = session.folder.path().join("other.json");
    std::fs::write(&other, &text).unwrap();
    let (_, reasons, err) = session.plan(&format!(" --tuning {}", other.display()));
    assert!(err.is_empty() && follows(&reasons, other.to_str().unwrap()), "{reasons:?} {err}");

    // A row that forces the other way: the plan follows the file, not the planner.
    let unfused = Value::from("unfused");
    let mut edited: Value = serde_json::from_str(&text).unwrap();
    edited["rows"][0]["choice"] = unfused;
    std::fs::write(file, edited.to_string()).unwrap();
    let (kernel, reasons, err) = session.plan("");
    assert!(err.is_empty() && kernel == "scores+softmax+values" && follows(&reasons, name), "{reasons:?} {err}");

    // Files that do not fit: one warning with the name and the reason, and the planner's own choice.
    let change = |key: &str, value: Value| {
        let mut edited: Value = serde_json::from_str(&text).unwrap();
        edited[key] = value;
        edited.to_string()
    };
    let tile = serde_json::json!({"flash": {
        "dims": 32, "rows": 9, "depth": 1, "value_keys": 1, "resident": false, "shuffle": false
    }});
    let row = |choice: Value| {
        let mut row = rows_of(&other)[0].clone();
        row["choice"] = choice;
        change("rows", Value::from(vec![row]))
    };
    for (bad, why) in [
        ("{\"version\": ".to_string(), "not tuned rows"),
        ("garbage".into(), "not tuned rows"),
        (text[..text.len() / 2].into(), "not tuned rows"),
        (change("version", "0.0.1".into()), "version \"0.0.1\""),
        (change("driver", "another 1.0".into()), "driver \"another 1.0\""),
        (change("adapter", "another".into()), "adapter \"another\""),
        (change("rows", "none".into()), "not tuned rows"),
        (row("warp".into()), "unknown variant `warp`"),
        (row(tile), "1 of 1 rows"),
    ] {
        std::fs::write(file, bad).unwrap();
        let (kernel, _, err) = session.plan("");
        assert_eq!(kernel, own, "{why}");
        warns_once(&err, file, why);
    }
    let (_, _, err) = session.plan(" --tuning missing.json");
    warns_once(&err, Path::new("missing.json"), "no such file");

    // Measuring anew replaces what did not fit.
    session.good("tune --seconds 600 --shape 1,2,2,64,64,32");
    assert_eq!(rows_of(file).len(), 1);
    assert!(session.plan("").2.is_empty());
}

#[test]
fn a_time_limit_that_is_too_short_stores_only_what_was_compared() {
    let session = Session::new();
    let output = session.run("tune --seconds 1");
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(out.contains("problems were not measured, or not with every candidate, within 1 s"), "{out}\n{err}");
    let stored = !session.files("tuning-").is_empty();
    assert_eq!(stored, output.status.success(), "{out}\n{err}");
    assert_eq!(stored, out.contains("stored: "), "{out}\n{err}");
}

#[test]
fn what_the_device_or_the_host_cannot_hold_is_named_and_the_rest_is_measured() {
    let session = Session::new();
    let huge = ["1,1,1,268435456,268435456,512", "1,268435456,1,1,1,1"];
    for command in ["bench --repeats 1", "tune --seconds 20"] {
        let output =
            session.run(&format!("{command} --json --shape {} --shape {} --shape 1,1,1,1,8,128", huge[0], huge[1]));
        let out = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{out}");
        let objects: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let errors: Vec<&str> = objects.iter().filter_map(|object| object["error"].as_str()).collect();
        let [device, host] = errors[..] else { panic!("{errors:?}") };
        assert!(
            device.starts_with(&format!("problem {} f32: q ", huge[0])) && device.contains("549755813888"),
            "{device}"
        );
        let takes = format!("problem {} f32: out of memory: the problem with its reference takes about 1", huge[1]);
        assert!(host.starts_with(&takes) && host.ends_with(" bytes are left there"), "{host}");
        assert!(objects.iter().any(|object| object["shape"] == "1,1,1,1,8,128"), "{out}");
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_rows_that_were_stored() {
    let session = Session::new();
    let file = session.folder.path().join("rows.json");
    let tune = format!("tune --seconds 600 --shape 1,1,1,1,8,8 --file {}", file.display());
    std::fs::write(&file, "what was there").unwrap();
    let mut command = Command::new("sh");
    // No file may grow, so that writing fails.
    command.args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_wgpu-attention")]);
    let output = session.start(command, &tune);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains(&format!("error: {}: ", file.display())), "{err}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "what was there");
    assert!(session.files(".tmp").is_empty());
}

#[test]
fn shapes_without_work_are_planned_but_not_measured() {
    let session = Session::new();
    for (shape, kernels) in [("0,2,2,4,4,8", &["none"][..]), ("1,2,2,0,4,8", &["none"]), ("1,2,2,4,0,8", &[])] {
        let [out, _] = session.good(&format!("plan --json --shape {shape}"));
        let plan: Value = serde_json::from_str(&out).unwrap();
        let (kernel, dispatches) = (plan["kernel"].as_str().unwrap(), plan["dispatches"].as_u64().unwrap());
        assert_eq!(kernels.contains(&kernel), dispatches == 0, "{out}");
        assert_eq!(kernels.is_empty(), dispatches > 0, "{out}");
        for command in ["tune --seconds 1", "bench"] {
            let output = session.run(&format!("{command} --shape {shape}"));
            let err = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{err}");
            assert!(err.contains(&format!("problem {shape} f32: no query sees a key")), "{err}");
        }
    }
    assert!(session.files("tuning-").is_empty());
}

#[test]
fn two_problems_of_a_class_are_refused() {
    let output = Session::new().run("tune --shape 1,2,2,64,64,32 --shape 1,2,2,65,65,32");
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(err.contains("1,2,2,64,64,32 f32 and 1,2,2,65,65,32 f32"), "{err}");
    // Without sizes, options of a problem would change nothing.
    for option in ["--alibi", "--dtype f16", "--causal top-left", "--key-lengths 1"] {
        let output = Session::new().run(&format!("tune {option}"));
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{option}");
        assert!(err.contains("neither --shape nor --problem gives its sizes"), "{err}");
    }
}

#[test]
fn what_the_driver_compiled_is_kept_and_damage_to_it_does_no_harm() {
    let session = Session::new();
    let input = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/cases/sdpa/shape_03_f32_b1h2_q7k65_d64.safetensors");
    let elsewhere = tempfile::tempdir().unwrap();
    let output = elsewhere.path().join("out.safetensors");
    let call = format!("run --input {input} --output {}", output.display());
    let result = || {
        let err = session.good(&call)[1].clone();
        // The metadata before the tensor have no fixed order.
        (std::fs::read(&output).unwrap().last_chunk::<{ 4 * 2 * 7 * 64 }>().unwrap().to_vec(), err)
    };
    let (want, err) = result();
    assert!(err.is_empty(), "{err}");
    // Only Vulkan gives it out.
    for file in session.files("wgpu_pipeline_cache") {
        let data = std::fs::read(&file).unwrap();
        assert!(result() == (want.clone(), String::new()));
        let mut flipped = data.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [vec![], vec![0xa5; 4096], data[..data.len() - 1].to_vec(), flipped] {
            std::fs::write(&file, &damaged).unwrap();
            let (got, err) = result();
            assert!(got == want);
            warns_once(&err, &file, "damaged");
            assert_ne!(std::fs::read(&file).unwrap(), damaged, "it is written anew");
            assert!(result() == (want.clone(), String::new()));
        }
    }
    // No temporary file is left.
    assert_eq!(session.files("").len(), session.files("wgpu_pipeline_cache").len() + session.files("proof-").len());
}

#[test]
fn what_trials_showed_is_kept_and_followed_until_it_does_not_fit() {
    let session = Session::new();
    let run = "run --shape 1,2,2,40,40,32 --compare";
    let (kernel, ..) = session.plan("");
    assert!(session.files("proof-").is_empty(), "a plan alone tries nothing");
    session.good(run);
    let [file] = &session.files("proof-")[..] else { panic!("one file: {:?}", session.files("")) };
    let text = std::fs::read_to_string(file).unwrap();
    let proof: Value = serde_json::from_str(&text).unwrap();
    let trials = proof["right"].as_array().unwrap();
    assert_eq!(trials.len(), 1, "{text}");
    let (tried, dims) = (trials[0]["kernel"].as_str().unwrap(), &trials[0]["dims"]);
    assert!(kernel.contains(tried) || tried == "unfused", "{kernel}, {tried}");
    assert_eq!(*dims, 32);
    session.good(run);
    assert_eq!(std::fs::read_to_string(file).unwrap(), text, "nothing is tried again");

    // A kernel that failed is not planned, and the plan says why. Later runs keep that.
    let write = |proof: &Value| std::fs::write(file, proof.to_string()).unwrap();
    let mut failed = proof.clone();
    failed["right"] = Value::Array(Vec::new());
    failed["failures"] = serde_json::json!([{"kernel": {"trial": trials[0], "why": "the test says so"}}]);
    write(&failed);
    let (other, reasons, err) = session.plan("");
    assert!(other != kernel && err.is_empty(), "{other}: {err}");
    let said = format!("not kernel {tried}: it failed its proof on this driver: the test says so");
    assert!(reasons.contains(&said), "{reasons:?}");
    session.good(run);
    assert!(std::fs::read_to_string(file).unwrap().contains("the test says so"));
    let mut adapters = Command::new(env!("CARGO_BIN_EXE_wgpu-attention"));
    let listed = adapters.arg("adapters").env("WGPU_ATTENTION_CACHE", session.folder.path()).output().unwrap().stdout;
    assert!(String::from_utf8(listed).unwrap().contains("the test says so"));

    // Of another driver or version it is worth nothing, and the trials run again.
    for field in ["driver", "version"] {
        let mut old = failed.clone();
        old[field] = "another".into();
        write(&old);
        assert_eq!(session.plan("").0, kernel);
        session.good(run);
        assert_eq!(std::fs::read_to_string(file).unwrap(), text, "{field}");
    }
    std::fs::write(file, "{").unwrap();
    let (again, _, err) = session.plan("");
    assert_eq!(again, kernel);
    warns_once(&err, file, "ignored");
}
