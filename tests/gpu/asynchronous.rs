//! Asynchronous calls: under executors of three kinds, several at once, dropped, and on a device that is lost meanwhile.

use std::io::Write;
use std::pin::{Pin, pin};
use std::process;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use wgpu_attention::multihead::{Call, Layer, LayerInputs, Linear, MultiHeadAttention};
use wgpu_attention::operations::{Advance, Append, Merge, Order, Projection, Rotation};
use wgpu_attention::{Attention, DeviceOptions, Element, Error, Gpu, Inputs, Options, Problem, Runner, with};

use crate::device::cases;
use crate::support::{Adapter, Case, Random, checked, gpus};
use crate::{form, lean, problem};

/// More than any call here takes whose shaders are compiled.
const LIMIT: Duration = Duration::from_secs(120);

/// So often a test calls until a call waits: on a busy machine the device may be done before the thread goes on.
const TRIES: u32 = 50;

/// Runs a call that hangs if it is wrong. No thread can end another one, so that the whole process ends then.
fn in_time<T>(call: impl FnOnce() -> T) -> T {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let (done, ended) = mpsc::channel::<()>();
    thread::spawn(move || {
        if ended.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            // Not the captured output of the test, which is lost with the process.
            writeln!(std::io::stderr(), "{test}: a call hangs").expect("standard error is open");
            process::abort();
        }
    });
    let result = call();
    drop(done);
    result
}

fn under_tokio<T>(call: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(call)
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// An executor that polls the call each time on another thread, and only when it was woken.
fn on_many_threads<T: Send>(call: impl Future<Output = T> + Send) -> T {
    let mut call = pin!(call);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        let poll = || call.as_mut().poll(&mut Context::from_waker(&waker));
        match thread::scope(|scope| scope.spawn(poll).join().unwrap()) {
            Poll::Ready(result) => return result,
            Poll::Pending => thread::park(),
        }
    }
}

/// A problem that takes every adapter some time.
fn long() -> Case {
    Case::random(lean(&problem([1, 4, 512, 512, 64], |_| ())), 3)
}

/// The adapters on which a call waits for the device. llvmpipe under OpenGL computes while the commands are submitted, so that nothing
/// is left to wait for.
fn waiting() -> impl Iterator<Item = &'static Adapter> {
    gpus().iter().filter(|gpu| gpu.info().backend != wgpu::Backend::Gl)
}

#[test]
fn the_asynchronous_path_gives_the_same_bits_under_any_executor() {
    for gpu in gpus() {
        let device: &Gpu = gpu;
        for case in cases() {
            let (want, _) = case.check(device, &form(None));
            let inputs = case.operands.inputs();
            let call = || device.attention_async(&case.problem, &inputs);
            assert_eq!(in_time(|| pollster::block_on(call())), Ok(want.clone()));
            assert_eq!(in_time(|| under_tokio(call())), Ok(want.clone()));
            assert_eq!(in_time(|| on_many_threads(call())), Ok(want));
        }
    }
}

#[test]
fn several_calls_share_one_thread() {
    for gpu in gpus() {
        let device: &'static Gpu = gpu;
        let problems = cases().map(|case| case.problem);
        let cases = [0, 1, 0, 1, 0].map(|n: usize| problems[n].clone()).into_iter().zip(11..);
        let cases: Vec<_> = cases.map(|(problem, seed)| Case::random(problem, seed)).collect();
        let want: Vec<_> = cases.iter().map(|case| case.check(device, &form(None)).0).collect();
        let together = async || {
            let call = async |case: Case| device.attention_async(&case.problem, &case.operands.inputs()).await;
            let mut tasks = Vec::new();
            for case in cases.clone() {
                tasks.push(tokio::spawn(call(case)));
            }
            let mut results = Vec::new();
            for task in tasks {
                results.push(task.await.unwrap().unwrap());
            }
            results
        };
        assert_eq!(in_time(|| under_tokio(together())), want);
    }
}

