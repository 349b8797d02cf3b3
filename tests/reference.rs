//! The CPU reference against hand-computed cases, against itself in other layouts, and f32 against its own error budget.

use half::{bf16, f16};
use wgpu_attention::Strides;
use wgpu_attention::reference::{
    Budget, Partial, Tolerance, attention, attention_with_budget, budget, logits, merge, scores, softmax, values,
};
use wgpu_attention::{
    Bias, Broadcast, Causal, Element, Elements, Error, HostSlice, Inputs, Layout, Logits, Operands, Outputs, Packed,
    Precision, Problem, Window, with,
};

/// Signed numbers, roughly normal.
fn random(seed: u64, len: usize, spread: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| spread * (uniform() + uniform() + uniform())).collect()
}

/// Random operands for everything that the problem uses.
struct Data {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mask: Option<Vec<u8>>,
    bias: Option<Vec<f32>>,
    key_lengths: Option<Vec<u32>>,
    offsets: Option<Vec<i32>>,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
}

impl Data {
    fn new(p: &Problem) -> Self {
        let shape = p.check().unwrap();
        let batch = p.batch as usize;
        Data {
            q: random(1, shape.q().extent() as usize, 1.0),
            k: random(2, shape.k().extent() as usize, 1.0),
            v: random(3, shape.v().extent() as usize, 1.0),
            mask: p.mask.map(|m| random(4, m.len(), 1.0).iter().map(|&x| u8::from(x > -0.8)).collect()),
            bias: p.bias.map(|b| random(5, b.shape.len(), 2.0)),
            key_lengths: p.key_lengths.then(|| (0..batch).map(|b| p.seq_kv - 2 * b as u32).collect()),
            offsets: (p.causal == Causal::Offset).then(|| (0..batch).map(|b| 3 * b as i32 - 2).collect()),
            slopes: p.alibi.then(|| (0..p.heads).map(|h| 0.5 / (h + 1) as f32).collect()),
            sinks: p.sinks.then(|| random(6, p.heads as usize, 1.0)),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        with!(Inputs::new(&self.q, &self.k, &self.v), operands: with!(Operands::default(), mask: self.mask.as_ref().map(HostSlice::from), bias: self.bias.as_ref().map(HostSlice::from), key_lengths: self.key_lengths.as_ref().map(HostSlice::from), offsets: self.offsets.as_ref().map(HostSlice::from), alibi_slopes: self.slopes.as_ref().map(HostSlice::from), sinks: self.sinks.as_ref().map(HostSlice::from)))
    }
}

/// The same inputs with other operands.
fn given<'a>(inputs: Inputs<'a>, set: impl FnOnce(&mut Operands<HostSlice<'a>>)) -> Inputs<'a> {
    let mut inputs = inputs;
    set(&mut inputs.operands);
    inputs
}

/// A problem with every output.
fn problem(sizes: [u32; 5], set: impl FnOnce(&mut Problem)) -> Problem {
    let [batch, heads, seq_q, seq_kv, head_dim] = sizes;
    let mut p = Problem::new(batch, heads, seq_q, seq_kv, head_dim);
    (p.lse, p.weights, p.logits) = (true, true, Some(Logits::Masked));
    set(&mut p);
    p
}

/// The same problem but for what `set` changes.
fn with(p: &Problem, set: impl FnOnce(&mut Problem)) -> Problem {
    let mut p = p.clone();
    set(&mut p);
    p
}

fn causal(p: &mut Problem, causal: Causal, left: Option<u32>, right: Option<u32>) {
    (p.causal, p.window) = (causal, Window { left, right });
}

/// Everything at once, at odd sizes.
fn everything() -> Problem {
    problem([2, 6, 7, 13, 11], |p| {
        (p.kv_heads, p.value_dim) = (2, 5);
        (p.softcap, p.alibi, p.sinks, p.key_lengths) = (Some(2.5), true, true, true);
        p.mask = Some(Broadcast([2, 1, 7, 13]));
        p.bias = Some(Bias { shape: Broadcast([1, 6, 1, 11]), element: Element::F32 });
        causal(p, Causal::BottomRight, Some(9), Some(0));
    })
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got == want || (got - want).abs() <= tolerance, "element {i} is {got}, not {want}");
    }
}

/// One string per row of the score matrix: `#` where a key is seen.
fn seen(p: &Problem, inputs: &Inputs<'_>) -> Vec<String> {
    let weights = attention::<f64>(p, inputs).unwrap().weights.unwrap();
    let row = |row: &[f64]| row.iter().map(|&w| if w > 0.0 { '#' } else { '.' }).collect();
    weights.chunks(p.seq_kv as usize).map(row).collect()
}

