//! Operands for checks and benchmarks: the same on every machine.

use wgpu_attention::{Element, Problem};

use crate::floats::Floats;
use crate::operands::OwnedInputs;

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Debug)]
pub struct Sample(pub u64);

impl Sample {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Signed, with mean 0 and variance 1: the sum of four uniform numbers.
    fn normal(&mut self) -> f32 {
        let uniform = |bits: u64| (bits as u16) as f32 / 65536.0 - 0.5;
        let bits = self.bits();
        (0..4).map(|i| uniform(bits >> (16 * i))).sum::<f32>() * 3f32.sqrt()
    }

    pub fn floats(&mut self, count: u64, element: Element) -> Floats {
        let values: Vec<f32> = (0..count).map(|_| self.normal()).collect();
        Floats::rounded(&values, element)
    }

    /// q, k and v of a dense problem.
    pub fn operands(&mut self, problem: &Problem) -> wgpu_attention::Result<OwnedInputs> {
        let shape = problem.check()?;
        let [q, k, v] = [shape.q(), shape.k(), shape.v()].map(|tensor| self.floats(tensor.extent(), problem.element));
        Ok(OwnedInputs::new(q, k, v))
    }
}
