//! A layer whose weights are on a device, and its calls on host slices.

use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Element, Problem};
use crate::device::allocation::{allocate, upload_bytes};
use crate::device::encode::{Attention, Home};
use crate::device::gpu::Gpu;
use crate::device::layer::buffers::Uploaded;
use crate::device::layer::prepared::PreparedLayer;
use crate::kernel::slot::Slot;
use crate::layer::parameters::Parameters;
use crate::layer::plan::LayerPlan;
use crate::layer::{Call, Layer, LayerInputs, LayerOutputs, Weights};
use crate::ops::rotary::Rotation;
use crate::trace::span;

/// A [`Layer`] whose weights are on a device.
#[derive(Debug)]
pub struct MultiHeadAttention {
    home: Home,
    /// Without its weights, which are only on the device.
    layer: Layer,
    parameters: Parameters,
    /// The weight buffers.
    pub(crate) weights: Vec<(Slot, wgpu::Buffer)>,
    /// Biases, and added key and value.
    pub(crate) biases: Vec<f32>,
    /// Cosines and sines.
    pub(crate) table: Option<wgpu::Buffer>,
}

fn encoded(values: &[f32], element: Element) -> Vec<u8> {
    match element {
        Element::F32 => bytemuck::cast_slice(values).to_vec(),
        Element::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_ne_bytes()).collect(),
        Element::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect(),
    }
}

impl MultiHeadAttention {
    /// Uploads a layer's weights as `element`; biases stay f32.
    ///
    /// # Errors
    ///
    /// Those of [`Layer::check`], [`Error::Device`] if the device is below what every kernel needs, [`Error::Room`] if it cannot
    /// hold a weight matrix or cannot bind the rotary table, and [`Error::OutOfMemory`] if there is no memory for them.
    pub fn new(attention: &Attention, queue: &wgpu::Queue, layer: &Layer, element: Element) -> Result<Self> {
        pollster::block_on(Self::new_async(attention, queue, layer, element))
    }

    /// [`MultiHeadAttention::new`] without blocking the thread.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadAttention::new`].
    pub async fn new_async(
        attention: &Attention,
        queue: &wgpu::Queue,
        layer: &Layer,
        element: Element,
    ) -> Result<Self> {
        layer.check()?;
        let caps = attention.caps();
        caps.check()?;
        let parameters = Parameters::new(layer, element, caps)?;
        let (host, biases) = (parameters.weights(layer), parameters.bias_values(layer));
        let (weights, table) = allocate(attention.device(), || {
            let upload = |label, bytes: &[u8]| upload_bytes(attention.device(), queue, label, bytes);
            let weights = host
                .iter()
                .map(|(slot, values)| (*slot, upload("layer: weights", &encoded(values, element))))
                .collect();
            let table = layer.rotary.map(|r| {
                upload("layer: rotary table", bytemuck::cast_slice(&Rotation::table(r.positions, r.dim, r.base)))
            });
            (weights, table)
        })
        .await?;
        let mut layer = layer.clone();
        for linear in [&mut layer.query, &mut layer.key, &mut layer.value, &mut layer.out] {
            linear.weight = Vec::new();
        }
        Ok(MultiHeadAttention { home: attention.home().clone(), layer, parameters, weights, biases, table })
    }

    /// The attention problem inside the layer, as [`Layer::problem`].
    pub fn problem(&self, batch: u32, seq_q: u32, seq_kv: u32) -> Problem {
        self.layer.problem(batch, seq_q, seq_kv)
    }

    /// Plans a call for the device of `attention`, with its tuning. Pure: touches no device.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the call, and what is too large for the device.
    pub fn plan(&self, attention: &Attention, problem: &Problem, call: &Call, options: &Options) -> Result<LayerPlan> {
        let caps = attention.proven_caps();
        LayerPlan::tuned(&self.layer, &self.parameters, problem, call, &caps, options, attention.tuning())
    }

    /// Plans, compiles what is not cached yet, and allocates the scratch. Blocks while the driver compiles.
    ///
    /// With a cache, `problem.seq_kv` is its room, and the causal rule is that each new row sees the keys up to itself.
    ///
    /// # Errors
    ///
    /// [`Error::OtherDevice`] if the weights of the layer are on another device, and those of [`MultiHeadAttention::plan`] and of
    /// [`Attention::prepare`].
    pub fn prepare(
        &self,
        attention: &Attention,
        problem: &Problem,
        call: &Call,
        options: &Options,
    ) -> Result<PreparedLayer> {
        pollster::block_on(self.prepare_async(attention, problem, call, options))
    }

