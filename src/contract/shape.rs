//! A checked [`Problem`]. Whoever holds a [`Shape`] knows that it was checked, so nothing downstream checks shapes again.

use crate::contract::error::{Error, Result};
use crate::contract::operands::{HostSlice, Operand, Operands, Scalar};
use crate::contract::problem::{Broadcast, Element, Elements, Inputs, Logits, Packed, Paged, Problem};
use crate::contract::tensor::Tensor;
use crate::contract::walk::Band;

/// Largest head and value dimension.
pub const MAX_DIM: u32 = 512;
/// Largest sequence length, batch, head count and window: positions and offsets then stay inside i32.
pub const MAX_SIZE: u32 = 1 << 28;

/// The dimensions that tell classes of problems apart. A class holds the dimensions up to its own and above the one before it.
pub(crate) const DIMS: [u32; 5] = [32, 64, 128, 256, MAX_DIM];

/// A checked problem with the numbers that follow from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub(crate) problem: Problem,
    /// Factor of q·k.
    pub(crate) scale: f32,
    /// Query heads that share one key/value head.
    pub(crate) group: u32,
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) out: Tensor,
}

impl Shape {
    pub(crate) fn new(p: &Problem) -> Result<Self> {
        check_sizes(p)?;
        check_numbers(p)?;
        check_broadcasts(p)?;
        let (batch, total_q, total_kv) = match p.packed {
            None => (p.batch, p.seq_q, p.seq_kv),
            Some(packed) => {
                check_packed(p, packed)?;
                (1, packed.total_q, packed.total_kv)
            }
        };
        // Rows are padded to four scores of 4 bytes, so that the bytes of the score matrix stay inside u64.
        let rows = u64::from(p.batch) * u64::from(p.heads);
        let scores = u128::from(rows) * u128::from(p.seq_q) * u128::from(p.seq_kv);
        let limit = u64::MAX / 32;
        if scores > u128::from(limit) {
            let value = u64::try_from(scores).unwrap_or(u64::MAX);
            return Err(Error::elements("the score matrix, batch·heads·seq_q·seq_kv,", value, limit));
        }
        let [kv_batch, kv_rows] = match p.paged {
            None => [batch, total_kv],
            Some(paged) => {
                check_paged(p)?;
                paged.check(p.batch, p.seq_kv)?;
                [paged.pages, paged.page_size]
            }
        };
        let q = Tensor::input("q", [batch, p.heads, total_q], p.head_dim, p.q)?;
        let k = Tensor::input("k", [kv_batch, p.kv_heads, kv_rows], p.head_dim, p.k)?;
        let v = Tensor::input("v", [kv_batch, p.kv_heads, kv_rows], p.value_dim, p.v)?;
        let out = Tensor::output("out", [batch, p.heads, total_q], p.value_dim, p.out)?;
        Ok(Shape {
            scale: p.scale.unwrap_or_else(|| (1.0 / f64::from(p.head_dim).sqrt()) as f32),
            group: p.heads / p.kv_heads,
            q,
            k,
            v,
            out,
            problem: p.clone(),
        })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Tensor q.
    pub fn q(&self) -> &Tensor {
        &self.q
    }

    /// Tensor k.
    pub fn k(&self) -> &Tensor {
        &self.k
    }

    /// Tensor v.
    pub fn v(&self) -> &Tensor {
        &self.v
    }

    /// Tensor out.
    pub fn out(&self) -> &Tensor {
        &self.out
    }

    /// The factor of q·k: that of the problem, or 1/√head_dim where the problem gives none.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The smallest of [`DIMS`] that holds head_dim and value_dim.
    pub(crate) fn class_dims(&self) -> u32 {
        let dim = self.problem.head_dim.max(self.problem.value_dim);
        DIMS.into_iter().find(|&dims| dim <= dims).expect("a checked problem has no larger dims")
    }

    /// Whether the score transform is more than the scale and the key range.
    pub(crate) fn transforms(&self) -> bool {
        let p = &self.problem;
        p.key_positions || p.softcap.is_some() || p.alibi || p.mask.is_some() || p.bias.is_some()
    }

    /// Elements of the lse output.
    pub fn lse_len(&self) -> u64 {
        match self.problem.packed {
            None => u64::from(self.problem.batch) * u64::from(self.problem.heads) * u64::from(self.problem.seq_q),
            Some(packed) => u64::from(self.problem.heads) * u64::from(packed.total_q),
        }
    }

    /// Entries of the block table; 0 where the problem has none.
    pub fn block_table_len(&self) -> u64 {
        self.problem.paged.map_or(0, |paged| u64::from(self.problem.batch) * u64::from(paged.of(self.problem.seq_kv)))
    }

    /// Elements of the weights and logits outputs.
    pub fn scores_len(&self) -> u64 {
        u64::from(self.problem.batch)
            * u64::from(self.problem.heads)
            * u64::from(self.problem.seq_q)
            * u64::from(self.problem.seq_kv)
    }

    /// Number of visible (row, key) pairs over all batches and heads, as far as the problem tells. Causal rule and window count.
    /// The contents of lengths, masks and per-batch offsets are not part of the problem, so that these hide nothing here. With
    /// per-batch offsets a row counts the width of the window, or all keys without one.
    pub fn visible_pairs(&self) -> u64 {
        let head = Band::of(self, 1).pairs(0..self.problem.seq_q.into(), &(0..self.problem.seq_kv));
        head * u64::from(self.problem.batch) * u64::from(self.problem.heads)
    }

    /// Floating-point operations of the two products over the visible pairs: 2·(head_dim + value_dim) each.
    pub fn flops(&self) -> f64 {
        self.visible_pairs() as f64 * 2.0 * f64::from(self.problem.head_dim + self.problem.value_dim)
    }

    /// Checks host operands: presence, type, length and, for the small arrays, contents.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], [`Error::Unexpected`], [`Error::Element`], [`Error::Scalar`] or [`Error::Length`] for an operand that does not
    /// fit the problem; [`Error::Entry`] or [`Error::Number`] for an entry out of range.
    pub fn check_inputs(&self, inputs: &Inputs<'_>) -> Result<()> {
        let tensor = |field, data: &Elements<'_>, tensor: &Tensor| {
            same_element(field, data, self.problem.element)?;
            length(field, data.len(), tensor.extent() as usize)
        };
        tensor("q", &inputs.q, &self.q)?;
        tensor("k", &inputs.k, &self.k)?;
        tensor("v", &inputs.v, &self.v)?;
        self.check_operands(&inputs.operands)
    }

