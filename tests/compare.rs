//! The comparison of whole calls with the reference: what is right passes, and any element that is wrong does not.

mod support;

use half::{bf16, f16};
use support::{Case, Data, Random};
use wgpu_attention::multihead::{Call, Layer, LayerInputs, LayerOutputs, Linear, RotaryEmbedding, Weights};
use wgpu_attention::operations::{Append, Merge};
use wgpu_attention::reference::{self, Comparisons, Worst, compare_append, compare_layer, compare_merge};
use wgpu_attention::{
    Broadcast, Causal, Element, Elements, Error, Inputs, Layout, Logits, Outputs, Problem, Strides, compare, with,
};

/// Breaks one element after the other of one output, and asserts that each is found where it is.
fn every_wrong_element_is_found(name: &str, right: &[f32], judge: &dyn Fn(&[f32]) -> Comparisons) {
    assert!(judge(right).passed(), "{}", judge(right));
    for index in 0..right.len() {
        for wrong in [right[index] + 0.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            if wrong.to_bits() == right[index].to_bits() {
                continue;
            }
            let mut broken = right.to_vec();
            broken[index] = wrong;
            let found = judge(&broken);
            let output = found.get(name).unwrap();
            // What is NaN in the reference may be any NaN.
            if !(wrong.is_nan() && right[index].is_nan()) && right[index].is_finite() {
                assert!(!found.passed() && !found.regressed(), "{name}[{index}] = {wrong}:\n{found}");
                assert_eq!(output.budget.failures, 1, "{found}");
                assert_eq!(output.budget.worst.unwrap().index, index, "{found}");
                assert!(found.to_string().contains("WRONG"), "{found}");
            }
        }
    }
}

/// A problem with every output, rows that see nothing and, with `strided`, gaps between the rows of out.
fn problem(strided: bool) -> (Problem, Data) {
    let mut p = Problem::new(2, 2, 3, 5, 4);
    (p.lse, p.weights, p.logits, p.causal) = (true, true, Some(Logits::Masked), Causal::BottomRight);
    p.key_lengths = true;
    if strided {
        p.out = Layout::Strided(Strides { offset: 3, batch: 64, head: 5, row: 20 });
    }
    let data = Data::random(&p, 7, 1.0);
    (p, data)
}

#[test]
fn every_output_of_a_call_is_compared() {
    for strided in [false, true] {
        let (p, data) = problem(strided);
        let right = reference::attention::<f32>(&p, &data.inputs()).unwrap();
        let judge = |outputs: &Outputs| compare(&p, &data.inputs(), outputs).unwrap();
        let names: Vec<&str> = judge(&right).outputs.iter().map(|output| output.name).collect();
        assert_eq!(names, ["out", "lse", "weights", "logits"]);
        // Whatever lies between the rows of out counts as well.
        let lengths: Vec<usize> = judge(&right).outputs.iter().map(|output| output.budget.count).collect();
        assert_eq!(lengths, [right.out.len(), 12, 60, 60]);
        every_wrong_element_is_found("out", &right.out, &|out| judge(&with!(right.clone(), out: out.into())));
        let of = |x: &Option<Vec<f32>>| x.clone().unwrap();
        every_wrong_element_is_found("lse", &of(&right.lse), &|lse| {
            judge(&with!(right.clone(), lse: Some(lse.into())))
        });
        every_wrong_element_is_found("weights", &of(&right.weights), &|weights| {
            judge(&with!(right.clone(), weights: Some(weights.into())))
        });
        every_wrong_element_is_found("logits", &of(&right.logits), &|logits| {
            judge(&with!(right.clone(), logits: Some(logits.into())))
        });
    }
}

