{% from "shared/address.wgsl" import row_at %}
// Export:  scores from the scratch to an f32 output of the caller: weights and logits, with the numbers that codes
// stand for.
//
// Grid:      columns = tiles of {{ threads }} keys, rows = single query rows, then heads and batches. One invocation a
//            score.
// Memory:    no workgroup memory.
// Given:     every place of the scratch was written, but for rows and keys that a packed sequence does not have.
// Reference: src/reference/logits.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> s: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;
@group(0) @binding(3) var<storage, read> lists: array<u32>;

{% include "shared/visible.wgsl" %}
{% include "shared/code.wgsl" %}
{% include "shared/weight.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let row = params.row0 + here.row_tile;
    let key = here.col_tile * {{ threads }}u + thread;
    if (!here.inside || key >= params.seq_kv) {
        return;
    }
    let seq = sequence(here.batch);
    let from_place = {{ row_at("s", "here.batch", "here.head", "row") }} + key;
    let to_place = {{ row_at("out", "here.batch", "here.head", "row") }} + key;
    let x = s[from_place];
    var bits = bitcast<u32>(x);
    let nowhere = (row >= seq.rows) | (key >= seq.stored);
    if ((params.flags & EXPORT_LOGITS) != 0u) {
        // The ends of the range of f32 stand for codes in the scratch, and the next numbers for the ends.
        bits = select(bits, 0xff7fffffu, x == LOWEST);
        bits = select(bits, 0x7f7fffffu, x == HIGHEST);
        bits = select(bits, 0x7f800000u, x == PLUS);
        bits = select(bits, 0x7fc00000u, x == UNDEFINED);
        bits = select(bits, 0xff800000u, nowhere | (x < LOWEST));
    } else {
        bits = select(bits, 0u, nowhere | (x == LEAST) | (x == NOTHING));
        bits = select(bits, 0x7fc00000u, (x == NO_RESULT) & !nowhere);
    }
    out[to_place] = bits;
}
