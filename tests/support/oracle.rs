//! The contract of [`Problem`] read out literally, with plain loops and IEEE arithmetic in f64. It shares nothing with the crate's
//! reference, not even the checked shape, so that a mistake in one of the two shows.

use wgpu_attention::{Broadcast, Causal, Elements, Layout, Logits, Outputs, Problem, with};

use super::{Data, Tensor};

/// A problem with its operands.
pub struct Oracle<'a> {
    p: &'a Problem,
    data: &'a Data,
}

/// One batch, or one packed sequence.
#[derive(Clone, Copy)]
pub struct Sequence {
    slab: usize,
    first_row: usize,
    pub rows: usize,
    first_key: usize,
    /// Keys that stand somewhere, hidden ones included.
    pub keys: usize,
    length: usize,
    offset: i64,
}

/// Where row `r` of head `h` of batch `b` begins.
fn place(layout: Layout, heads: u32, rows: u32, dim: u32, [b, h, r]: [usize; 3]) -> usize {
    let [heads, rows, dim] = [heads, rows, dim].map(|n| n as usize);
    match layout {
        Layout::Bhsd => ((b * heads + h) * rows + r) * dim,
        Layout::Bshd => ((b * rows + r) * heads + h) * dim,
        Layout::Strided(s) => s.offset as usize + b * s.batch as usize + h * s.head as usize + r * s.row as usize,
        layout => panic!("a layout that this oracle does not know: {layout:?}"),
    }
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    let elements: Elements<'_> = tensor.elements();
    (0..elements.len()).map(|at| elements.get(at)).collect()
}

/// A finite number beyond f32 becomes the largest of f32.
fn clamped(x: f64) -> f64 {
    if x.is_finite() { x.clamp(f32::MIN.into(), f32::MAX.into()) } else { x }
}

impl<'a> Oracle<'a> {
    pub fn new(p: &'a Problem, data: &'a Data) -> Self {
        Oracle { p, data }
    }

    pub fn sequence(&self, b: usize) -> Sequence {
        let (p, data) = (self.p, self.data);
        let span = |cu: &Option<Vec<u32>>, full: u32| match cu {
            Some(cu) => (cu[b] as usize, (cu[b + 1] - cu[b]) as usize),
            None => (0, full as usize),
        };
        let ((first_row, rows), (first_key, keys)) = (span(&data.cu_q, p.seq_q), span(&data.cu_kv, p.seq_kv));
        let length = data.key_lengths.as_ref().map_or(keys, |lengths| lengths[b] as usize);
        let offset = match p.causal {
            Causal::BottomRight => length as i64 - rows as i64,
            Causal::Offset => i64::from(data.offsets.as_ref().unwrap()[b].clamp(-(1 << 30), 1 << 30)),
            _ => 0,
        };
        let slab = if p.packed.is_some() { 0 } else { b };
        // What the block table says beyond the length names no page.
        let keys = if p.paged.is_some() { length } else { keys };
        Sequence { slab, first_row, rows, first_key, keys, length, offset }
    }

    /// Where a query row begins in q.
    pub fn q_at(&self, b: usize, h: usize, i: usize) -> usize {
        self.row_at(self.p.q, self.p.head_dim, b, h, i)
    }

    /// Where a row begins in out.
    pub fn out_at(&self, b: usize, h: usize, i: usize) -> usize {
        self.row_at(self.p.out, self.p.value_dim, b, h, i)
    }

    fn row_at(&self, layout: Layout, dim: u32, b: usize, h: usize, i: usize) -> usize {
        let s = self.sequence(b);
        let rows = self.p.packed.map_or(self.p.seq_q, |packed| packed.total_q);
        place(layout, self.p.heads, rows, dim, [s.slab, h, s.first_row + i])
    }

