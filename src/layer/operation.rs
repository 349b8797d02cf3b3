//! The operations around attention in a layer.

use std::fmt;

use crate::contract::error::Result;
use crate::contract::shape::Shape;
use crate::dispatch::steps::Steps;
use crate::layer::parameters::AddedKey;
use crate::ops::append::{self, Append};
use crate::ops::average::Average;
use crate::ops::extra::Extra;
use crate::ops::project::{Projection, Wiring};
use crate::ops::rotary::{self, Rotation};

/// An operation around attention, with the buffers that it binds.
#[derive(Clone, Debug)]
pub(crate) enum LayerOperation {
    /// Linear maps of one input, with the rotary embedding of their first columns where the kernel can do that.
    Project(Projection, Wiring),
    /// Rotary embedding in a pass of its own, in place.
    Rotate(Rotation, rotary::Slots),
    /// New keys or values go into the cache.
    Append(Append, append::Slots),
    /// The layer's added key joins the result of attention.
    JoinAddedKey {
        /// Where it is.
        added: AddedKey,
        /// Length of the buffer of biases, in elements.
        biases: u64,
    },
    /// The weights of the heads become the weights that leave the layer.
    GiveWeights {
        /// Columns of the weights that leave the layer.
        columns: u32,
        /// Whether they are the mean over the heads.
        mean: bool,
        /// Whether one column is that of the added key.
        added: bool,
    },
}

impl LayerOperation {
    /// Adds the dispatches to the steps; `attention` is the problem inside the layer.
    pub(crate) fn dispatches(&self, attention: &Shape, steps: &mut Steps<'_>) -> Result<()> {
        match *self {
            LayerOperation::Project(ref projection, wiring) => projection.dispatches(wiring, steps),
            LayerOperation::Rotate(ref rotation, slots) => rotation.dispatches(slots, steps),
            LayerOperation::Append(ref append, slots) => append.dispatches(slots, steps),
            LayerOperation::JoinAddedKey { added, biases } => {
                Extra { attention, key: added.key_offset, value: added.value_offset, biases }.dispatches(steps)
            }
            LayerOperation::GiveWeights { columns, mean, added } => {
                Average { attention, columns, mean, extra: added }.dispatches(steps)
            }
        }
    }
}

impl fmt::Display for LayerOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayerOperation::Project(p, wiring) => {
                let (x, y) = (wiring.x.name(), wiring.y.name());
                let rotated = if wiring.rotated.is_some() { ", with rotary embedding" } else { "" };
                write!(f, "projection of {x} to {y}: {}×{}×{} to {} columns", p.batch, p.rows, p.inputs, p.outputs)?;
                write!(f, "{rotated}")
            }
            LayerOperation::Rotate(_, slots) => write!(f, "rotary embedding in {}", slots.x.name()),
            LayerOperation::Append(_, slots) => {
                write!(f, "new rows of {} to the {}", slots.x.name(), slots.cache.name())
            }
            LayerOperation::JoinAddedKey { .. } => write!(f, "the added key joins the result of attention"),
            LayerOperation::GiveWeights { mean: true, .. } => write!(f, "mean of the weights of all heads"),
            LayerOperation::GiveWeights { mean: false, .. } => {
                write!(f, "weights of each head with those of added keys")
            }
        }
    }
}
