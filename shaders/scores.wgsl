{% from "shared/element.wgsl" import storage, load %}
{% from "shared/lines.wgsl" import lines_until %}
{% from "shared/address.wgsl" import row_at %}
{% from "shared/unroll.wgsl" import joined, four_dots %}
// Scores:  s = scale · q kᵀ  (with `full`: the whole logit, hidden keys marked), f32, into the score scratch.
//
// A NaN or an infinity in q or k is found by its bits when it is loaded and makes codes of scores (shared/code.wgsl).
//
// Grid:      columns = tiles of keys, rows = tiles of query rows, then heads and batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     1 ≤ rows, keys; scratch rows start at multiples of four; key tiles too. Tiles that no row sees are not
//            written.
// Reference: src/reference/scores.rs
{% if native %}
enable f16;
{% endif %}
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> q: {{ storage(element, native, vector, wide) }};
@group(0) @binding(2) var<storage, read> k: {{ storage(element, native, vector, wide) }};
@group(0) @binding(3) var<storage, read_write> s: array<{{ "vec4<f32>" if lanes else "f32" }}>;
@group(0) @binding(4) var<storage, read> lists: array<u32>;
{% if full %}
@group(0) @binding(5) var<storage, read> mask: array<u32>;
@group(0) @binding(6) var<storage, read> bias: array<u32>;
{% endif %}

{% include "shared/visible.wgsl" %}
{% include "shared/score.wgsl" %}
{% include "shared/value.wgsl" %}
{{ load("q", element, native, vector, wide) }}
{{ load("k", element, native, vector, wide) }}

fn q_place(batch: u32, head: u32, sequence: Sequence, row: u32) -> u32 {
    return {{ row_at("q", "batch_of(batch)", "head", "(sequence.token_q + min(row, max(sequence.rows, 1u) - 1u))") }};
}

fn k_place(batch: u32, head: u32, sequence: Sequence, key: u32) -> u32 {
    return {{ row_at("k", "batch_of(batch)", "(head / params.group)", "(sequence.token_kv + key)") }};
}

fn s_place(batch: u32, head: u32, row: u32) -> u32 {
    return {{ row_at("s", "batch", "head", "row") }};
}

{% if lanes %}
// Lane-per-row form, for CPU adapters, where loads are the cost: a lane owns {{ rows }} rows and keeps {{ dims }} dims
// of each in registers; four keys are loaded once per subgroup, spread over its lanes, and broadcast. All query heads
// of a key/value head are rows of one tile. The workgroup is one subgroup; it runs over {{ tile_cols }} keys. Head dims
// beyond {{ dims }} take further passes that add to the scratch.
const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const DIMS: u32 = {{ dims }}u;
const KEYS: u32 = {{ tile_cols }}u;
{% include "shared/lines.wgsl" %}

