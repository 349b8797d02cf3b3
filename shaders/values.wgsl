{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/lines.wgsl" import lines_until %}
{% from "shared/address.wgsl" import row_at %}
{% from "shared/unroll.wgsl" import joined, weighted, all_good %}
{% from "shared/value.wgsl" import classes_word, classes_of_vector %}
// Values:  out = w v,  weights from the scratch; added to what `out` holds where the keys come in several dispatches. A
// value of NaN or an infinity counts as 0, so that 0 · NaN cannot leak from a hidden key; each row keeps the classes of
// those it sees (shared/value.wgsl). Weights may be codes (shared/weight.wgsl).
//
// Grid:      columns = blocks of value dims, rows = tiles of query rows, then heads and batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     weights are 0 outside a row's range, over whole vectors of four within the range of the tile.
// Reference: src/reference/values.rs
{% if native %}
enable f16;
{% endif %}
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> s: {{ storage("f32", false, true, wide) }};
@group(0) @binding(2) var<storage, read> v: {{ storage(element, native, vector, wide) }};
@group(0) @binding(3) var<storage, read_write> out: {{ output(out, vector) }};
@group(0) @binding(4) var<storage, read> lists: array<u32>;

{% include "shared/visible.wgsl" %}
{% include "shared/value.wgsl" %}
{% include "shared/weight.wgsl" %}
{{ load("s", "f32", false, true, wide) }}
{{ load("v", element, native, vector, wide) }}
{{ store("out", out, vector) }}

fn v_place(batch: u32, head: u32, sequence: Sequence, key: u32) -> u32 {
    return {{ row_at("v", "batch_of(batch)", "(head / params.group)", "(sequence.token_kv + key)") }};
}

fn s_place(batch: u32, head: u32, row: u32) -> u32 {
    return ({{ row_at("s", "batch", "head", "row") }}) >> 2u;
}

fn out_place(batch: u32, head: u32, sequence: Sequence, row: u32) -> u32 {
    return {{ row_at("out", "batch_of(batch)", "head", "(sequence.token_q + row)") }};
}

// Four dims of one row: the sum so far where the keys are split, and the classes of the values.
fn give(at: u32, valid: u32, sum: vec4<f32>, own: u32) {
    var total = sum;
    var all = own;
{% if out == "f32" %}
    if ((params.flags & ADD) != 0u) {
{% if vector %}
        let before = bitcast<vec4<f32>>(out[at >> 2u]);
{% else %}
        let last = valid - 1u;
        let before = bitcast<vec4<f32>>(
            vec4<u32>(out[at], out[at + min(1u, last)], out[at + min(2u, last)], out[at + min(3u, last)]),
        );
{% endif %}
        total += before;
        all |= classes(before);
    }
{% endif %}
    store_out(at, valid, result_bits(total, all));
}

// The classes of a value for a row that gives its key this weight.
fn seen(all: u32, weight: f32) -> u32 {
    return classes_seen(all, weight != 0.0, weight == NOTHING);
}

{% if lanes %}
// Lane-per-row form, for CPU adapters: a lane owns {{ rows }} rows and {{ dims }} dims of each in registers; values of
// four keys are loaded once per subgroup, spread over its lanes, and broadcast. The workgroup is one subgroup. All
// query heads of a key/value head are rows of one tile.
const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const DIMS: u32 = {{ dims }}u;
{% include "shared/lines.wgsl" %}
{% set parts = dims // 4 %}
{# Classes of the values of a row or key: 32-bit words of four vectors each. Of what a lane loads of four keys: words
   likewise. #}
{% set groups = parts // 4 %}
{% set loads = dims // lanes %}
{% set words = (loads + 3) // 4 %}
{% macro see(j, g) %}
{% for r in range(rows) %}
            class_{{ r }}_{{ g }} |= seen(class_of_{{ j }}_{{ g }}, w_{{ r }}.{{ "xyzw"[j] }});
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    {{ "@builtin(subgroup_invocation_id)" if subgroup else "@builtin(local_invocation_index)" }} lane: u32,
) {
    let here = place(workgroup, grid);
    if (!here.inside) {
        return;
    }
    let batch = here.batch;
    let kv_head = here.head * params.group;
    let seq = sequence(batch);
    let line_first = here.row_tile * (LANES * ROWS);
    let row_end = max(params.row0, min(params.row_end, seq.rows));
    let line_end = {{ lines_until("row_end") }};
    if (line_first >= line_end) {
        return;
    }
    let line_last = line_end - 1u;
    let range = tile_range(seq, line_row(line_first), line_row(min(line_first + LANES * ROWS - 1u, line_last)));
    let key_begin = max(params.key0, range.x & ~3u);
    let key_end = min(params.key_end, range.y);
    let key_last = max(seq.stored, 1u) - 1u;
    let dim = here.col_tile * DIMS;
    let valid = params.value_dim - dim;
    let last = (valid - 1u) & ~3u;
{% for r in range(rows) %}
    let owned_{{ r }} = line_first + {{ r * lanes }}u + lane <= line_last;
    let line_{{ r }} = min(line_first + {{ r * lanes }}u + lane, line_last);
    let s_{{ r }} = s_place(batch, line_head(here.head, line_{{ r }}), line_row(line_{{ r }}));
    var broken_{{ r }} = false;
{% for g in range(groups) %}
    var class_{{ r }}_{{ g }} = 0u;
{% endfor %}
{% for c in range(dims // 4) %}
    var sum_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% if subgroup %}
{% for t in range(dims // lanes) %}
    let key_{{ t }} = (lane + {{ t * lanes }}u) / {{ dims // 4 }}u;
    let in_{{ t }} = min(((lane + {{ t * lanes }}u) % {{ dims // 4 }}u) * 4u, last);
{% endfor %}
{% endif %}
    for (var key = key_begin; key < key_end; key += 4u) {
{% for r in range(rows) %}
        let w_{{ r }} = load_s((s_{{ r }} + (key >> 2u)) << 2u, 4u);
        broken_{{ r }} |= any(w_{{ r }} < vec4<f32>());
{% endfor %}
{% if subgroup %}
{% for t in range(dims // lanes) %}
        let raw_{{ t }} = load_v(
            v_place(batch, kv_head, seq, min(key + key_{{ t }}, key_last)) + dim + in_{{ t }},
            valid - in_{{ t }},
        );
        let good_{{ t }} = finite(raw_{{ t }});
        let v_{{ t }} = finite_or_zero(raw_{{ t }});
{% endfor %}
        // In loops of one iteration or none: unlike a branch, drivers on the CPU skip those.
{% for w in range(words) %}
        var own_{{ w }} = 0u;
{% endfor %}
        for (var once = u32(!({{ joined(loads, " & ", "good_#") }})); once > 0u; once--) {
{% for t in range(loads) %}
            own_{{ t // 4 }} |= classes(raw_{{ t }}) << {{ t % 4 * 8 }}u;
{% endfor %}
        }
        // The classes that each lane found, so that all know whether there are any.
{% for w in range(words) %}
{% for n in range(lanes) %}
        let of_{{ w }}_{{ n }} = subgroupBroadcast(own_{{ w }}, {{ n }}u);
{% endfor %}
{% endfor %}
        let bad = {% for w in range(words) -%}
        {{ " | " if not loop.first }}({{ joined(lanes, " | ", "of_%s_#" | format(w)) }})
        {%- endfor %};
        for (var once = u32(bad != 0u); once > 0u; once--) {
{% for j in range(4) %}
{% for g in range(groups) %}
            let class_of_{{ j }}_{{ g }} = {% for c in range(4) -%}
            {% set part = j * parts + g * 4 + c -%}
            {% set word, bit = "of_%s_%s" | format(part // lanes // 4, part % lanes), part // lanes % 4 * 8 -%}
            {{ " | " if not loop.first }}((({{ word }} >> {{ bit }}u) & 0xffu) << {{ c * 8 }}u)
            {%- endfor %};
{{ see(j, g) }}
{% endfor %}
{% endfor %}
        }
{% for j in range(4) %}
{% set component = "xyzw"[j] %}
{% for c in range(dims // 4) %}
{% set part = j * (dims // 4) + c %}
        let b_{{ j }}_{{ c }} = subgroupBroadcast(v_{{ part // lanes }}, {{ part % lanes }}u);
{% for r in range(rows) %}
        sum_{{ r }}_{{ c }} += w_{{ r }}.{{ component }} * b_{{ j }}_{{ c }};
{% endfor %}
{% endfor %}
{% endfor %}
{% else %}
{% for j in range(4) %}
{% set component = "xyzw"[j] %}
        let place_{{ j }} = v_place(batch, kv_head, seq, min(key + {{ j }}u, key_last)) + dim;
{% for c in range(dims // 4) %}
        let raw_{{ j }}_{{ c }} = load_v(place_{{ j }} + min({{ c * 4 }}u, last), valid - min({{ c * 4 }}u, last));
        let good_{{ j }}_{{ c }} = finite(raw_{{ j }}_{{ c }});
        let b_{{ j }}_{{ c }} = finite_or_zero(raw_{{ j }}_{{ c }});
{% for r in range(rows) %}
        sum_{{ r }}_{{ c }} += w_{{ r }}.{{ component }} * b_{{ j }}_{{ c }};
{% endfor %}
{% endfor %}
{% endfor %}
        for (var once = u32(!({{ all_good(4, parts) }})); once > 0u; once--) {
{% for j in range(4) %}
{% for g in range(groups) %}
            let class_of_{{ j }}_{{ g }} = {{ classes_word("raw_%s" | format(j), g * 4) }};
{{ see(j, g) }}
{% endfor %}
{% endfor %}
        }
{% endif %}
    }
{% for r in range(rows) %}
    if (owned_{{ r }}) {
        let at = out_place(batch, line_head(here.head, line_{{ r }}), seq, line_row(line_{{ r }})) + dim;
{% for c in range(dims // 4) %}
        if ({{ c * 4 }}u < valid) {
            give(
                at + {{ c * 4 }}u,
                valid - {{ c * 4 }}u,
                sum_{{ r }}_{{ c }},
                select({{ classes_of_vector("class_%s" | format(r), c) }}, 0xffu, broken_{{ r }}),
            );
        }
{% endfor %}
    }
{% endfor %}
}
{% else %}
// Tiled form, for GPUs: a workgroup owns {{ tile_rows }} rows × {{ tile_cols }} dims, stages {{ dims }} keys of weights
// and values at a time, and each invocation owns {{ rows }} rows × 4·{{ cols }} dims of the tile in registers.
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
{% endif %}