    /// Where a key begins in k, and its value in v.
    pub fn key_at(&self, b: usize, kv_head: usize, j: usize) -> [usize; 2] {
        let (p, s) = (self.p, self.sequence(b));
        let (slab, row, rows) = match (p.paged, p.packed) {
            (Some(paged), _) => {
                let size = paged.page_size as usize;
                let table = self.data.block_table.as_ref().unwrap();
                let page = table[b * (table.len() / p.batch as usize) + j / size];
                (page as usize, j % size, paged.page_size)
            }
            (None, packed) => (s.slab, s.first_key + j, packed.map_or(p.seq_kv, |packed| packed.total_kv)),
        };
        [(p.k, p.head_dim), (p.v, p.value_dim)]
            .map(|(layout, dim)| place(layout, p.kv_heads, rows, dim, [slab, kv_head, row]))
    }

    /// Where the lse of a row stands.
    pub fn lse_at(&self, b: usize, h: usize, i: usize) -> usize {
        let (heads, s) = (self.p.heads as usize, self.sequence(b));
        match self.p.packed {
            Some(packed) => h * packed.total_q as usize + s.first_row + i,
            None => (b * heads + h) * self.p.seq_q as usize + i,
        }
    }

    /// Where an element of a mask or bias stands; `None` beyond a short last axis.
    pub fn spread(shape: Broadcast, [b, h, i, j]: [usize; 4]) -> Option<usize> {
        let n = shape.0.map(|n| n as usize);
        let pick = |axis: usize, at: usize| if n[axis] == 1 { 0 } else { at };
        let last = pick(3, j);
        (last < n[3]).then(|| ((pick(0, b) * n[1] + pick(1, h)) * n[2] + pick(2, i)) * n[3] + last)
    }

    /// The position of a key, below 0 where its slot is empty.
    fn key_stands(&self, b: usize, j: usize) -> i64 {
        let listed = self.data.key_positions.as_ref();
        listed.map_or(j as i64, |listed| i64::from(listed[b * self.p.seq_kv as usize + j]).min((1 << 30) - 1))
    }

    /// Whether everything but the bias lets row `i` see key `j`.
    pub fn reaches(&self, [b, h, i, j]: [usize; 4]) -> bool {
        let s = self.sequence(b);
        let (at, key) = (i as i64 + s.offset, self.key_stands(b, j));
        let mask = match (self.p.mask, &self.data.mask) {
            (Some(shape), Some(mask)) => Self::spread(shape, [b, h, i, j]).is_some_and(|place| mask[place] != 0),
            _ => true,
        };
        mask && j < s.length
            && key >= 0
            && !(self.p.causal != Causal::None && key > at)
            && self.p.window.left.is_none_or(|left| key >= at - i64::from(left))
            && self.p.window.right.is_none_or(|right| key <= at + i64::from(right))
    }

    fn bias(&self, at: [usize; 4]) -> f64 {
        match (self.p.bias, &self.data.bias) {
            (Some(bias), Some(data)) => {
                Self::spread(bias.shape, at).map_or(f64::NEG_INFINITY, |place| data.elements().get(place))
            }
            _ => 0.0,
        }
    }

    pub fn visible(&self, at: [usize; 4]) -> bool {
        self.reaches(at) && self.bias(at) != f64::NEG_INFINITY
    }

    /// Raw, capped and masked logits of a pair; the last is of no meaning where the key is hidden.
    fn logits(&self, at: [usize; 4], dot: f64) -> [f64; 3] {
        let scale = self.p.scale.unwrap_or((1.0 / f64::from(self.p.head_dim).sqrt()) as f32);
        let raw = clamped(f64::from(scale) * dot);
        let capped = self.p.softcap.map_or(raw, |cap| f64::from(cap) * (raw / f64::from(cap)).tanh());
        let [b, h, i, j] = at;
        let distance = (i as i64 + self.sequence(b).offset - self.key_stands(b, j)).abs() as f64;
        let slope = self.data.slopes.as_ref().map_or(0.0, |slopes| f64::from(slopes[h]));
        [raw, capped, clamped(clamped(capped - slope * distance) + self.bias(at))]
    }