#[test]
fn thirds_and_sixths() {
    let p = problem([1, 1, 1, 3, 1], |p| p.scale = Some(2.0));
    let (q, v) = ([0.5], [6.0, 12.0, 18.0]);
    let k = [1f32, 2.0, 3.0].map(f32::ln);
    let inputs = Inputs::new(&q[..], &k[..], &v[..]);
    let got = attention::<f64>(&p, &inputs).unwrap();
    assert_close(got.weights.as_ref().unwrap(), &[1.0 / 6.0, 2.0 / 6.0, 3.0 / 6.0], 1e-7);
    assert_close(&got.out, &[14.0], 1e-6);
    assert_close(got.lse.as_ref().unwrap(), &[6f64.ln()], 1e-7);

    // A sink of ln 6 takes half of the weight.
    let p = with(&p, |p| p.sinks = true);
    let sinks = [6f32.ln()];
    let got = attention::<f64>(&p, &given(inputs, |o| o.sinks = Some((&sinks).into()))).unwrap();
    assert_close(got.weights.as_ref().unwrap(), &[1.0 / 12.0, 2.0 / 12.0, 3.0 / 12.0], 1e-7);
    assert_close(&got.out, &[7.0], 1e-6);
    assert_close(got.lse.as_ref().unwrap(), &[12f64.ln()], 1e-7);
}

#[test]
fn cap_then_alibi_then_bias() {
    let mut p = problem([1, 2, 2, 2, 1], |p| {
        (p.scale, p.softcap, p.alibi) = (Some(0.5), Some(1.5), true);
        p.bias = Some(Bias { shape: Broadcast::new("bias", &[2]).unwrap(), element: Element::F32 });
    });
    let (q, k, v) = ([2.0, -2.0, 4.0, 4.0], [1.0, -3.0, 0.25, 1.0], [0.0; 4]);
    let inputs = with!(Inputs::new(&q[..], &k[..], &v[..]), operands: with!(Operands::default(), bias: Some((&[10.0f32, -20.0]).into()), alibi_slopes: Some((&[0.25f32, 8.0]).into())));
    let raw = [1.0, -3.0, -1.0, 3.0, 0.5, 2.0, 0.5, 2.0];
    let capped = raw.map(|s: f64| 1.5 * (s / 1.5).tanh());
    let added = [10.0, -20.25, 9.75, -20.0, 10.0, -28.0, 2.0, -20.0];
    let masked: Vec<f64> = capped.iter().zip(added).map(|(s, t)| s + t).collect();
    for (upto, want) in [(Logits::Raw, &raw[..]), (Logits::Capped, &capped), (Logits::Masked, &masked)] {
        p.logits = Some(upto);
        assert_close(attention::<f64>(&p, &inputs).unwrap().logits.as_ref().unwrap(), want, 1e-12);
    }
}

#[test]
fn causal_and_window() {
    let check = |seq_q, seq_kv, rule: (Causal, Option<u32>, Option<u32>), want: &[&str]| {
        let p = problem([1, 1, seq_q, seq_kv, 2], |p| causal(p, rule.0, rule.1, rule.2));
        assert_eq!(seen(&p, &Data::new(&p).inputs()), want, "{rule:?}");
    };
    check(3, 5, (Causal::TopLeft, None, None), &["#....", "##...", "###.."]);
    check(3, 5, (Causal::BottomRight, None, None), &["###..", "####.", "#####"]);
    check(4, 2, (Causal::BottomRight, None, None), &["..", "..", "#.", "##"]);
    check(3, 4, (Causal::None, Some(1), Some(0)), &["#...", "##..", ".##."]);
    check(3, 4, (Causal::None, None, Some(1)), &["##..", "###.", "####"]);
    check(2, 4, (Causal::BottomRight, Some(1), None), &[".##.", "..##"]);
    check(2, 4, (Causal::TopLeft, None, Some(3)), &["#...", "##.."]);

    let p = problem([3, 1, 2, 4, 2], |p| causal(p, Causal::Offset, Some(1), None));
    let operands = Data { offsets: Some(vec![-1, 1, 4]), ..Data::new(&p) };
    assert_eq!(seen(&p, &operands.inputs()), ["....", "#...", "##..", ".##.", "...#", "...."]);
}

#[test]
fn key_lengths_shift_the_bottom_right() {
    let p = problem([3, 1, 2, 4, 2], |p| {
        p.key_lengths = true;
        causal(p, Causal::BottomRight, None, None);
    });
    let mut operands = Data::new(&p);
    operands.key_lengths = Some(vec![3, 1, 0]);
    assert_eq!(seen(&p, &operands.inputs()), ["##..", "###.", "....", "#...", "....", "...."]);
    // ALiBi counts from the same position.
    let p = with(&p, |p| (p.alibi, p.scale) = (true, Some(0.0)));
    let logits =
        attention::<f64>(&p, &given(operands.inputs(), |o| o.alibi_slopes = Some((&[2f32]).into()))).unwrap().logits;
    let hidden = f64::NEG_INFINITY;
    assert_eq!(logits.unwrap()[..8], [-2.0, 0.0, hidden, hidden, -4.0, -2.0, 0.0, hidden]);
}