#[test]
fn a_call_that_waits_leaves_its_thread_to_other_tasks() {
    for gpu in waiting() {
        let device: &'static Gpu = gpu;
        let case = long();
        let (want, _) = case.check(device, &form(None));
        let turns = async || {
            let case = case.clone();
            let call = async move { device.attention_async(&case.problem, &case.operands.inputs()).await };
            let call = tokio::spawn(call);
            let mut turns = 0;
            while !call.is_finished() {
                turns += 1;
                tokio::task::yield_now().await;
            }
            assert_eq!(call.await.unwrap().as_ref(), Ok(&want));
            turns
        };
        // A call that blocks is done in its first turn.
        let most = (0..TRIES).map(|_| in_time(|| under_tokio(turns()))).find(|&turns| turns > 4);
        assert!(most.is_some(), "{}", gpu.name);
    }
}

/// Calls until one waits for the device when it is polled once, and gives that one.
fn begin<F: Future>(call: impl Fn() -> F) -> impl Future<Output = F::Output> {
    let waits = |call: &mut Pin<Box<F>>| call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
    (0..TRIES).map(|_| Box::pin(call())).find_map(|mut begun| waits(&mut begun).then_some(begun)).expect("none waits")
}

#[test]
fn a_call_that_is_dropped_leaves_the_device_as_it_was() {
    for gpu in waiting() {
        let case = long();
        let (want, _) = case.check(gpu, &form(None));
        let inputs = case.operands.inputs();
        for _ in 0..3 {
            drop(begin(|| gpu.attention_async(&case.problem, &inputs)));
        }
        let (again, _) = case.check(gpu, &form(None));
        assert_eq!(again, want);
    }
}

#[test]
fn a_device_that_is_lost_meanwhile_ends_the_call() {
    for gpu in waiting() {
        let device = gpu.limited(|_| ());
        let case = long();
        case.check(&device, &form(None));
        let inputs = case.operands.inputs();
        let call = begin(|| device.attention_async(&case.problem, &inputs));
        device.device().destroy();
        let result = in_time(|| pollster::block_on(call));
        assert!(matches!(result, Err(Error::DeviceLost(_))), "{result:?}");
    }
}

fn layer(r: &mut Random) -> Layer {
    let mut linear = || {
        let weight = r.signed_vec(8 * 8, 0.5);
        Linear { inputs: 8, outputs: 8, weight, order: Order::OutIn, bias: None }
    };
    Layer::new(2, 2, [linear(), linear(), linear(), linear()]).unwrap()
}

#[test]
fn operations_and_layers_give_the_same_asynchronously() {
    for gpu in gpus() {
        let (gpu, r): (&Gpu, _) = (gpu, &mut Random(5));
        let (append, merge) = (Append::new(1, 1, 2, 4, 4), Merge::new(2, 1, 1, 3, 4));
        let (rotation, table) = (Rotation::new(1, 1, 3, 4, 3), Rotation::table(3, 4, 100.0));
        let projection = Projection::new(3, 8, 8, Order::OutIn, Element::F32);
        let [x, cache, out, lse, weight] = [8, 16, 24, 6, 64].map(|len| r.signed_vec(len, 1.0));
        let rows = &out[..12];
        let want = gpu.append(&append, (&x).into(), (&cache).into(), &[1], None);
        assert!(want.is_ok());
        let call = gpu.append_async(&append, (&x).into(), (&cache).into(), &[1], None);
        assert_eq!(in_time(|| under_tokio(call)), want);
        let advance = Advance::new(2, 1, 4);
        let want = gpu.advance(&advance, &[0, 4], None);
        assert!(want.is_ok());
        assert_eq!(in_time(|| under_tokio(gpu.advance_async(&advance, &[0, 4], None))), want);
        let want = gpu.merge(&merge, &out, &lse, None);
        assert!(want.is_ok());
        assert_eq!(in_time(|| under_tokio(gpu.merge_async(&merge, &out, &lse, None))), want);
        let want = gpu.project(&projection, &out, (&weight).into(), None);
        assert!(want.is_ok());
        let call = gpu.project_async(&projection, &out, (&weight).into(), None);
        assert_eq!(in_time(|| under_tokio(call)), want);
        let want = gpu.rotate(&rotation, rows.into(), &table, &[0, 1, 2]);
        assert!(want.is_ok());
        assert_eq!(in_time(|| under_tokio(gpu.rotate_async(&rotation, rows.into(), &table, &[0, 1, 2]))), want);

        let (layer, call) = (layer(r), Call::default());
        let (problem, inputs) = (layer.problem(1, 3, 3), LayerInputs::new(&out));
        let blocking = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).unwrap();
        let want = blocking.forward(gpu, &problem, &call, &inputs).unwrap();
        let forward = async || {
            let layer = MultiHeadAttention::new_async(gpu.library(), gpu.queue(), &layer, Element::F32).await?;
            layer.forward_async(gpu, &problem, &call, &inputs).await
        };
        assert_eq!(in_time(|| under_tokio(forward())), Ok(want));
    }
}

