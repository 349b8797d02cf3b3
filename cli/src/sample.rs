//! Operands for checks and benchmarks: the same on every machine.

use wgpu_attention::{Element, Operand, Operands, with};

use crate::floats::Floats;
use crate::operands::{Array, OwnedInputs};
use crate::problem::{Given, boundaries, steps};

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

    /// Operands of any problem. Where the values are not given, masks and biases are random, lengths are in equal steps up to the
    /// longest, keys with positions are those of a circular cache, and pages are in random order.
    pub fn operands(&mut self, given: &Given) -> wgpu_attention::Result<OwnedInputs> {
        let Given { problem, values } = given;
        let shape = problem.check()?;
        let [q, k, v] = [shape.q(), shape.k(), shape.v()].map(|tensor| self.floats(tensor.extent(), problem.element));
        let batch = problem.batch;
        let operands = Operands::from_fn(|operand| {
            let len = operand.len(&shape)?;
            Some(match operand {
                Operand::Mask => Array::U8(values.mask.clone().unwrap_or_else(|| self.mask(len, values.density))),
                Operand::Bias => {
                    let element = problem.bias.map_or(Element::F32, |bias| bias.element);
                    Array::Float(values.bias.clone().unwrap_or_else(|| self.floats(len, element)))
                }
                Operand::KeyLengths => {
                    Array::U32(values.key_lengths.clone().unwrap_or_else(|| steps(batch, problem.seq_kv)))
                }
                Operand::KeyPositions => {
                    // The oldest key stands after the first third of the slots.
                    let keys = i64::from(problem.seq_kv);
                    Array::I32((0..len as i64).map(|n| ((n % keys + keys - keys / 3) % keys) as i32).collect())
                }
                Operand::Offsets => {
                    let last_to_last = problem.seq_kv as i32 - problem.seq_q as i32;
                    Array::I32(vec![values.offset.unwrap_or(last_to_last); batch as usize])
                }
                // Press et al. 2022, "Train Short, Test Long", section 3.
                Operand::AlibiSlopes => {
                    let slope = |head: u64| (-8.0 * (head + 1) as f32 / len as f32).exp2();
                    Array::Float(Floats::F32((0..len).map(slope).collect()))
                }
                Operand::Sinks => Array::Float(self.floats(len, Element::F32)),
                Operand::CuSeqlensQ => {
                    Array::U32(boundaries(batch, problem.seq_q, problem.packed.map_or(0, |packed| packed.total_q)))
                }
                Operand::CuSeqlensKv => {
                    Array::U32(boundaries(batch, problem.seq_kv, problem.packed.map_or(0, |packed| packed.total_kv)))
                }
                Operand::BlockTable => Array::U32(self.pages(len, problem.paged.map_or(1, |paged| paged.pages))),
                _ => unreachable!("this code knows every operand"),
            })
        });
        Ok(with!(OwnedInputs::new(q, k, v), operands))
    }

    fn mask(&mut self, len: u64, density: f64) -> Vec<u8> {
        (0..len).map(|_| u8::from((self.bits() >> 11) as f64 / (1u64 << 53) as f64 <= density)).collect()
    }

    /// Page numbers in random order, each once before any comes again.
    fn pages(&mut self, len: u64, pages: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..pages).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, (self.bits() % (last as u64 + 1)) as usize);
        }
        order.iter().copied().cycle().take(len as usize).collect()
    }
}

#[cfg(test)]
mod tests {
    use wgpu_attention::{Bias, Broadcast, Causal, Packed, Paged, Problem};

    use super::*;

    #[test]
    fn operands_of_any_problem_are_valid() {
        let mut all = Problem::new(3, 4, 5, 9, 8);
        (all.alibi, all.sinks, all.key_lengths, all.key_positions) = (true, true, true, true);
        all.causal = Causal::Offset;
        all.mask = Some(Broadcast([3, 1, 5, 9]));
        all.bias = Some(Bias { shape: Broadcast([1, 4, 1, 9]), element: Element::F16 });
        let mut packed = Problem::new(3, 4, 5, 9, 8);
        packed.packed = Some(Packed { total_q: 7, total_kv: 25 });
        let mut paged = Problem::new(3, 4, 5, 9, 8);
        paged.paged = Some(Paged { pages: 4, page_size: 4 });
        for problem in [all, packed, paged] {
            let shape = problem.check().unwrap();
            let made = Sample(5).operands(&problem.into()).unwrap();
            shape.check_inputs(&made.inputs()).unwrap();
        }
    }

    #[test]
    fn lengths_rise_in_equal_steps_and_fill_their_total() {
        assert_eq!(steps(4, 10), [3, 5, 8, 10]);
        assert_eq!(boundaries(4, 10, 26), [0, 3, 8, 16, 26]);
        assert_eq!(boundaries(4, 10, 20), [0, 3, 8, 16, 20]);
        assert_eq!(boundaries(4, 10, 30), [0, 7, 12, 20, 30]);
        assert_eq!(boundaries(2, 3, 100), [0, 3, 6]);
        assert_eq!(boundaries(0, 3, 0), [0]);
    }

    #[test]
    fn a_mask_has_the_density_asked_for() {
        for density in [0.0, 0.25, 1.0] {
            let seen = Sample(1).mask(40_000, density).iter().map(|&x| f64::from(x)).sum::<f64>() / 40_000.0;
            assert!((seen - density).abs() < 0.01, "{seen}");
        }
        let mut pages = Sample(1).pages(8, 8);
        assert_ne!(pages, (0..8).collect::<Vec<_>>());
        pages.sort_unstable();
        assert_eq!(pages, (0..8).collect::<Vec<_>>());
    }
}
