//! The caller's own device and encoder, slices, a device that is lost.

use std::time::Duration;

use wgpu_attention::operations::Merge;
use wgpu_attention::{Attention, Causal, Element, Error, Form, Gpu, Kernel, Options, Plan, Problem, wgpu, with};

use crate::support::staged::Staged;
use crate::support::{Adapter, Case, Data, gpus};
use crate::{form, lean, problem};

/// A device that the library did not make.
fn own(gpu: &Adapter) -> (wgpu::Device, wgpu::Queue) {
    let descriptor = wgpu::DeviceDescriptor { required_limits: gpu.adapter().limits(), ..Default::default() };
    pollster::block_on(gpu.adapter().request_device(&descriptor)).unwrap()
}

pub fn cases() -> [Case; 2] {
    let one = problem([2, 2, 33, 35, 20], |p| (p.causal, p.key_lengths) = (Causal::BottomRight, true));
    let two = problem([1, 3, 7, 65, 12], |p| p.sinks = true);
    [Case::random(one, 1), Case::random(two, 2)]
}

#[test]
fn problems_share_the_callers_device_and_encoder() {
    for gpu in gpus() {
        let (device, queue) = own(gpu);
        let attention = Attention::new(&device);
        let cases = cases();
        let prepared = cases.each_ref().map(|case| attention.prepare(&attention.plan(&case.problem).unwrap()).unwrap());
        // The first problem twice, with other operands, and the second between them, in one encoder.
        let again = Case::random(cases[0].problem.clone(), 77);
        let staged = [(0, &cases[0]), (1, &cases[1]), (0, &again)]
            .map(|(n, case)| (n, case, Staged::new(&device, prepared[n].plan(), &case.operands)));
        let mut encoder = device.create_command_encoder(&Default::default());
        for (n, _, staged) in &staged {
            prepared[*n].encode(&mut encoder, &staged.buffers()).unwrap();
        }
        queue.submit([encoder.finish()]);
        for (n, case, staged) in &staged {
            case.compare(&staged.outputs(&device, &queue), prepared[*n].plan());
        }
    }
}

#[test]
fn recording_compiles_nothing_and_needs_no_compiler() {
    for gpu in gpus() {
        let (device, queue) = own(gpu);
        let attention = Attention::new(&device);
        assert_eq!(attention.compiled_pipelines(), 0);
        let [case, _] = cases();
        let plan = attention.plan(&case.problem).unwrap();
        assert_eq!(attention.compiled_pipelines(), 0, "planning is pure");
        let prepared = attention.prepare(&plan).unwrap();
        let compiled = attention.compiled_pipelines();
        assert!(compiled > 0);
        let staged = Staged::new(&device, &plan, &case.operands);
        let mut encoder = device.create_command_encoder(&Default::default());
        prepared.encode(&mut encoder, &staged.buffers()).unwrap();
        attention.prepare(&plan).unwrap();
        assert_eq!(attention.compiled_pipelines(), compiled);
        // What compiles is gone; recording goes on.
        drop(attention);
        prepared.encode(&mut encoder, &staged.buffers()).unwrap();
        queue.submit([encoder.finish()]);
        case.compare(&staged.outputs(&device, &queue), &plan);
    }
}

#[test]
fn a_pipeline_cache_is_given_out_and_taken_and_damage_to_it_is_refused() {
    for gpu in gpus() {
        let offered = gpu.adapter().features().contains(wgpu::Features::PIPELINE_CACHE);
        let [case, _] = cases();
        let first = gpu.limited(|_| ());
        let (want, _) = case.check(&first, &form(None));
        let data = first.library().pipeline_cache_data();
        assert_eq!(data.is_some(), offered, "{}", gpu.name);
        let data = data.unwrap_or(vec![1; 100]);
        let mut second = gpu.limited(|_| ());
        // SAFETY: the library gave the data out, or it is damaged, or the device takes none.
        let load =
            |device: &mut wgpu_attention::Gpu, data: &[u8]| unsafe { device.library_mut().load_pipeline_cache(data) };
        assert_eq!(load(&mut second, &data), offered, "{}", gpu.name);
        let mut flipped = data.clone();
        // The driver's own part, which wgpu does not look at.
        *flipped.last_mut().unwrap() ^= 0x10;
        for damaged in [&[][..], &[7; 5], &[0xa5; 5000], &data[..data.len() - 1], &data[8..], &flipped] {
            assert!(!load(&mut second, damaged), "{}", gpu.name);
        }
        assert_eq!(case.check(&second, &form(None)).0, want, "{}", gpu.name);
        let plain = gpu.limited_to(Some(wgpu::Features::empty()), |_| ());
        assert_eq!(plain.library().pipeline_cache_data(), None);
    }
}

