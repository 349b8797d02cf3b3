//! Many keys: no length from which on a problem takes another kernel or more time for a key, on any kind of device.

use std::time::{Duration, Instant};

use wgpu_attention::internal::Step;
use wgpu_attention::internal::kernel::{Slot, Variant};
use wgpu_attention::{Broadcast, Caps, Causal, Element, Kernel, Options, Packed, Paged, Plan, Problem, Window, with};

use crate::{check, coverage, gpu, planned};

/// A device with what its driver offers, and buffers that hold any tensor.
fn device(cpu: bool, subgroup: Option<u32>, int64: bool) -> Caps {
    let mut caps =
        with!(gpu(), cpu, int64, subgroup_size: subgroup, subgroup_min_size: subgroup, subgroup_max_size: subgroup);
    let l = &mut caps.limits;
    (l.max_buffer_size, l.max_storage_buffer_binding_size) = (1 << 60, 1 << 31);
    (l.max_storage_buffers_per_shader_stage, l.max_compute_workgroup_storage_size) = (16, 32_768);
    caps
}

fn devices() -> [(&'static str, Caps); 4] {
    [
        ("lavapipe", device(true, Some(8), true)),
        ("llvmpipe of OpenGL", device(true, None, false)),
        ("SwiftShader", device(true, Some(4), false)),
        ("a GPU", device(false, Some(32), true)),
    ]
}

/// Lengths from 10³ to 10⁶, each at most a tenth above the one before, and both sides of every power of two.
fn lengths() -> Vec<u32> {
    let mut all: Vec<u32> = (0..).map(|n| (1e3 * 1.1f64.powi(n)) as u32).take_while(|&n| n < 1_000_000).collect();
    all.extend((10..20).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1]).filter(|&n| n >= 1000));
    all.extend([28_000, 29_000, 30_000, 31_000, 60_000, 70_000, 250_000, 270_000, 1_000_000]);
    all.sort_unstable();
    all
}

