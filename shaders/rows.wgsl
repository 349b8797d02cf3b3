{% from "shared/element.wgsl" import storage, load, store, output %}
// Rows:  out = softmax(logits) v  in one pass over the keys, without a score matrix: each lane owns {{ rows }} query rows and keeps their
// q, running maximum m, sum l and unnormalised output o in registers. Per block of {{ keys }} keys:
//   s = scale · q kᵀ;  m' = max(m, s);  p = exp(s − m');  l = l · exp(m − m') + Σ p;  o = o · exp(m − m') + p v.
// At the end out = o / l and lse = m + ln l. (Online softmax: Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022.)
{% if subgroup %}
// Keys and values are loaded once per subgroup, spread over its lanes, and broadcast.
{% else %}
// Without subgroup operations every lane loads every key and value.
{% endif %}
// NaN and infinities are found by their bits when they are loaded. In q or k they make codes of logits (shared/score.wgsl); in v they count
// as 0, so that 0 · NaN cannot leak from a hidden key, and each row keeps the classes of those it sees (shared/value.wgsl). What they
// cost beyond the tests stands in loops of one iteration or none: unlike a branch, drivers on the CPU skip those.
//
// Grid:      rows = tiles of {{ rows * lanes }} query rows, then heads and batches (shared/params.wgsl); the workgroup is one subgroup.
// Memory:    no workgroup memory.
// Given:     1 ≤ head_dim, value_dim ≤ {{ dims }}. Blocks of keys that no row of the tile sees by range are not read.
// Reference: src/reference.rs (attention)
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> q: {{ storage(element, false, vector, wide) }};
@group(0) @binding(2) var<storage, read> k: {{ storage(element, false, vector, wide) }};
@group(0) @binding(3) var<storage, read> v: {{ storage(element, false, vector, wide) }};
@group(0) @binding(4) var<storage, read_write> out: {{ output(out, vector) }};
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
@group(0) @binding(6) var<storage, read> lists: array<u32>;
{% if full %}
@group(0) @binding(7) var<storage, read> mask: array<u32>;
@group(0) @binding(8) var<storage, read> bias: array<u32>;
{% endif %}

{% include "shared/visible.wgsl" %}
{% include "shared/pages.wgsl" %}
{% include "shared/score.wgsl" %}
{% include "shared/normaliser.wgsl" %}
{% include "shared/total.wgsl" %}
{% include "shared/value.wgsl" %}
{{ load("q", element, false, vector, wide) }}
{{ load("k", element, false, vector, wide) }}
{{ load("v", element, false, vector, wide) }}
{{ store("out", out, vector) }}

const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const KEYS: u32 = {{ keys }}u;

// exp(x − m), as low as f32 can tell from 0.
fn weigh(x: f32, m: f32) -> f32 {
    return exp(max(x - m, -150.0));
}

