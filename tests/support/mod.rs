//! What the test suites share: adapters opened once, operands from a seed, and the comparison with the reference.
#![allow(dead_code, unused_imports, reason = "each suite uses its part")]

pub mod adapters;
pub mod case;
pub mod data;
pub mod operations;
pub mod oracle;
pub mod random;
pub mod staged;

pub use adapters::{Adapter, checked, floor, gpus, is_small, small};
pub use case::Case;
pub use data::{Data, Tensor};
pub use oracle::Oracle;
pub use random::Random;