#[test]
fn masks_broadcast() {
    let check = |shape: &[u32], mask: &[u8], want: &[&str]| {
        let shape = Broadcast::new("mask", shape).unwrap();
        let p = problem([2, 1, 2, 3, 2], |p| p.mask = Some(shape));
        let operands = Data { mask: Some(mask.to_vec()), ..Data::new(&p) };
        assert_eq!(seen(&p, &operands.inputs()), want);
        // A bias hides what a mask hides.
        let p = problem([2, 1, 2, 3, 2], |p| p.bias = Some(Bias { shape, element: Element::F32 }));
        let bias = mask.iter().map(|&m| if m != 0 { 0.5 } else { f32::NEG_INFINITY }).collect();
        assert_eq!(seen(&p, &Data { bias: Some(bias), ..Data::new(&p) }.inputs()), want);
    };
    check(&[3], &[1, 0, 9], &["#.#", "#.#", "#.#", "#.#"]);
    check(&[2, 3], &[1, 0, 0, 0, 1, 1], &["#..", ".##", "#..", ".##"]);
    check(&[2, 1, 1, 3], &[1, 0, 0, 0, 1, 1], &["#..", "#..", ".##", ".##"]);
    check(&[2, 1, 2, 1], &[1, 0, 0, 1], &["###", "...", "...", "###"]);
    check(&[1], &[1], &["###", "###", "###", "###"]);
    // A short last axis hides the rest.
    check(&[2, 2], &[1, 0, 0, 1], &["#..", ".#.", "#..", ".#."]);
}

#[test]
fn stages_make_the_whole() {
    let mut p = everything();
    let operands = Data::new(&p);
    for (rule, layout) in [(Causal::BottomRight, Layout::Bshd), (Causal::TopLeft, Layout::Bhsd)] {
        (p.causal, p.out) = (rule, layout);
        let (shape, inputs) = (p.check().unwrap(), operands.inputs());
        let whole = attention::<f64>(&p, &inputs).unwrap();
        let raw = scores::<f64>(&shape, &inputs);
        let masked = logits(&shape, &inputs, &raw, Logits::Masked);
        let (weights, lse) = softmax(&shape, &inputs, &masked);
        let out = values(&shape, &inputs, &weights);
        assert_eq!(whole, with!(Outputs::new(out), lse: Some(lse), weights: Some(weights), logits: Some(masked)));
        assert_eq!(attention_with_budget(&p, &inputs).unwrap().0, whole);
    }
}

#[test]
fn every_batch_and_head_reads_its_own() {
    let [batch, heads, kv_heads, seq_q, seq_kv, dim] = [2, 6, 2, 3, 5, 4];
    let p = problem([2, 6, 3, 5, 4], |p| (p.kv_heads, p.scale) = (2, Some(0.5)));
    let o = Data::new(&p);
    let mut want = Vec::new();
    for (b, h, i) in (0..batch * heads * seq_q).map(|n| (n / seq_q / heads, n / seq_q % heads, n % seq_q)) {
        let head = b * kv_heads + h / 3;
        let at =
            |x: &[f32], head: usize, length: usize, row: usize, d: usize| f64::from(x[(head * length + row) * dim + d]);
        let dot =
            |j| (0..dim).map(|d| at(&o.q, b * heads + h, seq_q, i, d) * at(&o.k, head, seq_kv, j, d)).sum::<f64>();
        let weights: Vec<f64> = (0..seq_kv).map(|j| (0.5 * dot(j)).exp()).collect();
        let sum = weights.iter().sum::<f64>();
        want.extend(
            (0..dim).map(|d| (0..seq_kv).map(|j| weights[j] / sum * at(&o.v, head, seq_kv, j, d)).sum::<f64>()),
        );
    }
    assert_close(&attention::<f64>(&p, &o.inputs()).unwrap().out, &want, 1e-14);
}

#[test]
fn query_heads_share_keys_in_contiguous_groups() {
    let p = problem([2, 6, 3, 5, 4], |p| (p.kv_heads, p.value_dim) = (2, 3));
    let o = Data::new(&p);
    let repeat = |x: &[f32], head: usize| x.chunks(head).flat_map(|x| [x; 3].concat()).collect::<Vec<f32>>();
    let (k, v) = (repeat(&o.k, 5 * 4), repeat(&o.v, 5 * 3));
    let full = with!(o.inputs(), k: (&k).into(), v: (&v).into());
    let want = attention::<f64>(&with(&p, |p| p.kv_heads = 6), &full).unwrap();
    assert_eq!(attention::<f64>(&p, &o.inputs()).unwrap(), want);
}