type Rule = (&'static str, fn(&mut Problem));

const RULES: [Rule; 7] = [
    ("all keys", |_| {}),
    ("window", |p| (p.window, p.causal) = (Window { left: Some(1023), right: Some(0) }, Causal::Offset)),
    ("wide window", |p| (p.window, p.causal) = (Window { left: Some(499_999), right: None }, Causal::BottomRight)),
    ("causal", |p| p.causal = Causal::BottomRight),
    ("causal window", |p| (p.window, p.causal) = (Window { left: Some(1023), right: None }, Causal::BottomRight)),
    ("mask", |p| p.mask = Some(Broadcast([1, 1, 1, p.seq_kv]))),
    ("soft cap", |p| p.softcap = Some(30.0)),
];

/// Keys [first, end) that a row sees, offsets that only the GPU knows being those of the last rows.
fn range(p: &Problem, row: u32) -> (i64, i64) {
    let keys = i64::from(p.seq_kv);
    let offset = if matches!(p.causal, Causal::BottomRight | Causal::Offset) { keys - i64::from(p.seq_q) } else { 0 };
    let position = i64::from(row) + offset;
    let first = p.window.left.map_or(0, |left| (position - i64::from(left)).clamp(0, keys));
    let end = if p.causal == Causal::None { keys } else { (position + 1).clamp(0, keys) };
    (first, p.window.right.map_or(end, |right| end.min((position + i64::from(right) + 1).clamp(0, keys))))
}

/// Iterations that the loops of the busiest invocation of a dispatch of a fused kernel take, counted tile by tile, with the test that ends
/// each.
fn iterations(p: &Problem, step: &Step) -> u64 {
    let per_step = |full: bool, rows: u32| if full { 2 + u64::from(rows) } else { 1 };
    let (rows, keys, each, shares) = match &step.variant {
        Variant::Rows(x) => (x.tile.tile_rows(), x.tile.keys, per_step(x.full, x.tile.rows), 1),
        Variant::Split(x) => {
            let sums = if x.tile.shuffle { 0 } else { 2 };
            (1, x.tile.keys * x.tile.streams, per_step(x.full, x.tile.rows) + sums, step.uniform.place().col_tiles)
        }
        _ => return 0,
    };
    let (place, own) = (step.uniform.place(), step.uniform["key0"]..step.uniform["key_end"]);
    let tiles = (place.row0..place.row_end).step_by(rows as usize).map(|first| {
        let last = (first + rows).min(place.row_end) - 1;
        let (low, high) = (range(p, first).0, range(p, last).1);
        let walked = high.min(own.end.into()) - low.max(own.start.into());
        (walked.max(0) as u64).div_ceil(shares.into()).div_ceil(keys.into())
    });
    tiles.max().unwrap_or(0) * each
}

#[test]
fn time_per_visible_key_does_not_jump_from_a_thousand_keys_to_a_million() {
    for (name, caps) in devices() {
        for (rule, set) in RULES {
            for seq_q in [1, 64] {
                for element in [Element::F32, Element::F16] {
                    let mut before: Option<(u32, String, f64)> = None;
                    for seq_kv in lengths() {
                        let mut p = Problem::new(1, 4, seq_q, seq_kv, 64);
                        (p.kv_heads, p.element) = (2, element);
                        set(&mut p);
                        let plan = planned(&p, &caps, &Options::default());
                        if caps.cpu {
                            for step in plan.steps() {
                                assert!(
                                    iterations(&p, step) <= 1 << 16,
                                    "{name}, {rule}: {}\n{plan}",
                                    iterations(&p, step)
                                );
                            }
                        }
                        let seen: i64 = (0..seq_q).map(|row| range(&p, row).1 - range(&p, row).0).sum();
                        let time = plan.estimate().as_secs_f64() / seen as f64;
                        // Whether a merge follows is no other kernel.
                        let kernel = plan.steps()[0].variant.stage().to_string();
                        if let Some((keys, last, each)) = before.replace((seq_kv, kernel.clone(), time)) {
                            assert_eq!(kernel, last, "{name}, {rule}, {seq_q} rows: {keys} and {seq_kv} keys\n{plan}");
                            let jump = time / each;
                            assert!(
                                jump.max(1.0 / jump) <= 1.3,
                                "{name}, {rule}, {seq_q} rows: {jump} from {keys} to {seq_kv} keys\n{plan}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn keys_beyond_the_loops_of_a_cpu_driver_are_walked_in_dispatches_that_carry_on() {
    let options = Options::default();
    let mut paged = Problem::new(2, 4, 40, 300_000, 64).with_layout(wgpu_attention::Layout::Bshd);
    paged.paged = Some(Paged { pages: 20_000, page_size: 16 });
    (paged.key_lengths, paged.causal) = (true, Causal::BottomRight);
    let mut packed = Problem::new(3, 4, 40, 300_000, 64);
    packed.packed = Some(Packed { total_q: 100, total_kv: 500_000 });
    let mut half = Problem::new(2, 4, 200, 300_000, 63);
    half.element = Element::F16;
    let mut mask = Problem::new(1, 2, 100, 300_000, 64);
    mask.mask = Some(Broadcast([1, 1, 100, 300_000]));
    let mut weights = Problem::new(1, 1, 40, 300_000, 64);
    weights.weights = true;
    let mut groups = Problem::new(2, 8, 3, 2_500_000, 64);
    (groups.kv_heads, groups.softcap) = (2, Some(5.0));
    for (_, caps) in &devices()[..2] {
        for p in [&paged, &packed, &half, &mask, &groups] {
            assert!(check(p, caps, &options), "{p:?}");
            let plan = planned(p, caps, &options);
            let few = p.seq_q == 3;
            assert_eq!(plan.steps()[0].variant.stage(), if few { "split" } else { "rows" }, "{plan}");
            let firsts: Vec<u32> = plan.steps().iter().filter_map(|step| step.uniform.get("key0")).collect();
            assert!(few || firsts.iter().any(|&key| key > 0), "{plan}");
            let state = plan.steps().iter().any(|step| step.bindings.iter().any(|bound| bound.slot == Slot::State));
            assert_eq!(state, !few, "{plan}");
        }
        let forced = with!(Options::default(), kernel: Some(Kernel::Rows));
        assert!(check(&weights, caps, &forced) && check(&weights, caps, &options));
    }
    // A device that binds no further buffer, or no scratch for the rows of one tile, says what is in the way.
    let (_, mut caps) = devices()[0].clone();
    caps.limits.max_storage_buffers_per_shader_stage = 8;
    let rows = |scratch_budget| with!(Options::default(), kernel: Some(Kernel::Rows), scratch_budget);
    let error = Plan::new(&mask.check().unwrap(), &caps, &rows(256 << 20)).unwrap_err().to_string();
    assert!(error.contains("its loops take") && error.contains("9 storage buffers, the device 8"), "{error}");
    let error = Plan::new(&half.check().unwrap(), &caps, &rows(4096)).unwrap_err().to_string();
    assert!(error.contains("scratch budget"), "{error}");
}

#[test]
fn keys_beyond_a_binding_are_walked_in_dispatches_too() {
    for (name, mut caps) in devices().into_iter().filter(|(name, _)| *name != "SwiftShader") {
        caps.limits.max_storage_buffer_binding_size = 1 << 20;
        for seq_q in [1, 100] {
            let mut p = Problem::new(2, 4, seq_q, 50_000, 64);
            (p.kv_heads, p.lse, p.causal) = (2, true, Causal::BottomRight);
            assert!(check(&p, &caps, &Options::default()), "{name}");
            let plan = planned(&p, &caps, &Options::default());
            let first = plan.steps()[0].variant.stage();
            assert_ne!(first, "scores", "{name}: {plan}");
        }
    }
}

#[test]
fn scratch_between_dispatches_keeps_to_the_budget() {
    let (_, caps) = &devices()[0];
    let p = Problem::new(4, 8, 1000, 300_000, 64);
    for scratch_budget in [1 << 16, 1 << 22, 256 << 20] {
        let options = with!(Options::default(), scratch_budget);
        let plan = planned(&p, caps, &options);
        assert_eq!(plan.kernel(), "rows", "{plan}");
        assert!(plan.scratch_bytes() <= scratch_budget + 256, "{plan}");
        coverage::every_workgroup_once(&plan);
    }
}

#[test]
fn packed_sequences_of_many_keys_are_planned_with_and_without_a_score_matrix() {
    let mut p = Problem::new(2, 2, 16, 300_000, 64);
    p.packed = Some(Packed { total_q: 20, total_kv: 400_000 });
    for (_, caps) in &devices()[..3] {
        for kernel in [None, Some(Kernel::Unfused)] {
            assert!(check(&p, caps, &with!(Options::default(), kernel)));
        }
    }
}

#[test]
fn estimates_and_slices_count_what_a_window_leaves() {
    for (name, caps) in devices() {
        let mut p = Problem::new(1, 8, 256, 100_000, 64);
        let all = planned(&p, &caps, &Options::default());
        (p.window, p.causal) = (Window { left: Some(1023), right: None }, Causal::BottomRight);
        let few = planned(&p, &caps, &Options::default());
        let share = few.estimate().as_secs_f64() / all.estimate().as_secs_f64();
        // 1024 of 100,000 keys, and up to a tile of rows more.
        assert!((0.0102..0.0150).contains(&share), "{name}: {share}\n{few}");
        assert!(few.slices() <= all.slices().div_ceil(50) + 1, "{name}: {} of {}", few.slices(), all.slices());
    }
}

#[test]
fn dispatches_of_a_causal_problem_keep_to_the_work_budget_by_what_their_tiles_walk() {
    let mut p = Problem::new(1, 1, 1 << 16, 1 << 16, 64);
    p.causal = Causal::TopLeft;
    let (_, caps) = &devices()[3];
    let plan = planned(&p, caps, &with!(Options::default(), work_budget: Duration::from_millis(20)));
    for step in plan.steps() {
        let Variant::Flash(x) = &step.variant else { panic!("{plan}") };
        let tile = u64::from(x.tile.tile_rows());
        let place = step.uniform.place();
        let tiles = u64::from(place.first)..u64::from(place.end);
        let pairs: u64 = tiles.map(|n| (n + 1) * tile * tile).sum();
        let found = step.flops / (pairs as f64 * 256.0);
        assert!((0.99..1.01).contains(&found) && step.flops <= 0.02001 * caps.flops_per_second(), "{found}\n{plan}");
    }
    assert!(plan.dispatches() > 50, "{plan}");
}

#[test]
fn the_largest_sizes_are_counted_and_planned_or_refused_at_once() {
    let start = Instant::now();
    let longest = 1 << 28;
    let mut causal = Problem::new(1, 1, longest, longest, 1);
    causal.causal = Causal::TopLeft;
    let mut window = causal.clone();
    window.window = Window { left: Some(longest), right: Some(longest) };
    let n = u64::from(longest);
    for _ in 0..1000 {
        assert_eq!(causal.check().unwrap().visible_pairs(), n * (n + 1) / 2);
        assert_eq!(window.check().unwrap().visible_pairs(), n * (n + 1) / 2);
    }
    let heads = Problem::new(1, longest, 1, 1, 1);
    let wide = Problem::new(1, 1, longest, longest, 512);
    for (_, caps) in devices() {
        for p in [&causal, &window, &heads, &wide] {
            for kernel in [None, Some(Kernel::Unfused), Some(Kernel::Rows), Some(Kernel::Flash), Some(Kernel::Split)] {
                // Whether it is refused is not the question.
                let _ = Plan::new(&p.check().unwrap(), &caps, &with!(Options::default(), kernel));
            }
        }
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}