    /// Like [`Shape::check_inputs`], for all operands but q, k and v.
    pub(crate) fn check_operands(&self, operands: &Operands<HostSlice<'_>>) -> Result<()> {
        for &operand in Operand::ALL {
            let field = operand.name();
            match (operands.get(operand), operand.need(self)) {
                (None, None) => {}
                (Some(data), Some((scalar, len))) => {
                    same_scalar(field, data.scalar(), scalar)?;
                    length(field, data.len(), len as usize)?;
                }
                (None, Some(_)) => return Err(Error::Missing { field }),
                (Some(_), None) => return Err(Error::Unexpected { field }),
            }
        }
        self.check_entries(operands)
    }

    /// The contents of the small operands, whose types and lengths are right.
    fn check_entries(&self, operands: &Operands<HostSlice<'_>>) -> Result<()> {
        let key_lengths = operands.key_lengths.map(HostSlice::u32s);
        for (index, &value) in key_lengths.unwrap_or(&[]).iter().enumerate() {
            at_most(Operand::KeyLengths.name(), index, value, self.problem.seq_kv)?;
        }
        if let (Some(table), Some(paged)) = (operands.block_table.map(HostSlice::u32s), self.problem.paged) {
            // Without keys the table is empty, and so is each of its rows.
            let each = (paged.of(self.problem.seq_kv) as usize).max(1);
            for (b, pages) in table.chunks_exact(each).enumerate() {
                let used = key_lengths.map_or(each, |lengths| paged.of(lengths[b]) as usize);
                for (n, &page) in pages[..used].iter().enumerate() {
                    at_most(Operand::BlockTable.name(), b * each + n, page, paged.pages - 1)?;
                }
            }
        }
        for operand in [Operand::AlibiSlopes, Operand::Sinks] {
            let values = operands.get(operand).map_or(&[][..], |values| values.f32s());
            if let Some(&value) = values.iter().find(|x| !x.is_finite()) {
                return Err(Error::Number { field: operand.name(), value, want: "finite" });
            }
        }
        if let Some(packed) = self.problem.packed {
            for (operand, total, longest) in [
                (Operand::CuSeqlensQ, packed.total_q, self.problem.seq_q),
                (Operand::CuSeqlensKv, packed.total_kv, self.problem.seq_kv),
            ] {
                let values = operands.get(operand).expect("presence is checked above").u32s();
                check_boundaries(operand.name(), values, total, longest)?;
            }
        }
        Ok(())
    }