#[test]
fn layouts_hold_the_same_numbers() {
    let [batch, heads, seq_q, seq_kv, dim] = [2, 3, 5, 4, 6];
    let p = problem([batch, heads, seq_q, seq_kv, dim], |_| ());
    let o = Data::new(&p);
    let want = attention::<f64>(&p, &o.inputs()).unwrap();
    // Rows in another order of the axes, with room between them.
    let strided = |seq: u32| Strides { offset: 3, batch: 7, head: 14 * u64::from(seq), row: 14 };
    let moved = |x: &[f32], seq: u32| {
        let mut places = vec![f32::NAN; 3 + (14 * heads * seq) as usize];
        for (n, row) in x.chunks(dim as usize).enumerate() {
            let (b, h, s) = (n as u32 / seq / heads, n as u32 / seq % heads, n as u32 % seq);
            places[(3 + 7 * b + 14 * seq * h + 14 * s) as usize..][..dim as usize].copy_from_slice(row);
        }
        places.truncate(2 + 7 * batch as usize + (14 * (heads * seq - 1)) as usize);
        places
    };
    let (q, k, v) = (moved(&o.q, seq_q), moved(&o.k, seq_kv), moved(&o.v, seq_kv));
    let mut p = p.with_layout(Layout::Strided(strided(seq_kv)));
    (p.q, p.out) = (Layout::Strided(strided(seq_q)), Layout::Strided(strided(seq_q)));
    let inputs = Inputs::new(&q, &k, &v);
    let (got, budget) = attention_with_budget(&p, &inputs).unwrap();
    assert_eq!((&got.lse, &got.weights), (&want.lse, &want.weights));
    let with_gaps = moved(&want.out.iter().map(|&x| x as f32).collect::<Vec<_>>(), seq_q);
    let single: Vec<f32> = got.out.iter().map(|&x| x as f32).collect();
    assert!(single.iter().zip(&with_gaps).all(|(got, want)| got == want || (want.is_nan() && *got == 0.0)));

    // Only rows are compared, and a wrong one is found where it stands.
    let mut single: Vec<f32> =
        single.iter().zip(&with_gaps).map(|(&x, gap)| if gap.is_nan() { f32::NAN } else { x }).collect();
    let shape = p.check().unwrap();
    let same = budget.compare_out(&shape, &single, &got.out);
    assert!(same.passed() && same.count == want.out.len(), "{same}");
    let last = single.len() - 1;
    single[last] += 1e-3;
    let off = budget.compare_out(&shape, &single, &got.out);
    assert_eq!((off.failures, off.worst.map(|worst| worst.index)), (1, Some(last)), "{off}");
}

#[test]
fn packed_sequences_are_separate_runs() {
    let (cu_q, cu_kv) = ([1u32, 4, 4, 9], [0u32, 7, 9, 11]); // token 0 and the last one belong to nobody
    let mut p = problem([3, 4, 5, 7, 3], |p| {
        (p.kv_heads, p.alibi, p.sinks) = (2, true, true);
        p.packed = Some(Packed { total_q: 10, total_kv: 11 });
        p.mask = Some(Broadcast([3, 1, 5, 7]));
        causal(p, Causal::BottomRight, Some(4), None);
    });
    p = p.with_layout(Layout::Bshd);
    let mut o = Data::new(&p);
    o.q[..12].fill(f32::NAN);
    let bounds = (Some(HostSlice::from(&cu_q)), Some(HostSlice::from(&cu_kv)));
    let inputs = given(o.inputs(), |o| (o.cu_seqlens_q, o.cu_seqlens_kv) = bounds);
    let got = attention::<f64>(&p, &inputs).unwrap();
    let mut want = with!(Outputs::new(vec![0.0; got.out.len()]), lse: Some(vec![0.0; 4 * 10]), weights: Some(vec![0.0; 3 * 4 * 5 * 7]), logits: Some(vec![f64::NEG_INFINITY; 3 * 4 * 5 * 7]));
    for b in [0, 2] {
        let [q0, q1, k0, k1] = [cu_q[b], cu_q[b + 1], cu_kv[b], cu_kv[b + 1]].map(|n| n as usize);
        let (rows, keys) = (q1 - q0, k1 - k0);
        let one = with(&p, |p| {
            (p.batch, p.seq_q, p.seq_kv, p.packed) = (1, rows as u32, keys as u32, None);
            p.mask = Some(Broadcast([1, 1, rows as u32, keys as u32]));
        });
        let mask = o.mask.as_ref().unwrap()[b * 5 * 7..].chunks(7).take(rows).flat_map(|row| &row[..keys]).copied();
        let (mask, [k0, k1]) = (mask.collect::<Vec<u8>>(), [k0 * 6, k1 * 6]);
        let inputs = with!(Inputs::new(&o.q[q0 * 12..q1 * 12], &o.k[k0..k1], &o.v[k0..k1]), operands: given(o.inputs(), |o| o.mask = Some((&mask).into())).operands);
        let one = attention::<f64>(&one, &inputs).unwrap();
        want.out[q0 * 12..q1 * 12].copy_from_slice(&one.out);
        for h in 0..4 {
            let lse = &one.lse.as_ref().unwrap()[h * rows..][..rows];
            want.lse.as_mut().unwrap()[h * 10 + q0..][..rows].copy_from_slice(lse);
            for i in 0..rows {
                let (from, to) = ((h * rows + i) * keys, ((b * 4 + h) * 5 + i) * 7);
                want.weights.as_mut().unwrap()[to..][..keys]
                    .copy_from_slice(&one.weights.as_ref().unwrap()[from..][..keys]);
                want.logits.as_mut().unwrap()[to..][..keys]
                    .copy_from_slice(&one.logits.as_ref().unwrap()[from..][..keys]);
            }
        }
    }
    assert_eq!(got, want);
    // The stages agree where there is no key, too: a soft cap must not make −inf finite.
    let p = with(&p, |p| (p.softcap, p.logits) = (Some(3.0), Some(Logits::Capped)));
    let shape = p.check().unwrap();
    let capped = logits(&shape, &inputs, &scores::<f64>(&shape, &inputs), Logits::Capped);
    assert_eq!(attention::<f64>(&p, &inputs).unwrap().logits.unwrap(), capped);
}

