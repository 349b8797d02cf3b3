//! The operations beside attention on host slices: upload, compute, read back.

use crate::contract::error::{Error, Result};
use crate::contract::options::Options;
use crate::contract::problem::{Element, Elements, Outputs};
use crate::device::allocation::{allocate, upload_bytes};
use crate::device::gpu::Gpu;
use crate::device::gpu::resident::unwritten;
use crate::device::operation::{
    AdvanceBuffers, AppendBuffers, Description, MergeBuffers, Operation, ProjectionBuffers, RotationBuffers,
};
use crate::ops::advance::Advance;
use crate::ops::append::Append;
use crate::ops::merge::Merge;
use crate::ops::project::Projection;
use crate::ops::rotary::Rotation;

impl Gpu {
    /// Buffers that begin with the given bytes.
    async fn stage<const N: usize>(&self, operands: [(&'static str, &[u8]); N]) -> Result<[wgpu::Buffer; N]> {
        self.fault()?;
        allocate(&self.device, || operands.map(|(field, bytes)| upload_bytes(&self.device, &self.queue, field, bytes)))
            .await
    }

    /// Runs an operation slice by slice, and waits for each.
    async fn perform<D: Description>(&self, operation: &Operation<D>, buffers: &D::Buffers<'_>) -> Result<()> {
        let call = operation.begin()?;
        let record = |slice, encoder: &mut _| call.encode_slice(slice, encoder, buffers);
        self.submit_slices(operation.slices(), record, |_| ()).await
    }

    /// Appends on host slices, and gives the whole cache widened to f32.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the description or a slice, a start or a page number outside the cache, and errors of the device.
    pub fn append(
        &self,
        append: &Append,
        x: Elements<'_>,
        cache: Elements<'_>,
        starts: &[u32],
        block_table: Option<&[u32]>,
    ) -> Result<Vec<f32>> {
        self.block_on(self.append_async(append, x, cache, starts, block_table))
    }

    /// [`Gpu::append`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::append`].
    pub async fn append_async(
        &self,
        append: &Append,
        x: Elements<'_>,
        cache: Elements<'_>,
        starts: &[u32],
        block_table: Option<&[u32]>,
    ) -> Result<Vec<f32>> {
        append.check_lengths(x.len(), cache.len(), starts.len(), block_table)?;
        for (field, elements) in [("x", x), ("cache", cache)] {
            check_element(field, elements, append.element)?;
        }
        append.check_places(starts, block_table)?;
        let operation = self.library.append_async(append, &Options::default()).await?;
        let [new, to, first, table] = self
            .stage([
                ("x", x.bytes()),
                ("cache", cache.bytes()),
                ("starts", bytemuck::cast_slice(starts)),
                ("block_table", bytemuck::cast_slice(block_table.unwrap_or(&[]))),
            ])
            .await?;
        let mut buffers = AppendBuffers::new(new.slice(..), to.slice(..), first.slice(..));
        buffers.block_table = Some(table.slice(..));
        self.perform(&operation, &buffers).await?;
        self.read_widened(&to, append.element, cache.len() as u64).await
    }

    /// Advances lengths on host slices, and gives the new ones.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the description or a slice, a length beyond the limit, and errors of the device.
    pub fn advance(&self, advance: &Advance, lengths: &[u32], by: Option<&[u32]>) -> Result<Vec<u32>> {
        self.block_on(self.advance_async(advance, lengths, by))
    }

    /// [`Gpu::advance`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::advance`].
    pub async fn advance_async(&self, advance: &Advance, lengths: &[u32], by: Option<&[u32]>) -> Result<Vec<u32>> {
        advance.check_lengths(lengths.len(), by.map(<[u32]>::len))?;
        advance.check_limit(lengths)?;
        let operation = self.library.advance_async(advance, &Options::default()).await?;
        let [grown, each] = self
            .stage([("lengths", bytemuck::cast_slice(lengths)), ("by", bytemuck::cast_slice(by.unwrap_or(&[])))])
            .await?;
        let mut buffers = AdvanceBuffers::new(grown.slice(..));
        buffers.by = Some(each.slice(..));
        self.perform(&operation, &buffers).await?;
        let mut read = bytemuck::pod_collect_to_vec(&self.read_async(grown.slice(..)).await?);
        read.truncate(lengths.len());
        Ok(read)
    }

    /// Merges partial results on host slices, dense as [`Merge`] says.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the description or a slice, and errors of the device.
    pub fn merge(
        &self,
        merge: &Merge,
        partial_out: &[f32],
        partial_lse: &[f32],
        sinks: Option<&[f32]>,
    ) -> Result<Outputs> {
        self.block_on(self.merge_async(merge, partial_out, partial_lse, sinks))
    }

    /// [`Gpu::merge`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::merge`].
    pub async fn merge_async(
        &self,
        merge: &Merge,
        partial_out: &[f32],
        partial_lse: &[f32],
        sinks: Option<&[f32]>,
    ) -> Result<Outputs> {
        merge.check_lengths(partial_out.len(), partial_lse.len(), sinks.map(<[f32]>::len))?;
        let (tensor, rows) = (merge.checked()?, merge.total_rows());
        let operation = self.library.merge_async(merge, &Options::default()).await?;
        let [partial_out, partial_lse, sinks, out, lse] = self
            .stage([
                ("partial_out", bytemuck::cast_slice(partial_out)),
                ("partial_lse", bytemuck::cast_slice(partial_lse)),
                ("sinks", bytemuck::cast_slice(sinks.unwrap_or(&[]))),
                ("out", &unwritten(&tensor, merge.element)),
                ("lse", bytemuck::cast_slice(&vec![f32::NAN; rows as usize])),
            ])
            .await?;
        let mut buffers = MergeBuffers::new(partial_out.slice(..), partial_lse.slice(..), out.slice(..));
        (buffers.sinks, buffers.lse) = (Some(sinks.slice(..)), Some(lse.slice(..)));
        self.perform(&operation, &buffers).await?;
        let out = self.read_widened(&out, merge.element, tensor.extent()).await?;
        let lse = if merge.lse { Some(self.read_widened(&lse, Element::F32, rows).await?) } else { None };
        Ok(Outputs { out, lse, ..Outputs::default() })
    }

    /// Projects rows on host slices. Of y, what lies between its elements is NaN.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the description or a slice, and errors of the device.
    pub fn project(
        &self,
        projection: &Projection,
        x: &[f32],
        weight: Elements<'_>,
        biases: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        self.block_on(self.project_async(projection, x, weight, biases))
    }

    /// [`Gpu::project`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::project`].
    pub async fn project_async(
        &self,
        projection: &Projection,
        x: &[f32],
        weight: Elements<'_>,
        biases: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        projection.check_lengths(x.len(), weight.len(), biases.map(<[f32]>::len))?;
        check_element("weight", weight, projection.element)?;
        let operation = self.library.project_async(projection, &Options::default()).await?;
        let [_, _, _, len] = projection.extents();
        let [x, weight, biases, y] = self
            .stage([
                ("x", bytemuck::cast_slice(x)),
                ("weight", weight.bytes()),
                ("biases", bytemuck::cast_slice(biases.unwrap_or(&[]))),
                ("y", bytemuck::cast_slice(&vec![f32::NAN; len as usize])),
            ])
            .await?;
        let mut buffers = ProjectionBuffers::new(x.slice(..), weight.slice(..), y.slice(..));
        buffers.biases = Some(biases.slice(..));
        self.perform(&operation, &buffers).await?;
        self.read_widened(&y, Element::F32, len).await
    }

    /// Rotates rows on host slices in place, and gives them widened to f32; `rotation.y` must be `None`.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the description or a slice, and errors of the device.
    pub fn rotate(&self, rotation: &Rotation, x: Elements<'_>, table: &[f32], positions: &[u32]) -> Result<Vec<f32>> {
        self.block_on(self.rotate_async(rotation, x, table, positions))
    }

    /// [`Gpu::rotate`] without blocking the thread, under any executor; see [`Gpu`].
    ///
    /// # Errors
    ///
    /// Those of [`Gpu::rotate`].
    pub async fn rotate_async(
        &self,
        rotation: &Rotation,
        x: Elements<'_>,
        table: &[f32],
        positions: &[u32],
    ) -> Result<Vec<f32>> {
        rotation.check()?;
        if rotation.y.is_some() {
            let why = "host slices are rotated in place";
            return Err(Error::Conflict { left: "y", right: "host slices", why });
        }
        check_element("x", x, rotation.element)?;
        rotation.check_lengths(x.len(), table.len(), positions.len())?;
        let operation = self.library.rotate_async(rotation, &Options::default()).await?;
        let [rows, table, positions] = self
            .stage([
                ("x", x.bytes()),
                ("table", bytemuck::cast_slice(table)),
                ("positions", bytemuck::cast_slice(positions)),
            ])
            .await?;
        self.perform(&operation, &RotationBuffers::new(rows.slice(..), table.slice(..), positions.slice(..))).await?;
        self.read_widened(&rows, rotation.element, x.len() as u64).await
    }
}

fn check_element(field: &'static str, elements: Elements<'_>, want: Element) -> Result<()> {
    let got = elements.element();
    if got == want { Ok(()) } else { Err(Error::Element { field, got, want }) }
}
