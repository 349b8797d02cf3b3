//! What the planner asks of the kernels of attention.

use super::fused::Fused;
use super::params::Attention;
use super::uniform::Uniform;
use crate::contract::shape::Shape;

/// A kernel of attention. [`super::uniform::params`] writes how it picks its parameters.
pub(crate) trait AttentionKernel: Picks {
    /// How the work on so many keys is divided into workgroups.
    fn grid(&self, shape: &Shape, keys: u64) -> Grid;

    /// Whether it works on every pair of a row and a key, also on those that the row does not see.
    fn every_pair(&self) -> bool {
        false
    }

    /// Whether its workgroups take the tiles of rows from both ends in turn.
    fn takes_both_ends(&self) -> bool {
        false
    }

    /// The kernel, if it is fused.
    fn fused(&self) -> Option<&dyn Fused> {
        None
    }
}

/// The uniform of a kernel of attention, picked from what the planner knows.
pub(crate) trait Picks {
    /// The values of those fields that the kernel reads.
    fn pick(&self, all: &Attention) -> Uniform;
}

/// Workgroups of a plane of query rows (those of a batch and a head, or of a batch and a key/value head), and their work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Query rows of a workgroup.
    pub(crate) tile_rows: u32,
    /// Workgroups that share a tile of rows.
    pub(crate) columns: u64,
    /// Floating-point operations of a query row and a key.
    pub(crate) flops: f64,
}

impl Grid {
    /// Of a kernel that takes single rows, each in workgroups of so many keys.
    pub(crate) fn rows(keys: u64, threads: u32) -> Grid {
        Grid { tile_rows: 1, columns: keys.div_ceil(threads.into()), flops: 32.0 }
    }
}
