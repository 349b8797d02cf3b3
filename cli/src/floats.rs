//! Owned floating-point data in one of the three element types.

use half::{bf16, f16};
use wgpu_attention::{Element, Elements};

/// A tensor's elements on the host.
#[derive(Clone, Debug, PartialEq)]
pub enum Floats {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Floats {
    /// `values`, rounded to `element`.
    pub fn rounded(values: &[f32], element: Element) -> Self {
        match element {
            Element::F32 => Floats::F32(values.to_vec()),
            Element::F16 => Floats::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            Element::Bf16 => Floats::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        }
    }

    pub fn elements(&self) -> Elements<'_> {
        match self {
            Floats::F32(x) => Elements::F32(x),
            Floats::F16(x) => Elements::F16(x),
            Floats::Bf16(x) => Elements::Bf16(x),
        }
    }

    pub fn element(&self) -> Element {
        self.elements().element()
    }

    /// Widened to f32, which is exact.
    pub fn widened(&self) -> Vec<f32> {
        match self {
            Floats::F32(x) => x.clone(),
            Floats::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Floats::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// `x` rounded to `element` and widened again.
pub fn round(x: f32, element: Element) -> f32 {
    match element {
        Element::F32 => x,
        Element::F16 => f16::from_f32(x).to_f32(),
        Element::Bf16 => bf16::from_f32(x).to_f32(),
        _ => unreachable!("this code knows f32, f16 and bf16"),
    }
}
