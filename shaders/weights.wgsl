{% from "shared/address.wgsl" import lse_at, row_at %}
// Weights:  w = exp(x − m) / l  in place on raw scores, x being their logits and m, l the maximum and sum that a fused
// kernel left of each row;  lse = m + ln l  where it is asked for. Hidden keys weigh 0, and so does all of a row that
// sees none. (Dao et al., FlashAttention, 2022: softmax recomputed from its normaliser.)
//
// Grid:      columns = tiles of {{ threads }} keys, rows = single query rows, then heads and batches. One invocation a
//            weight.
// Memory:    no workgroup memory.
// Given:     s, the output, holds scale · q·k of every key that a row sees by range; totals hold m and l of every row.
//            Every place is written.
// Reference: src/reference/weights.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read_write> s: array<u32>;
@group(0) @binding(2) var<storage, read> totals: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> lists: array<u32>;
@group(0) @binding(4) var<storage, read_write> lse: array<u32>;
@group(0) @binding(5) var<storage, read> mask: array<u32>;
@group(0) @binding(6) var<storage, read> bias: array<u32>;

{% include "shared/visible.wgsl" %}
{% include "shared/score.wgsl" %}
{% include "shared/normaliser.wgsl" %}

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
    let at = {{ row_at("s", "here.batch", "here.head", "row") }} + key;
    var bits = 0u;
    if (row < seq.rows) {
        let line = {{ lse_at("batch_of(here.batch)", "here.head", "seq.token_q + row") }};
        let m = totals[line].x;
        let l = totals[line].y;
        let range = key_range(seq, row);
        if (key >= range.x && key < range.y) {
            let x = logit(here.batch, here.head, row, key, seq, bitcast<f32>(s[at]));
            bits = bitcast<u32>(select(0.0, exp(max(x - m, -150.0)) / l, (x > MINUS) & (l > 0.0)));
            bits = select(bits, 0x7fc00000u, broken(m) & (x > HIDDEN));
        }
        if ((params.flags & LSE) != 0u && key == 0u) {
            lse[line] = lse_bits(m, l);
        }
    }
    s[at] = bits;
}
