//! The kernels around attention and the layer as a whole, on real drivers.

#[path = "../support/mod.rs"]
mod support;

mod cache;
mod errors;
mod fused_rotation;
mod layers;
mod project;
mod rotary;

use support::staged::Guarded;
use wgpu_attention::{Form, Gpu, Options, with};

const FORMS: [Option<Form>; 2] = [Some(Form::Tiled), Some(Form::Lanes)];

fn forced(form: Option<Form>) -> Options {
    with!(Options::default(), form)
}

/// A buffer of these numbers between margins that nobody may write.
fn guarded<T: bytemuck::NoUninit>(gpu: &Gpu, values: &[T]) -> Guarded {
    Guarded::new(gpu.device(), bytemuck::cast_slice(values))
}

/// What such a buffer holds, its margins untouched.
fn read<T: bytemuck::Pod>(gpu: &Gpu, buffer: &Guarded) -> Vec<T> {
    gpu.wait().expect("computed");
    bytemuck::pod_collect_to_vec(&buffer.read(gpu.device(), gpu.queue()))
}
