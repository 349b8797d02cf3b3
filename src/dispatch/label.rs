//! Names of dispatches and of compute passes, for debuggers, profiles and traces.

use std::collections::HashMap;
use std::fmt::Write;
use std::ops::Range;

use crate::dispatch::step::Step;
use crate::kernel::Variant;

/// The ranges of a dispatch that a label gives where other dispatches of the same kernel have others.
fn ranges(step: &Step) -> [(&'static str, Range<u32>); 5] {
    let part = &step.part;
    let keys = step.uniform.get("key0").zip(step.uniform.get("key_end")).map_or(0..0, |(first, end)| first..end);
    [
        ("rows", part.rows.clone()),
        ("keys", keys),
        ("cache rows", part.cache_rows.clone()),
        ("inputs", part.inputs.clone()),
        ("columns", part.columns.clone()),
    ]
}

/// One label for each dispatch, such as `flash[64×32] b0 h0..8 rows 0..512`: the kernel with the rows and keys (or columns) of its tile,
/// batches, heads, and the rows, keys and other ranges, each where the dispatch does not take the whole. Where several dispatches
/// share the workgroups of a part, the label says which of them it has. Heads are left out where there is one.
pub fn labels(steps: &[Step]) -> Vec<String> {
    let mut whole: HashMap<Variant, [(&str, Range<u32>); 5]> = HashMap::new();
    for step in steps {
        let own = ranges(step);
        let all = whole.entry(step.variant).or_insert_with(|| own.clone());
        for ((_, all), (_, own)) in all.iter_mut().zip(own) {
            *all = all.start.min(own.start)..all.end.max(own.end);
        }
    }
    let heads = steps.iter().map(|step| step.part.heads.end).max().unwrap_or(0);
    let label = |(n, step): (usize, &Step)| {
        let mut label = kernel(&step.variant);
        let mut add = |text: String| write!(label, " {text}").expect("a string takes everything");
        add(format!("b{}", short(&step.part.batch)));
        if heads > 1 {
            add(format!("h{}", short(&step.part.heads)));
        }
        for ((name, own), (_, all)) in ranges(step).iter().zip(&whole[&step.variant]) {
            if own != all {
                add(format!("{name} {}..{}", own.start, own.end));
            }
        }
        // The first dispatch of a part begins with workgroup 0.
        let place = step.uniform.place();
        if place.first > 0 || steps.get(n + 1).is_some_and(|next| next.uniform.place().first > 0) {
            add(format!("workgroups {}..{}", place.first, place.end));
        }
        label
    };
    steps.iter().enumerate().map(label).collect()
}

/// A range of batches or heads: `0..8`, or `3` where there is one.
fn short(range: &Range<u32>) -> String {
    match range.end.saturating_sub(range.start) {
        1 => range.start.to_string(),
        _ => format!("{}..{}", range.start, range.end),
    }
}

/// A kernel with the rows and keys, or columns, of its tile: `flash[64×32]`.
fn kernel(variant: &Variant) -> String {
    match variant.tile() {
        Some([rows, columns]) => format!("{}[{rows}×{columns}]", variant.kernel()),
        None => variant.kernel().into(),
    }
}

/// The label of a compute pass: the operation and its kernels, such as `attention: scores, softmax, values`.
pub fn pass(operation: &str, steps: &[Step]) -> String {
    format!("{operation}: {}", distinct(steps, Variant::kernel).join(", "))
}

/// A name of each step's variant in order, each name once.
pub fn distinct(steps: &[Step], name: impl Fn(&Variant) -> &'static str) -> Vec<&'static str> {
    let mut names = Vec::new();
    for step in steps {
        let name = name(&step.variant);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}
