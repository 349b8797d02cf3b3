// Extra:  one more key k', with value v', that every row sees whatever its masks say, joined to finished rows of attention:
//   s = scale · q k';  w = exp(s) / (exp(lse) + exp(s));  out = (1 − w) out + w v'.
// (PyTorch's `bias_k` and `bias_v`. The merge of two softmax states, of which the second has one key.)
//
// Grid:      rows = {{ threads }} query rows, then heads and batches (shared/params.wgsl); an invocation owns a row.
// Memory:    no workgroup memory.
// Given:     lse holds params.lse_head rows of log-sum-exp per head, then as many places again, where w goes.
// Reference: src/reference/extra.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> shifts: array<f32>;
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let row = params.row0 + here.row_tile * {{ threads }}u + thread;
    if (!here.inside || row >= params.row_end) {
        return;
    }
    let kv_head = here.head / params.group;
    let q_at = params.q_base + here.batch * params.q_batch + here.head * params.q_head + row * params.q_row;
    var s = 0.0;
    for (var d = 0u; d < params.head_dim; d++) {
        s += q[q_at + d] * shifts[params.k_base + kv_head * params.head_dim + d];
    }
    s *= params.scale;
    let line = params.lse_base + here.batch * params.lse_batch + here.head * params.lse_head + row;
    // −inf: the row saw no key so far.
    let bits = lse[line];
    let hidden = bits == 0xff800000u;
    // exp(lse − s), where it is neither 0 nor infinite in f32; beyond, one of the two weights is 0 to all its digits.
    let e = select(exp(clamp(bitcast<f32>(select(bits, 0u, hidden)) - s, -80.0, 80.0)), 0.0, hidden);
    let w = 1.0 / (1.0 + e);
    lse[line + params.total_q] = bitcast<u32>(w);
    let out_at = params.out_base + here.batch * params.out_batch + here.head * params.out_head + row * params.out_row;
    for (var d = 0u; d < params.value_dim; d++) {
        out[out_at + d] = e * w * out[out_at + d] + w * shifts[params.v_base + kv_head * params.value_dim + d];
    }
}
