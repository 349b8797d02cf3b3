//! Where the weights and biases of a layer are on a device, and what their buffers hold.

use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::problem::Element;
use crate::kernel::slot::Slot;
use crate::layer::{Layer, Linear};
use crate::ops::project::Order;

/// Where the weights and the bias of one linear map are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LinearLocation {
    /// The weight buffer.
    pub(crate) buffer: Slot,
    /// The first weight in that buffer, in elements.
    pub(crate) weight_offset: u64,
    /// Elements from one row of the matrix in memory to the next.
    pub(crate) weight_row: u64,
    /// The first bias in the buffer of biases, in elements.
    pub(crate) bias_offset: Option<u64>,
}

/// Where [`Layer::bias_kv`] is in the buffer of biases, in elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AddedKey {
    pub(crate) key_offset: u64,
    pub(crate) value_offset: u64,
}

/// Where all weights and biases of a layer are. Matrices share a buffer where one product can read them side by side.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parameters {
    /// Type of the weights. Biases are f32.
    pub(crate) element: Element,
    /// The maps of query, key and value.
    pub(crate) inputs: [LinearLocation; 3],
    /// The map of the output.
    pub(crate) out: LinearLocation,
    /// The added key and value, if the layer has them.
    pub(crate) added: Option<AddedKey>,
    /// Length of the buffer of biases, in elements.
    pub(crate) biases: u64,
}

fn input_maps(layer: &Layer) -> [&Linear; 3] {
    [&layer.query, &layer.key, &layer.value]
}

fn columns(maps: &[&Linear]) -> u64 {
    maps.iter().map(|map| u64::from(map.outputs)).sum()
}

/// Matrices that multiply the same rows as one, their columns side by side.
fn side_by_side(maps: &[&Linear]) -> Vec<f32> {
    match maps[0].order {
        Order::OutIn => maps.iter().flat_map(|map| map.weight.iter().copied()).collect(),
        Order::InOut => (0..maps[0].inputs as usize)
            .flat_map(|i| maps.iter().flat_map(move |map| map.weight.chunks_exact(map.outputs as usize).nth(i)))
            .flatten()
            .copied()
            .collect(),
    }
}

impl Parameters {
    /// Lays out the weights, as `element`, and the biases of a layer. Looks at its sizes, and not at the weights.
    pub(crate) fn new(layer: &Layer, element: Element, caps: &Caps) -> Result<Self> {
        let (maps, limit) = (input_maps(layer), caps.limits.max_buffer_size);
        let bytes = |maps: &[&Linear]| {
            maps.iter().map(|map| u64::from(map.inputs) * u64::from(map.outputs)).sum::<u64>() * element.bytes()
        };
        let fits_one_buffer = |&first: &usize| {
            let alike = |map: &&Linear| (map.inputs, map.order) == (maps[first].inputs, maps[first].order);
            maps[first..].iter().all(alike) && bytes(&maps[first..]) <= limit
        };
        // The matrices from this one on share a buffer; each of those before it has one of its own.
        let first_shared = (0..2).find(fits_one_buffer).unwrap_or(2);
        let mut sizes = maps[..first_shared].iter().map(|&map| bytes(&[map]));
        let too_large = sizes.find(|&size| size > limit);
        let too_large =
            too_large.or([&maps[first_shared..], &[&layer.out]].map(bytes).into_iter().find(|&n| n > limit));
        if let Some(value) = too_large {
            return Err(Error::bytes("weight matrix", value, limit));
        }
        let table = layer.rotary.map_or(0, |rotary| rotary.table_bytes());
        if table > caps.binding() {
            return Err(Error::bytes("rotary table", table, caps.binding()));
        }
        let locate = |map: &Linear, buffer: u8, columns_before: u64, columns: u64| {
            let (weight_offset, weight_row) = match map.order {
                Order::OutIn => (columns_before * u64::from(map.inputs), map.inputs.into()),
                Order::InOut => (columns_before, columns),
            };
            LinearLocation { buffer: Slot::Matrix(buffer), weight_offset, weight_row, bias_offset: None }
        };
        let inputs = [0, 1, 2].map(|n| {
            let shared = if n < first_shared { n..n + 1 } else { first_shared..3 };
            locate(maps[n], shared.start as u8, columns(&maps[shared.start..n]), columns(&maps[shared]))
        });
        let out = locate(&layer.out, 3, 0, layer.out.outputs.into());
        Ok(Parameters { element, inputs, out, added: None, biases: 0 }.with_biases(layer))
    }

    fn with_biases(mut self, layer: &Layer) -> Self {
        let maps = input_maps(layer);
        let mut end = 0;
        let mut reserve = |elements: u64| {
            end += elements;
            end - elements
        };
        // All three or none, in the order of the maps: one product of several maps reads their biases as one.
        if maps.iter().any(|map| map.bias.is_some()) {
            for (location, map) in self.inputs.iter_mut().zip(maps) {
                location.bias_offset = Some(reserve(map.outputs.into()));
            }
        }
        self.out.bias_offset = layer.out.bias.as_ref().map(|bias| reserve(bias.len() as u64));
        self.added = layer.bias_kv.as_ref().map(|(key, value)| AddedKey {
            key_offset: reserve(key.len() as u64),
            value_offset: reserve(value.len() as u64),
        });
        // A binding is at least a vector long.
        self.biases = end.max(4);
        self
    }

    /// What each weight buffer holds.
    pub(crate) fn weights(&self, layer: &Layer) -> Vec<(Slot, Vec<f32>)> {
        let located: Vec<_> = self.inputs.iter().map(|location| location.buffer).zip(input_maps(layer)).collect();
        let shared = located.chunk_by(|(left, _), (right, _)| left == right).map(|maps| {
            let (buffer, maps) = (maps[0].0, maps.iter().map(|(_, map)| *map).collect::<Vec<_>>());
            (buffer, side_by_side(&maps))
        });
        shared.chain([(self.out.buffer, layer.out.weight.clone())]).collect()
    }

    /// What the buffer of biases holds. The bias of a map that has none is zero.
    pub(crate) fn bias_values(&self, layer: &Layer) -> Vec<f32> {
        let mut values = vec![0.0; self.biases as usize];
        let mut write = |offset: u64, source: &[f32]| values[offset as usize..][..source.len()].copy_from_slice(source);
        let locations = self.inputs.iter().chain([&self.out]);
        for (location, map) in locations.zip(input_maps(layer).into_iter().chain([&layer.out])) {
            if let (Some(offset), Some(bias)) = (location.bias_offset, &map.bias) {
                write(offset, bias);
            }
        }
        if let (Some(added), Some((key, value))) = (self.added, &layer.bias_kv) {
            write(added.key_offset, key);
            write(added.value_offset, value);
        }
        values
    }
}
