{% from "shared/address.wgsl" import row_at %}
// Average:  the weights that the layer gives out: of each head, or their mean, with columns for the keys that it
// adds.
//   y[b,(h),i,j] = (mean over h of) (1 − w') · w[b,h,i,j];
//   then w' of the extra key;  then (1 − w') · exp(−lse) of the zero key.
//
// Grid:      columns = tiles of {{ threads }} keys, rows = single query rows, then heads (one where the mean is taken)
//            and batches.
// Memory:    no workgroup memory.
// Given:     lse as `extra` leaves it. params.mean_heads heads are averaged, params.keys keys stand in w and
//            params.columns columns in y.
// Reference: src/reference/average.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> w: array<f32>;
@group(0) @binding(2) var<storage, read> lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let row = params.row0 + here.row_tile;
    let key = here.col_tile * {{ threads }}u + thread;
    if (!here.inside || key >= params.columns) {
        return;
    }
    var sum = 0.0;
    // By the bits: NaN in one head makes the mean NaN.
    var undefined = false;
    for (var n = 0u; n < params.mean_heads; n++) {
        let row_lse = params.lse_base + here.batch * params.lse_batch + (here.head + n) * params.lse_head + row;
        var keep = 1.0;
        var extra = 0.0;
        if ((params.flags & EXTRA_KEY) != 0u) {
            extra = lse[row_lse + params.extra_weights];
            undefined |= (bitcast<u32>(extra) & 0x7fffffffu) > 0x7f800000u;
            keep = 1.0 - extra;
        }
        if (key < params.keys) {
            let weight = w[{{ row_at("w", "here.batch", "(here.head + n)", "row") }} + key];
            undefined |= (bitcast<u32>(weight) & 0x7fffffffu) > 0x7f800000u;
            sum += keep * weight;
        } else if (key == params.keys && (params.flags & EXTRA_KEY) != 0u) {
            sum += extra;
        } else {
            let bits = bitcast<u32>(lse[row_lse]) & 0x7fffffffu;
            undefined |= (bits > 0x7f800000u) | (bitcast<u32>(lse[row_lse]) == 0x7f800000u);
            sum += keep * exp(-lse[row_lse]);
        }
    }
    y[{{ row_at("y", "here.batch", "here.head", "row") }} + key] =
        select(bitcast<u32>(sum * params.factor), 0x7fc00000u, undefined);
}
