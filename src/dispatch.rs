//! Parts of the work that fit a device, and the dispatches that run them: what attention and the operations share.

pub mod label;
pub(crate) mod part;
pub(crate) mod step;
pub(crate) mod steps;