#[test]
fn rows_that_see_nothing() {
    let mut p = problem([1, 2, 3, 2, 4], |p| causal(p, Causal::BottomRight, None, None));
    let o = Data { sinks: Some(vec![0.5, -7.0]), ..Data::new(&p) };
    let got = attention::<f64>(&p, &given(o.inputs(), |o| o.sinks = None)).unwrap();
    let (lse, weights) = (got.lse.unwrap(), got.weights.unwrap());
    assert_eq!((&got.out[..4], &weights[..2], lse[0]), (&[0.0; 4][..], &[0.0; 2][..], f64::NEG_INFINITY));
    assert!(got.out[4..12].iter().all(|&x| x != 0.0) && lse[1].is_finite());
    p.sinks = true;
    let got = attention::<f64>(&p, &o.inputs()).unwrap();
    let lse = got.lse.unwrap();
    assert_eq!((&got.out[..4], lse[0], lse[3]), (&[0.0; 4][..], 0.5, -7.0));
}

#[test]
fn nothing_leaks_from_hidden_keys() {
    let p = problem([1, 1, 3, 5, 4], |p| {
        p.key_lengths = true;
        causal(p, Causal::TopLeft, None, None);
    });
    let mut o = Data { key_lengths: Some(vec![2]), ..Data::new(&p) };
    let want = attention::<f64>(&p, &o.inputs()).unwrap();
    for garbage in [f32::NAN, f32::INFINITY, 1e30] {
        o.k[8..].fill(garbage);
        o.v[8..].fill(garbage);
        assert_eq!(attention::<f64>(&p, &o.inputs()).unwrap(), want);
    }
    // Key 1 is hidden from row 0 only; one bad value there shows in its element of the other rows, and nowhere else.
    o.v[6] = f32::INFINITY;
    let got = attention::<f64>(&p, &o.inputs()).unwrap();
    assert_eq!((&got.out[..4], &got.lse, &got.weights), (&want.out[..4], &want.lse, &want.weights));
    let shows = |got: &[f64]| (0..12).all(|n| (got[n] == f64::INFINITY) == (n > 3 && n % 4 == 2));
    assert!(shows(&got.out), "{:?}", got.out);
    // Even where its weight underflows.
    o.k[4..8].copy_from_slice(&[-1e6, -1e6, -1e6, -1e6]);
    o.q.fill(1.0);
    let got = attention::<f64>(&p, &o.inputs()).unwrap();
    assert!(got.weights.as_ref().unwrap()[6] < 1e-300);
    assert!(shows(&got.out), "{:?}", got.out);
}

#[test]
fn low_is_not_hidden() {
    let p = problem([1, 1, 1, 3, 1], |p| {
        p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 3]), element: Element::F32 });
    });
    let (k, v) = ([-1.0, -2.0, 3.0], [3.0, 6.0, -30.0]);
    let run = |bias: [f32; 3]| {
        let inputs = with!(Inputs::new(&[1.0][..], &k[..], &v[..]), operands: with!(Operands::default(), bias: Some((&bias).into())));
        attention_with_budget(&p, &inputs).unwrap()
    };
    let (got, budget) = run([f32::MIN; 3]);
    assert_close(&got.out, &[-7.0], 1e-14);
    assert_eq!(got.lse.as_ref().unwrap(), &[f64::from(f32::MIN)]);
    // f32 has no choice here either, so that little is allowed.
    assert!(budget.out.atol[0] < 1e-4, "{budget:?}");
    let (got, _) = run([f32::MIN, f32::MIN, f32::NEG_INFINITY]);
    assert_close(&got.out, &[4.5], 1e-14);
    // The same in f32, where the sum itself overflows.
    let huge = problem([1, 1, 1, 2, 1], |p| p.scale = Some(1.0));
    let inputs = Inputs::new(&[1e30][..], &[-1e30, -2e30][..], &[1.0, 3.0][..]);
    assert_eq!(attention::<f32>(&huge, &inputs).unwrap().out, [2.0]);
    assert_eq!(attention::<f64>(&huge, &inputs).unwrap().out, [2.0]);
}