#[test]
fn the_outcome_is_the_one_computed_by_hand() {
    // One query, two keys of equal score: the output is the mean of the values, 3.
    let p = Problem::new(1, 1, 1, 2, 2);
    let inputs = Inputs::new(&[0.0; 2], &[1.0; 4], &[1.0, 3.0, 5.0, 3.0]);
    let judge = |out: [f32; 2]| compare(&p, &inputs, &Outputs::new(out.into())).unwrap();
    let exact = judge([3.0, 3.0]);
    assert!(exact.passed() && !exact.regressed());
    assert_eq!((exact.outputs.len(), exact.outputs[0].budget.worst, exact.outputs[0].budget.max_error), (1, None, 0.0));
    let table = exact.to_string();
    assert_eq!(
        table,
        "output     elements  max error  of budget   of limit  verdict\n\
         out               2     0.00e0      0.0 %      0.0 %  ok\n"
    );
    let off = judge([3.0, 3.5]);
    let Worst { index, got, want, .. } = off.outputs[0].budget.worst.unwrap();
    assert_eq!((index, got, want, off.outputs[0].budget.max_error), (1, 3.5, 3.0, 0.5));
    assert!(off.to_string().contains("WRONG in 1 elements: element 1 is 3.5e0, not 3e0 ± "), "{off}");
    // Values this far apart have a budget well above the limit: an error between the two is a loss of digits.
    let (budget, limit) = (off.outputs[0].budget, off.outputs[0].limit.unwrap());
    let [allowed, expected] = [budget, limit].map(|found| found.worst.unwrap().allowed);
    assert!(expected < allowed, "{expected:e} {allowed:e}");
    let between = judge([3.0, (3.0 + (allowed + expected) / 2.0) as f32]);
    assert!(between.passed() && between.regressed(), "{between}");
    assert!(between.to_string().contains("less accurate than expected: element 1"), "{between}");
}

#[test]
fn outputs_of_another_call_are_errors() {
    let (p, data) = problem(false);
    let right = reference::attention::<f32>(&p, &data.inputs()).unwrap();
    let judge = |p: &Problem, change: &dyn Fn(&mut Outputs)| {
        let mut outputs = right.clone();
        change(&mut outputs);
        compare(p, &data.inputs(), &outputs).unwrap_err()
    };
    assert_eq!(judge(&p, &|o| o.out.truncate(47)), Error::Length { field: "out", got: 47, want: 48 });
    assert_eq!(judge(&p, &|o| o.lse = Some(vec![0.0; 13])), Error::Length { field: "lse", got: 13, want: 12 });
    assert_eq!(judge(&p, &|o| o.weights = Some(Vec::new())), Error::Length { field: "weights", got: 0, want: 60 });
    assert_eq!(judge(&p, &|o| o.logits = None), Error::Missing { field: "logits" });
    let mut plain = p.clone();
    plain.lse = false;
    assert_eq!(judge(&plain, &|_| ()), Error::Unexpected { field: "lse" });
    plain.heads = 0;
    assert_eq!(judge(&plain, &|_| ()), Error::Zero { field: "heads" });
}

#[test]
fn empty_calls_are_compared() {
    for [batch, seq_q, seq_kv] in [[0, 2, 3], [2, 0, 3], [2, 3, 0]] {
        let mut p = Problem::new(batch, 2, seq_q, seq_kv, 4);
        (p.lse, p.weights) = (true, true);
        let case = Case::random(p.clone(), 3);
        let outputs = reference::attention::<f32>(&p, &case.operands.inputs()).unwrap();
        let found = compare(&p, &case.operands.inputs(), &outputs).unwrap();
        assert!(found.passed() && found.outputs.len() == 3, "{found}");
    }
}

fn linear(r: &mut Random, inputs: u32, outputs: u32, bias: bool) -> Linear {
    let weight = r.signed_vec((inputs * outputs) as usize, 0.5);
    Linear { inputs, outputs, weight, bias: bias.then(|| r.signed_vec(outputs as usize, 0.5)), ..Linear::default() }
}

fn layer(bias: bool, added: bool, rotary: bool) -> Layer {
    let r = &mut Random(9);
    let parts = [linear(r, 6, 16, bias), linear(r, 6, 8, bias), linear(r, 6, 6, bias), linear(r, 12, 5, bias)];
    let mut layer = Layer::new(4, 2, parts).unwrap();
    layer.zero_attn = added;
    layer.bias_kv = added.then(|| (r.signed_vec(8, 1.0), r.signed_vec(6, 1.0)));
    layer.rotary = rotary.then_some(RotaryEmbedding { dim: 2, interleaved: false, base: 100.0, positions: 8 });
    layer
}

