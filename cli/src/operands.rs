//! Owned inputs of one problem; [`OwnedInputs::inputs`] lends them to the library.

use wgpu_attention::{Bias, Broadcast, HostSlice, Inputs, Operands, Problem, with};

use crate::floats::Floats;

/// The elements of an operand, in whichever type it has.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I32(Vec<i32>),
    U32(Vec<u32>),
    Float(Floats),
}

impl Array {
    fn slice(&self) -> HostSlice<'_> {
        match self {
            Array::U8(x) => x.into(),
            Array::I32(x) => x.into(),
            Array::U32(x) => x.into(),
            Array::Float(x) => x.elements().into(),
        }
    }
}

/// What [`Inputs`] borrows.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnedInputs {
    pub q: Floats,
    pub k: Floats,
    pub v: Floats,
    pub operands: Operands<Array>,
}

impl OwnedInputs {
    pub fn new(q: Floats, k: Floats, v: Floats) -> Self {
        OwnedInputs { q, k, v, operands: Operands::default() }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        with!(Inputs::new(self.q.elements(), self.k.elements(), self.v.elements()), operands: slices(&self.operands))
    }
}

/// What the library borrows of operands.
pub fn slices(operands: &Operands<Array>) -> Operands<HostSlice<'_>> {
    operands.as_ref().map(|_, array| array.slice())
}

pub fn set_mask(problem: &mut Problem, operands: &mut Operands<Array>, shape: Broadcast, mask: Vec<u8>) {
    problem.mask = Some(shape);
    operands.mask = Some(Array::U8(mask));
}

pub fn set_bias(problem: &mut Problem, operands: &mut Operands<Array>, shape: Broadcast, bias: Floats) {
    problem.bias = Some(Bias { shape, element: bias.element() });
    operands.bias = Some(Array::Float(bias));
}

pub fn set_key_lengths(problem: &mut Problem, operands: &mut Operands<Array>, lengths: Vec<u32>) {
    problem.key_lengths = true;
    operands.key_lengths = Some(Array::U32(lengths));
}
