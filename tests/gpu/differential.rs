//! Random problems over the whole contract, in buffers of the test's own, against an oracle that shares nothing with the crate.
//!
//! - `WGPU_ATTENTION_DIFFERENTIAL_SECONDS=3600`: how long, all adapters together. Unset: ten seconds. 0: one problem alone.
//! - `WGPU_ATTENTION_DIFFERENTIAL_SEED=17`: the first problem. Unset: 0. Problem n is the same in every run.
//!
//! Compiling takes most of the time, so that problems come in families that share their shaders.

use std::collections::BTreeMap;
use std::env;
use std::io::Write;
use std::time::{Duration, Instant};

use wgpu_attention::internal::describe;
use wgpu_attention::reference::{Budget, attention_with_budget, regression_limit};
use wgpu_attention::{
    Bias, Broadcast, Causal, Element, Error, Form, Gpu, Kernel, Layout, Logits, Obstacle, Options, Outputs, Packed,
    Paged, Plan, Precision, Problem, Window, with,
};

use crate::composed::strided;
use crate::edges::edge_operands;
use crate::support::staged::Staged;
use crate::support::{Adapter, Case, Data, Oracle, Random, Tensor, floor, gpus};
use crate::{KERNELS, obstacle};

/// Whether NaN and infinities stand where they must show.
const VISIBLE_SPECIALS: bool = true;

/// Problems of a family.
const FAMILY: u64 = 4;
/// Fewest problems on each adapter, however slow it is.
const FEWEST: u64 = 8 * FAMILY;

const SEQS: [u32; 16] = [1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 47, 64, 65, 100, 129];
/// What hidden places hold, and what visible ones hold that must show: NaN of several kinds among them.
const HIDDEN: [u32; 7] = [0x7fc0_0000, 0x7f80_0001, 0xffff_ffff, 0x7f80_0000, 0xff80_0000, 0x7149_f2ca, 0xf149_f2ca];
const SPECIAL: [u32; 5] = [0x7fc0_0000, 0x7f80_0001, 0xffff_ffff, 0x7f80_0000, 0xff80_0000];

/// Neighbours give numbers that have nothing in common (the finaliser of SplitMix64).
fn scattered(seed: u64) -> Random {
    let x = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Random(x ^ (x >> 31))
}

/// What the problems of a family share: all that shaders are compiled for.
struct Family {
    element: Element,
    bias: Element,
    /// Dims and strides are whole vectors of four.
    whole: bool,
    /// Most dims of a row.
    dims: u32,
    /// Soft cap, ALiBi, mask and bias are there.
    full: bool,
    /// Weights and logits are asked for.
    matrices: bool,
    paged: bool,
    packed: bool,
    kernel: Option<(Kernel, Option<Form>)>,
    native_f16: bool,
    /// A device with the least that the crate promises to run on.
    floor: bool,
}

impl Family {
    fn new(number: u64) -> Self {
        let r = &mut scattered(number);
        let (paged, packed) = r.pick(&[(false, false), (false, false), (false, true), (true, false)]);
        // One after the other, the planner's choice among them.
        let kernel = KERNELS.get(number as usize % (KERNELS.len() + 1)).copied();
        let element = match kernel {
            Some((Kernel::Matrix, _)) => Element::F16,
            _ => r.pick(&[Element::F32, Element::F32, Element::F16, Element::Bf16]),
        };
        Family {
            element,
            bias: r.pick(&[Element::F32, Element::F16, Element::Bf16]),
            whole: r.once_in(2),
            // Wide rows take long to compile: a short run sees every kernel with narrow ones.
            dims: if number < 16 { 32 } else { r.pick(&[32, 32, 32, 32, 32, 32, 64, 64, 128, 256, 512]) },
            full: r.once_in(2),
            matrices: !paged && r.once_in(3),
            paged,
            packed,
            kernel,
            native_f16: r.once_in(2),
            floor: r.once_in(8),
        }
    }