#[test]
fn every_output_of_a_layer_is_compared() {
    for n in 0..16 {
        let [bias, added, rotary, mean] = [1, 2, 4, 8].map(|bit| n & bit != 0);
        let layer = layer(bias, added, rotary);
        let mut problem = layer.problem(2, 3, 3);
        // Row 1 sees no key but those that the layer adds.
        problem.mask = Some(Broadcast([1, 1, 3, 3]));
        let mut call = Call::default();
        (call.weights, call.seq_first) = (Some(if mean { Weights::Mean } else { Weights::Heads }), n % 3 == 0);
        let query = Random(3).signed_vec(2 * 3 * 6, 1.0);
        let mut inputs = LayerInputs::new(&query);
        let mask = [1u8, 0, 1, 0, 0, 0, 1, 1, 1];
        inputs.operands.mask = Some((&mask).into());
        let right = reference::layer::<f32>(&layer, &problem, &call, &inputs).unwrap();
        let judge = |outputs: &LayerOutputs| compare_layer(&layer, &problem, &call, &inputs, outputs).unwrap();
        every_wrong_element_is_found("out", &right.out, &|out| judge(&with!(right.clone(), out: out.into())));
        every_wrong_element_is_found("weights", right.weights.as_ref().unwrap(), &|weights| {
            judge(&with!(right.clone(), weights: Some(weights.into())))
        });
        // The bound is that of f32 arithmetic: a thousandth of the values is far beyond it.
        let found = judge(&with!(right.clone(), out: right.out.iter().map(|x| x + 1e-4).collect()));
        assert_eq!(found.get("out").unwrap().budget.failures, right.out.len(), "{found}");

        let short = with!(right.clone(), out: right.out[1..].to_vec());
        let want = right.out.len();
        let error = compare_layer(&layer, &problem, &call, &inputs, &short).unwrap_err();
        assert_eq!(error, Error::Length { field: "out", got: want - 1, want });
        let error = compare_layer(&layer, &problem, &call, &inputs, &with!(right.clone(), weights: None));
        assert_eq!(error, Err(Error::Missing { field: "weights" }));
        call.weights = None;
        let error = compare_layer(&layer, &problem, &call, &inputs, &right).unwrap_err();
        assert_eq!(error, Error::Unexpected { field: "weights" });
        call.cache = true;
        let error = compare_layer(&layer, &problem, &call, &inputs, &right).unwrap_err();
        assert!(matches!(error, Error::Conflict { left: "cache", .. }), "{error}");
    }
}

/// A layer of one head, one query and one key: the output is x · w_v · w_o, and its bound can be added up by hand.
#[test]
fn the_budget_of_a_layer_is_the_one_computed_by_hand() {
    let one = |weight: f32| Linear { inputs: 1, outputs: 1, weight: vec![weight], ..Linear::default() };
    let layer = Layer::new(1, 1, [one(0.0), one(0.0), one(3.0), one(5.0)]).unwrap();
    let (problem, call) = (layer.problem(1, 1, 1), Call::default());
    let inputs = LayerInputs::new(&[2.0]);
    let judge = |out: f32| {
        compare_layer(&layer, &problem, &call, &inputs, &with!(LayerOutputs::default(), out: vec![out])).unwrap()
    };
    let worst = judge(30.5).get("out").unwrap().budget.worst.unwrap();
    assert_eq!((worst.index, worst.got, worst.want), (0, 30.5, 30.0));
    let u = 2f64.powi(-24);
    // v = 6: the sum of one product, the bias and the store, and the reference's own rounding.
    let v = (9.0 + 2.0 + 1.0) * u * 6.0;
    // The only key has the weight 1 and its value is out: what is left are the sum over the keys, the relative part and v's error.
    let context = 9.0 * u * 6.0 + 4.0 * u * 6.0 + u * 6.0 + v;
    let out = 5.0 * context + (9.0 + 2.0) * u * 30.0;
    assert!((worst.allowed / out - 1.0).abs() < 0.02, "{:e} {out:e}", worst.allowed);
}

