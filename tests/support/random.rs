//! Random numbers from a fixed seed, the same on every machine.

/// A linear congruential generator (Knuth's MMIX multiplier), its upper bits used.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 32
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() as usize * n) >> 32
    }

    /// True once in `n` calls.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Between −1 and 1.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Signed, roughly normal with variance 1.
    pub fn normal(&mut self) -> f32 {
        self.uniform() + self.uniform() + self.uniform()
    }

    pub fn normals(&mut self, len: usize, spread: f32) -> Vec<f32> {
        (0..len).map(|_| spread * self.normal()).collect()
    }
}
