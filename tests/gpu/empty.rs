//! Sizes of 0: no batch, no query or no key. Outputs are empty, or their rows see no key.

use wgpu_attention::{
    Bias, Broadcast, Causal, Element, Error, Kernel, Layout, Logits, Options, Packed, Paged, Problem, Strides, Window,
    wgpu, with,
};

use crate::support::staged::Staged;
use crate::support::{Case, Data, floor, gpus};
use crate::{all_everywhere, every_way, everywhere, problem, ways};

/// Sizes of which one at least is 0: batch, query heads, queries, keys, dims.
const EMPTY: [[u32; 5]; 6] =
    [[0, 4, 5, 7, 20], [2, 4, 0, 7, 20], [2, 4, 5, 0, 20], [2, 4, 0, 0, 20], [0, 4, 0, 0, 20], [2, 4, 40, 0, 5]];

/// What the contract says of a problem whose rows have no key, written out.
#[track_caller]
fn says_no_key(case: &Case) {
    let (p, want) = (&case.problem, &case.want);
    assert!(want.out.iter().all(|&x| x == 0.0));
    let each = (p.seq_q.max(1) as usize, p.heads as usize);
    for (n, &lse) in want.lse.iter().flatten().enumerate() {
        let sink = case.operands.sinks.as_ref().map(|sinks| sinks[n / each.0 % each.1].into());
        assert_eq!(lse, sink.unwrap_or(f64::NEG_INFINITY));
    }
    assert!(want.weights.iter().chain(&want.logits).all(Vec::is_empty));
}

#[test]
fn without_a_batch_a_query_or_a_key_every_kernel_gives_what_the_contract_says() {
    let mut cases = Vec::new();
    for sizes in EMPTY {
        let sets: [&dyn Fn(&mut Problem); 4] = [
            &|_| (),
            &|p| (p.sinks, p.kv_heads, p.causal) = (true, 2, Causal::BottomRight),
            &|p| {
                (p.softcap, p.alibi, p.key_lengths, p.causal) = (Some(2.0), true, true, Causal::Offset);
                p.mask = Some(Broadcast([p.batch, 1, p.seq_q, p.seq_kv]));
                p.bias = Some(Bias { shape: Broadcast([1, p.heads, 1, p.seq_kv]), element: Element::F16 });
                p.window = Window { left: Some(3), right: Some(0) };
            },
            &|p| {
                (p.lse, p.sinks, p.logits) = (false, true, Some(Logits::Raw));
                *p = p.clone().with_layout(Layout::Bshd);
                p.mask = Some(Broadcast([1, 1, p.seq_q, 1]));
            },
        ];
        for (n, set) in sets.into_iter().enumerate() {
            let p = problem(sizes, |p| {
                p.element = [Element::F32, Element::F16, Element::Bf16][n % 3];
                set(p);
            });
            let case = Case::random(p, n as u64);
            says_no_key(&case);
            cases.push(case);
        }
    }
    all_everywhere(&cases);
}

#[test]
fn weights_without_a_key_leave_the_log_sum_exp_to_the_fused_kernel() {
    for sinks in [false, true] {
        let case = Case::random(
            problem([2, 4, 9, 0, 24], |p| (p.logits, p.sinks, p.element) = (None, sinks, Element::F16)),
            3,
        );
        says_no_key(&case);
        everywhere(case);
    }
}

#[test]
fn every_kernel_that_can_be_forced_runs_without_a_key() {
    let p = problem([1, 2, 3, 0, 32], |p| (p.element, p.weights, p.logits) = (Element::F16, false, None));
    let case = Case::random(p, 2);
    for gpu in gpus() {
        // Kernels and forms that give the same plan count once.
        let ran: Vec<_> = every_way(gpu, &case.problem).iter().map(|way| case.check(gpu, way).1.choice()).collect();
        for kernel in [Kernel::Unfused, Kernel::Rows, Kernel::Flash, Kernel::Split] {
            let force = with!(Options::default(), kernel: Some(kernel));
            let runs = gpu.library().plan_with(&case.problem, &force).is_ok();
            assert_eq!(ran.iter().any(|choice| choice.kernel() == kernel), runs, "{kernel:?} of {ran:?}");
        }
    }
}

