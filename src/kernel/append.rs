//! Host side of `shaders/append.wgsl`: new rows go into a cache.

use std::fmt;

use minijinja::{Value, context};

use super::body::ELEMENTWISE;
use super::params::{At, Pages};
use super::shader::Shader;
use super::slot::Slot;
use super::uniform::params;

/// A variant of `append`: what one invocation copies. The bits are copied as they are, so that the element type plays no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Append {
    /// 16 bytes; rows begin and end at multiples of them.
    Vector,
    /// 4 bytes; rows begin and end at whole words.
    Word,
    /// One 16-bit element; two rows may share a word.
    Half,
}

params! {
    /// The parameters of `append`.
    Append {
        /// New rows, in units.
        x: At,
        /// The cache, in units.
        cache: At,
        /// Place of the start of batch 0.
        starts_base: u32,
        /// Place of the block table.
        table_base: u32,
        /// New rows of a head.
        rows: u32,
        /// Rows of a head that the cache has room for.
        capacity: u32,
        /// Units of a row.
        units: u32,
        /// First row of the cache that is bound.
        cache_row0: u32,
        /// End of those rows.
        cache_row_end: u32,
        /// The pages of the cache.
        pages: Pages,
        /// One bit a rule that is on.
        flags: u32,
    } reads CIRCULAR
}

impl Append {
    /// Bytes of the unit.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Append::Vector => 16,
            Append::Word => 4,
            Append::Half => 2,
        }
    }
}

impl Shader for Append {
    const NAME: &str = "append";

    fn all() -> impl Iterator<Item = Self> {
        [Append::Vector, Append::Word, Append::Half].into_iter()
    }

    fn bindings(&self) -> Vec<(Slot, bool)> {
        vec![(Slot::X, false), (Slot::Starts, false), (Slot::BlockTable, false), (Slot::Cache, true)]
    }

    fn threads(&self) -> u32 {
        ELEMENTWISE
    }

    fn context(&self) -> Value {
        let unit = if *self == Append::Vector { "vec4<u32>" } else { "u32" };
        context! { threads => self.threads(), bytes => self.bytes(), unit, half => *self == Append::Half }
    }
}

impl fmt::Display for Append {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "append[{} bytes]", self.bytes())
    }
}
