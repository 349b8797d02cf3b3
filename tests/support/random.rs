//! Random numbers from a fixed seed, the same on every machine.

/// A linear congruential generator (Knuth's MMIX multiplier), its upper bits used.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 32
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: u32) -> u32 {
        ((self.next() * u64::from(n)) >> 32) as u32
    }

    /// True once in `n` calls.
    pub fn once_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }

    /// Uniform in [-1, 1).
    pub fn signed(&mut self) -> f32 {
        (self.next() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn signed_vec(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len).map(|_| size * self.signed()).collect()
    }

    /// Signed, roughly normal with variance 1.
    pub fn normal(&mut self) -> f32 {
        self.signed() + self.signed() + self.signed()
    }

    pub fn normals(&mut self, len: usize, spread: f32) -> Vec<f32> {
        (0..len).map(|_| spread * self.normal()).collect()
    }
}