#[test]
fn every_output_of_a_merge_is_compared() {
    for (element, sinks, strided) in [
        (Element::F32, false, false),
        (Element::F32, true, true),
        (Element::F16, true, false),
        (Element::Bf16, false, true),
    ] {
        let mut merge = Merge::new(3, 2, 2, 3, 4);
        (merge.element, merge.sinks) = (element, sinks);
        if strided {
            merge.out = Layout::Strided(Strides { offset: 3, batch: 64, head: 5, row: 20 });
        }
        let r = &mut Random(5);
        let (mut out, mut lse) = (r.signed_vec(3 * 12 * 4, 2.0), r.signed_vec(3 * 12, 3.0));
        // Row 0 is empty in every partial, whatever its out holds; row 1 is so in the first one.
        for n in [0, 1, 12, 24] {
            lse[n] = f32::NEG_INFINITY;
            out[4 * n..4 * n + 4].fill(f32::NAN);
        }
        let sinks = sinks.then(|| r.signed_vec(2, 1.0));
        let judge = |outputs: &Outputs| compare_merge(&merge, &out, &lse, sinks.as_deref(), outputs).unwrap();
        // The reference in f64, rounded once, in the layout of the merge. Between the rows anything may stand.
        let right = merged(&merge, &out, &lse, sinks.as_deref());
        let rows: Vec<usize> = (0..right.out.len()).filter(|&index| !right.out[index].is_nan()).collect();
        assert_eq!(rows.len(), 48);
        let dense: Vec<f32> = rows.iter().map(|&index| right.out[index]).collect();
        assert!(judge(&right).passed(), "{}", judge(&right));
        for (&index, &x) in rows.iter().zip(&dense) {
            for wrong in [x + 0.125, f32::NAN, f32::INFINITY] {
                let mut broken = right.clone();
                broken.out[index] = wrong;
                let found = judge(&broken);
                assert!(!found.passed(), "{found}");
                assert_eq!(found.get("out").unwrap().budget.worst.unwrap().index, index, "{found}");
            }
        }
        every_wrong_element_is_found("lse", right.lse.as_ref().unwrap(), &|lse| {
            judge(&with!(right.clone(), lse: Some(lse.into())))
        });
        let error = compare_merge(&merge, &out, &lse[1..], sinks.as_deref(), &right).unwrap_err();
        assert_eq!(error, Error::Length { field: "partial_lse", got: 35, want: 36 });
        let short = with!(right.clone(), out: right.out[1..].to_vec());
        let want = right.out.len();
        let error = compare_merge(&merge, &out, &lse, sinks.as_deref(), &short).unwrap_err();
        assert_eq!(error, Error::Length { field: "out", got: want - 1, want });
        let error = compare_merge(&merge, &out, &lse, sinks.as_deref(), &with!(right.clone(), lse: None));
        assert_eq!(error, Err(Error::Missing { field: "lse" }));
        let more = with!(right.clone(), weights: Some(Vec::new()));
        let error = compare_merge(&merge, &out, &lse, sinks.as_deref(), &more);
        assert_eq!(error, Err(Error::Unexpected { field: "weights" }));
    }
    // Without a partial every row is empty.
    let merge = Merge::new(0, 1, 1, 2, 1);
    let outputs = |out: f32| with!(Outputs::new(vec![0.0, out]), lse: Some(vec![f32::NEG_INFINITY; 2]));
    assert!(compare_merge(&merge, &[], &[], None, &outputs(0.0)).unwrap().passed());
    assert!(!compare_merge(&merge, &[], &[], None, &outputs(1e-30)).unwrap().passed());
}

/// A merge by the reference, with NaN between the rows of a strided out.
fn merged(merge: &Merge, out: &[f32], lse: &[f32], sinks: Option<&[f32]>) -> Outputs {
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let (outs, lses) = (wide(out), wide(lse));
    let partials: Vec<_> =
        outs.chunks(48).zip(lses.chunks(12)).map(|(out, lse)| reference::Partial { out, lse }).collect();
    let sinks: Option<Vec<f64>> = sinks.map(|sinks| (0..12).map(|row| sinks[row / 3 % 2].into()).collect());
    let (dense, lse) = reference::merge(4, &partials, sinks.as_deref()).unwrap();
    let round = |x: f64| match merge.element {
        Element::F32 => x as f32,
        Element::F16 => f16::from_f64(x).to_f32(),
        Element::Bf16 => bf16::from_f64(x).to_f32(),
        _ => unreachable!("this code knows f32, f16 and bf16"),
    };
    let mut place = Problem::new(2, 2, 3, 1, 4);
    place.out = merge.out;
    let shape = place.check().unwrap();
    let mut out = vec![f32::NAN; shape.out().extent() as usize];
    for (row, x) in dense.chunks(4).enumerate() {
        let [b, h, i] = [row / 6, row / 3 % 2, row % 3].map(|n| n as u32);
        let at = shape.out().at(b, h, i) as usize;
        out[at..at + 4].iter_mut().zip(x).for_each(|(out, &x)| *out = round(x));
    }
    with!(Outputs::new(out), lse: Some(lse.iter().map(|&x| x as f32).collect()))
}