#[test]
fn devices_open_and_pipelines_compile_asynchronously() {
    for gpu in gpus() {
        let [case, _] = cases();
        let options = with!(DeviceOptions::default(), checked: checked());
        let opened = in_time(|| under_tokio(Gpu::open_async(gpu.adapter(), &options))).unwrap();
        assert_eq!(opened.info(), gpu.info());
        let (want, plan) = case.check(&opened, &form(None));
        let library = Attention::new(opened.device());
        let prepared = under_tokio(library.prepare_async(&plan)).unwrap();
        assert!(library.compiled_pipelines() > 0);
        let compute = async || {
            let resident = opened.upload_async(&plan, &case.operands.inputs()).await?;
            let mut slices = 0;
            opened.run_async(&prepared, &resident, |_, _| slices += 1).await?;
            opened.wait_async().await?;
            assert_eq!(slices, plan.slices());
            opened.download_async(&plan, &resident).await
        };
        assert_eq!(in_time(|| under_tokio(compute())), Ok(want));
    }
    let count = in_time(|| under_tokio(Gpu::adapters_async())).len();
    assert_eq!(count, Gpu::adapters().len());
    let none = in_time(|| under_tokio(Gpu::find_async("no such adapter")));
    assert!(matches!(none, Err(Error::NoAdapter { .. })), "{none:?}");
}

/// The compiler checks that other threads may poll the futures: nothing here runs.
#[allow(dead_code, clippy::too_many_arguments, reason = "only the types count")]
fn futures_are_send(
    gpu: &Gpu,
    runner: &Runner,
    problem: &Problem,
    inputs: &Inputs<'_>,
    options: &Options,
    resident: &MultiHeadAttention,
    layer: (&Layer, &Call, &LayerInputs<'_>),
    operations: (&Append, &Advance, &Merge, &Projection, &Rotation),
) {
    fn is_send(_: impl Send) {}
    let (library, (host, call, given)) = (gpu.library(), layer);
    is_send(Gpu::adapters_async());
    is_send(Gpu::new_async());
    is_send(Gpu::named_async(""));
    is_send(Gpu::find_async(""));
    is_send(async { Gpu::open_async(&Gpu::find_async("").await?, &DeviceOptions::default()).await });
    is_send(Runner::gpu_or_cpu_async());
    is_send(async { Runner::proven_async(Gpu::new_async().await?).await });
    is_send(runner.attention_async(problem, inputs));
    is_send(gpu.attention_async(problem, inputs));
    is_send(gpu.attention_with_async(problem, inputs, options));
    is_send(gpu.wait_async());
    is_send(async {
        let plan = library.plan(problem)?;
        let prepared = library.prepare_async(&plan).await?;
        let resident = gpu.upload_async(&plan, inputs).await?;
        gpu.run_async(&prepared, &resident, |_, _| ()).await?;
        gpu.read_async(resident.buffers().out).await?;
        gpu.download_async(&plan, &resident).await
    });
    is_send(MultiHeadAttention::new_async(library, gpu.queue(), host, Element::F32));
    is_send(resident.prepare_async(library, problem, call, options));
    is_send(resident.forward_async(gpu, problem, call, given));
    is_send(resident.forward_with_async(gpu, problem, call, given, options));
    let (append, advance, merge, projection, rotation) = operations;
    is_send(library.append_async(append, options));
    is_send(library.advance_async(advance, options));
    is_send(library.merge_async(merge, options));
    is_send(library.project_async(projection, options));
    is_send(library.rotate_async(rotation, options));
    is_send(gpu.append_async(append, inputs.q, inputs.k, &[], None));
    is_send(gpu.advance_async(advance, &[], None));
    is_send(gpu.merge_async(merge, &[], &[], None));
    is_send(gpu.project_async(projection, &[], inputs.k, None));
    is_send(gpu.rotate_async(rotation, inputs.q, &[], &[]));
}
