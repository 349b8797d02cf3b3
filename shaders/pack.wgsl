{% from "shared/element.wgsl" import rounding %}
// Pack:  out = round(x), f32 scratch -> 16-bit output, for rows that do not fill whole vectors, where `values` would share words.
//
// Grid:      columns = tiles of {{ threads }} words. One invocation a word of two elements.
// Memory:    no workgroup memory.
// Given:     the output is dense, and the scratch has its elements in the same order; params.pack_count elements from the bindings' start.
// Reference: src/reference/values.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

{{ rounding(element) }}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let word = here.col_tile * {{ threads }}u + thread;
    if (!here.inside || word * 2u >= params.pack_count) {
        return;
    }
    let low = half_bits(x[word * 2u]);
    // An odd last element leaves the other half of its word as it was.
    var high = out[word] & 0xffff0000u;
    if (word * 2u + 1u < params.pack_count) {
        high = half_bits(x[word * 2u + 1u]) << 16u;
    }
    out[word] = low | high;
}
