//! The caller's own device and encoder, slices, the asynchronous path, a device that is lost.

use wgpu_attention::{Attention, Causal, Error, Options, Problem, wgpu};

use crate::support::staged::Staged;
use crate::support::{Adapter, Case, gpus};
use crate::{form, lean, problem};

/// A device that the library did not make.
fn own(gpu: &Adapter) -> (wgpu::Device, wgpu::Queue) {
    let descriptor = wgpu::DeviceDescriptor { required_limits: gpu.adapter.limits(), ..Default::default() };
    pollster::block_on(gpu.adapter.request_device(&descriptor)).unwrap()
}

fn cases() -> [Case; 2] {
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
        let offered = gpu.adapter.features().contains(wgpu::Features::PIPELINE_CACHE);
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
    let options = Options { work_budget: std::time::Duration::from_micros(1), ..form(None) };
    for gpu in gpus() {
        for case in cases() {
            let plan = gpu.library().plan_with(&case.problem, &options).unwrap();
            let prepared = gpu.library().prepare(&plan).unwrap();
            let staged = Staged::new(gpu.device(), &plan, &case.operands);
            assert!(prepared.slices() > 2);
            for slice in 0..prepared.slices() {
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                prepared.encode_slice(slice, &mut encoder, &staged.buffers()).unwrap();
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
            for step in 0..plan.dispatches() {
                // Nothing but the last dispatches writes the output.
                let out = staged.outputs(gpu.device(), gpu.queue()).out;
                assert!(step > 1 || out.iter().all(|x| x.is_nan()), "step {step} of\n{plan}");
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                prepared.encode_steps(step..step + 1, &mut encoder, &staged.buffers()).unwrap();
                gpu.queue().submit([encoder.finish()]);
            }
            case.compare(&staged.outputs(gpu.device(), gpu.queue()), &plan);
        }
    }
}

#[test]
fn the_asynchronous_path_gives_the_same_bits() {
    for gpu in gpus() {
        for case in cases() {
            let (want, _) = case.check(gpu, &form(None));
            let device = gpu.device();
            let done = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        device.poll(wgpu::PollType::Poll).unwrap();
                        std::thread::yield_now();
                    }
                });
                let got = pollster::block_on(gpu.attention_async(&case.problem, &case.operands.inputs()));
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                assert_eq!(got.unwrap(), want);
            });
        }
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
                device.wait(),
            ];
            for (n, result) in lost.into_iter().enumerate() {
                assert!(matches!(result, Err(Error::DeviceLost(_))), "call {n}: {result:?}");
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
