{% from "shared/address.wgsl" import lse_at, row_at %}
{% from "shared/finish.wgsl" import join_sinks, over_sum %}
{% from "shared/weigh.wgsl" import weigh %}
// Softmax:  row of logits -> row of weights, in place:
//   w[j] = exp(x[j] − m) / l,  l = Σ exp(x[j] − m) (+ exp(sink − m)),  lse = m + ln l.
// There are two passes over the row. The first keeps a running m and l in each invocation, which the workgroup then
// merges. The second writes. Keys outside the row's range and HIDDEN ones weigh 0. A row with no
// visible key is all 0, and its lse is −inf. Logits may be codes (shared/code.wgsl).
//
// Grid:      rows = single query rows, then heads and batches; a workgroup owns one row, of any length.
// Memory:    {{ 8 * threads }} bytes of workgroup memory.
{% if output %}
// Given:     the rows are those of the caller's weights, without a gap between them. Written: the whole row.
{% else %}
// Given:     scratch rows start at multiples of four. Written: every place that `values` reads (the range of its tile
//            of params.values_rows rows, whole vectors of four), or the whole row where the weights are an output, too.
//            Weights may be codes (shared/weight.wgsl).
{% endif %}
// Reference: src/reference/softmax.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read_write> s: array<{{ "u32" if output else "vec4<f32>" }}>;
@group(0) @binding(2) var<storage, read> lists: array<u32>;
{% if lse %}
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;
{% endif %}

{% include "shared/visible.wgsl" %}
{% include "shared/code.wgsl" %}
{% include "shared/normaliser.wgsl" %}
{% if not output %}
{% include "shared/weight.wgsl" %}
{% endif %}

const THREADS: u32 = {{ threads }}u;

var<workgroup> sh_max: array<f32, {{ threads }}>;
var<workgroup> sh_sum: array<f32, {{ threads }}>;

// The four keys that an invocation takes at once, of which `key` is the first.
fn keys_of(key: u32) -> vec4<u32> {
{% if output %}
    // Neighbouring invocations take neighbouring keys.
    return vec4<u32>(key, key + THREADS, key + 2u * THREADS, key + 3u * THREADS);
{% else %}
    return vec4<u32>(key, key + 1u, key + 2u, key + 3u);
{% endif %}
}

// Their logits. The row begins at `row_base`.
fn logits_of(row_base: u32, key: u32, range: vec2<u32>) -> vec4<f32> {
    let keys = keys_of(key);
{% if output %}
    let at = row_base + min(keys, vec4<u32>(params.seq_kv - 1u));
    let x = bitcast<vec4<f32>>(vec4<u32>(s[at.x], s[at.y], s[at.z], s[at.w]));
{% else %}
    let x = s[(row_base + key) >> 2u];
{% endif %}
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
    let row_base = {{ row_at("s", "here.batch", "here.head", "row") }};
    // Rows that a packed sequence does not have keep an empty range: their scratch becomes 0.
    var range = vec2<u32>();
    if (row < seq.rows) {
        range = key_range(seq, row);
    }

    var m = HIDDEN;
    var l = 0.0;
{% set first = "%s + thread" if output else "(%s & ~3u) + thread * 4u" %}
    for (var key = {{ first | format("range.x") }}; key < range.y; key += THREADS * 4u) {
        let x = logits_of(row_base, key, range);
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
{% if output %}
    for (var key = thread; key < params.seq_kv; key += THREADS * 4u) {
        let keys = keys_of(key);
        let x = logits_of(row_base, key, range);
        let finite_weights = bitcast<vec4<u32>>(weigh_codes(x, m) * inverse);
        let weights = select(finite_weights, vec4<u32>(0x7fc00000u), vec4<bool>(broken(m)) & (x > vec4<f32>(HIDDEN)));
{% for axis in "xyzw" %}
        if (keys.{{ axis }} < params.seq_kv) {
            s[row_base + keys.{{ axis }}] = weights.{{ axis }};
        }
{% endfor %}
    }
{% else %}
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
    for (var key = {{ first | format("written.x") }}; key < written.y; key += THREADS * 4u) {
        let x = logits_of(row_base, key, range);
        let visible = max(weigh_codes(x, m) * inverse, vec4<f32>(LEAST));
        let finite_weight = select(visible, vec4<f32>(NOTHING), x == vec4<f32>(MINUS));
        let weight = select(finite_weight, vec4<f32>(NO_RESULT), broken(m));
        s[(row_base + key) >> 2u] = select(vec4<f32>(), weight, x > vec4<f32>(HIDDEN));
    }
{% endif %}
}
