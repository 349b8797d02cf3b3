//! Values as texts: the names of small enums, and problems, options, devices and plans as JSON.

use std::fmt::{Debug, Display};
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use wgpu_attention::tuning::{Class, Row, Tuning};
use wgpu_attention::{
    Bias, Broadcast, Caps, Causal, Element, Elements, Error, Form, HostSlice, Kernel, Layout, Logits, Options, Packed,
    Paged, Plan, Precision, Problem, Strides, Window, wgpu, with,
};

/// Every value is read by its name, also in JSON, and a wrong name is refused by an error that says `refusal`.
fn named<T>(all: &[T], names: &[&str], refusal: &str)
where
    T: FromStr<Err = Error> + Display + Debug + PartialEq + Copy + Serialize + DeserializeOwned,
{
    assert_eq!(all.iter().map(T::to_string).collect::<Vec<_>>(), names);
    for (&value, name) in all.iter().zip(names) {
        assert_eq!(name.parse(), Ok(value));
        assert_eq!(serde_json::to_string(&value).unwrap(), format!("{name:?}"));
        assert_eq!(serde_json::from_str::<T>(&format!("{name:?}")).unwrap(), value);
    }
    for wrong in ["sideways", "", &names[0].to_uppercase()] {
        let error = wrong.parse::<T>().unwrap_err();
        assert_eq!(error.to_string(), refusal.replace("{}", wrong));
    }
}

#[test]
fn small_enums_are_read_by_their_names() {
    named(
        &Kernel::ALL,
        &["unfused", "rows", "flash", "matrix", "split"],
        "kernel is \"{}\"; it must be one of unfused, rows, flash, matrix, split",
    );
    named(&Precision::ALL, &["strict", "fast"], "precision is \"{}\"; it must be one of strict, fast");
    named(&Form::ALL, &["tiled", "lanes", "emulated"], "form is \"{}\"; it must be one of tiled, lanes, emulated");
    named(&Element::ALL, &["f32", "f16", "bf16"], "element is \"{}\"; it must be one of f32, f16, bf16");
    named(
        &Causal::ALL,
        &["none", "top-left", "bottom-right", "offset"],
        "causal is \"{}\"; it must be one of none, top-left, bottom-right, offset",
    );
    assert_eq!(format!("{:>6}|{:<6}|", Kernel::Rows, Element::F16), "  rows|f16   |");
}

#[test]
fn slices_vectors_and_arrays_of_every_element_type_are_inputs() {
    let (f16, bf16) = ([half::f16::ONE; 2], [half::bf16::ONE; 2]);
    for elements in [Elements::from(&f16), Elements::from(&f16[..]), Elements::from(&f16.to_vec())] {
        assert_eq!((elements, HostSlice::from(elements)), (Elements::F16(&f16), HostSlice::from(&f16)));
    }
    for elements in [Elements::from(&bf16), Elements::from(&bf16[..]), Elements::from(&bf16.to_vec())] {
        assert_eq!((elements, HostSlice::from(elements)), (Elements::Bf16(&bf16), HostSlice::from(&bf16)));
    }
    assert_eq!(Elements::from(&[1.0; 2]), Elements::F32(&[1.0, 1.0]));
}

/// Through JSON and back.
fn again<T: Serialize + DeserializeOwned>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

/// A problem in which no field is what `Problem::new` makes it.
fn unusual() -> Problem {
    let mut p = Problem::new(2, 4, 3, 5, 8);
    (p.kv_heads, p.value_dim, p.scale, p.softcap) = (2, 6, Some(0.1), Some(30.5));
    (p.causal, p.window) = (Causal::BottomRight, Window { left: Some(7), right: None });
    p.mask = Some(Broadcast([1, 1, 3, 5]));
    p.bias = Some(Bias { shape: Broadcast([2, 4, 1, 5]), element: Element::Bf16 });
    (p.key_lengths, p.alibi, p.sinks, p.lse, p.weights) = (true, true, true, true, true);
    (p.element, p.logits) = (Element::F16, Some(Logits::Capped));
    (p.q, p.k, p.v) = (Layout::Bshd, Layout::Bhsd, Layout::Bshd);
    p.out = Layout::Strided(Strides { offset: 8, batch: 1 << 40, head: 8, row: 32 });
    (p.packed, p.paged) = (Some(Packed { total_q: 9, total_kv: 11 }), Some(Paged { pages: 3, page_size: 16 }));
    p
}