#[test]
fn parts_merge_into_the_whole() {
    for sinks in [false, true] {
        let p = problem([1, 3, 5, 9, 4], |p| {
            p.sinks = sinks;
            causal(p, Causal::TopLeft, None, None); // no row but the last sees anything of the second part
        });
        let o = Data::new(&p);
        let whole = attention::<f64>(&p, &o.inputs()).unwrap();
        let part = |from: u32, to: u32| {
            let mut p = with(&p, |p| (p.seq_kv, p.sinks, p.causal) = (to - from, false, Causal::Offset));
            let strides = Strides { offset: u64::from(4 * from), batch: 0, head: 36, row: 4 };
            (p.k, p.v) = (Layout::Strided(strides), Layout::Strided(strides));
            let end = p.check().unwrap().k().extent() as usize;
            let offsets = [-(from as i32)];
            let inputs = with!(o.inputs(), k: o.k[..end].into(), v: o.v[..end].into(), operands: given(o.inputs(), |o| (o.offsets, o.sinks) = (Some((&offsets).into()), None)).operands);
            attention::<f64>(&p, &inputs).unwrap()
        };
        let parts = [part(0, 4), part(4, 7), part(7, 9)];
        let partials = parts.each_ref().map(|part| Partial { out: &part.out, lse: part.lse.as_ref().unwrap() });
        let per_row: Option<Vec<f64>> = o.sinks.map(|z| z.iter().flat_map(|&z| [f64::from(z); 5]).collect());
        let (out, lse) = merge(4, &partials, per_row.as_deref()).unwrap();
        assert_close(&out, &whole.out, 1e-14);
        assert_close(&lse, whole.lse.as_ref().unwrap(), 1e-14);

        let nothing = Partial { out: &[f64::NAN; 60], lse: &[f64::NEG_INFINITY; 15] };
        let (out, lse) = merge(4, &[nothing, nothing], per_row.as_deref()).unwrap();
        assert_eq!((out, lse), (vec![0.0; 60], per_row.unwrap_or(vec![f64::NEG_INFINITY; 15])));
    }
    // Without a part nobody says how many rows there are; without a row there is nothing to say.
    assert_eq!(merge::<f32>(4, &[], None), Err(Error::Zero { field: "partials" }));
    assert_eq!(merge::<f32>(4, &[Partial { out: &[], lse: &[] }; 2], Some(&[])), Ok((vec![], vec![])));
    let short = Partial { out: &[0.0; 7], lse: &[0.0; 2] };
    assert_eq!(merge::<f32>(4, &[short], None), Err(Error::Length { field: "partial.out", got: 7, want: 8 }));
}

/// Compares plain f32 with f64, tensor by tensor, in the element type's own output.
fn f32_is_within_budget(p: &Problem, inputs: &Inputs<'_>) {
    let (want, budget) = attention_with_budget(p, inputs).unwrap();
    let mut got = attention::<f32>(p, inputs).unwrap();
    for x in &mut got.out {
        *x = match p.element {
            Element::F32 => *x,
            Element::F16 => f16::from_f32(*x).to_f32(),
            Element::Bf16 => bf16::from_f32(*x).to_f32(),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        };
    }
    let out = budget.compare_out(&p.check().unwrap(), &got.out, &want.out);
    let lse = budget.lse.check(&got.lse.unwrap(), want.lse.as_ref().unwrap());
    let weights = budget.weights.check(&got.weights.unwrap(), want.weights.as_ref().unwrap());
    let logits = budget.logits.check(&got.logits.unwrap(), want.logits.as_ref().unwrap());
    assert!(out.passed() && lse.passed() && weights.passed() && logits.passed(), "{out}; {lse}; {weights}; {logits}");
    // A tolerance that lets everything pass proves nothing.
    let largest = |x: &[f64]| x.iter().filter(|x| x.is_finite()).fold(0f64, |largest, x| largest.max(x.abs()));
    let tensors = [
        ("out", Some(want.out), &budget.out, 5e-4),
        ("lse", want.lse, &budget.lse, 1e-4),
        ("weights", want.weights, &budget.weights, 2e-4),
        ("logits", want.logits, &budget.logits, 2e-5),
    ];
    for (name, want, tolerance, share) in tensors {
        let (widest, largest) = (largest(&tolerance.atol), largest(&want.unwrap()));
        assert!(widest < share * largest, "{name}: {widest:e} of {largest}, {:e}", widest / largest);
    }
}

