{% from "shared/element.wgsl" import rounding %}
// Pack:  out = round(x), f32 scratch -> 16-bit output, for rows that do not fill whole vectors, where `values` would
// share words.
{% if lists %}
// Of a packed batch only the tokens that a sequence owns are written: the scratch holds an earlier call's results for
// the others.
{% endif %}
//
// Grid:      columns = tiles of {{ threads }} words. One invocation a word of two elements.
// Memory:    no workgroup memory.
// Given:     the output is dense, and the scratch has its elements in the same order; params.elements elements from
//            the bindings' start.
{% if lists %}
//            The first element is element params.element0 of token params.token0 + n · params.total_q of a head n, and
//            the next token is params.token_elements elements behind. The first tokens of the params.sequences
//            sequences do not fall; where they do, fewer tokens may be written.
{% endif %}
// Reference: src/reference/values.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;
{% if lists %}
@group(0) @binding(3) var<storage, read> lists: array<u32>;

{% include "shared/visible.wgsl" %}

// Whether a sequence owns the token of an element. Only the last sequence that begins at or before the token can.
fn owned(element: u32) -> bool {
    let token = (params.token0 + (params.element0 + element) / params.token_elements) % params.total_q;
    var low = 0u;
    var high = params.sequences;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (lists[params.list_cu_seqlens_q + middle] <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    let s = sequence(low);
    return token >= s.token_q && token - s.token_q < s.rows;
}
{% endif %}

{{ rounding(element) }}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let word = here.col_tile * {{ threads }}u + thread;
    if (!here.inside || word * 2u >= params.elements) {
        return;
    }
    let first = word * 2u;
    let second = first + 1u;
{% if lists %}
    let has_first = owned(first);
    let has_second = second < params.elements && owned(second);
    if (!has_first && !has_second) {
        return;
    }
{% else %}
    let has_first = true;
    let has_second = second < params.elements;
{% endif %}
    // The half of a word that is another's stays as it was: beyond an odd last element, or of a token that no sequence
    // owns.
    var bits = 0u;
    if (!has_first || !has_second) {
        bits = out[word];
    }
    if (has_first) {
        bits = (bits & 0xffff0000u) | half_bits(x[first]);
    }
    if (has_second) {
        bits = (bits & 0xffffu) | (half_bits(x[second]) << 16u);
    }
    out[word] = bits;
}