/// One row of three partials, added up by hand.
#[test]
fn the_budget_of_a_merge_is_the_one_computed_by_hand() {
    // Equal log-sum-exps: every weight is a third, and the mean of 1, 2 and 6 is 3.
    let merge = Merge::new(3, 1, 1, 1, 1);
    let outputs = with!(Outputs::new(vec![3.5]), lse: Some(vec![0.5]));
    let found = compare_merge(&merge, &[1.0, 2.0, 6.0], &[0.0; 3], None, &outputs).unwrap();
    let [out, lse] = ["out", "lse"].map(|name| found.get(name).unwrap().budget.worst.unwrap());
    let u = 2f64.powi(-24);
    // exp(8u) − 1 of the distances 2, 1 and 3, a sum whose largest term is 6, and the relative part.
    let want = 8.0 * u * 2.0 + (8.0 + 3f64.sqrt()) * u * 6.0 + 4.0 * u * 3.0;
    assert!((out.allowed / want - 1.0).abs() < 1e-5, "{:e} {want:e}", out.allowed);
    assert_eq!(lse.allowed, u * (2.0 * lse.want + 16.0 + 2.0 * 3f64.sqrt()));
    assert!((out.want - 3.0).abs() < 1e-15 && (lse.want - 3f64.ln()).abs() < 1e-15);
}

#[test]
fn every_bit_of_a_cache_is_compared() {
    // One new row of two elements for each of two batches; the caches have room for three.
    let append = Append::new(2, 1, 1, 3, 2);
    let x = [1.0, f32::from_bits(0x7fc0_0001), 3.0, 4.0];
    let before: Vec<f32> = (0..12).map(|n| n as f32).collect();
    let right = [1.0, x[1], 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 3.0, 4.0];
    let judge = |after: &[f32]| compare_append(&append, (&x).into(), (&before).into(), &[0, 2], None, after.into());
    let found = judge(&right).unwrap();
    assert!(found.passed() && found.get("cache").unwrap().budget.count == 12, "{found}");
    // Even another NaN is wrong.
    for index in 0..12 {
        let mut broken = right;
        broken[index] = f32::from_bits(right[index].to_bits() ^ 1);
        let found = judge(&broken).unwrap();
        assert!(!found.passed() && found.outputs[0].budget.worst.unwrap().index == index, "{found}");
    }
    assert_eq!(judge(&right[1..]), Err(Error::Length { field: "cache after", got: 11, want: 12 }));
    let halves = [f16::ONE; 12];
    let error = compare_append(&append, (&x).into(), Elements::F16(&halves), &[0, 2], None, (&right).into());
    assert_eq!(error, Err(Error::Element { field: "cache", got: Element::F16, want: Element::F32 }));
}

#[test]
fn a_cache_of_halves_is_compared_as_it_is_or_widened() {
    let mut append = Append::new(1, 1, 1, 2, 1);
    append.element = Element::Bf16;
    let (x, before) = ([bf16::from_f32(3.0)], [bf16::ONE, bf16::ONE]);
    let judge = |after: Elements<'_>| {
        compare_append(&append, Elements::Bf16(&x), Elements::Bf16(&before), &[1], None, after)
            .map(|found| found.passed())
    };
    assert_eq!(judge(Elements::Bf16(&[bf16::ONE, x[0]])), Ok(true));
    assert_eq!(judge(Elements::Bf16(&[bf16::ONE, -x[0]])), Ok(false));
    assert_eq!(judge((&[1.0, 3.0]).into()), Ok(true));
    assert_eq!(judge((&[1.0, 3.0000002]).into()), Ok(false));
    let error = Error::Element { field: "cache after", got: Element::F16, want: Element::Bf16 };
    assert_eq!(judge(Elements::F16(&[f16::ONE; 2])), Err(error));
}

