//! Recording and submitting operations and layers.

use std::fmt::Debug;

use wgpu_attention::operations::{Description, Operation};
use wgpu_attention::{Gpu, wgpu};

/// Submits what `record` records.
pub fn submit(gpu: &Gpu, record: impl FnOnce(&mut wgpu::CommandEncoder)) {
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    record(&mut encoder);
    gpu.queue().submit([encoder.finish()]);
}

/// Runs an operation with a submission for each slice.
pub fn run<D: Description>(gpu: &Gpu, operation: &Operation<D>, buffers: &D::Buffers<'_>) {
    let recording = operation.begin().expect("nothing to allocate");
    for slice in 0..operation.slices() {
        submit(gpu, |encoder| recording.encode_slice(slice, encoder, buffers).expect("valid buffers"));
    }
    gpu.wait().expect("computed");
}

/// Records a slice of one call with the buffers of type `S`.
pub type Slice<'a, S> = dyn Fn(usize, &mut wgpu::CommandEncoder, &S) + 'a;

/// Two calls of one object, recorded slice by slice in turns, with calls between them that are recorded as a whole. `stage` makes the
/// buffers of a call from a seed. Every call must leave the outputs that it leaves when it runs alone; these are returned.
pub fn take_turns<S, O: Debug + PartialEq>(
    gpu: &Gpu,
    slices: usize,
    stage: &dyn Fn(u64) -> S,
    read: &dyn Fn(&S) -> O,
    whole: &dyn Fn(&mut wgpu::CommandEncoder, &S),
    calls: [&Slice<'_, S>; 2],
) -> [O; 2] {
    let want = [1, 2].map(|seed| {
        let staged = stage(seed);
        submit(gpu, |encoder| whole(encoder, &staged));
        read(&staged)
    });
    let staged = [stage(1), stage(2)];
    for slice in 0..slices {
        for (call, staged) in calls.iter().zip(&staged) {
            submit(gpu, |encoder| call(slice, encoder, staged));
        }
        submit(gpu, |encoder| whole(encoder, &staged[1]));
    }
    assert_eq!(staged.each_ref().map(read), want);
    want
}

/// A buffer for an operand that nobody reads.
pub fn nothing(gpu: &Gpu) -> wgpu::Buffer {
    let usage = wgpu::BufferUsages::COPY_SRC;
    gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size: 0, usage, mapped_at_creation: false })
}