// A score with what may be a code of the dims before, and one of these dims where q or k holds NaN or an infinity
// there.
fn with_codes(x: f32, before: f32, dot_product: f32, bad: bool, scales: bool) -> f32 {
    let own = select(0.0, code_of(dot_product), bad);
    let ends = abs(before) > HIGHEST;
    let both = ends & bad & (own != before);
    let code = select(select(own, before, ends), UNDEFINED, both);
    return select(x, select(code, scale_code(code), scales), ends | bad);
}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    {{ "@builtin(subgroup_invocation_id)" if subgroup else "@builtin(local_invocation_index)" }} lane: u32,
) {
    let here = place(workgroup, grid);
    let batch = here.batch;
    let kv_head = here.head * params.group;
    let seq = sequence(batch);
    let line_first = here.row_tile * (LANES * ROWS);
    let row_end = max(params.row0, min(params.row_end, seq.rows));
    let line_end = {{ lines_until("row_end") }};
    let line_last = max(line_end, 1u) - 1u;
    let range = tile_range(
        seq,
        line_row(min(line_first, line_last)),
        line_row(min(line_first + LANES * ROWS - 1u, line_last)),
    );
    let key_first = params.key0 + here.col_tile * KEYS;
    let key_begin = max(key_first, range.x & ~3u);
    let key_stop = min(min(key_first + KEYS, params.key_end), min(range.y, seq.stored));
    // No early return: a CPU driver would run all that follows under a mask. Without work the loop is empty.
    let key_end = select(0u, key_stop, here.inside & (line_first < line_end));
    let key_last = max(seq.stored, 1u) - 1u;
{% for r in range(rows) %}
    let owned_{{ r }} = line_first + {{ r * lanes }}u + lane <= line_last;
    let line_{{ r }} = min(line_first + {{ r * lanes }}u + lane, line_last);
    let q_{{ r }} = q_place(batch, line_head(here.head, line_{{ r }}), seq, line_row(line_{{ r }}));
    let s_{{ r }} = s_place(batch, line_head(here.head, line_{{ r }}), line_row(line_{{ r }}));
{% endfor %}
{% if subgroup %}
{% for t in range(dims // lanes) %}
    let key_{{ t }} = (lane + {{ t * lanes }}u) / {{ dims // 4 }}u;
    let dim_{{ t }} = ((lane + {{ t * lanes }}u) % {{ dims // 4 }}u) * 4u;
{% endfor %}
{% endif %}
    for (var dim = 0u; dim < params.head_dim; dim += DIMS) {
        // Bit r: row r of this lane holds NaN or an infinity in these dims.
        var q_bad = 0u;
        let valid = params.head_dim - dim;
        let last = (valid - 1u) & ~3u;
{% for c in range(dims // 4) %}
        let held_{{ c }} = {{ c * 4 }}u < valid;
        let at_{{ c }} = dim + min({{ c * 4 }}u, last);
        let left_{{ c }} = valid - min({{ c * 4 }}u, last);
{% for r in range(rows) %}
        let q_{{ r }}_{{ c }} = select(vec4<f32>(), load_q(q_{{ r }} + at_{{ c }}, left_{{ c }}), held_{{ c }});
        q_bad |= select({{ 2 ** r }}u, 0u, finite(q_{{ r }}_{{ c }}));
{% endfor %}
{% endfor %}
{% if subgroup %}
{% for t in range(dims // lanes) %}
        let in_{{ t }} = min(dim_{{ t }}, last);
{% endfor %}
{% endif %}
        for (var key = key_begin; key < key_end; key += 4u) {
{% if subgroup %}
{% for t in range(dims // lanes) %}
            let k_{{ t }} = select(
                vec4<f32>(),
                load_k(
                    k_place(batch, kv_head, seq, min(key + key_{{ t }}, key_last)) + dim + in_{{ t }},
                    valid - in_{{ t }},
                ),
                dim_{{ t }} < valid,
            );
{% endfor %}
{% set each = dims // lanes // 4 %}
            let k_own = {% for t in range(dims // lanes) -%}
            {{ " | " if not loop.first }}select({{ 2 ** (t // each) }}u, 0u, finite(k_{{ t }}))
            {%- endfor %};
            // Bit j: key j holds NaN or an infinity.
            let k_bad = {{ joined(lanes, " | ", "subgroupBroadcast(k_own, #u)") }};
{% else %}
            var k_bad = 0u;
{% endif %}
{% for r in range(rows) %}
            var sum_{{ r }} = vec4<f32>();
{% endfor %}
{% for j in range(4) %}
{% set component = "xyzw"[j] %}
{% if not subgroup %}
            let place_{{ j }} = k_place(batch, kv_head, seq, min(key + {{ j }}u, key_last)) + dim;
{% endif %}
{% for c in range(dims // 4) %}
{% set part = j * (dims // 4) + c %}
{% if subgroup %}
            let b_{{ j }}_{{ c }} = subgroupBroadcast(k_{{ part // lanes }}, {{ part % lanes }}u);
{% else %}
            let b_{{ j }}_{{ c }} = select(
                vec4<f32>(),
                load_k(place_{{ j }} + min({{ c * 4 }}u, last), left_{{ c }}),
                held_{{ c }},
            );
            k_bad |= select({{ 2 ** j }}u, 0u, finite(b_{{ j }}_{{ c }}));
{% endif %}
{% if c % 4 == 3 %}
{% for r in range(rows) %}
            sum_{{ r }}.{{ component }} += {{ four_dots("q_%s" | format(r), "b_%s" | format(j), c - 3) }};
{% endfor %}
{% endif %}
{% endfor %}
{% endfor %}
            // What the dims before left: a sum, or a code.
            let more = dim > 0u;
            let scale = select(1.0, params.scale, valid <= DIMS);
{% for r in range(rows) %}
            var before_{{ r }} = vec4<f32>();
            if (more) {
                before_{{ r }} = s[(s_{{ r }} + key) >> 2u];
            }
            var x_{{ r }} = clamp((before_{{ r }} + sum_{{ r }}) * scale, vec4<f32>(LOWEST), vec4<f32>(HIGHEST));
{% endfor %}
            // A loop of one iteration or none: unlike a branch, drivers on the CPU skip it.
{% set coded_before = joined(rows, " | ", "any(abs(before_#) > vec4<f32>(HIGHEST))") %}
            for (var once = u32(((q_bad | k_bad) != 0u) | {{ coded_before }}); once > 0u; once--) {
{% for r in range(rows) %}
{% for j in range(4) %}
{% set component = "xyzw"[j] %}
                x_{{ r }}.{{ component }} = with_codes(
                    x_{{ r }}.{{ component }},
                    before_{{ r }}.{{ component }},
                    sum_{{ r }}.{{ component }},
                    ((q_bad & {{ 2 ** r }}u) | (k_bad & {{ 2 ** j }}u)) != 0u,
                    valid <= DIMS,
                );
{% endfor %}
{% endfor %}
            }
{% for r in range(rows) %}
            if (owned_{{ r }}) {
                s[(s_{{ r }} + key) >> 2u] = x_{{ r }};
            }
{% endfor %}
        }
    }
}
{% else %}
// Tiled form, for GPUs: a workgroup owns {{ tile_rows }} rows × {{ tile_cols }} keys, stages {{ dims }} dims of both at
// a time, and each invocation owns {{ rows }} × {{ cols }} of the tile in registers; its rows and keys stand apart, so
// that neighbours read and write neighbouring places.
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
        // Two pairs of vectors and then their sum, as `rows` and `split` have it: `weights` compares these scores with
        // the maximum of theirs. Where a compiler added the two in orders that differ, a weight would be off by as much
        // as the two scores.
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
{% for r in range(rows) %}
    let row_{{ r }} = row_first + down + {{ r * (tile_rows // rows) }}u;
    if (row_{{ r }} <= row_last) {
        let line = s_place(batch, head, row_{{ r }});
{% for c in range(cols) %}
        let key_{{ c }} = key_first + across + {{ c * (tile_cols // cols) }}u;
        if (key_{{ c }} < params.key_end) {
            let bad = (
                sh_q_bad[down + {{ r * (tile_rows // rows) }}u] | sh_k_bad[across + {{ c * (tile_cols // cols) }}u]
            ) != 0u;
            let x = select(scaled(sum_{{ r }}_{{ c }}), scaled_code(sum_{{ r }}_{{ c }}), bad);
            s[line + key_{{ c }}] = {{ "logit(batch, head, row_%s, key_%s, seq, x)" | format(r, c) if full else "x" }};
        }
{% endfor %}
    }
{% endfor %}
}
{% endif %}
