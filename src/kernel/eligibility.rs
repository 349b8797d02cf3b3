//! What several kernels ask of a problem and a device before they can run.

use super::body::Tile;
use super::shader::Shader;
use crate::contract::caps::Caps;
use crate::contract::error::{Error, Result};
use crate::contract::obstacle::Obstacle;
use crate::contract::shape::Shape;
use crate::contract::tensor::Tensor;

/// Whether a workgroup of a kernel fits the device.
pub(crate) fn fits(caps: &Caps, kernel: &impl Shader) -> bool {
    let l = &caps.limits;
    let threads = kernel.threads();
    kernel.workgroup_bytes() <= l.max_compute_workgroup_storage_size
        && threads <= l.max_compute_invocations_per_workgroup
        && threads <= l.max_compute_workgroup_size_x
}

/// The largest tile with which the kernel fits the device, if the tile is not mostly empty for so few rows.
pub(crate) fn largest<K: Shader>(tiles: &[Tile], rows: u32, caps: &Caps, kernel: impl Fn(Tile) -> K) -> Result<Tile> {
    let smallest = tiles.last().expect("the table has rows").tile_rows;
    let found = tiles
        .iter()
        .find(|&&tile| fits(caps, &kernel(tile)) && (rows > tile.tile_rows / 2 || tile.tile_rows == smallest));
    found.copied().ok_or(Error::Kernel { kernel: K::NAME, why: Obstacle::NoTile })
}

/// What keeps a kernel that binds so many storage buffers from running.
pub(crate) fn too_many_bindings(caps: &Caps, needed: u32) -> Option<Obstacle> {
    let l = &caps.limits;
    let limit = l.max_storage_buffers_per_shader_stage.min(l.max_bindings_per_bind_group.saturating_sub(1));
    (limit < needed).then_some(Obstacle::Bindings { needed, limit })
}

/// Query rows that share a key/value head.
pub(crate) fn group_rows(shape: &Shape) -> u64 {
    u64::from(shape.problem.seq_q) * u64::from(shape.group)
}

/// Whether every row starts at a multiple of four elements and has a multiple of four of them.
pub(crate) fn whole_vectors(tensor: &Tensor) -> bool {
    let s = &tensor.strides;
    let steps = [s.batch, s.head, s.row];
    let aligned = steps.iter().zip(tensor.sizes).all(|(stride, size)| size == 1 || stride % 4 == 0);
    tensor.dim.is_multiple_of(4) && s.offset.is_multiple_of(4) && aligned
}

/// Keys of one dispatch: all (1 where there are none), unless the keys or values of a single head exceed a binding.
pub(crate) fn key_step(shape: &Shape, caps: &Caps) -> Result<u32> {
    let keys = shape.problem.seq_kv.max(1);
    if shape.problem.packed.is_some() {
        return Ok(keys);
    }
    let bytes = shape.problem.element.bytes();
    let room = caps.binding() - caps.alignment();
    if shape.problem.paged.is_some() {
        // Any page may hold keys of any sequence, so that all of them are bound, of one head at least.
        let pool = |tensor: &Tensor| {
            if tensor.is_empty() {
                return 0;
            }
            let [pages, _, rows] = tensor.sizes;
            (tensor.at(pages - 1, 0, rows - 1) + u64::from(tensor.dim) - tensor.strides.offset) * bytes
        };
        let pools = [("k", pool(&shape.k)), ("v", pool(&shape.v))];
        return match pools.into_iter().find(|&(_, value)| value > room) {
            Some((field, size)) => {
                let advice = "use a pool of fewer pages, or one pool for each part of the key/value heads";
                Err(Error::Room { field, size, unit: "bytes", limit: room, advice })
            }
            None => Ok(keys),
        };
    }
    let mut step = u64::from(keys);
    for (field, tensor) in [("k", &shape.k), ("v", &shape.v)] {
        let dim = u64::from(tensor.dim);
        let keys = match (room / bytes).checked_sub(dim) {
            None => 0,
            Some(rest) => rest / tensor.strides.row.max(1) + 1,
        };
        if keys < u64::from(shape.problem.seq_kv) {
            // Whole vectors of weights.
            let whole = keys / 4 * 4;
            if whole == 0 {
                let value = (tensor.strides.row * 3 + dim) * bytes;
                return Err(Error::bytes(field, value, room));
            }
            step = step.min(whole);
        }
    }
    Ok(step as u32)
}
