{% from "shared/address.wgsl" import row_at, lse_at %}
// Extra:  one more key k', with value v', that every row sees whatever its masks say, joined to finished rows of
// attention:
//   s = scale · q k';  w = exp(s) / (exp(lse) + exp(s));  out = (1 − w) out + w v'.
// Where either score is NaN or +∞, the row and w are NaN. (PyTorch's `bias_k` and `bias_v`. The merge of two softmax
// states, of which the second has one key.)
//
// Grid:      rows = {{ threads }} query rows, then heads and batches (shared/params.wgsl); an invocation owns a row.
// Memory:    no workgroup memory.
// Given:     lse holds params.lse_head rows of log-sum-exp per head, then as many places again, where w goes.
// Reference: src/reference/extra.rs
{% include "shared/params.wgsl" %}
{% include "shared/code.wgsl" %}

@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> biases: array<f32>;
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<u32>;

// Whether the bits are those of NaN or an infinity.
fn ends(bits: u32) -> bool {
    return (bits & 0x7f800000u) == 0x7f800000u;
}

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
    let q_at = {{ row_at("q", "here.batch", "here.head", "row") }};
    var dot_product = 0.0;
    var bad = false;
    for (var d = 0u; d < params.head_dim; d++) {
        let x = q[q_at + d];
        let k = biases[params.key_base + kv_head * params.head_dim + d];
        bad |= ends(bitcast<u32>(x)) | ends(bitcast<u32>(k));
        dot_product += x * k;
    }
    let s = dot_product * params.scale;
    let row_lse = {{ lse_at("here.batch", "here.head", "row") }};
    // −inf: the row saw no key so far.
    let bits = lse[row_lse];
    let hidden = bits == 0xff800000u;
    let own = select(s, code_of(s), bad);
    let undefined = broken(max(select(coded(bits), HIDDEN, hidden), own));
    // exp(lse − s), where it is neither 0 nor infinite in f32; beyond, one of the two weights is 0 to all its digits.
    let e = select(exp(clamp(bitcast<f32>(select(bits, 0u, hidden)) - s, -80.0, 80.0)), 0.0, hidden);
    let w = select(1.0 / (1.0 + e), 0.0, own == MINUS);
    let keep = select(e * w, 1.0, own == MINUS);
    lse[row_lse + params.extra_weights] = select(bitcast<u32>(w), 0x7fc00000u, undefined);
    let out_at = {{ row_at("out", "here.batch", "here.head", "row") }};
    for (var d = 0u; d < params.value_dim; d++) {
        let before = out[out_at + d];
        let value = biases[params.value_base + kv_head * params.value_dim + d];
        let sum = bitcast<u32>(keep * bitcast<f32>(before) + w * value);
        // What is NaN or an infinity before makes the sum one, as arithmetic has it or else NaN.
        let special = ends(before) | ends(bitcast<u32>(value));
        out[out_at + d] = select(sum, 0x7fc00000u, undefined | (special & !ends(sum)));
    }
}