#[test]
fn slices_submitted_in_order_make_the_whole() {
    let options = with!(form(None), work_budget: Duration::from_micros(1));
    for gpu in gpus() {
        for case in cases() {
            let plan = gpu.library().plan_with(&case.problem, &options).unwrap();
            let prepared = gpu.library().prepare(&plan).unwrap();
            let staged = Staged::new(gpu.device(), &plan, &case.operands);
            assert!(prepared.slices() > 2);
            let call = prepared.begin().unwrap();
            for slice in 0..prepared.slices() {
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                call.encode_slice(slice, &mut encoder, &staged.buffers()).unwrap();
                gpu.queue().submit([encoder.finish()]);
            }
            case.compare(&staged.outputs(gpu.device(), gpu.queue()), &plan);
        }
    }
}

#[test]
fn dispatches_recorded_one_by_one_make_the_whole() {
    for gpu in gpus() {
        for case in cases() {
            let plan = gpu.library().plan(&case.problem).unwrap();
            let prepared = gpu.library().prepare(&plan).unwrap();
            let staged = Staged::new(gpu.device(), &plan, &case.operands);
            let call = prepared.begin().unwrap();
            for step in 0..plan.dispatches() {
                // Nothing but the last dispatches writes the output.
                let out = staged.outputs(gpu.device(), gpu.queue()).out;
                assert!(step > 1 || out.iter().all(|x| x.is_nan()), "step {step} of\n{plan}");
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                call.encode_steps(step..step + 1, &mut encoder, &staged.buffers()).unwrap();
                gpu.queue().submit([encoder.finish()]);
            }
            case.compare(&staged.outputs(gpu.device(), gpu.queue()), &plan);
        }
    }
}

/// Plans of many slices that keep something in a scratch or in an output from one to the next, each for a reason of its own.
fn sliced(gpu: &Gpu) -> Vec<Plan> {
    let way =
        |kernel, form| with!(Options::default(), kernel: Some(kernel), form, work_budget: Duration::from_micros(1));
    // The small arrays of each call, too.
    let small = |p: &mut Problem| (p.key_lengths, p.sinks, p.causal) = (true, true, Causal::Offset);
    let one = problem([2, 2, 33, 35, 20], |p| small(p));
    let odd = lean(&problem([2, 2, 33, 35, 8], |p| {
        small(p);
        (p.element, p.value_dim) = (Element::F16, 5);
    }));
    let mut weights = lean(&problem([2, 2, 33, 36, 20], |p| small(p)));
    weights.weights = true;
    let decode = lean(&problem([1, 2, 1, 2000, 16], |p| small(p)));
    let ways = [
        (&one, way(Kernel::Unfused, Some(Form::Tiled)), "scores"),
        (&one, way(Kernel::Unfused, Some(Form::Lanes)), "scores"),
        (&odd, way(Kernel::Unfused, Some(Form::Tiled)), "pack"),
        (&odd, way(Kernel::Rows, None), "pack"),
        (&odd, way(Kernel::Flash, None), "pack"),
        (&weights, way(Kernel::Rows, None), "softmax"),
        (&weights, way(Kernel::Flash, None), "softmax"),
        (&decode, way(Kernel::Split, None), "merge"),
    ];
    let plan = |(p, way, kernel): (&Problem, Options, &str)| {
        let plan = gpu.library().plan_with(p, &way).unwrap();
        assert!(plan.kernel().contains(kernel) && plan.slices() > 1, "{plan}");
        // Weights after a fused kernel are formed in the caller's buffer.
        assert!(plan.scratch_bytes() > 0 || kernel == "softmax", "{plan}");
        plan
    };
    ways.into_iter().map(plan).collect()
}

/// Two calls and what each must give, from a `Prepared` of its own.
fn pair(gpu: &Gpu, plan: &Plan) -> [(Staged, [Option<Vec<u8>>; 4]); 2] {
    [1, 2].map(|seed| {
        let operands = Data::random(plan.shape().problem(), seed, 1.0);
        let alone = Staged::new(gpu.device(), plan, &operands);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        gpu.library().prepare(plan).unwrap().encode(&mut encoder, &alone.buffers()).unwrap();
        gpu.queue().submit([encoder.finish()]);
        (Staged::new(gpu.device(), plan, &operands), alone.bytes(gpu.device(), gpu.queue()))
    })
}

