//! Where the elements of q, k, v and out are.

use crate::contract::error::{Error, Result};
use crate::contract::problem::{Layout, Strides};

/// Sizes and strides of one [batch, heads, rows, dim] tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    /// Batch, heads and rows. A packed tensor has batch 1 and all tokens as rows.
    pub sizes: [u32; 3],
    /// Last axis.
    pub dim: u32,
    /// Offset of the first element, and the distances between elements.
    pub strides: Strides,
}

impl Tensor {
    fn new(sizes: [u32; 3], dim: u32, layout: Layout) -> Self {
        let [_, heads, rows] = sizes.map(u64::from);
        let d = u64::from(dim);
        let strides = match layout {
            Layout::Bhsd => Strides { offset: 0, batch: heads * rows * d, head: rows * d, row: d },
            Layout::Bshd => Strides { offset: 0, batch: heads * rows * d, head: d, row: heads * d },
            Layout::Strided(strides) => strides,
        };
        Tensor { sizes, dim, strides }
    }

    /// Elements from the start of the buffer to the last one, or `None` beyond u64.
    fn checked_extent(&self) -> Option<u64> {
        if self.is_empty() {
            return Some(0);
        }
        let steps = [self.strides.batch, self.strides.head, self.strides.row];
        let mut end = self.strides.offset.checked_add(u64::from(self.dim))?;
        for (size, stride) in self.sizes.iter().zip(steps) {
            end = end.checked_add(u64::from(size - 1).checked_mul(stride)?)?;
        }
        Some(end)
    }

    /// An output tensor, checked: every element can be addressed, and no two elements share an address.
    pub(crate) fn output(field: &'static str, sizes: [u32; 3], dim: u32, layout: Layout) -> Result<Self> {
        let tensor = Tensor::input(field, sizes, dim, layout)?;
        if !tensor.disjoint() {
            let (s, [b, h, r]) = (tensor.strides, sizes);
            return Err(Error::Overlap { field, strides: [s.batch, s.head, s.row], sizes: [b, h, r, dim] });
        }
        Ok(tensor)
    }

    /// An input tensor, checked: every element can be addressed.
    pub(crate) fn input(field: &'static str, sizes: [u32; 3], dim: u32, layout: Layout) -> Result<Self> {
        let tensor = Tensor::new(sizes, dim, layout);
        // Byte counts stay far below the maximum of u64, so that the planner can add them without checks.
        let limit = u64::MAX / 64;
        match tensor.checked_extent() {
            Some(extent) if extent <= limit => Ok(tensor),
            extent => Err(Error::elements(field, extent.unwrap_or(u64::MAX), limit)),
        }
    }

    /// Whether the tensor has no element. Nothing is then read or written, whatever the strides are.
    pub fn is_empty(&self) -> bool {
        self.sizes.contains(&0)
    }

    /// Elements from the start of the buffer slice up to and including the tensor's last one; 0 for an empty tensor.
    pub fn extent(&self) -> u64 {
        self.checked_extent().expect("checked by Shape::new")
    }

    /// Offset of element (batch, head, row, 0) from the start of the buffer slice, in elements.
    pub fn at(&self, batch: u32, head: u32, row: u32) -> u64 {
        let s = &self.strides;
        s.offset + u64::from(batch) * s.batch + u64::from(head) * s.head + u64::from(row) * s.row
    }

    /// Whether no two elements share an address: each stride is at least the span of all smaller ones.
    fn disjoint(&self) -> bool {
        if self.is_empty() {
            return true;
        }
        let s = &self.strides;
        let mut axes: Vec<(u64, u64)> = [s.batch, s.head, s.row]
            .into_iter()
            .zip(self.sizes)
            .filter(|&(_, n)| n > 1)
            .map(|(stride, n)| (stride, u64::from(n)))
            .collect();
        axes.sort_unstable();
        let mut span = u64::from(self.dim);
        for (stride, n) in axes {
            if stride < span {
                return false;
            }
            span += (n - 1) * stride;
        }
        true
    }

    /// Whether the elements fill their extent without a gap, in any order of the axes.
    pub fn is_dense(&self) -> bool {
        let elements = self.sizes.iter().map(|&n| u64::from(n)).product::<u64>() * u64::from(self.dim);
        elements == 0 || (self.strides.offset == 0 && self.extent() == elements)
    }
}
