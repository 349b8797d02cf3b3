//! How the work of a kernel is divided into workgroups.

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
