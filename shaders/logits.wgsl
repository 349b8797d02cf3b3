{% from "shared/address.wgsl" import row_at %}
// Logits:  the score transform in place on raw scores, for devices that cannot bind the operands beside q and k, and
// for calls that ask for the scores before it.
//
// Grid:      columns = tiles of {{ threads }} keys, rows = single query rows, then heads and batches. One invocation a
//            score.
// Memory:    no workgroup memory.
// Given:     the scratch holds scale · q·k of every key below params.key_end.
// Reference: src/reference/logits.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read_write> s: array<f32>;
@group(0) @binding(2) var<storage, read> lists: array<u32>;
@group(0) @binding(3) var<storage, read> mask: array<u32>;
@group(0) @binding(4) var<storage, read> bias: array<u32>;

{% include "shared/visible.wgsl" %}
{% include "shared/score.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let row = params.row0 + here.row_tile;
    let key = params.key0 + here.col_tile * {{ threads }}u + thread;
    if (!here.inside || key >= params.key_end) {
        return;
    }
    let at = {{ row_at("s", "here.batch", "here.head", "row") }} + key;
    let seq = sequence(here.batch);
    s[at] = logit(here.batch, here.head, row, key, key_position(seq, key), seq, s[at]);
}