    /// Elements of a row of the f32 scratch of scores: `seq_kv`, padded to a multiple of 4. At least 4, because a binding must not be empty.
    pub(crate) fn score_row(&self) -> u32 {
        self.problem.seq_kv.next_multiple_of(4).max(4)
    }

    /// Whether the problem asks for these logits.
    pub(crate) fn wants(&self, logits: Logits) -> bool {
        self.problem.logits == Some(logits)
    }
}

fn check_sizes(p: &Problem) -> Result<()> {
    let sizes = [
        ("batch", p.batch, MAX_SIZE),
        ("heads", p.heads, MAX_SIZE),
        ("kv_heads", p.kv_heads, MAX_SIZE),
        ("seq_q", p.seq_q, MAX_SIZE),
        ("seq_kv", p.seq_kv, MAX_SIZE),
        ("head_dim", p.head_dim, MAX_DIM),
        ("value_dim", p.value_dim, MAX_DIM),
    ];
    for (field, value, limit) in sizes {
        // A problem without a batch, a query or a key has a result. Without a head or a dimension no tensor has a shape.
        if value == 0 && !["batch", "seq_q", "seq_kv"].contains(&field) {
            return Err(Error::Zero { field });
        }
        if value > limit {
            return Err(Error::TooLarge { field, value: value.into(), limit: limit.into() });
        }
    }
    let rows = u64::from(p.batch) * u64::from(p.heads);
    if rows > u64::from(MAX_SIZE) {
        return Err(Error::TooLarge { field: "batch·heads", value: rows, limit: MAX_SIZE.into() });
    }
    if !p.heads.is_multiple_of(p.kv_heads) {
        return Err(Error::KvHeads { heads: p.heads, kv_heads: p.kv_heads });
    }
    Ok(())
}

fn check_numbers(p: &Problem) -> Result<()> {
    if let Some(scale) = p.scale
        && !scale.is_finite()
    {
        return Err(Error::Number { field: "scale", value: scale, want: "finite" });
    }
    if let Some(softcap) = p.softcap
        && !(softcap.is_finite() && softcap > 0.0)
    {
        return Err(Error::Number { field: "softcap", value: softcap, want: "finite and positive" });
    }
    for (field, side) in [("window.left", p.window.left), ("window.right", p.window.right)] {
        if let Some(value) = side
            && value > MAX_SIZE
        {
            return Err(Error::TooLarge { field, value: value.into(), limit: MAX_SIZE.into() });
        }
    }
    Ok(())
}

fn check_broadcasts(p: &Problem) -> Result<()> {
    let target = [p.batch, p.heads, p.seq_q, p.seq_kv];
    for (operand, shape) in [(Operand::Mask, p.mask), (Operand::Bias, p.bias.map(|b| b.shape))] {
        let field = operand.name();
        if let Some(Broadcast(shape)) = shape {
            let keys = shape[3] == 1 || shape[3] == target[3] || (1..target[3]).contains(&shape[3]);
            let fits = keys && (0..3).all(|axis| shape[axis] == 1 || shape[axis] == target[axis]);
            if !fits {
                return Err(Error::Broadcast { field, shape, target });
            }
            let elements = shape.iter().map(|&n| u128::from(n)).product::<u128>();
            if elements > u128::from(u64::MAX / 16) {
                return Err(Error::elements(field, u64::MAX, u64::MAX / 16));
            }
        }
    }
    Ok(())
}