    fn problem(&self, r: &mut Random) -> Problem {
        let split = matches!(self.kernel, Some((Kernel::Split, _)));
        // Emulated matrices are slow.
        let most = if matches!(self.kernel, Some((Kernel::Matrix, _))) { 15_000 } else { 60_000 };
        let kv_heads = 1 + r.below(3);
        let heads = kv_heads * (1 + r.below(4));
        let dim = |r: &mut Random| match (self.whole, self.dims > 32) {
            (true, false) => 4 * (1 + r.below(self.dims / 4)),
            (true, true) => self.dims / 2 + 4 * (1 + r.below(self.dims / 8)),
            (false, false) => 1 + r.below(self.dims),
            (false, true) => self.dims / 2 + 1 + r.below(self.dims / 2),
        };
        let (seq_q, seq_kv) = match split && r.once_in(2) {
            true => (1 + r.below(4), 400 + r.below(1500)),
            false => (r.pick(&SEQS), r.pick(&SEQS)),
        };
        let mut p = Problem::new(1 + r.below(3), heads, seq_q, seq_kv, dim(r));
        p.kv_heads = kv_heads;
        p.value_dim = if r.once_in(2) { p.head_dim } else { dim(r) };
        p.element = self.element;
        let work = |p: &Problem| p.batch * p.heads * p.seq_q * p.seq_kv * p.head_dim.max(p.value_dim) / 32;
        if work(&p) > most {
            p.batch = 1;
        }
        if work(&p) > most {
            (p.heads, p.kv_heads) = (p.heads / p.kv_heads, 1);
        }
        p.scale = r.pick(&[None, None, Some(0.0), Some(-0.7), Some(2.5)]);
        p.causal = r.pick(&[Causal::None, Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset]);
        let side = |r: &mut Random| r.pick(&[None, None, None, Some(0), Some(1), Some(5), Some(40), Some(1 << 28)]);
        p.window = Window { left: side(r), right: side(r) };
        (p.sinks, p.lse) = (r.once_in(3), !r.once_in(3));
        if self.full {
            p.softcap = r.pick(&[None, None, Some(0.1), Some(3.0), Some(50.0)]);
            p.alibi = r.once_in(3);
            p.key_positions = r.once_in(5);
            p.mask = r.once_in(2).then(|| broadcast(r, &p));
            p.bias = r.once_in(2).then(|| Bias { shape: broadcast(r, &p), element: self.bias });
        }
        if self.matrices {
            p.weights = !r.once_in(3);
            p.logits = r.pick(&[None, None, Some(Logits::Raw), Some(Logits::Capped), Some(Logits::Masked)]);
        }
        if self.packed {
            p.packed = Some(Packed { total_q: p.seq_q + r.below(40), total_kv: p.seq_kv + r.below(40) });
        } else {
            p.key_lengths = r.once_in(2);
        }
        if self.paged {
            let page_size = r.pick(&[1, 2, 3, 7, 8, 16, 64]).min(p.seq_kv);
            let each = p.seq_kv.div_ceil(page_size);
            p.paged = Some(Paged { pages: 1 + r.below(p.batch * each + 2), page_size });
        }
        self.layouts(&mut p, r);
        p
    }

    fn layouts(&self, p: &mut Problem, r: &mut Random) {
        let (batch, rows, keys) =
            p.packed.map_or((p.batch, p.seq_q, p.seq_kv), |packed| (1, packed.total_q, packed.total_kv));
        let (slabs, keys) = p.paged.map_or((batch, keys), |paged| (paged.pages, paged.page_size));
        let sizes = [
            (batch, p.heads, rows, p.head_dim),
            (slabs, p.kv_heads, keys, p.head_dim),
            (slabs, p.kv_heads, keys, p.value_dim),
            (batch, p.heads, rows, p.value_dim),
        ];
        let layout = |(batch, heads, rows, dim)| match r.below(4) {
            0 => Layout::Bshd,
            1 | 2 => match strided(r, [batch, heads, rows], dim) {
                Layout::Strided(mut s) if self.whole => {
                    [s.offset, s.batch, s.head, s.row] =
                        [s.offset, s.batch, s.head, s.row].map(|n| n.next_multiple_of(4));
                    // Each stride clears what the smaller ones span.
                    let [few, many] = if s.head < s.row {
                        [(&mut s.head, heads), (&mut s.row, rows)]
                    } else {
                        [(&mut s.row, rows), (&mut s.head, heads)]
                    };
                    *many.0 = (*few.0 * u64::from(few.1)).max(*many.0);
                    s.batch = (*many.0 * u64::from(many.1)).max(s.batch);
                    Layout::Strided(s)
                }
                layout => layout,
            },
            _ => Layout::Bhsd,
        };
        [p.q, p.k, p.v, p.out] = sizes.map(layout);
    }

