//! A call of a layer, compiled and with its buffers, ready to be recorded into the caller's encoder.

use crate::contract::error::{Error, Result};
use crate::device::allocation::constant;
use crate::device::encode::{Attention, Buffers, Prepared, Recording, Set};
use crate::device::gpu::whole;
use crate::device::layer::buffers::LayerBuffers;
use crate::device::layer::multihead::MultiHeadAttention;
use crate::device::operation::Compiled;
use crate::dispatch::step::Step;
use crate::kernel::slot::Slot;
use crate::layer::Sources;
use crate::layer::plan::{LayerPlan, Stage};
use crate::plan::{Plan, no_more_slices};

/// A layer prepared for one [`crate::Problem`] and [`Call`](crate::multihead::Call), ready to be recorded any number of times,
/// from any number of threads.
#[derive(Debug)]
pub struct PreparedLayer {
    plan: LayerPlan,
    before: Compiled,
    /// Its scratch is that of the whole layer.
    attention: Prepared,
    after: Compiled,
    weights: Vec<(Slot, wgpu::Buffer)>,
    biases: wgpu::Buffer,
    table: Option<wgpu::Buffer>,
    /// For positions and sinks.
    zeros: wgpu::Buffer,
}

async fn compiled(attention: &Attention, operation: &str, stage: &Stage) -> Result<Compiled> {
    Compiled::new(attention, operation, &stage.steps, stage.slices.clone(), &[]).await
}

impl PreparedLayer {
    /// Compiles and allocates what a plan says.
    pub(crate) async fn new(of: &MultiHeadAttention, attention: &Attention, plan: LayerPlan) -> Result<Self> {
        let before = compiled(attention, "layer, before attention", &plan.before).await?;
        let after = compiled(attention, "layer, after attention", &plan.after).await?;
        let inner = attention.prepare_with(plan.attention(), plan.scratch()).await?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let biases = constant(attention.device(), "layer: biases", usage, bytemuck::cast_slice(&of.biases)).await?;
        let zeros = constant(attention.device(), "layer: zeros", usage, &vec![0; plan.zeros() as usize]).await?;
        let (weights, table) = (of.weights.clone(), of.table.clone());
        Ok(PreparedLayer { plan, before, attention: inner, after, weights, biases, table, zeros })
    }

    /// The plan of the whole layer.
    pub fn layer_plan(&self) -> &LayerPlan {
        &self.plan
    }

    /// The plan of the attention inside.
    pub fn plan(&self) -> &Plan {
        self.attention.plan()
    }