#[test]
fn packed_sequences_may_be_none_and_without_tokens() {
    let packed = |batch, seq_q, seq_kv, total_q, total_kv, element| {
        problem([batch, 4, seq_q, seq_kv, 20], |p| {
            (p.packed, p.element, p.kv_heads) = (Some(Packed { total_q, total_kv }), element, 2);
        })
    };
    let mut cases = Vec::new();
    for element in [Element::F32, Element::F16] {
        cases.extend([
            packed(3, 0, 0, 0, 0, element),
            packed(3, 5, 0, 9, 0, element),
            packed(3, 0, 5, 0, 9, element),
            packed(0, 0, 0, 0, 0, element),
            // Tokens that no sequence owns: nothing is written there.
            packed(0, 5, 5, 9, 9, element),
            packed(3, 0, 5, 9, 9, element),
            packed(3, 5, 0, 9, 9, element),
        ]);
    }
    let cases: Vec<_> = cases.into_iter().map(|p| Case::random(p, 4)).collect();
    all_everywhere(&cases);
}

#[test]
fn pages_may_hold_no_key_and_a_pool_no_page() {
    for (batch, pages) in [(2, 0), (2, 3), (0, 3), (0, 0)] {
        for seq_q in [1, 40] {
            let mut p = problem([batch, 4, seq_q, 0, 20], |p| {
                (p.weights, p.logits, p.key_lengths) = (false, None, true);
                p.paged = Some(Paged { pages, page_size: 4 });
            });
            everywhere(Case::random(p.clone(), 5));
            p.seq_kv = 9;
            let want = Err(Error::Zero { field: "paged.pages" });
            let got = p.check().map(|_| ());
            assert_eq!(got, if pages == 0 && batch > 0 { want } else { Ok(()) });
        }
    }
    // Keys in pages, and no query: a table, and nothing to read by it.
    let p = problem([2, 4, 0, 9, 20], |p| {
        (p.weights, p.logits, p.paged) = (false, None, Some(Paged { pages: 3, page_size: 4 }));
    });
    everywhere(Case::random(p, 6));
}

#[test]
fn parts_of_a_large_problem_without_a_key_are_all_written() {
    for gpu in gpus() {
        let gpu = floor(gpu, 4096, 3);
        for element in [Element::F32, Element::F16] {
            let p = problem([3, 4, 70, 0, 20], |p| (p.element, p.sinks) = (element, true));
            let case = Case::random(p, 7);
            for case in [&case, &case.lean()] {
                for way in ways_of(&gpu, &case.problem) {
                    case.check(&gpu, &way);
                }
            }
        }
    }
}

/// Every kernel that can run.
fn ways_of(gpu: &wgpu_attention::Gpu, p: &Problem) -> Vec<Options> {
    let force = Kernel::ALL.map(|kernel| with!(Options::default(), kernel: Some(kernel)));
    let runs: Vec<_> = force.into_iter().filter(|way| gpu.library().plan_with(p, way).is_ok()).collect();
    assert!(!runs.is_empty());
    runs
}