    fn options(&self, p: &Problem, r: &mut Random) -> Options {
        let mut options = with!(Options::default(), batch_invariant: r.once_in(4));
        (options.kernel, options.form) = self.kernel.map_or((None, None), |(kernel, form)| (Some(kernel), form));
        options.precision = r.pick(&Precision::ALL);
        options.native_f16 = (p.element == Element::F16).then_some(self.native_f16);
        if r.once_in(4) {
            options.scratch_budget = 4 * u64::from(p.seq_kv.next_multiple_of(4)) * (1 + u64::from(r.below(40)));
        }
        if r.once_in(4) {
            options.work_budget = Duration::from_micros(1 + u64::from(r.below(100)));
        }
        options
    }
}

/// Any axis full or 1, the last one of any length.
fn broadcast(r: &mut Random, p: &Problem) -> Broadcast {
    let mut shape = [p.batch, p.heads, p.seq_q, p.seq_kv].map(|n| if r.once_in(2) { 1 } else { n });
    if p.seq_kv > 2 && r.once_in(3) {
        shape[3] = 2 + r.below(p.seq_kv - 2);
    }
    Broadcast(shape)
}

/// Every place that a row owns or sees, and what of it matters.
struct Places {
    /// Elements of q, k and v that matter.
    needed: [Vec<bool>; 3],
    bias: Vec<bool>,
    /// Elements of out and lse that a row owns.
    out: Vec<bool>,
    lse: Vec<bool>,
    /// Some of the pairs that are visible.
    pairs: Vec<[usize; 4]>,
}

fn places(p: &Problem, data: &Data, out_len: usize, lse_len: usize) -> Places {
    let oracle = Oracle::new(p, data);
    let mut found = Places {
        needed: [&data.q, &data.k, &data.v].map(|tensor| vec![false; tensor.len()]),
        bias: vec![false; data.bias.as_ref().map_or(0, Tensor::len)],
        out: vec![false; out_len],
        lse: vec![false; lse_len],
        pairs: Vec::new(),
    };
    let (heads, group) = (p.heads as usize, (p.heads / p.kv_heads) as usize);
    let [dim, value_dim] = [p.head_dim, p.value_dim].map(|n| n as usize);
    // Logits before the mask show every key.
    let open = matches!(p.logits, Some(Logits::Raw | Logits::Capped));
    for b in 0..p.batch as usize {
        let s = oracle.sequence(b);
        for (h, i) in (0..heads).flat_map(|h| (0..s.rows).map(move |i| (h, i))) {
            let mut any = false;
            for j in 0..s.keys {
                let at = [b, h, i, j];
                let [key, value] = oracle.key_at(b, h / group, j);
                let visible = oracle.visible(at);
                if visible || open {
                    found.needed[1][key..key + dim].fill(true);
                    any = true;
                }
                if visible {
                    found.needed[2][value..value + value_dim].fill(true);
                    found.pairs.push(at);
                }
                if let Some(bias) = p.bias.filter(|_| oracle.reaches(at)) {
                    Oracle::spread(bias.shape, at).into_iter().for_each(|place| found.bias[place] = true);
                }
            }
            let (query, out) = (oracle.q_at(b, h, i), oracle.out_at(b, h, i));
            if any {
                found.needed[0][query..query + dim].fill(true);
            }
            found.out[out..out + value_dim].fill(true);
            found.lse[oracle.lse_at(b, h, i)] = true;
        }
    }
    found
}

