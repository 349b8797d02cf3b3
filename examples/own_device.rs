//! Attention inside a program that has its own device, queue and command encoder: plan and compile once, record often.
//!
//! ```sh
//! cargo run --release -p wgpu-attention --example own_device
//! ```

use wgpu_attention::{Attention, Buffers, Causal, Error, Problem, wgpu};

fn main() -> wgpu_attention::Result<()> {
    // What the caller has anyway: here the first adapter and its default device.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let found = || Error::NoAdapter { wanted: String::new(), found: "none".into() };
    let adapter = adapters.first().ok_or_else(found)?;
    let descriptor = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
        .map_err(|error| Error::RequestDevice(error.to_string()))?;

    // One query head of three rows, causal; batch, heads, seq_q, seq_kv, head_dim.
    let mut problem = Problem::new(1, 1, 3, 3, 4);
    problem.causal = Causal::TopLeft;
    let attention = Attention::new(&device); // once per device: it keeps the compiled pipelines
    let plan = attention.plan(&problem)?; // pure data
    print!("{plan}");
    let prepared = attention.prepare(&plan)?; // compiles and allocates

    let bytes = 4 * plan.shape().q().extent();
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    let buffer = |label| {
        let label = Some(label);
        device.create_buffer(&wgpu::BufferDescriptor { label, size: bytes, usage, mapped_at_creation: false })
    };
    let [q, k, v, out] = ["q", "k", "v", "out"].map(buffer);
    let read_usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let read = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("read"),
        size: bytes,
        usage: read_usage,
        mapped_at_creation: false,
    });
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    queue.write_buffer(&v, 0, bytemuck::cast_slice(&values));

    // Queries and keys are 0, so that each row is the mean of the values that it sees.
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    prepared.encode(&mut encoder, &Buffers::new(q.slice(..), k.slice(..), v.slice(..), out.slice(..)))?;
    encoder.copy_buffer_to_buffer(&out, 0, &read, 0, bytes);
    queue.submit([encoder.finish()]);

    read.slice(..).map_async(wgpu::MapMode::Read, |mapped| mapped.expect("the device is there"));
    device.poll(wgpu::PollType::wait_indefinitely()).map_err(|error| Error::DeviceLost(error.to_string()))?;
    let view = read.slice(..).get_mapped_range().map_err(|error| Error::DeviceLost(error.to_string()))?;
    let rows: Vec<f32> = bytemuck::pod_collect_to_vec(&view);
    for row in rows.chunks_exact(4) {
        println!("{row:?}");
    }
    let mean = [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0], [4.0, 5.0, 6.0, 7.0]].concat();
    assert!(rows.iter().zip(mean).all(|(got, want)| (got - want).abs() < 1e-5));
    Ok(())
}