fn commands(gpu: &Gpu, record: impl FnOnce(&mut wgpu::CommandEncoder)) -> wgpu::CommandBuffer {
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    record(&mut encoder);
    encoder.finish()
}

#[test]
fn calls_of_one_prepared_take_turns() {
    for gpu in gpus() {
        for plan in sliced(gpu) {
            let prepared = gpu.library().prepare(&plan).unwrap();
            let [(a, want_a), (b, want_b)] = pair(gpu, &plan);
            let (first, second) = (prepared.begin().unwrap(), prepared.begin().unwrap());
            for slice in 0..prepared.slices() {
                for (call, staged) in [(&first, &a), (&second, &b)] {
                    let commands =
                        commands(gpu, |encoder| call.encode_slice(slice, encoder, &staged.buffers()).unwrap());
                    gpu.queue().submit([commands]);
                }
                // And a whole one in between.
                gpu.queue().submit([commands(gpu, |encoder| prepared.encode(encoder, &b.buffers()).unwrap())]);
            }
            assert_eq!(a.bytes(gpu.device(), gpu.queue()), want_a, "{plan}");
            assert_eq!(b.bytes(gpu.device(), gpu.queue()), want_b, "{plan}");
        }
    }
}

#[test]
fn what_is_recorded_keeps_its_scratch_after_its_call() {
    for gpu in gpus() {
        for plan in sliced(gpu) {
            let prepared = gpu.library().prepare(&plan).unwrap();
            let calls = pair(gpu, &plan);
            // A call is over before the next one begins, but neither has been submitted.
            let recorded = calls.each_ref().map(|(staged, _)| {
                let call = prepared.begin().unwrap();
                let slice = |n| commands(gpu, |encoder| call.encode_slice(n, encoder, &staged.buffers()).unwrap());
                (0..prepared.slices()).map(slice).collect::<Vec<_>>()
            });
            let [first, second] = recorded;
            first.into_iter().zip(second).for_each(|(first, second)| {
                gpu.queue().submit([first, second]);
            });
            for (staged, want) in &calls {
                assert_eq!(staged.bytes(gpu.device(), gpu.queue()), *want, "{plan}");
            }
        }
    }
}

#[test]
fn many_threads_run_one_prepared() {
    for gpu in gpus() {
        // On OpenGL only one thread may use the device at a time.
        let threads = if gpu.info().backend == wgpu::Backend::Gl { 1 } else { 6 };
        let device: &Gpu = gpu;
        for plan in sliced(device) {
            let prepared = device.library().prepare(&plan).unwrap();
            let problem = plan.shape().problem();
            let run = |seed| {
                let operands = Data::random(problem, seed, 1.0);
                let resident = device.upload(&plan, &operands.inputs()).unwrap();
                device.run(&prepared, &resident, &mut |_, _| ()).unwrap();
                device.download(&plan, &resident).unwrap()
            };
            let bits = |outputs: wgpu_attention::Outputs| {
                let rest = [outputs.lse, outputs.weights, outputs.logits].map(Option::unwrap_or_default);
                let all = outputs.out.into_iter().chain(rest.into_iter().flatten());
                all.map(f32::to_bits).collect::<Vec<_>>()
            };
            let want: Vec<_> = (0..threads).map(|seed| bits(run(seed))).collect();
            std::thread::scope(|scope| {
                let run = &run;
                let threads: Vec<_> =
                    (0..threads).map(|seed| scope.spawn(move || [run(seed), run(seed), run(seed)])).collect();
                for (thread, want) in threads.into_iter().zip(&want) {
                    for got in thread.join().unwrap() {
                        assert!(bits(got) == *want, "another call's results\n{plan}");
                    }
                }
            });
        }
    }
}