/// Puts NaN and infinities at places that rows see: one element in any lane, or a whole row.
fn show(p: &Problem, data: &mut Data, pairs: &[[usize; 4]], r: &mut Random) {
    for _ in 0..1 + r.below(3) {
        let at = pairs[r.below(pairs.len() as u32) as usize];
        let [b, h, i, j] = at;
        let special = f32::from_bits(r.pick(&SPECIAL));
        let [key, value] = Oracle::new(p, data).key_at(b, h / (p.heads / p.kv_heads) as usize, j);
        let query = Oracle::new(p, data).q_at(b, h, i);
        let (tensor, start, dim) = match r.below(4) {
            0 => (&mut data.q, query, p.head_dim),
            1 => (&mut data.k, key, p.head_dim),
            2 => (&mut data.v, value, p.value_dim),
            _ => match (p.bias, &mut data.bias) {
                // An infinity below would hide the key.
                (Some(bias), Some(tensor)) if special != f32::NEG_INFINITY => {
                    (tensor, Oracle::spread(bias.shape, at).unwrap(), 1)
                }
                _ => (&mut data.v, value, p.value_dim),
            },
        };
        let any = r.below(dim);
        let lane = r.pick(&[0, dim - 1, any]) as usize;
        let lanes = if r.once_in(4) { 0..dim as usize } else { lane..lane + 1 };
        tensor.fill(start + lanes.start..start + lanes.end, special);
    }
}

/// A problem, how to plan it, and two sets of operands that one after the other run by the same plan.
struct Trial {
    problem: Problem,
    options: Options,
    floor: bool,
    operands: [Data; 2],
    /// For what the test does beside.
    random: Random,
}

impl Trial {
    fn new(seed: u64) -> Self {
        let family = Family::new(seed / FAMILY);
        let r = &mut scattered(!seed);
        let problem = family.problem(r);
        let options = family.options(&problem, r);
        let operands = [0, 1].map(|n| edge_operands(&problem, r, scattered(2 * seed + n).0));
        Trial { problem, options, floor: family.floor, operands, random: Random(r.0) }
    }

