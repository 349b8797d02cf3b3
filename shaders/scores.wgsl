// Scores:  s = scale · q kᵀ, in f32, into the score scratch. This is the body for GPUs; scores_lanes.wgsl is the one
// for CPU adapters.
{% if full %}
// Every score goes through the whole score transform, and the keys that a row does not see are marked HIDDEN.
{% endif %}
//
// A workgroup owns {{ tile_rows }} query rows × {{ tile_cols }} keys. A loop iteration stages {{ dims }} dims of these
// rows and keys in workgroup memory and adds their products to the scores. An invocation owns {{ rows }} × {{ cols }}
// scores, which it keeps in registers. Its rows and keys stand apart in the tile, so that neighbouring invocations read
// and write neighbouring addresses. A NaN or an infinity in q or k is found by its bits when it is loaded. It makes
// codes of the scores that it enters (shared/code.wgsl).
//
// Grid:      columns = tiles of keys, rows = tiles of query rows, then heads and batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     1 ≤ rows, keys. Rows of the scratch and tiles of keys start at multiples of four. Tiles that no row sees
//            are not written.
// Reference: src/reference/scores.rs
{% if native %}
enable f16;
{% endif %}
{% include "shared/params.wgsl" %}
{% include "shared/scores.wgsl" %}

const TILE_Q: u32 = {{ tile_rows }}u;
const TILE_KV: u32 = {{ tile_cols }}u;
const DIMS: u32 = {{ dims }}u;
const THREADS: u32 = {{ threads }}u;
const PITCH: u32 = {{ dims // 4 + 1 }}u;

var<workgroup> sh_q: array<vec4<f32>, {{ tile_rows * (dims // 4 + 1) }}>;
var<workgroup> sh_k: array<vec4<f32>, {{ tile_cols * (dims // 4 + 1) }}>;
// Not 0: the row, or the key, holds NaN or an infinity.
var<workgroup> sh_q_bad: array<u32, {{ tile_rows }}>;
var<workgroup> sh_k_bad: array<u32, {{ tile_cols }}>;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
{% include "shared/tile.wgsl" %}
    let key_first = params.key0 + here.col_tile * TILE_KV;
    if (max(key_first, range.x) >= min(min(key_first + TILE_KV, params.key_end), range.y) || seq.stored == 0u) {
        return;
    }
    let key_last = seq.stored - 1u;
    let across = thread % {{ tile_cols // cols }}u;
    let down = thread / {{ tile_cols // cols }}u;
{% for r in range(rows) %}
{% for c in range(cols) %}
    var sum_{{ r }}_{{ c }} = 0.0;
{% endfor %}
{% endfor %}
    for (var i = thread; i < TILE_Q; i += THREADS) {
        sh_q_bad[i] = 0u;
    }
    for (var i = thread; i < TILE_KV; i += THREADS) {
        sh_k_bad[i] = 0u;
    }
    workgroupBarrier();
    for (var dim = 0u; dim < params.head_dim; dim += DIMS) {
        for (var part = thread; part < TILE_Q * (DIMS / 4u); part += THREADS) {
            let row = part / (DIMS / 4u);
            let d = dim + (part % (DIMS / 4u)) * 4u;
            var x = vec4<f32>();
            if (d < params.head_dim) {
                x = load_q(q_place(batch, head, seq, min(row_first + row, row_last)) + d, params.head_dim - d);
            }
            if (!finite(x)) {
                sh_q_bad[row] = 1u;
            }
            sh_q[row * PITCH + part % (DIMS / 4u)] = x;
        }
        for (var part = thread; part < TILE_KV * (DIMS / 4u); part += THREADS) {
            let key = part / (DIMS / 4u);
            let d = dim + (part % (DIMS / 4u)) * 4u;
            var x = vec4<f32>();
            if (d < params.head_dim) {
                x = load_k(k_place(batch, head, seq, min(key_first + key, key_last)) + d, params.head_dim - d);
            }
            if (!finite(x)) {
                sh_k_bad[key] = 1u;
            }
            sh_k[key * PITCH + part % (DIMS / 4u)] = x;
        }
        workgroupBarrier();
        // Two pairs of vectors and then their sum, as `rows` and `split` have it.
{% for d in range(dims // 4) %}
{% for r in range(rows) %}
        let q_{{ d }}_{{ r }} = sh_q[(down + {{ r * (tile_rows // rows) }}u) * PITCH + {{ d }}u];
{% endfor %}
{% for c in range(cols) %}
        let k_{{ d }}_{{ c }} = sh_k[(across + {{ c * (tile_cols // cols) }}u) * PITCH + {{ d }}u];
{% for r in range(rows) %}
{% set first = d < 4 and d % 2 == 0 %}
        {{ "var" if first else "" }} part_{{ r }}_{{ c }}_{{ d // 2 % 2 }} {{ "" if first else "+" }}=
            dot(q_{{ d }}_{{ r }}, k_{{ d }}_{{ c }});
{% endfor %}
{% endfor %}
{% endfor %}
{% for r in range(rows) %}
{% for c in range(cols) %}
        sum_{{ r }}_{{ c }} += part_{{ r }}_{{ c }}_0 + part_{{ r }}_{{ c }}_1;
{% endfor %}
{% endfor %}
        workgroupBarrier();
    }
{% for c in range(cols) %}
    let key_{{ c }} = key_first + across + {{ c * (tile_cols // cols) }}u;
{% if full %}
    let position_{{ c }} = key_position(seq, key_{{ c }});
{% endif %}
{% endfor %}
{% for r in range(rows) %}
    let row_{{ r }} = row_first + down + {{ r * (tile_rows // rows) }}u;
    if (row_{{ r }} <= row_last) {
        let s_row = s_place(batch, head, row_{{ r }});
{% for c in range(cols) %}
        if (key_{{ c }} < params.key_end) {
            let bad = (
                sh_q_bad[down + {{ r * (tile_rows // rows) }}u] | sh_k_bad[across + {{ c * (tile_cols // cols) }}u]
            ) != 0u;
            let x = select(scaled(sum_{{ r }}_{{ c }}), scaled_code(sum_{{ r }}_{{ c }}), bad);
{% set logit = "logit(batch, head, row_%s, key_%s, position_%s, seq, x)" | format(r, c, c) %}
            s[s_row + key_{{ c }}] = {{ logit if full else "x" }};
        }
{% endfor %}
    }
{% endfor %}
}