#[test]
fn only_a_call_beside_another_allocates() {
    let mut counted = false;
    for gpu in gpus() {
        let device = &gpu.limited(|_| ());
        let p = lean(&problem([1, 2, 512, 2048, 16], |_| ()));
        let way = with!(Options::default(), kernel: Some(Kernel::Unfused), work_budget: Duration::from_millis(1));
        let plan = device.library().plan_with(&p, &way).unwrap();
        let prepared = device.library().prepare(&plan).unwrap();
        let resident = device.upload(&plan, &Data::random(&p, 1, 1.0).inputs()).unwrap();
        let run = || device.run(&prepared, &resident, &mut |_, _| ()).unwrap();
        let allocated = || Some(device.device().generate_allocator_report()?.total_allocated_bytes);
        let at_first = allocated();
        counted |= at_first.is_some();
        // What the upload went through is gone by then.
        (0..3).for_each(|_| run());
        assert!(allocated() <= at_first, "{}", gpu.name);
        let at_first = allocated();
        let call = prepared.begin().unwrap();
        run();
        let beside = allocated();
        let grown = beside.zip(at_first).map(|(now, before)| now - before);
        assert!(grown.is_none_or(|grown| grown >= plan.scratch_bytes()), "{grown:?} on {}", gpu.name);
        drop(call);
        (0..3).for_each(|_| run());
        assert_eq!(allocated(), beside, "{}", gpu.name);
    }
    assert!(counted, "no backend counts");
}

#[test]
fn errors_of_one_thread_reach_no_other() {
    for gpu in gpus() {
        // On OpenGL only one thread may use the device at a time, and this one does.
        if gpu.info().backend == wgpu::Backend::Gl {
            continue;
        }
        let device: &Gpu = gpu;
        let case = Case::random(lean(&problem([1, 2, 9, 35, 8], |_| ())), 1);
        let usage = wgpu::BufferUsages::STORAGE;
        let descriptor = wgpu::BufferDescriptor { label: None, size: 16, usage, mapped_at_creation: false };
        let unreadable = device.device().create_buffer(&descriptor);
        std::thread::scope(|scope| {
            let wrong = scope.spawn(|| {
                for _ in 0..50 {
                    let error = device.read(unreadable.slice(..)).unwrap_err();
                    assert!(matches!(error, Error::Validation(_)), "{error}");
                    assert_eq!(device.wait(), Ok(()), "told twice");
                }
            });
            while !wrong.is_finished() {
                case.check(device, &form(None));
            }
            wrong.join().unwrap();
        });
        // Commands of the caller's own: the next call on their thread tells, and no other thread's.
        let mistake = || {
            let mut encoder = device.device().create_command_encoder(&Default::default());
            encoder.clear_buffer(&unreadable, 0, None);
            drop(encoder.finish());
        };
        std::thread::scope(|scope| {
            scope.spawn(mistake).join().unwrap();
            assert_eq!(device.wait(), Ok(()));
            mistake();
            scope.spawn(|| assert_eq!(device.wait(), Ok(()))).join().unwrap();
            assert!(matches!(device.wait(), Err(Error::Validation(_))));
            assert_eq!(device.wait(), Ok(()));
        });
    }
}

#[test]
fn a_lost_device_is_an_error_on_every_call() {
    for gpu in gpus() {
        let device = gpu.limited(|_| ());
        let case = Case::random(lean(&problem([1, 2, 9, 35, 8], |_| ())), 1);
        let (_, plan) = case.check(&device, &form(None));
        let prepared = device.library().prepare(&plan).unwrap();
        let resident = device.upload(&plan, &case.operands.inputs()).unwrap();
        device.device().destroy();
        let _ = device.device().poll(wgpu::PollType::wait_indefinitely());
        for _ in 0..2 {
            let lost = [
                device.attention(&case.problem, &case.operands.inputs()).map(drop),
                pollster::block_on(device.attention_async(&case.problem, &case.operands.inputs())).map(drop),
                device.run(&prepared, &resident, &mut |_, _| ()),
                device.download(&plan, &resident).map(drop),
                device.upload(&plan, &case.operands.inputs()).map(drop),
                device.library().prepare(&plan).map(drop),
                // Nothing is compiled yet: the driver's first object is refused.
                Attention::new(device.device()).prepare(&plan).map(drop),
                Attention::new(device.device()).merge(&Merge::new(2, 1, 1, 3, 4), &form(None)).map(drop),
                device.wait(),
            ];
            for (n, result) in lost.into_iter().enumerate() {
                let Err(Error::DeviceLost(why)) = &result else { panic!("call {n}: {result:?}") };
                assert!(!why.contains("view") && !why.contains("invalid"), "call {n} blames what the loss left: {why}");
            }
        }
    }
}

#[test]
fn a_plan_is_the_same_for_the_same_device() {
    let p = Problem::new(1, 8, 512, 512, 64);
    for gpu in gpus() {
        let attention = gpu.library();
        assert_eq!(attention.plan(&p).unwrap(), attention.plan(&p).unwrap());
    }
}