    /// Every output that the problem asks for; what no row owns is 0, and −inf in logits.
    pub fn outputs(&self, out_len: usize, lse_len: usize) -> Outputs<f64> {
        let (p, data) = (self.p, self.data);
        let [q, k, v] = [&data.q, &data.k, &data.v].map(wide);
        let [heads, seq_q, seq_kv, dim, value_dim] =
            [p.heads, p.seq_q, p.seq_kv, p.head_dim, p.value_dim].map(|n| n as usize);
        let group = heads / p.kv_heads as usize;
        let pairs = p.batch as usize * heads * seq_q * seq_kv;
        let (mut out, mut lse) = (vec![0.0; out_len], vec![0.0; lse_len]);
        let (mut weights, mut asked) = (vec![0.0; pairs], vec![f64::NEG_INFINITY; pairs]);
        for b in 0..p.batch as usize {
            let s = self.sequence(b);
            for (h, i) in (0..heads).flat_map(|h| (0..s.rows).map(move |i| (h, i))) {
                let row = &q[self.q_at(b, h, i)..][..dim];
                let matrix = ((b * heads + h) * seq_q + i) * seq_kv;
                // Key, place of its value, logit.
                let mut seen: Vec<(usize, usize, f64)> = Vec::new();
                for j in 0..s.keys {
                    let [key_at, value_at] = self.key_at(b, h / group, j);
                    let dot = (0..dim).fold(0.0, |sum, d| sum + row[d] * k[key_at + d]);
                    let [raw, capped, masked] = self.logits([b, h, i, j], dot);
                    let visible = self.visible([b, h, i, j]);
                    if visible {
                        seen.push((j, value_at, masked));
                    }
                    asked[matrix + j] = match p.logits {
                        Some(Logits::Raw) => raw,
                        Some(Logits::Capped) => capped,
                        _ if visible => masked,
                        _ => f64::NEG_INFINITY,
                    };
                }
                // A sink of −inf is no sink.
                let sink = data.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks[h].into());
                let entering = || seen.iter().map(|&(_, _, x)| x).chain([sink]);
                let nan = entering().any(f64::is_nan);
                let max = entering().fold(f64::NEG_INFINITY, f64::max);
                // No logit that enters is NaN or +inf, and one at least is finite: there is a softmax.
                let ordinary = !nan && max.is_finite();
                let sum: f64 = if ordinary { entering().map(|x| (x - max).exp()).sum() } else { f64::NAN };
                lse[self.lse_at(b, h, i)] = match ordinary {
                    true => max + sum.ln(),
                    false if nan => f64::NAN,
                    false => max,
                };
                for &(j, _, x) in &seen {
                    weights[matrix + j] = if ordinary { (x - max).exp() / sum } else { f64::NAN };
                }
                let to = self.out_at(b, h, i);
                // With a bad sink, a row without a key is as bad as the others of its head.
                let bad = !ordinary && (!seen.is_empty() || nan || max == f64::INFINITY);
                for d in 0..value_dim {
                    out[to + d] = if bad { f64::NAN } else { sum_of(&seen, &weights[matrix..], |at| v[at + d]) };
                }
            }
        }
        with!(Outputs::new(out), lse: p.lse.then_some(lse), weights: p.weights.then_some(weights), logits: p.logits.map(|_| asked))
    }
}

/// Σ weight · value over the keys that a row sees, each weight above 0 unless its logit is −inf.
fn sum_of(seen: &[(usize, usize, f64)], weights: &[f64], value: impl Fn(usize) -> f64) -> f64 {
    let (mut finite, mut infinite) = (0.0, 0.0);
    for &(j, at, logit) in seen {
        let x = value(at);
        if x.is_finite() {
            finite += weights[j] * x;
        } else {
            infinite += if logit == f64::NEG_INFINITY { f64::NAN } else { x };
        }
    }
    finite + infinite
}