#[test]
fn the_budget_of_two_equal_keys_is_what_its_formulas_say() {
    // Scores of 1 and values of ±1: A = 1, p = 1/2, out = 0, lse = 1 + ln 2, all exponents 0.
    let p = problem([1, 1, 1, 2, 1], |p| p.scale = Some(1.0));
    let u = 2f64.powi(-24);
    let close = |got: &[f64], want: f64| {
        assert!(got.iter().all(|got| (got / want - 1.0).abs() < 1e-5), "{} u, not {} u", got[0] / u, want / u);
    };
    let sum = 8.0 + 2f64.sqrt();
    for element in [Element::F32, Element::F16, Element::Bf16] {
        let p = with(&p, |p| p.element = element);
        let (q, v) = ([1.0, 1.0], [1.0, -1.0]);
        let halves = [q, v].map(|x| x.map(f16::from_f32));
        let brains = [q, v].map(|x| x.map(bf16::from_f32));
        let [q, v] = match element {
            Element::F32 => [(&q[..]).into(), (&v[..]).into()],
            Element::F16 => halves.each_ref().map(|x| Elements::F16(x)),
            Element::Bf16 => brains.each_ref().map(|x| Elements::Bf16(x)),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        };
        let one = match q {
            Elements::F32(x) => Elements::F32(&x[..1]),
            Elements::F16(x) => Elements::F16(&x[..1]),
            Elements::Bf16(x) => Elements::Bf16(&x[..1]),
            _ => unreachable!("this code knows f32, f16 and bf16"),
        };
        let budget = budget(&p, &Inputs::new(one, q, v)).unwrap();
        // e = 4u A + 2u · 4 of each key moves out by Σ p e |v − out| = e, and a weight by p (e + Σ p e) = e.
        let (e, [rounding, tiny]) = (
            12.0 * u,
            match element {
                Element::F32 => [0.0, 0.0],
                Element::F16 => [2f64.powi(-11), 2f64.powi(-24)],
                Element::Bf16 => [2f64.powi(-8), 0.0],
                _ => unreachable!("this code knows f32, f16 and bf16"),
            },
        );
        close(&budget.out.atol, e + sum * u + tiny);
        close(&[budget.out.rtol], 4.0 * u + 1.01 * rounding);
        close(&budget.lse.atol, 4.0 * u + u * (2.0 * (1.0 + 2f64.ln()) + 16.0 + 2.0 * 2f64.sqrt()));
        close(&budget.weights.atol, e + sum * u / 2.0);
        close(&budget.logits.atol, 4.0 * u);
        close(&[budget.weights.rtol, 4.0 * budget.logits.rtol], 4.0 * u);
        assert_eq!(budget.lse.rtol, 0.0);
        // Weights of f16 move out by 2⁻¹¹ Σ p |v| more; nothing else moves, and no other type.
        let rounding = if element == Element::F16 { 2f64.powi(-11) } else { 0.0 };
        let fast = budget.clone().with_precision(Precision::Fast);
        close(&fast.out.atol, e + sum * u + tiny + rounding);
        assert_eq!(Budget { out: budget.out.clone(), fast: budget.fast.clone(), ..fast }, budget);
        assert_eq!(budget.clone().with_precision(Precision::Strict), budget);
    }
}

#[test]
fn the_budget_of_f16_weights_is_their_rounding_times_the_values() {
    // Weights 2/3 and 1/3: the larger sum of |v| of the two dims counts, and the infinity has no share.
    let p = problem([1, 1, 1, 2, 1], |p| {
        (p.scale, p.value_dim, p.element) = (Some(1.0), 3, Element::F16);
        p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 2]), element: Element::F32 });
    });
    let half = |x: &[f32]| -> Vec<f16> { x.iter().map(|&x| f16::from_f32(x)).collect() };
    let (q, v) = (half(&[0.0, 0.0]), half(&[1.0, -3.0, f32::INFINITY, -2.0, 6.0, 0.0]));
    let inputs = Inputs::new(Elements::F16(&q[..1]), Elements::F16(&q), Elements::F16(&v));
    let bias = [0.0, -(2f32.ln())];
    let got = budget(&p, &given(inputs, |o| o.bias = Some((&bias).into()))).unwrap().fast[0];
    assert!((got / (4.0 / 2048.0) - 1.0).abs() < 1e-5, "{got:e}");
    // Where f32 cannot tell which key is largest, the largest value counts.
    let p = with(&p, |p| p.softcap = Some(1e9));
    let got = budget(&p, &given(inputs, |o| o.bias = Some((&[0.0, 0.0]).into()))).unwrap().fast;
    assert_eq!(got, [6.0 / 2048.0]);
}

#[test]
fn the_budget_of_a_low_key_counts_its_distance_and_its_small_weight() {
    // Scores 0 and −8: the weight of the second key is 1 / (1 + e⁸), its exponential may be off by 2u (4 + 2 · 8).
    let p = problem([1, 1, 1, 2, 1], |p| p.scale = Some(1.0));
    let (k, v) = ([0.0, -8.0], [0.0, 1.0]);
    let inputs = Inputs::new(&[1.0][..], &k[..], &v[..]);
    let got = budget(&p, &inputs).unwrap();
    let u = 2f64.powi(-24);
    let low = 1.0 / (1.0 + 8f64.exp());
    let (high, e) = (1.0 - low, [8.0 * u, 4.0 * 8.0 * u + 2.0 * u * 20.0]);
    let g = high * e[0] + low * e[1];
    let sum = (8.0 + 2f64.sqrt()) * u;
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-4, "{got:e}, not {want:e}");
    close(got.out.atol[0], high * e[0] * low + low * e[1] * high + sum);
    close(got.weights.atol[0], high * (e[0] + g) + sum * high);
    close(got.weights.atol[1], low * (e[1] + g) + sum * low);
    close(got.lse.atol[0], low * 32.0 * u + u * (2.0 * (-8f64).exp().ln_1p() + 16.0 + 2.0 * 2f64.sqrt()));
    close(got.logits.atol[1], 32.0 * u);
}