fn check_packed(p: &Problem, packed: Packed) -> Result<()> {
    if p.key_lengths {
        let why = "packed sequences carry their lengths in cu_seqlens";
        return Err(Error::Conflict { left: "packed", right: Operand::KeyLengths.name(), why });
    }
    for (field, value) in [("packed.total_q", packed.total_q), ("packed.total_kv", packed.total_kv)] {
        if value > MAX_SIZE {
            return Err(Error::TooLarge { field, value: value.into(), limit: MAX_SIZE.into() });
        }
    }
    for (field, longest, limit) in [("seq_q", p.seq_q, packed.total_q), ("seq_kv", p.seq_kv, packed.total_kv)] {
        if longest > limit {
            return Err(Error::TooLarge { field, value: longest.into(), limit: limit.into() });
        }
    }
    Ok(())
}

/// Refuses what cannot be combined with pages.
fn check_paged(p: &Problem) -> Result<()> {
    let excluded = [
        (
            p.packed.is_some(),
            "packed",
            "sequences in pages have their lengths in key_lengths, and queries of equal number",
        ),
        (p.weights, "weights", "only kernels without a score matrix read keys in pages"),
        (p.logits.is_some(), "logits", "only kernels without a score matrix read keys in pages"),
    ];
    match excluded.into_iter().find(|(set, ..)| *set) {
        Some((_, right, why)) => Err(Error::Conflict { left: "paged", right, why }),
        None => Ok(()),
    }
}

impl Paged {
    /// Number of pages that hold the keys of one sequence: entries of a row of the block table.
    pub(crate) fn of(&self, keys: u32) -> u32 {
        keys.div_ceil(self.page_size)
    }

    /// Checks that the pages, and a block table of so many sequences, can be addressed.
    pub(crate) fn check(&self, batch: u32, keys: u32) -> Result<()> {
        for (field, value) in [("paged.pages", self.pages), ("paged.page_size", self.page_size)] {
            // An empty pool is enough where there are no keys.
            if value == 0 && (field == "paged.page_size" || (batch > 0 && keys > 0)) {
                return Err(Error::Zero { field });
            }
            if value > MAX_SIZE {
                return Err(Error::TooLarge { field, value: value.into(), limit: MAX_SIZE.into() });
            }
        }
        let entries = u64::from(batch) * u64::from(self.of(keys));
        if entries > u64::from(MAX_SIZE) {
            let advice = "use a smaller batch, larger pages or fewer keys";
            let limit = MAX_SIZE.into();
            return Err(Error::Room {
                field: Operand::BlockTable.name(),
                size: entries,
                unit: "entries",
                limit,
                advice,
            });
        }
        Ok(())
    }
}

/// Boundaries of sequences rise, each to at most `longest` more than the one before, and end within the tokens.
fn check_boundaries(field: &'static str, values: &[u32], total: u32, longest: u32) -> Result<()> {
    for (index, pair) in values.windows(2).enumerate() {
        let (index, value) = (index + 1, pair[1]);
        if value < pair[0] {
            return Err(Error::Entry { field, index, value: value.into(), want: "at least", limit: pair[0].into() });
        }
        at_most(field, index, value, total)?;
        at_most(field, index, value, pair[0].saturating_add(longest))?;
    }
    Ok(())
}

fn same_scalar(field: &'static str, got: Scalar, want: Scalar) -> Result<()> {
    match (got, want) {
        _ if got == want => Ok(()),
        (Scalar::Float(got), Scalar::Float(want)) => Err(Error::Element { field, got, want }),
        (got, want) => Err(Error::Scalar { field, got, want }),
    }
}

fn same_element(field: &'static str, data: &Elements<'_>, want: Element) -> Result<()> {
    let got = data.element();
    if got == want { Ok(()) } else { Err(Error::Element { field, got, want }) }
}

fn length(field: &'static str, got: usize, want: usize) -> Result<()> {
    if got == want { Ok(()) } else { Err(Error::Length { field, got, want }) }
}

fn at_most(field: &'static str, index: usize, value: u32, limit: u32) -> Result<()> {
    if value <= limit {
        return Ok(());
    }
    Err(Error::Entry { field, index, value: value.into(), want: "at most", limit: limit.into() })
}