#[test]
fn nothing_that_has_no_element_is_looked_at_or_written() {
    for gpu in gpus() {
        let usage = wgpu::BufferUsages::COPY_DST;
        let make = |size| {
            gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        // Neither of them could be bound, and both stand for several operands.
        for any in [make(0), make(6)] {
            for (sizes, options) in EMPTY.into_iter().flat_map(|sizes| {
                let p = problem(sizes, |p| p.logits = None);
                ways(gpu, &p).into_iter().map(move |way| (sizes, way))
            }) {
                let p = problem(sizes, |p| {
                    (p.key_lengths, p.logits, p.sinks) = (true, None, true);
                    p.mask = Some(Broadcast([p.batch, 1, 1, p.seq_kv]));
                });
                let Ok(plan) = gpu.library().plan_with(&p, &options) else { continue };
                let (prepared, data) = (gpu.library().prepare(&plan).unwrap(), Data::random(&p, 8, 1.0));
                let staged = Staged::new(gpu.device(), &plan, &data);
                let mut buffers = staged.buffers();
                let none = any.slice(..);
                if p.batch == 0 || p.seq_q == 0 {
                    (buffers.q, buffers.out, buffers.lse) = (none, none, Some(none));
                }
                if p.batch == 0 || p.seq_kv == 0 {
                    (buffers.k, buffers.v, buffers.operands.mask) = (none, none, Some(none));
                }
                if p.batch == 0 {
                    buffers.operands.key_lengths = Some(none);
                }
                buffers.weights = Some(none);
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                prepared.encode(&mut encoder, &buffers).unwrap();
                let beyond =
                    prepared.begin().unwrap().encode_slice(prepared.slices(), &mut encoder, &buffers).unwrap_err();
                let (value, limit) = (prepared.slices() as u64 + 1, prepared.slices() as u64);
                assert_eq!(beyond, Error::TooLarge { field: "slice, counted from 1,", value, limit });
                // What is missing is missing all the same, and what has elements is looked at.
                let mut missing = buffers;
                missing.operands.mask = None;
                let refused = prepared.encode(&mut encoder, &missing).unwrap_err();
                assert_eq!(refused, Error::Missing { field: "mask" });
                gpu.queue().submit([encoder.finish()]);
                gpu.wait().unwrap();
                if p.batch > 0 && p.seq_q > 0 {
                    let got = staged.outputs(gpu.device(), gpu.queue());
                    Case::new(p, data).compare(&got, &plan);
                }
            }
        }
        assert_eq!(gpu.read(make(0).slice(..)), Ok(Vec::new()));
    }
}

#[test]
fn plans_without_a_row_have_no_dispatch_but_a_choice() {
    for gpu in gpus() {
        let options = |kernel| with!(Options::default(), kernel: Some(kernel));
        for sizes in [[0, 2, 5, 7, 5], [2, 2, 0, 7, 5], [2, 2, 0, 0, 5]] {
            for kernel in [Kernel::Unfused, Kernel::Rows, Kernel::Flash, Kernel::Split] {
                let p = problem(sizes, |p| {
                    // A 16-bit output between whose rows others stand: for `pack` that would be too much.
                    (p.element, p.weights, p.logits) = (Element::F16, false, None);
                    p.out = Layout::Strided(Strides { offset: 3, batch: 900, head: 300, row: 9 });
                });
                let Ok(plan) = gpu.library().plan_with(&p, &options(kernel)) else { continue };
                assert_eq!((plan.dispatches(), plan.slices(), plan.scratch_bytes()), (0, 0, 0), "{plan}");
                assert_eq!((plan.choice().kernel(), plan.kernel().as_str()), (kernel, "none"), "{plan}");
                assert_eq!(plan.estimate().as_nanos(), 0);
                assert!(plan.to_string().contains("0 dispatches in 0 slices"), "{plan}");
            }
            assert!(gpu.library().plan_with(&problem(sizes, |_| ()), &options(Kernel::Unfused)).is_ok());
        }
        // Tokens that no sequence owns, in a 16-bit output that passes through f32: it is not packed over them.
        let p = problem([2, 2, 0, 7, 5], |p| {
            (p.element, p.weights, p.logits) = (Element::F16, false, None);
            p.packed = Some(Packed { total_q: 9, total_kv: 9 });
        });
        for way in ways_of(gpu, &p) {
            let plan = gpu.library().plan_with(&p, &way).unwrap();
            assert_eq!((plan.dispatches(), plan.scratch_bytes()), (0, 0), "{plan}");
        }
    }
}
