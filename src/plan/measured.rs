//! Tuning rows: which kernel with which tile was fastest on an adapter, for a class of problems. They are pure data. The planner follows
//! a row that fits before it makes a choice of its own.

use serde::{Deserialize, Serialize};

use crate::contract::options::Kernel;
use crate::contract::problem::{Causal, Element};
use crate::contract::shape::Shape;
use crate::kernel::lanes::Lanes;
use crate::kernel::{Variant, flash, matrix, rows, split};

/// The largest number of query rows per head that counts as few. It is below the rows of any workgroup's tile.
const FEW: u32 = 16;

/// How many query rows a head has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Queries {
    /// One, as in decoding, or none.
    One,
    /// 2 to 16.
    Few,
    /// More.
    Many,
}

/// A class of problems for which the same kernel and tile is expected to be fastest on one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Class {
    /// The smallest of 32, 64, 128, 256 and 512 that holds head_dim and value_dim.
    pub dims: u32,
    /// Type of q, k, v and out.
    pub element: Element,
    /// Whether the score transform is more than the scale and the key range: soft cap, ALiBi, mask, bias or
    /// key positions.
    pub operands: bool,
    /// Query rows of a head.
    pub queries: Queries,
    /// Whether there is a causal rule and many queries. The rule hides half of the keys from many queries, and almost none from few.
    pub causal: bool,
}

impl Class {
    /// The class of a problem.
    pub fn of(shape: &Shape) -> Class {
        let queries = match shape.problem.seq_q {
            0 | 1 => Queries::One,
            2..=FEW => Queries::Few,
            _ => Queries::Many,
        };
        Class {
            dims: shape.class_dims(),
            element: shape.problem.element,
            operands: shape.transforms(),
            queries,
            causal: queries == Queries::Many && shape.problem.causal != Causal::None,
        }
    }
}

/// A kernel, with its tile if it is fused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// `scores`, `softmax` and `values`, whose tiles the planner chooses.
    Unfused,
    /// `rows`.
    Rows(rows::Tile),
    /// `flash`.
    Flash(flash::Tile),
    /// `matrix`.
    Matrix(matrix::Tile),
    /// `split`.
    Split(split::Tile),
}

impl Choice {
    pub(crate) fn of(variant: &Variant) -> Choice {
        match variant {
            Variant::Rows(x) => Choice::Rows(x.tile),
            Variant::Flash(x) => Choice::Flash(x.tile),
            Variant::Matrix(x) => Choice::Matrix(x.tile),
            Variant::Split(x) => Choice::Split(x.tile),
            _ => Choice::Unfused,
        }
    }

    /// The kernel.
    pub fn kernel(&self) -> Kernel {
        match self {
            Choice::Unfused => Kernel::Unfused,
            Choice::Rows(_) => Kernel::Rows,
            Choice::Flash(_) => Kernel::Flash,
            Choice::Matrix(_) => Kernel::Matrix,
            Choice::Split(_) => Kernel::Split,
        }
    }

    /// Whether the kernel has this tile.
    pub fn exists(&self) -> bool {
        self.number().is_some()
    }

    /// The kernel with each of its tiles, in the order of its table.
    fn all(kernel: Kernel) -> Box<dyn Iterator<Item = Choice>> {
        match kernel {
            Kernel::Unfused => Box::new(std::iter::once(Choice::Unfused)),
            Kernel::Rows => Box::new(Lanes::all().flat_map(rows::tiles).map(Choice::Rows)),
            Kernel::Flash => Box::new(flash::TILES.into_iter().map(Choice::Flash)),
            Kernel::Matrix => Box::new(matrix::tiles().map(Choice::Matrix)),
            Kernel::Split => Box::new(split::tiles().map(Choice::Split)),
        }
    }

    /// The place of the tile in its kernel's table, if it is there.
    pub(crate) fn number(&self) -> Option<u32> {
        Choice::all(self.kernel()).position(|known| known == *self).map(|place| place as u32)
    }

    /// The kernel with the tile at a place of its table.
    pub(crate) fn numbered(kernel: Kernel, number: u32) -> Option<Choice> {
        Choice::all(kernel).nth(number as usize)
    }
}

/// A tuning row: what was fastest for a class.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The class of problems.
    pub class: Class,
    /// What was fastest.
    pub choice: Choice,
    /// Milliseconds that the choice took for the problem that was measured for its class.
    pub ms: f64,
}

/// Tuning rows that were measured on one adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning {
    /// Where the rows come from, such as the path of a file. The plan's reasons name it.
    pub source: String,
    /// The rows. Of several rows for one class, the planner follows the first one that can run.
    pub rows: Vec<Row>,
}

impl Tuning {
    /// The rows that no plan follows, because their kernel does not have their tile.
    pub fn unknown(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| !row.choice.exists())
    }
}
