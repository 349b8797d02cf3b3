//! The subcommands, one file each.

pub mod adapters;
pub mod bench;
pub mod cases;
pub mod check;
pub mod heatmap;
pub mod plan;
pub mod run;
pub mod tune;