{# Each row that sees key j keeps the classes of its values of group g. #}
{% macro see(j, g) %}
{% for r in range(rows) %}
                class_{{ r }}_{{ g }} |= select(0u, select(class_of_{{ j }}_{{ g }}, classes_of_zero(class_of_{{ j }}_{{ g }}), x_{{ r }}_{{ j }} == MINUS), x_{{ r }}_{{ j }} > HIDDEN);
{% endfor %}
{% endmacro %}
{% set parts = dims // 4 %}
{% set loads = keys * parts // lanes %}
{# Classes of the values of a row or key: 32-bit words of four vectors each. Of what a lane loads of a block: words likewise. #}
{% set groups = parts // 4 %}
{% set words = (loads + 3) // 4 %}
@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    {{ "@builtin(subgroup_invocation_id)" if subgroup else "@builtin(local_invocation_index)" }} lane: u32,
) {
    let here = place(workgroup, grid);
    let batch = here.batch;
    let head = here.head;
    let seq = sequence(batch);
    // From both ends by turns: under a causal rule late rows see most, and drivers give each thread a run of workgroups.
    let turn = here.row_tile / 2u;
    let row_tile = select(turn, params.row_tiles - 1u - turn, here.row_tile % 2u == 1u);
    let row_first = params.row0 + row_tile * (LANES * ROWS);
    let row_end = select(0u, min(params.row_end, seq.rows), here.inside);
    // Rows of this lane: row_first + lane + LANES · r for r < turns. No early return: a CPU driver would run all that follows under a mask.
    let turns = min(ROWS, (max(row_end, row_first) - row_first + LANES - 1u) / LANES);
    let row_last = max(row_end, 1u) - 1u;
    let range = tile_range(seq, min(row_first, row_last), min(row_first + LANES * ROWS - 1u, row_last));
    let key_end = select(0u, min(range.y, seq.stored), turns > 0u);

{% for r in range(rows) %}
{% if not full %}
    let range_{{ r }} = key_range(seq, min(row_first + {{ r * lanes }}u + lane, row_last));
{% endif %}
    var m_{{ r }} = HIDDEN;
    var l_{{ r }} = 0.0;
{% for g in range(groups) %}
    var class_{{ r }}_{{ g }} = 0u;
{% endfor %}
{% for c in range(parts) %}
    var q_{{ r }}_{{ c }} = vec4<f32>();
    var o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
    // One row after the other, so that each load stands once in the text: drivers that compile on the CPU pay for each place.
    let q_last = (params.head_dim - 1u) & ~3u;
    // Bit r: row r of this lane holds NaN or an infinity in q.
    var q_bad = 0u;
    for (var r = 0u; r < turns; r++) {
        let row = min(row_first + r * LANES + lane, row_last);
        let at = params.q_base + batch_of(batch) * params.q_batch + head * params.q_head + (seq.token_q + row) * params.q_row;
{% for c in range(parts) %}
        let x_{{ c }} = select(vec4<f32>(), load_q(at + min({{ c * 4 }}u, q_last), params.head_dim - min({{ c * 4 }}u, q_last)), {{ c * 4 }}u < params.head_dim);
{% for r in range(rows) %}
        q_{{ r }}_{{ c }} = select(q_{{ r }}_{{ c }}, x_{{ c }}, r == {{ r }}u);
{% endfor %}
{% endfor %}
        let good = {% for c in range(parts) %}{{ " && " if not loop.first }}finite(x_{{ c }}){% endfor %};
        q_bad |= select(1u << r, 0u, good);
    }

    let v_last = (params.value_dim - 1u) & ~3u;
{% if subgroup %}
{% for t in range(loads) %}
    let key_{{ t }} = (lane + {{ t * lanes }}u) / {{ parts }}u;
    let dim_{{ t }} = ((lane + {{ t * lanes }}u) % {{ parts }}u) * 4u;
{% endfor %}
{% endif %}
    // Page by page; without pages all keys stand in one.
    var first = range.x;
    while (first < key_end) {
        let end = page_end(first, key_end);
        let at = stored_at(seq, batch, first);
        let k_at = params.k_base + at.x * params.k_batch + (head / params.group) * params.k_head + (at.y - first) * params.k_row;
        let v_at = params.v_base + at.x * params.v_batch + (head / params.group) * params.v_head + (at.y - first) * params.v_row;
{% if not full %}
{% for r in range(rows) %}
        let end_{{ r }} = min(range_{{ r }}.y, end);
{% endfor %}
{% endif %}
        for (var key = first; key < end; key += KEYS) {
{% if subgroup %}
{% for t in range(loads) %}
            let k_{{ t }} = select(
                vec4<f32>(),
                load_k(k_at + min(key + key_{{ t }}, end - 1u) * params.k_row + min(dim_{{ t }}, q_last), params.head_dim - min(dim_{{ t }}, q_last)),
                dim_{{ t }} < params.head_dim,
            );
{% endfor %}
            let k_own = {% for t in range(loads) %}{{ " | " if not loop.first }}select({{ 2 ** (t // (loads // keys)) }}u, 0u, finite(k_{{ t }})){% endfor %};
            // Bit j: key j holds NaN or an infinity.
            let k_bad = {% for n in range(lanes) %}{{ " | " if not loop.first }}subgroupBroadcast(k_own, {{ n }}u){% endfor %};
{% endif %}
{% if not subgroup %}
            var k_bad = 0u;
{% for j in range(keys) %}
            let k_place_{{ j }} = k_at + min(key + {{ j }}u, end - 1u) * params.k_row;
{% endfor %}
{% endif %}
            // Dims outermost, so that a q of memory is read once for all keys. Sums of four vectors each, added up: exact where a long chain
            // of equal terms would round (f16's largest, say).
{% for c in range(parts) %}
{% for j in range(keys) %}
{% set part = j * parts + c %}
{% if subgroup %}
            let k_{{ j }}_{{ c }} = subgroupBroadcast(k_{{ part // lanes }}, {{ part % lanes }}u);
{% else %}
            let k_{{ j }}_{{ c }} = select(vec4<f32>(), load_k(k_place_{{ j }} + min({{ c * 4 }}u, q_last), params.head_dim - min({{ c * 4 }}u, q_last)), {{ c * 4 }}u < params.head_dim);
            k_bad |= select({{ 2 ** j }}u, 0u, finite(k_{{ j }}_{{ c }}));
{% endif %}
{% for r in range(rows) %}
            let d_{{ r }}_{{ j }}_{{ c }} = dot(q_{{ r }}_{{ c }}, k_{{ j }}_{{ c }});
{% if c % 4 == 3 %}
            {{ "var" if c == 3 else "" }} s_{{ r }}_{{ j }} {{ "" if c == 3 else "+" }}= (d_{{ r }}_{{ j }}_{{ c - 3 }} + d_{{ r }}_{{ j }}_{{ c - 2 }}) + (d_{{ r }}_{{ j }}_{{ c - 1 }} + d_{{ r }}_{{ j }}_{{ c }});
{% endif %}
{% endfor %}
{% endfor %}
{% endfor %}
{% for r in range(rows) %}
{% for j in range(keys) %}
            var x_{{ r }}_{{ j }} = scaled(s_{{ r }}_{{ j }});
{% endfor %}
{% endfor %}
            for (var once = u32((q_bad | k_bad) != 0u); once > 0u; once--) {
{% for r in range(rows) %}
{% for j in range(keys) %}
                x_{{ r }}_{{ j }} = select(x_{{ r }}_{{ j }}, scaled_code(s_{{ r }}_{{ j }}), ((q_bad & {{ 2 ** r }}u) | (k_bad & {{ 2 ** j }}u)) != 0u);
{% endfor %}
{% endfor %}
            }
{% if full %}
            for (var r = 0u; r < turns; r++) {
                let row = min(row_first + r * LANES + lane, row_last);
{% for j in range(keys) %}
                var x_{{ j }} = x_0_{{ j }};
{% for r in range(1, rows) %}
                x_{{ j }} = select(x_{{ j }}, x_{{ r }}_{{ j }}, r == {{ r }}u);
{% endfor %}
                x_{{ j }} = select(HIDDEN, logit(batch, head, row, key + {{ j }}u, seq, x_{{ j }}), key + {{ j }}u < end);
{% for r in range(rows) %}
                x_{{ r }}_{{ j }} = select(x_{{ r }}_{{ j }}, x_{{ j }}, r == {{ r }}u);
{% endfor %}
{% endfor %}
            }
{% else %}
{% for r in range(rows) %}
{% for j in range(keys) %}
            x_{{ r }}_{{ j }} = select(HIDDEN, x_{{ r }}_{{ j }}, key + {{ j }}u >= range_{{ r }}.x && key + {{ j }}u < end_{{ r }});
{% endfor %}
{% endfor %}
{% endif %}
{% for r in range(rows) %}
            let higher_{{ r }} = {% for j in range(keys) %}max(x_{{ r }}_{{ j }}, {% endfor %}m_{{ r }}{% for j in range(keys) %}){% endfor %};
            let shrink_{{ r }} = weigh(m_{{ r }}, higher_{{ r }});
            m_{{ r }} = higher_{{ r }};
{% for j in range(keys) %}
            let p_{{ r }}_{{ j }} = select(0.0, weigh(x_{{ r }}_{{ j }}, higher_{{ r }}), x_{{ r }}_{{ j }} > MINUS);
{% endfor %}
            l_{{ r }} = l_{{ r }} * shrink_{{ r }}{% for j in range(keys) %} + p_{{ r }}_{{ j }}{% endfor %};
{% endfor %}
{% if subgroup %}
{% for t in range(loads) %}
            let raw_{{ t }} = load_v(v_at + min(key + key_{{ t }}, end - 1u) * params.v_row + min(dim_{{ t }}, v_last), params.value_dim - min(dim_{{ t }}, v_last));
            let good_{{ t }} = finite(raw_{{ t }});
            let v_{{ t }} = finite_or_zero(raw_{{ t }});
{% endfor %}
{% for w in range(words) %}
            var v_own_{{ w }} = 0u;
{% endfor %}
            for (var once = u32(!({% for t in range(loads) %}{{ " && " if not loop.first }}good_{{ t }}{% endfor %})); once > 0u; once--) {
{% for t in range(loads) %}
                v_own_{{ t // 4 }} |= classes(raw_{{ t }}) << {{ t % 4 * 8 }}u;
{% endfor %}
            }
            // The classes that each lane found, so that all know whether there are any.
{% for w in range(words) %}
{% for n in range(lanes) %}
            let v_of_{{ w }}_{{ n }} = subgroupBroadcast(v_own_{{ w }}, {{ n }}u);
{% endfor %}
{% endfor %}
            let v_bad = {% for w in range(words) %}{{ " | " if not loop.first }}({% for n in range(lanes) %}{{ " | " if not loop.first }}v_of_{{ w }}_{{ n }}{% endfor %}){% endfor %};
            for (var once = u32(v_bad != 0u); once > 0u; once--) {
{% for j in range(keys) %}
{% for g in range(groups) %}
                let class_of_{{ j }}_{{ g }} = {% for c in range(4) %}{% set part = j * parts + g * 4 + c %}{{ " | " if not loop.first }}(((v_of_{{ part // lanes // 4 }}_{{ part % lanes }} >> {{ part // lanes % 4 * 8 }}u) & 0xffu) << {{ c * 8 }}u){% endfor %};
{{ see(j, g) }}
{% endfor %}
{% endfor %}
            }
{% else %}
{% for j in range(keys) %}
            let v_place_{{ j }} = v_at + min(key + {{ j }}u, end - 1u) * params.v_row;
{% endfor %}
{% endif %}
{% for c in range(parts) %}
{% for j in range(keys) %}
{% set part = j * parts + c %}
{% if subgroup %}
            let v_{{ j }}_{{ c }} = subgroupBroadcast(v_{{ part // lanes }}, {{ part % lanes }}u);
{% else %}
            let raw_{{ j }}_{{ c }} = load_v(v_place_{{ j }} + min({{ c * 4 }}u, v_last), params.value_dim - min({{ c * 4 }}u, v_last));
            let good_{{ j }}_{{ c }} = finite(raw_{{ j }}_{{ c }});
            let v_{{ j }}_{{ c }} = finite_or_zero(raw_{{ j }}_{{ c }});
{% endif %}
{% endfor %}
{% for r in range(rows) %}
            o_{{ r }}_{{ c }} = o_{{ r }}_{{ c }} * shrink_{{ r }}{% for j in range(keys) %} + p_{{ r }}_{{ j }} * v_{{ j }}_{{ c }}{% endfor %};
{% endfor %}
{% endfor %}
{% if not subgroup %}
            for (var once = u32(!({% for j in range(keys) %}{{ " && " if not loop.first }}{% for c in range(parts) %}{{ " && " if not loop.first }}good_{{ j }}_{{ c }}{% endfor %}{% endfor %})); once > 0u; once--) {
{% for j in range(keys) %}
{% for g in range(groups) %}
                let class_of_{{ j }}_{{ g }} = {% for c in range(4) %}{{ " | " if not loop.first }}(classes(raw_{{ j }}_{{ g * 4 + c }}) << {{ c * 8 }}u){% endfor %};
{{ see(j, g) }}
{% endfor %}
{% endfor %}
            }
{% endif %}
        }
        first = end;
    }

    for (var r = 0u; r < turns; r++) {
        var m = m_0;
        var l = l_0;
{% for g in range(groups) %}
        var class_{{ g }} = class_0_{{ g }};
{% endfor %}
{% for r in range(1, rows) %}
        m = select(m, m_{{ r }}, r == {{ r }}u);
        l = select(l, l_{{ r }}, r == {{ r }}u);
{% for g in range(groups) %}
        class_{{ g }} = select(class_{{ g }}, class_{{ r }}_{{ g }}, r == {{ r }}u);
{% endfor %}
{% endfor %}
        var shrink = 1.0;
        if ((params.flags & SINKS) != 0u) {
            let with_sink = join_sink(m, l, coded(lists[params.list_sinks + head]));
            shrink = with_sink.shrink;
            l = with_sink.l;
            m = with_sink.m;
        }
        let all_nan = select(0u, 0xffu, broken(m));
        let factor = select(0.0, shrink / l, l > 0.0);
        let row = row_first + r * LANES + lane;
        if (row < row_end) {
            if ((params.flags & LSE) != 0u) {
                let at = params.lse_base + batch_of(batch) * params.lse_batch + head * params.lse_head + seq.token_q + row;
                store_lse(at, m, l);
            }
            let at = params.out_base + batch_of(batch) * params.out_batch + head * params.out_head + (seq.token_q + row) * params.out_row;
{% for c in range(parts) %}
            if ({{ c * 4 }}u < params.value_dim) {
                var y = o_0_{{ c }};
{% for r in range(1, rows) %}
                y = select(y, o_{{ r }}_{{ c }}, r == {{ r }}u);
{% endfor %}
                store_out(at + {{ c * 4 }}u, params.value_dim - {{ c * 4 }}u, result_bits(y * factor, all_nan | (class_{{ c // 4 }} >> {{ c % 4 * 8 }}u)));
            }
{% endfor %}
        }
    }
}