#[test]
fn problems_are_the_same_after_json() {
    for problem in [unusual(), Problem::new(1, 8, 77, 77, 64)] {
        assert_eq!(again(&problem), problem);
    }
    let sizes = r#"{"batch":1,"heads":8,"kv_heads":8,"seq_q":7,"seq_kv":7,"head_dim":64,"value_dim":64}"#;
    assert_eq!(serde_json::from_str::<Problem>(sizes).unwrap(), Problem::new(1, 8, 7, 7, 64));
    let with = |more: &str| serde_json::from_str::<Problem>(&sizes.replace('}', &format!(",{more}}}")));
    let causal = with(r#""causal":"top-left","window":{"left":3},"q":"bshd","mask":[1,1,7,7]"#).unwrap();
    let mut want = Problem::new(1, 8, 7, 7, 64);
    (want.causal, want.window.left, want.q) = (Causal::TopLeft, Some(3), Layout::Bshd);
    want.mask = Some(Broadcast([1, 1, 7, 7]));
    assert_eq!(causal, want);
    let error = |more: &str| with(more).unwrap_err().to_string();
    assert!(error(r#""casual":"none""#).contains("unknown field `casual`"), "{}", error(r#""casual":"none""#));
    assert!(error(r#""window":{"lefts":1}"#).contains("unknown field `lefts`"));
    assert!(error(r#""causal":"sideways""#).contains("unknown variant `sideways`"));
    for size in ["batch", "heads", "kv_heads", "seq_q", "seq_kv", "head_dim", "value_dim"] {
        let without = sizes.replace(&format!("\"{size}\""), "\"scale\"");
        let error = serde_json::from_str::<Problem>(&without).unwrap_err().to_string();
        assert!(error.contains(&format!("missing field `{size}`")), "{error}");
    }
}

#[test]
fn options_and_devices_are_the_same_after_json() {
    let options = with!(Options::default(), kernel: Some(Kernel::Split), form: Some(Form::Emulated), native_f16: Some(false), precision: Precision::Fast, batch_invariant: true, scratch_budget: 1 << 40, work_budget: Duration::from_micros(1_500_001));
    for options in [options, Options::default()] {
        assert_eq!(again(&options), options);
    }
    assert_eq!(serde_json::from_str::<Options>("{}").unwrap(), Options::default());
    let error = serde_json::from_str::<Options>(r#"{"kernels":"rows"}"#).unwrap_err().to_string();
    assert!(error.contains("unknown field `kernels`"), "{error}");

    let mut caps = Caps::new(wgpu::Limits { max_buffer_size: 1 << 40, ..wgpu::Limits::downlevel_defaults() });
    (caps.cpu, caps.f16, caps.int64, caps.matrices) = (true, true, true, vec![16, 8]);
    (caps.subgroup_size, caps.subgroup_min_size, caps.subgroup_max_size) = (Some(8), Some(4), Some(32));
    for caps in [caps, Caps::new(wgpu::Limits::default())] {
        assert_eq!(again(&caps), caps);
    }
    let error = serde_json::from_str::<Caps>("{}").unwrap_err().to_string();
    assert!(error.contains("missing field"), "{error}");
}

#[test]
fn a_plan_is_written_and_made_again_when_it_is_read() {
    let mut caps = Caps::new(wgpu::Limits::default());
    let mut problem = Problem::new(1, 8, 1024, 1024, 64);
    (problem.scale, problem.causal) = (Some(0.1), Causal::BottomRight);
    let shape = problem.check().unwrap();
    let candidates = Tuning::candidates(&shape, &caps).unwrap();
    let tuned = |choice| {
        let row = Row { class: Class::of(&shape), choice, ms: 1.0 };
        Plan::tuned(&shape, &caps, &Options::default(), &Tuning { source: "here".into(), rows: vec![row] }).unwrap()
    };
    let mut plans: Vec<Plan> = candidates.into_iter().map(tuned).collect();
    assert!(plans.len() > 3, "{}", plans.len());
    caps.limits.max_storage_buffer_binding_size = 1 << 20;
    let forced = with!(Options::default(), kernel: Some(Kernel::Unfused), scratch_budget: 1 << 18);
    plans.push(Plan::new(&shape, &caps, &forced).unwrap());
    for plan in plans {
        assert_eq!(again(&plan), plan);
        let written = serde_json::to_value(&plan).unwrap();
        assert_eq!(serde_json::from_value::<Problem>(written["problem"].clone()).unwrap(), problem);
        assert_eq!(
            (written["kernel"].as_str(), written["dispatches"].as_u64()),
            (Some(&*plan.kernel()), Some(plan.dispatches() as u64))
        );
        // What this version would not plan is refused.
        for (field, other) in [
            ("variants", serde_json::json!(["rows"])),
            ("scratch_bytes", serde_json::json!(plan.scratch_bytes() + 4)),
            ("slices", serde_json::json!(plan.slices() + 1)),
        ] {
            let mut changed = written.clone();
            changed[field] = other;
            let error = serde_json::from_value::<Plan>(changed).unwrap_err().to_string();
            assert!(error.contains("plan it anew"), "{field}: {error}");
        }
        let mut changed = written;
        changed["problem"]["head_dim"] = serde_json::json!(1000);
        let error = serde_json::from_value::<Plan>(changed).unwrap_err().to_string();
        assert!(error.contains("head_dim"), "{error}");
    }
}