#[test]
fn f32_stays_within_the_budget_of_f64() {
    let plain = |scale, dim| problem([2, 3, 33, 129, dim], |p| (p.scale, p.kv_heads) = (Some(scale), 1));
    let peaked = plain(3.0, 37);
    let mut problems = vec![plain(0.15, 37), peaked.clone(), plain(-0.5, 1), everything()];
    problems.extend([Logits::Raw, Logits::Capped].map(|upto| with(&everything(), |p| p.logits = Some(upto))));
    for p in &problems {
        let o = Data::new(p);
        f32_is_within_budget(p, &o.inputs());
    }
    for p in [plain(0.15, 64), peaked] {
        let o = Data::new(&p);
        let [q, k, v] = [&o.q, &o.k, &o.v].map(|x| x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>());
        let inputs = Inputs::new(Elements::F16(&q), Elements::F16(&k), Elements::F16(&v));
        f32_is_within_budget(&with(&p, |p| p.element = Element::F16), &inputs);
        let [q, k, v] = [&o.q, &o.k, &o.v].map(|x| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        let inputs = Inputs::new(Elements::Bf16(&q), Elements::Bf16(&k), Elements::Bf16(&v));
        f32_is_within_budget(&with(&p, |p| p.element = Element::Bf16), &inputs);
    }
}

#[test]
fn the_budget_grows_with_what_f32_cannot_hold() {
    let p =
        problem([1, 1, 9, 17, 8], |p| p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 1]), element: Element::F32 }));
    let o = Data::new(&p);
    let bound = |bias: f32| {
        let bias = [bias];
        budget(&p, &given(o.inputs(), |o| o.bias = Some((&bias).into()))).unwrap().out.atol[0]
    };
    // A common bias changes no weight, but from 1000 on it costs f32 three digits of the scores.
    assert!(bound(1000.0) > 30.0 * bound(0.0) && bound(1000.0) < 3000.0 * bound(0.0));
    let capped = with(&p, |p| p.softcap = Some(100.0));
    let inputs = given(o.inputs(), |o| o.bias = Some((&[0f32]).into()));
    assert!(budget(&capped, &inputs).unwrap().out.atol[0] > 3.0 * bound(0.0));
    let alibi = with(&p, |p| p.alibi = true);
    let inputs = given(inputs, |o| o.alibi_slopes = Some((&[1e-9f32]).into()));
    assert!(budget(&alibi, &inputs).unwrap().out.atol[0] >= bound(0.0));
    // f32 logits of 10¹² hold no argmax: anything between the values is allowed, not more.
    let lost = bound(1e12);
    let largest = o.v.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    assert!(lost.is_finite() && lost < 2.1 * f64::from(largest), "{lost}");
}

#[test]
fn comparisons_are_strict_about_what_is_not_finite() {
    let tolerance = Tolerance { atol: vec![0.5, 0.0], rtol: 0.1 };
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let ok = tolerance.check(&[1.0, 10.5, f32::NAN, -0.0], &[1.5, 10.0, nan, 0.0]);
    assert!(ok.passed() && ok.max_error == 0.5 && ok.count == 4, "{ok:?}");
    let worst = ok.worst.unwrap();
    assert_eq!((worst.index, worst.got, worst.want, worst.allowed), (0, 1.0, 1.5, 0.65));
    assert_eq!(tolerance.check(&[f32::NEG_INFINITY, 2.0], &[-inf, 2.0]).failures, 0);
    for (got, want) in [(f32::NAN, 1.0), (1.0, nan), (f32::MIN, -inf), (f32::NEG_INFINITY, -1.0), (f32::INFINITY, -inf)]
    {
        let bad = tolerance.check(&[got, 0.0], &[want, 0.0]);
        assert_eq!((bad.failures, bad.worst.unwrap().index, bad.worst_ratio), (1, 0, inf), "{got} for {want}");
    }
    let off = tolerance.check(&[0.0, 0.0, 0.0, 1e-30], &[0.4, 0.0, 0.0, 0.0]);
    assert_eq!((off.failures, off.worst.unwrap().index), (1, 3), "the second row allows nothing at 0");
}

#[test]
fn bad_operands_are_errors() {
    let p = Problem::new(1, 1, 2, 3, 4);
    let o = Data::new(&p);
    let short = with!(o.inputs(), k: o.k[..11].into());
    let want = Error::Length { field: "k", got: 11, want: 12 };
    assert_eq!(attention::<f32>(&p, &short), Err(want.clone()));
    assert_eq!(budget(&p, &short), Err(want));
}
