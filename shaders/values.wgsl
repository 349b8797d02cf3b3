{% from "shared/unroll.wgsl" import weighted %}
// Values:  out = w v, with the weights w in the score scratch. Where the keys come in several dispatches, the later
// ones add to what `out` holds. This is the body for GPUs; values_lanes.wgsl is the one for CPU adapters.
//
// A workgroup owns {{ tile_rows }} rows × {{ tile_cols }} value dims. A loop iteration stages the weights and values of
// {{ dims }} keys in workgroup memory and adds their products to the sums. An invocation owns {{ rows }}
// rows × {{ 4 * cols }} dims, which it keeps in registers. A value of NaN or an infinity counts as 0, so that 0 · NaN
// cannot leak from a hidden key. Each row keeps the classes of such values of the keys that it sees
// (shared/value.wgsl). Weights may be codes (shared/weight.wgsl).
//
// Grid:      columns = blocks of value dims, rows = tiles of query rows, then heads and batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     weights are 0 outside a row's range, over whole vectors of four within the range of the tile.
// Reference: src/reference/values.rs
{% if native %}
enable f16;
{% endif %}
{% include "shared/params.wgsl" %}
{% include "shared/values.wgsl" %}

const TILE_Q: u32 = {{ tile_rows }}u;
const TILE_D: u32 = {{ tile_cols }}u;
const KEYS: u32 = {{ dims }}u;
const THREADS: u32 = {{ threads }}u;
const PITCH: u32 = {{ dims // 4 + 1 }}u;

var<workgroup> sh_w: array<vec4<f32>, {{ tile_rows * (dims // 4 + 1) }}>;
var<workgroup> sh_v: array<vec4<f32>, {{ dims * tile_cols // 4 }}>;
// The last staging, counted from 1, in which key j (or any key) held a non-finite value: no reset, so no further
// barrier.
var<workgroup> sh_bad: array<u32, {{ dims }}>;
var<workgroup> sh_any: u32;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
{% include "shared/tile.wgsl" %}
    let key_begin = max(params.key0, range.x & ~3u);
    let key_end = min(params.key_end, range.y);
    let dim_first = here.col_tile * TILE_D;
    let across = thread % {{ tile_cols // 4 // cols }}u;
    let down = thread / {{ tile_cols // 4 // cols }}u;
{% for r in range(rows) %}
    var broken_{{ r }} = false;
    // The classes of the values seen, eight bits for each vector.
    var class_{{ r }} = 0u;
{% for c in range(cols) %}
    var sum_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
    if (thread < KEYS) {
        sh_bad[thread] = 0u;
    }
    if (thread == 0u) {
        sh_any = 0u;
    }
    workgroupBarrier();
    var stage = 0u;
    for (var key = key_begin; key < key_end; key += KEYS) {
        stage += 1u;
        for (var part = thread; part < TILE_Q * (KEYS / 4u); part += THREADS) {
            let row = part / (KEYS / 4u);
            let j = key + (part % (KEYS / 4u)) * 4u;
            var w = vec4<f32>();
            if (j < key_end) {
                w = load_s((s_place(batch, head, min(row_first + row, row_last)) + (j >> 2u)) << 2u, 4u);
            }
            sh_w[row * PITCH + part % (KEYS / 4u)] = w;
        }
        for (var part = thread; part < KEYS * (TILE_D / 4u); part += THREADS) {
            let j = part / (TILE_D / 4u);
            let d = dim_first + (part % (TILE_D / 4u)) * 4u;
            var x = vec4<f32>();
            if (key + j < key_end && d < params.value_dim) {
                x = load_v(v_place(batch, head, seq, key + j) + d, params.value_dim - d);
            }
            if (!finite(x)) {
                x = finite_or_zero(x);
                sh_bad[j] = stage;
                sh_any = stage;
            }
            sh_v[part] = x;
        }
        workgroupBarrier();
{% for j4 in range(dims // 4) %}
{% for r in range(rows) %}
        let w_{{ j4 }}_{{ r }} = sh_w[(down + {{ r * (tile_rows // rows) }}u) * PITCH + {{ j4 }}u];
        broken_{{ r }} |= any(w_{{ j4 }}_{{ r }} < vec4<f32>());
{% endfor %}
{% for c in range(cols) %}
{% for j in range(4) %}
        let v_{{ j4 }}_{{ c }}_{{ j }} =
            sh_v[{{ (j4 * 4 + j) * (tile_cols // 4) }}u + across + {{ c * (tile_cols // 4 // cols) }}u];
{% endfor %}
{% for r in range(rows) %}
        sum_{{ r }}_{{ c }} += {{ weighted("w_%s_%s" | format(j4, r), "v_%s_%s" | format(j4, c)) }};
{% endfor %}
{% endfor %}
{% endfor %}
        if (sh_any == stage) {
            for (var j = 0u; j < min(KEYS, key_end - key); j++) {
                if (sh_bad[j] == stage) {
{% for c in range(cols) %}
                    let dim_{{ c }} = dim_first + (across + {{ c * (tile_cols // 4 // cols) }}u) * 4u;
                    if (dim_{{ c }} < params.value_dim) {
                        let all = classes(
                            load_v(v_place(batch, head, seq, key + j) + dim_{{ c }}, params.value_dim - dim_{{ c }}),
                        );
{% for r in range(rows) %}
                        class_{{ r }} |=
                            seen(all, sh_w[(down + {{ r * (tile_rows // rows) }}u) * PITCH + j / 4u][j % 4u])
                            << {{ c * 8 }}u;
{% endfor %}
                    }
{% endfor %}
                }
            }
        }
        workgroupBarrier();
    }
{% for r in range(rows) %}
    let row_{{ r }} = row_first + down + {{ r * (tile_rows // rows) }}u;
    if (row_{{ r }} <= row_last) {
        let at = out_place(batch, head, seq, row_{{ r }});
{% for c in range(cols) %}
        let dim_{{ r }}_{{ c }} = dim_first + (across + {{ c * (tile_cols // 4 // cols) }}u) * 4u;
        if (dim_{{ r }}_{{ c }} < params.value_dim) {
            give(
                at + dim_{{ r }}_{{ c }},
                params.value_dim - dim_{{ r }}_{{ c }},
                sum_{{ r }}_{{ c }},
                select(class_{{ r }} >> {{ c * 8 }}u, 0xffu, broken_{{ r }}),
            );
        }
{% endfor %}
    }
{% endfor %}
}
