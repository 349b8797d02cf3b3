//! What a call reads and gives on the host.

use super::Element;
use crate::contract::operands::{HostSlice, Operands};

/// Host data of a tensor.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Elements<'a> {
    /// f32 values.
    F32(&'a [f32]),
    /// f16 values.
    F16(&'a [half::f16]),
    /// bfloat16 values.
    Bf16(&'a [half::bf16]),
}

impl<'a> Elements<'a> {
    /// The element type.
    pub fn element(&self) -> Element {
        match self {
            Elements::F32(_) => Element::F32,
            Elements::F16(_) => Element::F16,
            Elements::Bf16(_) => Element::Bf16,
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(x) => x.len(),
            Elements::F16(x) => x.len(),
            Elements::Bf16(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i`, exactly, as f64.
    pub fn get(&self, i: usize) -> f64 {
        match self {
            Elements::F32(x) => x[i] as f64,
            Elements::F16(x) => x[i].to_f64(),
            Elements::Bf16(x) => x[i].to_f64(),
        }
    }

    /// The elements as bytes, as they are in memory.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Elements::F32(x) => bytemuck::cast_slice(x),
            Elements::F16(x) => bytemuck::cast_slice(x),
            Elements::Bf16(x) => bytemuck::cast_slice(x),
        }
    }
}

/// Conversions to `$to` from slices, vectors and arrays of a type.
macro_rules! from_host {
    ($to:ident: $($t:ty, $wrap:expr;)*) => {
        $(
            impl<'a> From<&'a [$t]> for $to<'a> {
                fn from(x: &'a [$t]) -> Self {
                    $wrap(x)
                }
            }

            impl<'a> From<&'a Vec<$t>> for $to<'a> {
                fn from(x: &'a Vec<$t>) -> Self {
                    $wrap(x)
                }
            }

            impl<'a, const N: usize> From<&'a [$t; N]> for $to<'a> {
                fn from(x: &'a [$t; N]) -> Self {
                    $wrap(x)
                }
            }
        )*
    };
}

pub(crate) use from_host;

from_host! { Elements:
    f32, Elements::F32;
    half::f16, Elements::F16;
    half::bf16, Elements::Bf16;
}

impl Default for Elements<'_> {
    fn default() -> Self {
        Elements::F32(&[])
    }
}

/// Operands of a problem on the host. An operand that the problem does not use must be `None`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Inputs<'a> {
    /// Queries, in the problem's layout.
    pub q: Elements<'a>,
    /// Keys.
    pub k: Elements<'a>,
    /// Values.
    pub v: Elements<'a>,
    /// Mask, bias and the small arrays.
    pub operands: Operands<HostSlice<'a>>,
}

impl<'a> Inputs<'a> {
    /// Queries, keys and values, from anything that [`Elements`] can be made of: slices, vectors and arrays of f32, f16 or bf16.
    pub fn new(q: impl Into<Elements<'a>>, k: impl Into<Elements<'a>>, v: impl Into<Elements<'a>>) -> Self {
        Inputs { q: q.into(), k: k.into(), v: v.into(), operands: Operands::default() }
    }
}

/// Results on the host, widened to `T` (f32, or f64 from the reference). An output that the problem does not ask for is `None`.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs<T = f32> {
    /// The output tensor in the problem's layout. With strides, the elements between rows are 0.
    pub out: Vec<T>,
    /// Log-sum-exp per row, natural log.
    pub lse: Option<Vec<T>>,
    /// Softmax weights.
    pub weights: Option<Vec<T>>,
    /// Logits.
    pub logits: Option<Vec<T>>,
}

impl<T> Outputs<T> {
    /// An output tensor alone.
    pub fn new(out: Vec<T>) -> Self {
        Outputs { out, lse: None, weights: None, logits: None }
    }
}
