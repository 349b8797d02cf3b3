//! Attention inside a program that has its own device, queue and command encoder: plan and compile once, record often.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example own_device
//! ```

use wgpu_attention::wgpu::util::{
    BufferInitDescriptor, DeviceExt, DownloadBuffer, initialize_adapter_from_env_or_default,
};
use wgpu_attention::{Attention, Buffers, Causal, Error, Problem, wgpu};

pub(crate) fn main() -> wgpu_attention::Result<()> {
    // ANCHOR: device
    // What the caller has anyway: here the adapter that wgpu prefers, with all its limits.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(initialize_adapter_from_env_or_default(&instance, None))
        .map_err(|error| Error::RequestDevice(error.to_string()))?;
    let descriptor = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
        .map_err(|error| Error::RequestDevice(error.to_string()))?;
    // ANCHOR_END: device

    // ANCHOR: prepare
    let mut problem = Problem::new(1, 1, 3, 3, 4); // batch, heads, seq_q, seq_kv, head_dim
    problem.causal = Causal::TopLeft;
    let attention = Attention::new(&device); // once per device: it keeps the compiled pipelines
    let plan = attention.plan(&problem)?; // pure data
    print!("{plan}");
    let prepared = attention.prepare(&plan)?; // compiles and allocates
    // ANCHOR_END: prepare

    // ANCHOR: encode
    // Queries and keys are 0, so that each row is the mean of the values that it sees.
    let (zeros, values) = ([0.0f32; 12], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11].map(|i| i as f32));
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let [q, k, v, out] = [("q", zeros), ("k", zeros), ("v", values), ("out", zeros)].map(|(label, contents)| {
        let contents = bytemuck::cast_slice(&contents);
        device.create_buffer_init(&BufferInitDescriptor { label: Some(label), contents, usage })
    });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    prepared.encode(&mut encoder, &Buffers::new(q.slice(..), k.slice(..), v.slice(..), out.slice(..)))?;
    queue.submit([encoder.finish()]);
    // ANCHOR_END: encode

    let (send, receive) = std::sync::mpsc::channel();
    DownloadBuffer::read_buffer(&device, &queue, &out.slice(..), move |bytes| send.send(bytes).expect("main waits"));
    device.poll(wgpu::PollType::wait_indefinitely()).map_err(|error| Error::DeviceLost(error.to_string()))?;
    let bytes = receive.recv().expect("it was sent").map_err(|error| Error::DeviceLost(error.to_string()))?;
    let rows: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    println!("{rows:?}");
    let mean = [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0], [4.0, 5.0, 6.0, 7.0]].concat();
    assert!(rows.iter().zip(mean).all(|(got, want)| (got - want).abs() < 1e-5));
    Ok(())
}
