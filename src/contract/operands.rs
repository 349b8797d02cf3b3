//! The operands that a problem may have beside q, k and v: one table of their names, sizes and kinds, and one list that holds
//! something for each of them.

use std::fmt;

use crate::contract::problem::{Causal, Element, Elements, from_host};
use crate::contract::shape::Shape;

/// How the GPU takes an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A tensor, which kernels bind. Its buffer needs usage `STORAGE`.
    Tensor,
    /// A small array of 4-byte numbers for each batch or head. A call copies it into one buffer with the other lists, so that kernels
    /// bind them all at once. Its buffer needs usage `COPY_SRC`.
    List,
}

/// Type of the elements of an operand.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// One byte.
    U8,
    /// Signed, 4 bytes.
    I32,
    /// Unsigned, 4 bytes.
    U32,
    /// A floating-point number.
    Float(Element),
}

impl Scalar {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Scalar::U8 => 1,
            Scalar::I32 | Scalar::U32 => 4,
            Scalar::Float(element) => element.bytes(),
        }
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scalar::U8 => f.pad("u8"),
            Scalar::I32 => f.pad("i32"),
            Scalar::U32 => f.pad("u32"),
            Scalar::Float(element) => element.fmt(f),
        }
    }
}

/// Writes [`Operands`] and [`Operand`] from a row for each operand: its field, its variant, its kind, and the type and the number of
/// the elements that a checked problem needs (`None` where the problem has no such operand).
macro_rules! operands {
    ($($(#[$doc:meta])* $field:ident: $operand:ident, $kind:ident, |$shape:ident| $need:expr;)*) => {
        /// Something for each operand of a problem beside q, k and v: a [`HostSlice`] in [`crate::Inputs`], a slice of a buffer in
        /// [`crate::Buffers`]. Operands that the problem does not use stay `None`.
        #[non_exhaustive]
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct Operands<T> {
            $($(#[$doc])* pub $field: Option<T>,)*
        }

        /// An operand of a problem beside q, k and v.
        #[non_exhaustive]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Operand {
            $($(#[$doc])* $operand,)*
        }

        impl Operand {
            /// All operands.
            pub const ALL: &[Operand] = &[$(Operand::$operand),*];

            /// The name in errors and labels, which is that of the field of [`Operands`].
            pub const fn name(self) -> &'static str {
                match self {
                    $(Operand::$operand => stringify!($field),)*
                }
            }

            /// How the GPU takes it.
            pub const fn kind(self) -> Kind {
                match self {
                    $(Operand::$operand => Kind::$kind,)*
                }
            }

            /// The type and the number of the elements that the problem needs, `None` where it has no such operand.
            pub(crate) fn need(self, shape: &Shape) -> Option<(Scalar, u64)> {
                match self {
                    $(Operand::$operand => { let $shape = shape; $need })*
                }
            }
        }

        impl<T> Operands<T> {
            /// What a function gives for each operand.
            pub fn from_fn(mut each: impl FnMut(Operand) -> Option<T>) -> Self {
                Operands { $($field: each(Operand::$operand),)* }
            }

            /// What there is for an operand.
            pub fn get(&self, operand: Operand) -> Option<&T> {
                match operand {
                    $(Operand::$operand => self.$field.as_ref(),)*
                }
            }

            /// Something else for each operand that there is.
            pub fn map<U>(self, mut each: impl FnMut(Operand, T) -> U) -> Operands<U> {
                Operands { $($field: self.$field.map(|x| each(Operand::$operand, x)),)* }
            }
        }
    };
}

operands! {
    /// Boolean mask, u8 in the shape of [`crate::Problem::mask`]: 0 hides, any other byte attends.
    mask: Mask, Tensor, |s| s.problem.mask.map(|mask| (Scalar::U8, mask.len() as u64));
    /// Additive bias in the shape and the element type of [`crate::Problem::bias`].
    bias: Bias, Tensor, |s| s.problem.bias.map(|bias| (Scalar::Float(bias.element), bias.shape.len() as u64));
    /// Key lengths, u32 `[batch]`. A length beyond `seq_kv` is an error on the host, and counts as `seq_kv` on the GPU.
    key_lengths: KeyLengths, List, |s| s.problem.key_lengths.then_some((Scalar::U32, s.problem.batch.into()));
    /// Positions of the keys, i32 `[batch, seq_kv]`; below 0 is an empty slot, which is hidden. A position above
    /// 2³⁰ − 1 counts as that.
    key_positions: KeyPositions, List, |s| {
        s.problem.key_positions.then_some((Scalar::I32, u64::from(s.problem.batch) * u64::from(s.problem.seq_kv)))
    };
    /// Offsets of [`Causal::Offset`], i32 `[batch]`.
    offsets: Offsets, List, |s| (s.problem.causal == Causal::Offset).then_some((Scalar::I32, s.problem.batch.into()));
    /// ALiBi slopes, f32 `[heads]`.
    alibi_slopes: AlibiSlopes, List, |s| s.problem.alibi.then_some((F32, s.problem.heads.into()));
    /// Boundaries of the query sequences, u32 `[batch + 1]`. None is below the one before it. On the GPU, boundaries beyond the
    /// tokens are clamped, and where a boundary falls, a token that several sequences claim holds the result of any of them, or
    /// none.
    cu_seqlens_q: CuSeqlensQ, List, |s| s.problem.packed.map(|_| (Scalar::U32, u64::from(s.problem.batch) + 1));
    /// Boundaries of the key sequences, u32 `[batch + 1]`.
    cu_seqlens_kv: CuSeqlensKv, List, |s| s.problem.packed.map(|_| (Scalar::U32, u64::from(s.problem.batch) + 1));
    /// Pages of the keys of each batch, u32 (in a buffer also i32) `[batch, ⌈seq_kv / page_size⌉]`. Entries beyond the key length may
    /// hold anything. A number outside the pool is an error on the host, and counts as that of the last page on the GPU.
    block_table: BlockTable, List, |s| s.problem.paged.map(|_| (Scalar::U32, s.block_table_len()));
    /// Attention sinks, f32 `[heads]`.
    sinks: Sinks, List, |s| s.problem.sinks.then_some((F32, s.problem.heads.into()));
}

const F32: Scalar = Scalar::Float(Element::F32);

impl Operand {
    /// The operands of a kind.
    pub fn of_kind(kind: Kind) -> impl Iterator<Item = Operand> {
        Self::ALL.iter().copied().filter(move |operand| operand.kind() == kind)
    }

    /// The number of elements, `None` where the problem has no such operand.
    pub fn len(self, shape: &Shape) -> Option<u64> {
        self.need(shape).map(|(_, len)| len)
    }

    /// The bytes of the elements, `None` where the problem has no such operand.
    pub fn bytes(self, shape: &Shape) -> Option<u64> {
        self.need(shape).map(|(scalar, len)| scalar.bytes() * len)
    }
}

impl<T> Operands<T> {
    /// References to what there is.
    pub fn as_ref(&self) -> Operands<&T> {
        Operands::from_fn(|operand| self.get(operand))
    }

    /// What there is, each with its operand.
    pub fn iter(&self) -> impl Iterator<Item = (Operand, &T)> {
        Operand::ALL.iter().filter_map(|&operand| Some((operand, self.get(operand)?)))
    }
}

impl<T> Default for Operands<T> {
    fn default() -> Self {
        Operands::from_fn(|_| None)
    }
}

/// The elements of an operand on the host, in whichever type it has. [`Shape::check_inputs`] refuses an operand of another type than
/// the problem needs.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HostSlice<'a> {
    /// Bytes.
    U8(&'a [u8]),
    /// Signed numbers.
    I32(&'a [i32]),
    /// Unsigned numbers.
    U32(&'a [u32]),
    /// Floating-point numbers.
    Float(Elements<'a>),
}

impl<'a> HostSlice<'a> {
    /// The type of the elements.
    pub fn scalar(&self) -> Scalar {
        match self {
            HostSlice::U8(_) => Scalar::U8,
            HostSlice::I32(_) => Scalar::I32,
            HostSlice::U32(_) => Scalar::U32,
            HostSlice::Float(x) => Scalar::Float(x.element()),
        }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self {
            HostSlice::U8(x) => x.len(),
            HostSlice::I32(x) => x.len(),
            HostSlice::U32(x) => x.len(),
            HostSlice::Float(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of the elements as they lie in memory.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            HostSlice::U8(x) => x,
            HostSlice::I32(x) => bytemuck::cast_slice(x),
            HostSlice::U32(x) => bytemuck::cast_slice(x),
            HostSlice::Float(x) => x.bytes(),
        }
    }
}

from_host! { HostSlice:
    u8, HostSlice::U8;
    i32, HostSlice::I32;
    u32, HostSlice::U32;
    f32, |x| HostSlice::Float(Elements::F32(x));
    half::f16, |x| HostSlice::Float(Elements::F16(x));
    half::bf16, |x| HostSlice::Float(Elements::Bf16(x));
}

impl<'a> From<Elements<'a>> for HostSlice<'a> {
    fn from(x: Elements<'a>) -> Self {
        HostSlice::Float(x)
    }
}

/// The elements of an operand whose type is checked.
macro_rules! typed {
    ($($name:ident: $t:ty, $pattern:pat => $x:ident;)*) => {
        impl<'a> HostSlice<'a> {
            $(
                pub(crate) fn $name(self) -> $t {
                    match self {
                        $pattern => $x,
                        other => panic!("an operand of {} passed its check", other.scalar()),
                    }
                }
            )*
        }
    };
}

typed! {
    u8s: &'a [u8], HostSlice::U8(x) => x;
    i32s: &'a [i32], HostSlice::I32(x) => x;
    u32s: &'a [u32], HostSlice::U32(x) => x;
    f32s: &'a [f32], HostSlice::Float(Elements::F32(x)) => x;
    floats: Elements<'a>, HostSlice::Float(x) => x;
}