    /// The dispatches of the whole layer in order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.plan.steps()
    }

    /// Why the steps around attention are as they are, a sentence each; [`PreparedLayer::plan`] has those of attention.
    pub fn reasons(&self) -> &[String] {
        self.plan.reasons()
    }

    /// How many slices there are.
    pub fn slices(&self) -> usize {
        self.plan.slices()
    }

    /// Records the whole layer. Nothing is submitted, waited for or read back.
    ///
    /// # Errors
    ///
    /// Those of [`Prepared::encode`].
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &LayerBuffers<'_>) -> Result<()> {
        let set = self.attention.scratch().shared()?;
        if self.slices() == 0 {
            let slots = self.slots(buffers, &set)?;
            return self.check(&slots, &self.inner(buffers, &slots));
        }
        (0..self.slices()).try_for_each(|slice| self.record(slice, encoder, buffers, &set))
    }

    /// Begins a call that is recorded slice by slice, as [`Prepared::begin`] does.
    ///
    /// # Errors
    ///
    /// Those of [`Prepared::begin`].
    pub fn begin(&self) -> Result<Recording<'_, PreparedLayer>> {
        Ok(Recording { of: self, set: self.attention.scratch().own()? })
    }

    fn record(
        &self,
        slice: usize,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &LayerBuffers<'_>,
        set: &Set,
    ) -> Result<()> {
        no_more_slices(slice, self.slices())?;
        let slots = self.slots(buffers, set)?;
        let inner = self.inner(buffers, &slots);
        // What is wrong with a later part must not leave the first ones in the encoder.
        self.check(&slots, &inner)?;
        let (first, second) = (self.before.slices(), self.before.slices() + self.attention.slices());
        if slice < first {
            self.before.record(self.before.slice(slice)?, encoder, &slots, &[])
        } else if slice < second {
            self.attention.record(self.attention.slice(slice - first)?, encoder, &inner, set, None)
        } else {
            self.after.record(self.after.slice(slice - second)?, encoder, &slots, &[])
        }
    }

    fn check(&self, slots: &[(Slot, wgpu::BufferSlice<'_>)], inner: &Buffers<'_>) -> Result<()> {
        self.before.check(slots)?;
        self.attention.check(inner)?;
        self.after.check(slots)
    }

    /// What the operations around attention bind.
    fn slots<'a>(&'a self, buffers: &LayerBuffers<'a>, set: &'a Set) -> Result<Vec<(Slot, wgpu::BufferSlice<'a>)>> {
        let given = [
            ("key", buffers.key.is_some(), self.plan.call().sources != Sources::Query),
            ("value", buffers.value.is_some(), self.plan.call().sources == Sources::Each),
            ("weights", buffers.weights.is_some(), self.plan.call().weights.is_some()),
            ("cache", buffers.cache.is_some(), self.plan.call().cache),
        ];
        for (field, given, wanted) in given {
            match (given, wanted) {
                (true, false) => return Err(Error::Unexpected { field }),
                (false, true) => return Err(Error::Missing { field }),
                _ => {}
            }
        }
        let cache = buffers.cache.as_ref();
        let read = self.plan().shape().problem.batch > 0;
        if read && cache.is_some_and(|cache| !cache.starts.buffer().usage().contains(wgpu::BufferUsages::COPY_SRC)) {
            return Err(Error::BufferUsage { field: "starts", usage: "COPY_SRC" });
        }
        let listed = [
            (Slot::Query, Some(buffers.query)),
            (Slot::Key, buffers.key),
            (Slot::Value, buffers.value),
            (Slot::Result, Some(buffers.result)),
            (Slot::Averaged, buffers.weights),
            (Slot::Biases, Some(self.biases.slice(..))),
            (Slot::KeyCache, cache.map(|cache| cache.k)),
            (Slot::ValueCache, cache.map(|cache| cache.v)),
            (Slot::Starts, cache.map(|cache| cache.starts)),
            (Slot::Angles, whole(&self.table)),
            (Slot::Positions, Some(cache.map_or(self.zeros.slice(..), |cache| cache.starts))),
        ];
        let own = self.weights.iter().chain(set).map(|(slot, buffer)| (*slot, buffer.slice(..)));
        Ok(listed.into_iter().filter_map(|(slot, slice)| Some((slot, slice?))).chain(own).collect())
    }

    /// What attention binds, among the slots.
    fn inner<'a>(&'a self, buffers: &LayerBuffers<'a>, slots: &[(Slot, wgpu::BufferSlice<'a>)]) -> Buffers<'a> {
        let find = |tensor: Slot| {
            let wanted = self.plan.attention_buffer(tensor);
            slots.iter().find(|(slot, _)| *slot == wanted).map(|(_, slice)| *slice)
        };
        let [q, k, v, out] = [Slot::Q, Slot::K, Slot::V, Slot::Out]
            .map(|tensor| find(tensor).expect("every layer projects query, key and value, and merges heads"));
        let mut inner = Buffers::new(q, k, v, out);
        inner.lse = find(Slot::Lse);
        inner.weights = find(Slot::Weights);
        inner.operands = buffers.operands;
        if self.plan.zero_sinks() {
            inner.operands.sinks = Some(self.zeros.slice(..));
        }
        if let Some(cache) = &buffers.cache {
            inner.operands.offsets = Some(cache.starts);
        }
        inner
    }
}

impl Recording<'_, PreparedLayer> {
    /// Records one slice. Slices run in order, each at most about [`crate::Options::work_budget`] long; submit after each.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] if there is no such slice, and those of [`PreparedLayer::encode`] for the buffers.
    pub fn encode_slice(
        &self,
        slice: usize,
        encoder: &mut wgpu::CommandEncoder,
        buffers: &LayerBuffers<'_>,
    ) -> Result<()> {
        self.of.record(slice, encoder, buffers, &self.set)?;
        self.hold(encoder);
        Ok(())
    }
}
