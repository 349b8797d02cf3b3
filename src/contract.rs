//! What can be asked, of which device, and what can be wrong with it: pure data and its checks.

pub mod caps;
pub(crate) mod error;
mod limits;
mod names;
pub(crate) mod obstacle;
pub mod operands;
pub(crate) mod options;
pub mod problem;
pub(crate) mod proof;
pub mod shape;
pub(crate) mod tensor;
pub(crate) mod walk;