    /// [`MultiHeadAttention::prepare`] for asynchronous callers; see [`Attention::prepare_async`].
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadAttention::prepare`].
    pub async fn prepare_async(
        &self,
        attention: &Attention,
        problem: &Problem,
        call: &Call,
        options: &Options,
    ) -> Result<PreparedLayer> {
        self.check_home(attention)?;
        self.prepare_plan(attention, self.plan(attention, problem, call, options)?).await
    }

    async fn prepare_plan(&self, attention: &Attention, plan: LayerPlan) -> Result<PreparedLayer> {
        let span = span!("prepare", operation = "multi-head attention", dispatches = plan.steps().count());
        span.around(PreparedLayer::new(self, attention, plan)).await
    }

    fn check_home(&self, attention: &Attention) -> Result<()> {
        if self.home.is(attention.home()) { Ok(()) } else { Err(Error::OtherDevice { field: "layer" }) }
    }

    /// Runs the layer on host slices: upload, compute, read back.
    ///
    /// # Errors
    ///
    /// [`Error::Conflict`] if the call has a cache, which stays on the GPU. For inputs that do not fit, those of
    /// [`crate::Shape::check_inputs`]. Those of [`MultiHeadAttention::prepare`] and of [`Gpu::read`], and [`Error::OutOfMemory`]
    /// if there is no memory for the buffers.
    pub fn forward(&self, gpu: &Gpu, problem: &Problem, call: &Call, inputs: &LayerInputs<'_>) -> Result<LayerOutputs> {
        self.forward_with(gpu, problem, call, inputs, &Options::default())
    }

    /// [`MultiHeadAttention::forward`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadAttention::forward`].
    pub async fn forward_async(
        &self,
        gpu: &Gpu,
        problem: &Problem,
        call: &Call,
        inputs: &LayerInputs<'_>,
    ) -> Result<LayerOutputs> {
        self.forward_with_async(gpu, problem, call, inputs, &Options::default()).await
    }

    /// The same with planning [`Options`].
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadAttention::forward`].
    pub fn forward_with(
        &self,
        gpu: &Gpu,
        problem: &Problem,
        call: &Call,
        inputs: &LayerInputs<'_>,
        options: &Options,
    ) -> Result<LayerOutputs> {
        gpu.block_on(self.forward_with_async(gpu, problem, call, inputs, options))
    }

    /// [`MultiHeadAttention::forward_with`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadAttention::forward`].
    pub async fn forward_with_async(
        &self,
        gpu: &Gpu,
        problem: &Problem,
        call: &Call,
        inputs: &LayerInputs<'_>,
        options: &Options,
    ) -> Result<LayerOutputs> {
        if call.cache {
            let why = "the cache stays on the GPU: record the call into an encoder";
            return Err(Error::Conflict { left: "cache", right: "host slices", why });
        }
        self.layer.check_call_sizes(problem, call)?;
        self.layer.check_inputs(problem, call, inputs)?;
        problem.check()?.check_operands(&inputs.operands)?;
        self.check_home(gpu.library())?;
        let plan = gpu.proven(|| self.plan(gpu.library(), problem, call, options), LayerPlan::attention).await?;
        let prepared = self.prepare_plan(gpu.library(), plan).await?;
        let columns = u64::from(self.layer.weight_columns(problem.seq_kv));
        let rows = u64::from(problem.batch) * u64::from(problem.seq_q);
        let heads = call.weights.map(|which| if which == Weights::Heads { u64::from(problem.heads) } else { 1 });
        let result_len = rows * u64::from(self.layer.out.outputs);
        let weights_len = heads.map(|heads| heads * rows * columns);
        let upload =
            |label, values: &[f32]| upload_bytes(gpu.device(), gpu.queue(), label, bytemuck::cast_slice(values));
        let make = || Uploaded {
            query: upload("query", inputs.query),
            key: inputs.key.map(|key| upload("key", key)),
            value: inputs.value.map(|value| upload("value", value)),
            result: upload("result", &vec![f32::NAN; result_len as usize]),
            weights: weights_len.map(|len| upload("weights", &vec![f32::NAN; len as usize])),
            operands: inputs
                .operands
                .map(|operand, data| upload_bytes(gpu.device(), gpu.queue(), operand.name(), data.bytes())),
        };
        let uploaded = allocate(gpu.device(), make).await?;
        let buffers = uploaded.buffers();
        let recording = prepared.begin()?;
        let record = |slice, encoder: &mut _| recording.encode_slice(slice, encoder, &buffers);
        gpu.submit_slices(prepared.slices(), record, |_| ()).await?;
        Ok(LayerOutputs {
            weights: gpu.read_f32s(&uploaded.weights, weights_len.unwrap_or(0)).await?,
            out: gpu.read_widened(&uploaded.result, Element::F32, result_len).await?,
        })
    }
}
