{% from "shared/address.wgsl" import lse_at %}
{% from "shared/finish.wgsl" import join_sinks, over_sum %}
{% from "shared/weigh.wgsl" import weigh %}
// Softmax:  row of logits -> row of weights, in place:
//   w[j] = exp(x[j] − m) / l,  l = Σ exp(x[j] − m) (+ exp(sink − m)),  lse = m + ln l.
// There are two passes over the row. The first keeps a running m and l in each invocation, which the workgroup then
// merges. The second writes. Keys outside the row's range and HIDDEN ones weigh 0. A row with no
// visible key is all 0, and its lse is −inf. Logits may be codes (shared/code.wgsl), weights too (shared/weight.wgsl).
//
// Grid:      rows = single query rows, then heads and batches; a workgroup owns one row, of any length.
// Memory:    {{ 8 * threads }} bytes of workgroup memory.
// Given:     scratch rows start at multiples of four. Written: every place that `values` reads (the range of its tile
//            of params.values_rows rows, whole vectors of four), or the whole row where the weights are an output.
// Reference: src/reference/softmax.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read_write> s: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> lists: array<u32>;
{% if lse %}
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;
{% endif %}

{% include "shared/visible.wgsl" %}
{% include "shared/code.wgsl" %}
{% include "shared/normaliser.wgsl" %}
{% include "shared/weight.wgsl" %}

const THREADS: u32 = {{ threads }}u;

var<workgroup> sh_max: array<f32, {{ threads }}>;
var<workgroup> sh_sum: array<f32, {{ threads }}>;

fn in_range(range: vec2<u32>, key: u32, x: vec4<f32>) -> vec4<f32> {
    let keys = vec4<u32>(key, key + 1u, key + 2u, key + 3u);
    return select(vec4<f32>(HIDDEN), x, (keys >= vec4<u32>(range.x)) & (keys < vec4<u32>(range.y)));
}

// Below this difference f32 cannot tell the weight from 0.
{{ weigh("vec4<f32>", "-150.0") }}

// Hidden keys and logits of −∞ weigh 0.
fn weigh_codes(x: vec4<f32>, m: f32) -> vec4<f32> {
    return select(vec4<f32>(), weigh(x, m), x > vec4<f32>(MINUS));
}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    if (!here.inside) {
        return;
    }
    let seq = sequence(here.batch);
    let row = params.row0 + here.row_tile;
    let line = (params.s_base + here.batch * params.s_batch + here.head * params.s_head + row * params.s_row) >> 2u;
    // Rows that a packed sequence does not have keep an empty range: their scratch becomes 0.
    var range = vec2<u32>();
    if (row < seq.rows) {
        range = key_range(seq, row);
    }

    var m = HIDDEN;
    var l = 0.0;
    for (var key = (range.x & ~3u) + thread * 4u; key < range.y; key += THREADS * 4u) {
        let x = in_range(range, key, s[line + (key >> 2u)]);
        let higher = max(max(m, max(x.x, x.y)), max(x.z, x.w));
        let w = weigh_codes(x, higher);
        l = l * exp(max(m - higher, -150.0)) + (w.x + w.y) + (w.z + w.w);
        m = higher;
    }
    sh_max[thread] = m;
    sh_sum[thread] = l;
    workgroupBarrier();
    for (var apart = THREADS / 2u; apart > 0u; apart >>= 1u) {
        if (thread < apart) {
            let other = sh_max[thread + apart];
            let higher = max(sh_max[thread], other);
            sh_sum[thread] = sh_sum[thread] * exp(max(sh_max[thread] - higher, -150.0))
                + sh_sum[thread + apart] * exp(max(other - higher, -150.0));
            sh_max[thread] = higher;
        }
        workgroupBarrier();
    }
    m = sh_max[0];
    l = sh_sum[0];
{{ join_sinks("here.head", rescale=false) }}
    let inverse = {{ over_sum("1.0") }};
{% if lse %}
    if (thread == 0u && row < seq.rows) {
        let at = {{ lse_at("batch_of(here.batch)", "here.head", "seq.token_q + row") }};
        lse[at] = lse_bits(m, l);
    }
{% endif %}
    // The rows of the tile that `values` reads together, the last of a sequence cut off. A row counts for as many lines
    // as there are heads in such a tile.
    let each = params.values_each;
    let line_own = here.row_tile * each + select(0u, here.head % params.group - params.group0, each > 1u);
    let line_first = line_own / params.values_rows * params.values_rows;
    let tile_last = min(
        params.row0 + (line_first + params.values_rows - 1u) / each,
        min(params.row_end, max(seq.rows, 1u)) - 1u,
    );
    let written = tile_range(seq, min(params.row0 + line_first / each, tile_last), tile_last);
    for (var key = (written.x & ~3u) + thread * 4u; key < written.y; key += THREADS * 4u) {
        let at = line + (key >> 2u);
        let x = in_range(range, key, s[at]);
        let visible = max(weigh_codes(x, m) * inverse, vec4<f32>(LEAST));
        let finite_weight = select(visible, vec4<f32>(NOTHING), x == vec4<f32>(MINUS));
        let weight = select(finite_weight, vec4<f32>(NO_RESULT), broken(m));
        s[at] = select(vec4<f32>(), weight, x > vec4<f32>(HIDDEN));
    }
}