#[test]
fn a_sample_of_rows_is_judged_as_in_the_whole_and_no_other_row() {
    let mut packed = Problem::new(3, 2, 7, 9, 4).with_layout(Layout::Bshd);
    packed.packed = Some(wgpu_attention::Packed { total_q: 15, total_kv: 20 });
    (packed.lse, packed.causal) = (true, Causal::BottomRight);
    let data = Data::random(&packed, 3, 1.0);
    for (p, data) in [problem(false), problem(true), (packed, data)] {
        let (shape, inputs) = (p.check().unwrap(), data.inputs());
        let (want, budget) = reference::attention_with_budget(&p, &inputs).unwrap();
        let right = reference::attention::<f32>(&p, &inputs).unwrap();
        let of_rows = |rows: &[std::ops::Range<u32>]| {
            let (want, budget) = reference::attention_with_budget_of_rows(&p, &inputs, rows).unwrap();
            let shape = shape.clone();
            move |got: &Outputs| budget.compare(&shape, got, &want).unwrap()
        };
        let second = 1..2;
        let (all, some, none) = (of_rows(&[0..2, 2..100]), of_rows(std::slice::from_ref(&second)), of_rows(&[]));
        assert_eq!(all(&right), budget.compare(&shape, &right, &want).unwrap());
        assert!(some(&right).passed());
        // Row 1 of each sequence in each head.
        let oracle = support::Oracle::new(&p, &data);
        let at = |b: usize, h: usize, i: usize| oracle.out_at(b, h, i);
        let mut judged = 0;
        for (b, h) in (0..p.batch as usize).flat_map(|b| (0..2).map(move |h| (b, h))) {
            for i in 0..oracle.sequence(b).rows {
                let mut wrong = right.clone();
                wrong.out[at(b, h, i) + 2] = f32::NAN;
                assert_eq!(some(&wrong).passed(), i != 1, "{b} {h} {i}");
                assert!(none(&wrong).passed());
                judged += usize::from(i == 1) * p.value_dim as usize;
            }
        }
        let gaps = right.out.len() - shape.lse_len() as usize * p.value_dim as usize;
        let unowned = shape.lse_len() as usize * 4 - all_rows(&oracle, &p) * 4;
        assert_eq!(some(&right).get("out").unwrap().budget.count, judged + gaps + unowned);
    }
}

/// Query rows of all heads that belong to a batch or a sequence.
fn all_rows(oracle: &support::Oracle<'_>, p: &Problem) -> usize {
    (0..p.batch as usize).map(|b| oracle.sequence(b).rows * p.heads as usize).sum()
}

#[test]
fn visible_pairs_are_those_that_the_oracle_counts() {
    let mut masked = Problem::new(2, 2, 5, 7, 4);
    masked.mask = Some(Broadcast([2, 1, 5, 7]));
    masked.bias = Some(wgpu_attention::Bias { shape: Broadcast([1, 2, 5, 7]), element: Element::F32 });
    masked.causal = Causal::Offset;
    let data = Data::random(&masked, 5, 1.0);
    for (p, data) in [problem(false), (masked, data)] {
        let oracle = support::Oracle::new(&p, &data);
        let mut want = 0;
        for (b, h) in (0..p.batch as usize).flat_map(|b| (0..p.heads as usize).map(move |h| (b, h))) {
            let pairs = (0..p.seq_q as usize).flat_map(|i| (0..p.seq_kv as usize).map(move |j| (i, j)));
            want += pairs.filter(|&(i, j)| oracle.visible([b, h, i, j])).count() as u64;
        }
        assert_eq!(reference::visible_pairs(&p, &data.inputs()).unwrap(), want);
        assert!(want > 0 && want < p.check().unwrap().visible_pairs());
    }
    let plain = Problem::new(1, 3, 4, 6, 4);
    let data = Data::random(&plain, 5, 1.0);
    assert_eq!(reference::visible_pairs(&plain, &data.inputs()), Ok(plain.check().unwrap().visible_pairs()));
}
