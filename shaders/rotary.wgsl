{% from "shared/element.wgsl" import rounding %}
{% from "shared/rotate.wgsl" import rotate %}
{% from "shared/address.wgsl" import row_at %}
// Rotary:  each pair (a, b) of the first params.rotary_dim elements of a row is rotated by the angle of its position:
//   y_a = cos · a − sin · b,  y_b = sin · a + cos · b  (shared/rotate.wgsl).
{% if interleaved %}
// Pairs are neighbours: (0, 1), (2, 3), …
{% else %}
// Pairs stand half a rotation apart: (0, n/2), (1, n/2 + 1), …
{% endif %}
// (Su et al., "RoFormer", 2021; ONNX `RotaryEmbedding`.)
// {{ "In place." if in_place else "The rest of the row is copied." }}
//
// Grid:      rows = {{ threads }} items of (row, pair{{ "s of one word" if packed else "" }}), then heads and batches
//            (shared/params.wgsl).
// Memory:    no workgroup memory.
{% if packed %}
// Given:     rows begin and end at whole words{{ "" if interleaved else ", and so does each half of the rotation" }}.
{% endif %}
// Reference: src/reference/rotary.rs
{% include "shared/params.wgsl" %}

{% if in_place %}
{% set x = "y" %}
@group(0) @binding(1) var<storage, read> table: array<f32>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<{{ "u32" if packed else "f32" }}>;
{% else %}
{% set x = "x" %}
@group(0) @binding(1) var<storage, read> table: array<f32>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<{{ "u32" if packed else "f32" }}>;
@group(0) @binding(4) var<storage, read> x: array<{{ "u32" if packed else "f32" }}>;
{% endif %}

{{ rotate("vec2<f32>" if packed and not interleaved else "f32") }}
{% if packed %}
{{ rounding(element) }}

fn widened(word: u32) -> vec2<f32> {
{% if element == "f16" %}
    return unpack2x16float(word);
{% else %}
    return bitcast<vec2<f32>>(vec2<u32>(word << 16u, word & 0xffff0000u));
{% endif %}
}

fn packed(value: vec2<f32>) -> u32 {
    return half_bits(value.x) | (half_bits(value.y) << 16u);
}
{% endif %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    // Items of a row: first the pairs that are rotated (two at a time where two 16-bit numbers share a word), then
    // what is copied.
    let half = params.rotary_dim / 2u;
    let pairs = {{ "half / 2u" if packed and not interleaved else "half" }};
    let number = here.row_tile * {{ threads }}u + thread;
    let row = params.row0 + number / params.items;
    let item = number % params.items;
    if (!here.inside || row >= params.row_end) {
        return;
    }
    let source = {{ row_at("x", "here.batch", "here.head", "row") }};
    let target_at = {{ row_at("y", "here.batch", "here.head", "row") }};
    if (item >= pairs) {
{% if not in_place %}
{% if packed %}
        let rest = half + item - pairs;
        y[(target_at >> 1u) + rest] = x[(source >> 1u) + rest];
{% else %}
        let rest = params.rotary_dim + item - pairs;
        y[target_at + rest] = x[source + rest];
{% endif %}
{% endif %}
        return;
    }
    let angle = position(here.batch, row) * params.rotary_dim;
{% if packed and interleaved %}
    let a = widened({{ x }}[(source >> 1u) + item]);
    let cosine = table[angle + item];
    let sine = table[angle + half + item];
    y[(target_at >> 1u) + item] = packed(vec2<f32>(
        rotated_first(a.x, a.y, cosine, sine),
        rotated_second(a.x, a.y, cosine, sine),
    ));
{% elif packed %}
    let a = widened({{ x }}[(source >> 1u) + item]);
    let b = widened({{ x }}[(source >> 1u) + pairs + item]);
    let cosine = vec2<f32>(table[angle + item * 2u], table[angle + item * 2u + 1u]);
    let sine = vec2<f32>(table[angle + half + item * 2u], table[angle + half + item * 2u + 1u]);
    y[(target_at >> 1u) + item] = packed(rotated_first(a, b, cosine, sine));
    y[(target_at >> 1u) + pairs + item] = packed(rotated_second(a, b, cosine, sine));
{% else %}
    let first = {{ "item * 2u" if interleaved else "item" }};
    let second = {{ "item * 2u + 1u" if interleaved else "half + item" }};
    let a = {{ x }}[source + first];
    let b = {{ x }}[source + second];
    let cosine = table[angle + item];
    let sine = table[angle + half + item];
    y[target_at + first] = rotated_first(a, b, cosine, sine);
    y[target_at + second] = rotated_second(a, b, cosine, sine);
{% endif %}
}