    /// The plan on a device, of the planner's choice where the kernel cannot run; that must be for the very reason that is expected.
    fn plan(&mut self, gpu: &Gpu) -> Plan {
        let p = &mut self.problem;
        if let Some(kernel) = self.options.kernel
            && let Some(reason) = obstacle(gpu, p, kernel, self.options.form)
        {
            let error = gpu.library().plan_with(p, &self.options).unwrap_err();
            let Error::Kernel { kernel: name, why } = &error else { panic!("{error}, but expected {reason:?}") };
            assert!(*name == kernel.name() && reason.is(why), "{error}, but expected {reason:?}");
            (self.options.kernel, self.options.form) = (None, None);
        }
        loop {
            match gpu.library().plan_with(p, &self.options) {
                Ok(plan) => return plan,
                // Rows of 16 bits that share words with their neighbours need a dense output.
                Err(Error::Conflict { left: "element", right: "out", .. }) if matches!(p.out, Layout::Strided(_)) => {
                    p.out = Layout::Bshd;
                }
                Err(Error::Kernel { kernel, why })
                    if kernel == "native f16" || refuses_f16(kernel, &why, self.options.native_f16, gpu) =>
                {
                    assert_ne!(self.options.native_f16, None, "{kernel}: {why}");
                    self.options.native_f16 = None;
                }
                // With 16-bit outputs its results wait in f32, for which a random budget may be too small.
                Err(Error::Kernel { kernel: "split", why })
                    if p.element != Element::F32 && self.options.kernel == Some(Kernel::Split) =>
                {
                    assert!(matches!(why, Obstacle::Partials { bytes, limit } if bytes > limit), "{why}");
                    self.options.kernel = None;
                }
                // No kernel of a device with four storage buffers has room for a block table.
                Err(Error::Kernel { kernel: "unfused", why: Obstacle::Every { fused, .. } })
                    if self.floor && p.paged.is_some() =>
                {
                    let few = |why: &Obstacle| matches!(why, Obstacle::Bindings { limit: 4, .. });
                    assert!(fused.iter().any(|(_, why)| few(why)), "{fused:?}");
                    (p.paged, p.k, p.v) = (None, Layout::Bhsd, Layout::Bhsd);
                    self.operands = [0, 1].map(|n| Data::random(p, n, 1.0));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Runs and compares; gives the kernels that ran.
    fn run(mut self, gpu: &Gpu) -> String {
        let plan = self.plan(gpu);
        let (p, r, shape) = (&self.problem, &mut self.random, plan.shape());
        let prepared = gpu.library().prepare(&plan).unwrap();
        for data in &self.operands {
            let mut data = data.clone();
            let [out_len, lse_len] = [shape.out().extent(), shape.lse_len()].map(|n| n as usize);
            let places = places(p, &data, out_len, lse_len);
            if VISIBLE_SPECIALS && !places.pairs.is_empty() && r.once_in(2) {
                show(p, &mut data, &places.pairs, r);
            }
            let clean = data.clone();
            let garbage = !r.once_in(3);
            for (tensor, needed) in [&mut data.q, &mut data.k, &mut data.v].into_iter().zip(&places.needed) {
                hide(tensor, needed, garbage, r);
            }
            if let Some(bias) = &mut data.bias {
                hide(bias, &places.bias, garbage, r);
            }
            let want = Oracle::new(p, &data).outputs(out_len, lse_len);
            let (reference, budget) = attention_with_budget(p, &clean.inputs()).unwrap();
            same(&reference, &want, &budget, &plan);
            let limit = regression_limit(p, &clean.inputs(), &reference, &budget).unwrap();

            let margins = || [!r.once_in(3), !r.once_in(3)];
            let staged = Staged::between(gpu.device(), &plan, &data, margins);
            let together = r.once_in(2);
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let call = prepared.begin().unwrap();
            for slice in 0..prepared.slices() {
                call.encode_slice(slice, &mut encoder, &staged.buffers()).unwrap();
                if !together {
                    gpu.queue().submit([encoder.finish()]);
                    encoder = gpu.device().create_command_encoder(&Default::default());
                }
            }
            gpu.queue().submit([encoder.finish()]);
            gpu.wait().unwrap();
            staged.assert_operands_stay(gpu.device(), gpu.queue());
            let mut got = staged.outputs(gpu.device(), gpu.queue());
            got.out.truncate(out_len);
            stays(&mut got.out, &places.out, "out");
            if let Some(lse) = &mut got.lse {
                stays(lse, &places.lse, "lse");
            }
            Case { problem: p.clone(), operands: data, want, budget, limit }.compare(&got, &plan);
        }
        plan.kernel()
    }
}

/// Whether a kernel refuses the way in which f16 must be read: of several kernels, one of them.
fn refuses_f16(kernel: &str, why: &Obstacle, native: Option<bool>, gpu: &Gpu) -> bool {
    match why {
        Obstacle::PackedF16 | Obstacle::OwnF16 => true,
        // `matrix` always needs the adapter's own type.
        Obstacle::NoF16 => kernel == "flash" && native == Some(true) && !gpu.library().caps().f16,
        Obstacle::Every { fused, .. } => fused.iter().any(|(kernel, why)| refuses_f16(kernel.name(), why, native, gpu)),
        _ => false,
    }
}

/// What nobody needs is garbage.
fn hide(tensor: &mut Tensor, needed: &[bool], garbage: bool, r: &mut Random) {
    let mut dirt = f32::from_bits(r.pick(&HIDDEN));
    for at in (0..needed.len()).filter(|&at| garbage && !needed[at]) {
        if r.once_in(16) {
            dirt = f32::from_bits(r.pick(&HIDDEN));
        }
        tensor.set(at, dirt);
    }
}

/// Places that no row owns are as they were; the oracle has 0 there.
#[track_caller]
fn stays(got: &mut [f32], owned: &[bool], name: &str) {
    for at in (0..got.len()).filter(|&at| !owned[at]) {
        assert!(got[at].is_nan(), "element {at} of {name} belongs to no row, and is {}", got[at]);
        got[at] = 0.0;
    }
}

/// Compares the crate's reference with the oracle, far more closely than a kernel.
fn same(reference: &Outputs<f64>, want: &Outputs<f64>, budget: &Budget, plan: &Plan) {
    let per_row = |index: usize, len: usize, atol: &[f64]| atol[index * atol.len() / len];
    let widest = budget.out.atol.iter().fold(0f64, |widest, &x| widest.max(x));
    let pairs = [
        ("out", Some(&reference.out), Some(&want.out), None),
        ("lse", reference.lse.as_ref(), want.lse.as_ref(), Some(&budget.lse.atol)),
        ("weights", reference.weights.as_ref(), want.weights.as_ref(), Some(&budget.weights.atol)),
        ("logits", reference.logits.as_ref(), want.logits.as_ref(), Some(&budget.logits.atol)),
    ];
    for (name, reference, want, atol) in pairs {
        assert_eq!(reference.is_some(), want.is_some(), "{name}");
        let (Some(reference), Some(want)) = (reference, want) else { continue };
        for (index, (&a, &b)) in reference.iter().zip(want).enumerate() {
            let allowed = 1e-6 * (atol.map_or(widest, |atol| per_row(index, want.len(), atol)) + 1e-6 * b.abs());
            let equal = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= allowed;
            assert!(equal, "the reference: element {index} of {name} is {a}, not {b} ± {allowed:e}\n{plan}");
        }
    }
}

/// Says, where a trial fails, how to run that one again.
struct Again<'a> {
    adapter: &'a Adapter,
    seed: u64,
}

impl Drop for Again<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let info = self.adapter.adapter().get_info();
            let name = info.name.split(['(', ',']).next().unwrap_or_default().trim();
            let set = |name: &str| env::var(name).map_or(String::new(), |value| format!("{name}={value} "));
            eprintln!(
                "problem {} failed on {}; again: {}{}WGPU_ATTENTION_ADAPTERS='{}:{name}' \
                 WGPU_ATTENTION_DIFFERENTIAL_SEED={} WGPU_ATTENTION_DIFFERENTIAL_SECONDS=0 \
                 cargo test --release --test gpu differential",
                self.seed,
                describe(&info),
                set("WGPU_ATTENTION_CHECKED"),
                set("WGPU_ATTENTION_SUITE"),
                info.backend,
                self.seed,
            );
        }
    }
}

fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}; it must be a whole number")))
}

#[test]
fn random_problems_agree_with_the_oracle() {
    let seconds = number("WGPU_ATTENTION_DIFFERENTIAL_SECONDS").unwrap_or(10);
    let first = number("WGPU_ATTENTION_DIFFERENTIAL_SEED").unwrap_or(0);
    let share = Duration::from_secs(seconds) / gpus().len() as u32;
    for adapter in gpus() {
        // Waits for this thread's turn, which does not count.
        let library = adapter.library();
        let four = library.caps().subgroup_size.is_some_and(|size| size < 8);
        let least = floor(adapter, 1 << 22, 65535);
        let (begin, mut kernels) = (Instant::now(), BTreeMap::<String, usize>::new());
        let mut count = 0;
        while count == 0 || seconds > 0 && (count < FEWEST || begin.elapsed() < share) {
            let seed = first + count;
            let _again = Again { adapter, seed };
            let mut trial = Trial::new(seed);
            if four && trial.options.kernel == Some(Kernel::Rows) {
                // Drivers of four lanes take minutes to compile it.
                trial.options.kernel = None;
            }
            let gpu: &Gpu = if trial.floor { &least } else { adapter };
            *kernels.entry(trial.run(gpu)).or_default() += 1;
            count += 1;
        }
        let name = &adapter.name;
        writeln!(std::io::stderr(), "{count} random problems agree with the oracle on {name}: {kernels:?}").unwrap();
    }
}
