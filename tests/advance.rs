//! Advancing lengths on real drivers: each as the reference counts it, and nothing beside them.

mod support;

use support::operations::{nothing, run};
use support::staged::Guarded;
use support::{Random, floor, gpus};
use wgpu_attention::operations::{Advance, AdvanceBuffers, By};
use wgpu_attention::{Error, Gpu, Options, reference, with};

/// Advances lengths between margins that nobody may write, and compares each with the reference.
fn check(gpu: &Gpu, advance: &Advance, lengths: &[u32], by: Option<&[u32]>, options: &Options) {
    let operation = gpu.library().advance(advance, options).unwrap_or_else(|error| panic!("{error}: {advance:?}"));
    let guarded = |words: &[u32]| Guarded::new(gpu.device(), bytemuck::cast_slice(words));
    let (on_gpu, each) = (guarded(lengths), by.map(guarded));
    let mut buffers = AdvanceBuffers::new(on_gpu.slice());
    buffers.by = each.as_ref().map(Guarded::slice);
    let mut want = lengths.to_vec();
    // Twice, as in a loop.
    for _ in 0..2 {
        run(gpu, &operation, &buffers);
        reference::advance(advance, &mut want, by).expect("valid");
        let got: Vec<u32> = bytemuck::pod_collect_to_vec(&on_gpu.read(gpu.device(), gpu.queue()));
        assert_eq!(got, want, "on {}: {advance:?} of {lengths:?} by {by:?}", gpu.info().name);
    }
}

fn each(batch: u32, limit: u32) -> Advance {
    with!(Advance::new(batch, 0, limit), by: By::Each)
}

#[test]
fn lengths_grow_by_one_number_or_by_one_each() {
    for gpu in gpus() {
        let lengths = [0, 3, 7, 100, 63, 8, 0];
        let options = Options::default();
        for by in [0, 1, 40] {
            check(gpu, &Advance::new(7, by, 1000), &lengths, None, &options);
        }
        check(gpu, &each(7, 1000), &lengths, Some(&[1, 0, 5, 2, 0, 200, 9]), &options);
        // More batches than a workgroup has invocations.
        let mut random = Random(3);
        let mut numbers = |below: u32| (0..777).map(|_| random.below(below)).collect::<Vec<u32>>();
        let (lengths, by) = (numbers(5000), numbers(9));
        check(gpu, &Advance::new(777, 3, 1 << 20), &lengths, None, &options);
        check(gpu, &each(777, 1 << 20), &lengths, Some(&by), &options);
    }
}

/// Lengths and numbers that only the GPU knows may be anything.
#[test]
fn no_length_passes_the_limit_or_wraps() {
    for gpu in gpus() {
        let lengths = [7, 8, 9, 1 << 31, u32::MAX - 1, u32::MAX, 0];
        let by = [u32::MAX, 0, 1, 1 << 31, 1, 2, u32::MAX];
        for limit in [0, 8, 1 << 31, u32::MAX] {
            check(gpu, &Advance::new(7, limit.min(1 << 31), limit), &lengths, None, &Options::default());
            check(gpu, &each(7, limit), &lengths, Some(&by), &Options::default());
        }
    }
}

#[test]
fn lengths_are_split_under_small_limits() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 4096, 3);
        let options = with!(Options::default(), work_budget: std::time::Duration::from_micros(1));
        let lengths: Vec<u32> = (0..3000).collect();
        let by: Vec<u32> = (0..3000).map(|n| n % 7).collect();
        for advance in [Advance::new(3000, 2, 2500), each(3000, 2500)] {
            let steps = advance.plan(gpu.library().caps(), &options).expect("splits");
            assert!(steps.iter().all(|step| step.grid.iter().all(|&side| side <= 3)));
            assert!(steps.iter().flat_map(|step| &step.bindings).all(|bound| bound.size <= 4096));
            assert!(steps.iter().any(|step| step.uniform.place().row0 > 0), "the lengths are split");
            let by = (advance.by == By::Each).then_some(&by[..]);
            check(gpu, &advance, &lengths, by, &options);
        }
    }
}

#[test]
fn host_slices_advance_and_what_is_wrong_with_them_is_an_error() {
    let gpu = &gpus()[0];
    let advance = Advance::new(3, 2, 8);
    assert_eq!(gpu.advance(&advance, &[0, 5, 7], None), Ok(vec![2, 7, 8]));
    assert_eq!(gpu.advance(&each(3, 8), &[0, 5, 7], Some(&[1, 0, 9])), Ok(vec![1, 5, 8]));
    let beyond = Error::Entry { field: "lengths", index: 1, value: 9, want: "at most", limit: 8 };
    assert_eq!(gpu.advance(&advance, &[0, 9, 7], None), Err(beyond));
    let short = |field| Err(Error::Length { field, got: 2, want: 3 });
    assert_eq!(gpu.advance(&advance, &[0, 5], None), short("lengths"));
    assert_eq!(gpu.advance(&each(3, 8), &[0, 5, 7], Some(&[1, 2])), short("by"));
    assert_eq!(gpu.advance(&each(3, 8), &[0, 5, 7], None), Err(Error::Missing { field: "by" }));
    assert_eq!(gpu.advance(&advance, &[0, 5, 7], Some(&[1, 2, 3])), Err(Error::Unexpected { field: "by" }));
    let large = Error::TooLarge { field: "by", value: 9, limit: 8 };
    assert_eq!(Advance::new(3, 9, 8).check(), Err(large.clone()));
    assert_eq!(gpu.library().advance(&Advance::new(3, 9, 8), &Options::default()).map(|_| ()), Err(large));
    let many = Error::TooLarge { field: "batch", value: (1 << 28) + 1, limit: 1 << 28 };
    assert_eq!(Advance::new((1 << 28) + 1, 1, 8).check(), Err(many));
}

#[test]
fn without_a_batch_nothing_is_recorded() {
    for gpu in gpus() {
        assert_eq!(gpu.advance(&Advance::new(0, 1, 8), &[], None), Ok(vec![]));
        let operation = gpu.library().advance(&each(0, 8), &Options::default()).expect("valid");
        assert_eq!((operation.slices(), operation.needs().count()), (0, 0));
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let none = nothing(gpu);
        assert_eq!(operation.encode(&mut encoder, &AdvanceBuffers::new(none.slice(..))), Ok(()));
    }
}

#[test]
fn wrong_buffers_are_errors() {
    let gpu = &gpus()[0];
    let operation = gpu.library().advance(&each(3, 8), &Options::default()).expect("compiles");
    let (words, short) =
        (Guarded::new(gpu.device(), &[0; 12]), Guarded::between(gpu.device(), &[0; 8], [false, false]));
    let encode = |buffers: &AdvanceBuffers<'_>| {
        operation.encode(&mut gpu.device().create_command_encoder(&Default::default()), buffers)
    };
    let mut buffers = AdvanceBuffers::new(words.slice());
    assert_eq!(encode(&buffers), Err(Error::Missing { field: "by" }));
    buffers.by = Some(words.slice());
    assert_eq!(encode(&buffers), Err(Error::Aliased { output: "lengths", other: "by" }));
    buffers.by = Some(short.slice());
    assert_eq!(encode(&buffers), Err(Error::BufferSize { field: "by", got: 8, want: 12 }));
}
