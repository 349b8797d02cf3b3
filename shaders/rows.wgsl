{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/address.wgsl" import row_at, lse_at %}
{% from "shared/finish.wgsl" import join_sinks, leave_lse, over_sum %}
{% from "shared/weigh.wgsl" import weigh %}
{% from "shared/unroll.wgsl" import joined, maximum %}
{% from "shared/value.wgsl" import classes_word, classes_of_vector %}
// Rows:  out = softmax(logits) v  in one pass over the keys, without a score matrix: each lane owns {{ rows }} query
// rows and keeps their q, running maximum m, sum l and unnormalised output o in registers. Per block of {{ keys }}
// keys:
//   s = scale · q kᵀ;  m' = max(m, s);  p = exp(s − m');  l = l · exp(m − m') + Σ p;  o = o · exp(m − m') + p v.
// At the end out = o / l and lse = m + ln l. (Online softmax: Milakov and Gimelshein, 2018; Dao et al., FlashAttention,
// 2022.)
{% if subgroup %}
// Keys and values are loaded once per subgroup, spread over its lanes, and broadcast.
{% else %}
// Without subgroup operations every lane loads every key and value.
{% endif %}
// NaN and infinities: the walk over the keys only notes whether it met any, by the bits of what it loaded. If so, each
// row is walked once more key by key, with codes for its logits (shared/code.wgsl) and classes for the values that it
// sees (shared/value.wgsl).
{% if carry %}
// The keys come in several dispatches, params.key0 .. params.key_end in this one: m, l and o of each row wait in
// `state` in between.
{% endif %}
//
// Grid:      rows = tiles of {{ rows * lanes }} query rows, then heads and batches (shared/params.wgsl); the workgroup
//            is one subgroup.
// Memory:    no workgroup memory.
// Given:     1 ≤ head_dim, value_dim ≤ {{ dims }}. Blocks of keys that no row of the tile sees by range are not read.
// Reference: src/reference.rs (attention)
{% include "shared/params.wgsl" %}

{% set native = false %}
{% include "shared/operands.wgsl" %}

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

// Below this difference f32 cannot tell the weight from 0.
{{ weigh("f32", "-150.0") }}

{# Every state of the rows as it is before the first key of this dispatch. #}
{% macro restore() %}
{% for r in range(rows) %}
    m_{{ r }} = HIDDEN;
    l_{{ r }} = 0.0;
{% for c in range(parts) %}
    o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% if carry %}
    for (var r = 0u; r < select(0u, turns, (params.flags & ADD) != 0u); r++) {
        let from_place = state_at + r * {{ (1 + parts) * lanes }}u;
        let kept = bitcast<vec4<f32>>(state[from_place]);
{% for c in range(parts) %}
        let kept_{{ c }} = bitcast<vec4<f32>>(state[from_place + {{ (1 + c) * lanes }}u]);
{% endfor %}
{% for g in range(groups) %}
        let class_of_{{ g }} = {{ classes_word("kept", g * 4) }};
{% endfor %}
{% for r in range(rows) %}
        m_{{ r }} = select(m_{{ r }}, kept.x, r == {{ r }}u);
        l_{{ r }} = select(l_{{ r }}, kept.y, r == {{ r }}u);
{% for g in range(groups) %}
        class_{{ r }}_{{ g }} = select(class_{{ r }}_{{ g }}, class_of_{{ g }}, r == {{ r }}u);
{% endfor %}
{% for c in range(parts) %}
        o_{{ r }}_{{ c }} = select(o_{{ r }}_{{ c }}, finite_or_zero(kept_{{ c }}), r == {{ r }}u);
{% endfor %}
{% endfor %}
    }
{% endif %}
{% endmacro %}

{# Four dims of a key, which a lane loads for itself. #}
{% macro k_vector(j, c) -%}
{% set dim = "min(%su, q_last)" | format(c * 4) -%}
select(
                vec4<f32>(),
                load_k(k_at + min(key + {{ j }}u, end - 1u) * params.k_row + {{ dim }}, params.head_dim - {{ dim }}),
                {{ c * 4 }}u < params.head_dim,
            )
{%- endmacro %}
{% macro v_vector(j, c) -%}
{% set dim = "min(%su, v_last)" | format(c * 4) -%}
load_v(v_at + min(key + {{ j }}u, end - 1u) * params.v_row + {{ dim }}, params.value_dim - {{ dim }})
{%- endmacro %}

{# All keys, in blocks. `spread`: loaded once per subgroup and broadcast. `careful`: with codes and classes; otherwise
   `sizes` notes whether that is needed. #}
{% macro walk(keys, spread, careful) %}
    // Page by page; without pages all keys stand in one.
    var first = key_first;
    while (first < key_end) {
        let end = page_end(first, key_end);
        let at = stored_at(seq, batch, first);
        let k_at = {{ row_at("k", "at.x", "(head / params.group)", "(at.y - first)") }};
        let v_at = {{ row_at("v", "at.x", "(head / params.group)", "(at.y - first)") }};
{% if not full %}
{% for r in range(rows) %}
        let end_{{ r }} = min(range_{{ r }}.y, end);
{% endfor %}
{% endif %}
        for (var key = first; key < end; key += {{ keys }}u) {
{% if spread %}
{% for t in range(loads) %}
            let k_{{ t }} = select(
                vec4<f32>(),
                load_k(
                    k_at + min(key + key_{{ t }}, end - 1u) * params.k_row + min(dim_{{ t }}, q_last),
                    params.head_dim - min(dim_{{ t }}, q_last),
                ),
                dim_{{ t }} < params.head_dim,
            );
            sizes = larger(sizes, k_{{ t }});
{% endfor %}
{% elif careful %}
            var k_bad = false;
{% endif %}
            // Dims outermost, so that a q of memory is read once for all keys. Sums of four vectors each, added up:
            // exact where a long chain of equal terms would round (f16's largest, say).
{% for c in range(parts) %}
{% for j in range(keys) %}
{% set part = j * parts + c %}
{% if spread %}
            let k_{{ j }}_{{ c }} = subgroupBroadcast(k_{{ part // lanes }}, {{ part % lanes }}u);
{% else %}
            let k_{{ j }}_{{ c }} = {{ k_vector(j, c) }};
{% if careful %}
            k_bad |= !finite(k_{{ j }}_{{ c }});
{% else %}
            sizes = larger(sizes, k_{{ j }}_{{ c }});
{% endif %}
{% endif %}
{% for r in range(rows) %}
            let d_{{ r }}_{{ j }}_{{ c }} = dot(q_{{ r }}_{{ c }}, k_{{ j }}_{{ c }});
{% if c % 4 == 3 %}
{% set d = "d_%s_%s" | format(r, j) %}
            {{ "var" if c == 3 else "" }} s_{{ r }}_{{ j }} {{ "" if c == 3 else "+" }}=
                ({{ d }}_{{ c - 3 }} + {{ d }}_{{ c - 2 }}) + ({{ d }}_{{ c - 1 }} + {{ d }}_{{ c }});
{% endif %}
{% endfor %}
{% endfor %}
{% endfor %}
{% for r in range(rows) %}
{% for j in range(keys) %}
{% if careful %}
            s_{{ r }}_{{ j }} = select(
                scaled(s_{{ r }}_{{ j }}),
                scaled_code(s_{{ r }}_{{ j }}),
                k_bad | ((q_bad & {{ 2 ** r }}u) != 0u),
            );
{% else %}
            s_{{ r }}_{{ j }} = scaled(s_{{ r }}_{{ j }});
{% endif %}
{% endfor %}
{% endfor %}
{% if full %}
            for (var r = 0u; r < turns; r++) {
                let row = min(row_first + r * LANES + lane, row_last);
{% for j in range(keys) %}
                var x_{{ j }} = s_0_{{ j }};
{% for r in range(1, rows) %}
                x_{{ j }} = select(x_{{ j }}, s_{{ r }}_{{ j }}, r == {{ r }}u);
{% endfor %}
                x_{{ j }} = select(
                    HIDDEN,
                    {{ "logit" if careful else "quick_logit" }}(batch, head, row, key + {{ j }}u, seq, x_{{ j }}),
                    key + {{ j }}u < end,
                );
{% for r in range(rows) %}
                s_{{ r }}_{{ j }} = select(s_{{ r }}_{{ j }}, x_{{ j }}, r == {{ r }}u);
{% endfor %}
{% endfor %}
            }
{% else %}
{% for r in range(rows) %}
{% for j in range(keys) %}
            s_{{ r }}_{{ j }} = select(
                HIDDEN,
                s_{{ r }}_{{ j }},
                (key + {{ j }}u >= range_{{ r }}.x) & (key + {{ j }}u < end_{{ r }}),
            );
{% endfor %}
{% endfor %}
{% endif %}
{% for r in range(rows) %}
            let higher_{{ r }} = {{ maximum(keys, "s_%s" | format(r), "m_%s" | format(r)) }};
            let shrink_{{ r }} = weigh(m_{{ r }}, higher_{{ r }});
            m_{{ r }} = higher_{{ r }};
{% for j in range(keys) %}
            let p_{{ r }}_{{ j }} = select(0.0, weigh(s_{{ r }}_{{ j }}, higher_{{ r }}), s_{{ r }}_{{ j }} > MINUS);
{% endfor %}
            l_{{ r }} = l_{{ r }} * shrink_{{ r }} + {{ joined(keys, " + ", "p_%s_#" | format(r)) }};
{% endfor %}
{% if spread %}
{% for t in range(loads) %}
            let v_{{ t }} = load_v(
                v_at + min(key + key_{{ t }}, end - 1u) * params.v_row + min(dim_{{ t }}, v_last),
                params.value_dim - min(dim_{{ t }}, v_last),
            );
            sizes = larger(sizes, v_{{ t }});
{% endfor %}
{% endif %}
{% for c in range(parts) %}
{% for j in range(keys) %}
{% set part = j * parts + c %}
{% if spread %}
            let v_{{ j }}_{{ c }} = subgroupBroadcast(v_{{ part // lanes }}, {{ part % lanes }}u);
{% elif careful %}
            let raw_{{ j }}_{{ c }} = {{ v_vector(j, c) }};
            let v_{{ j }}_{{ c }} = finite_or_zero(raw_{{ j }}_{{ c }});
{% else %}
            let v_{{ j }}_{{ c }} = {{ v_vector(j, c) }};
            sizes = larger(sizes, v_{{ j }}_{{ c }});
{% endif %}
{% endfor %}
{% for r in range(rows) %}
            o_{{ r }}_{{ c }} =
                o_{{ r }}_{{ c }} * shrink_{{ r }} + {{ joined(keys, " + ", "p_%s_# * v_#_%s" | format(r, c)) }};
{% endfor %}
{% endfor %}
{% if careful %}
{% for g in range(groups) %}
            let class_of_{{ g }} = {{ classes_word("raw_0", g * 4) }};
{% for r in range(rows) %}
            class_{{ r }}_{{ g }} |= classes_seen(class_of_{{ g }}, s_{{ r }}_0 > HIDDEN, s_{{ r }}_0 == MINUS);
{% endfor %}
{% endfor %}
{% endif %}
        }
        first = end;
    }
{% endmacro %}

{% set parts = dims // 4 %}
{% set loads = keys * parts // lanes %}
{# Classes of the values that a row sees: 32-bit words of four vectors each. #}
{% set groups = parts // 4 %}
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
    // From both ends by turns: under a causal rule late rows see most, and drivers give each thread a run of
    // workgroups.
    let turn = here.row_tile / 2u;
    let row_tile = select(turn, params.row_tiles - 1u - turn, here.row_tile % 2u == 1u);
    let row_first = params.row0 + row_tile * (LANES * ROWS);
    let row_end = select(0u, min(params.row_end, seq.rows), here.inside);
    // Rows of this lane: row_first + lane + LANES · r for r < turns. No early return: a CPU driver would run all that
    // follows under a mask.
    let turns = min(ROWS, (max(row_end, row_first) - row_first + LANES - 1u) / LANES);
    let row_last = max(row_end, 1u) - 1u;
    let range = tile_range(seq, min(row_first, row_last), min(row_first + LANES * ROWS - 1u, row_last));
{% if carry %}
    let key_first = max(range.x, params.key0);
    let key_end = select(0u, min(min(range.y, params.key_end), seq.stored), turns > 0u);
    // Of this lane's first row and vector; of the next vectors and then rows {{ lanes }} further each.
    let number = ((batch - params.batch0) * params.heads + head - params.head0) * params.row_tiles + row_tile;
    let state_at = number * {{ (1 + dims // 4) * rows * lanes }}u + lane;
{% else %}
    let key_first = range.x;
    let key_end = select(0u, min(range.y, seq.stored), turns > 0u);
{% endif %}

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
    // One row after the other, so that each load stands once in the text: drivers that compile on the CPU pay for each
    // place.
    let q_last = (params.head_dim - 1u) & ~3u;
    // Bit r: row r of this lane holds NaN or an infinity in q.
    var q_bad = 0u;
    for (var r = 0u; r < turns; r++) {
        let row = min(row_first + r * LANES + lane, row_last);
        let at = {{ row_at("q", "batch_of(batch)", "head", "(seq.token_q + row)") }};
{% for c in range(parts) %}
        let x_{{ c }} = select(
            vec4<f32>(),
            load_q(at + min({{ c * 4 }}u, q_last), params.head_dim - min({{ c * 4 }}u, q_last)),
            {{ c * 4 }}u < params.head_dim,
        );
{% for r in range(rows) %}
        q_{{ r }}_{{ c }} = select(q_{{ r }}_{{ c }}, x_{{ c }}, r == {{ r }}u);
{% endfor %}
{% endfor %}
        let good = {{ joined(parts, " & ", "finite(x_#)") }};
        q_bad |= select(1u << r, 0u, good);
    }

    let v_last = (params.value_dim - 1u) & ~3u;
{% if subgroup %}
{% for t in range(loads) %}
    let key_{{ t }} = (lane + {{ t * lanes }}u) / {{ parts }}u;
    let dim_{{ t }} = ((lane + {{ t * lanes }}u) % {{ parts }}u) * 4u;
{% endfor %}
{% endif %}
{% if carry %}
{{ restore() }}
{% endif %}
    // The largest exponents of what this lane loaded of keys and values.
    var sizes = vec4<u32>();
{{ walk(keys, subgroup, false) }}
{% if full %}
    let own = u32(
        any_ends(sizes) | (q_bad != 0u) | slope_ends(head) | {{ joined(rows, " | ", "(m_# == UNDEFINED)") }},
    );
{% else %}
    let own = u32(any_ends(sizes) | (q_bad != 0u));
{% endif %}
    let again = {{ joined(lanes, " | ", "subgroupBroadcast(own, #u)") if subgroup else "own" }};
    // A loop of one iteration or none: unlike a branch, drivers on the CPU skip it.
    for (var once = again; once > 0u; once--) {
{{ restore() }}
{{ walk(1, false, true) }}
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
{% if carry %}
        let more = params.key_end < params.seq_kv;
        if (more) {
            let to_place = state_at + r * {{ (1 + parts) * lanes }}u;
            state[to_place] = vec4<u32>(bitcast<u32>(m), bitcast<u32>(l), 0u, 0u);
{% for c in range(parts) %}
            var kept_{{ c }} = o_0_{{ c }};
{% for r in range(1, rows) %}
            kept_{{ c }} = select(kept_{{ c }}, o_{{ r }}_{{ c }}, r == {{ r }}u);
{% endfor %}
            state[to_place + {{ (1 + c) * lanes }}u] =
                result_bits(kept_{{ c }}, {{ classes_of_vector("class", c) }});
{% endfor %}
        }
{% endif %}
{{ join_sinks("head") }}
        let all_nan = select(0u, 0xffu, broken(m));
        let factor = {{ over_sum("shrink") }};
        let row = row_first + r * LANES + lane;
        if (row < row_end{{ " && !more" if carry }}) {
{{ leave_lse(lse_at("batch_of(batch)", "head", "seq.token_q + row")) }}
            let at = {{ row_at("out", "batch_of(batch)", "head", "(seq.token_q + row)") }};
{% for c in range(parts) %}
            if ({{ c * 4 }}u < params.value_dim) {
                var y = o_0_{{ c }};
{% for r in range(1, rows) %}
                y = select(y, o_{{ r }}_{{ c }}, r == {{ r }}u);
{% endfor %}
                store_out(
                    at + {{ c * 4 }}u,
                    params.value_dim - {{ c * 4 }}u,
                    result_bits(y * factor, all_nan | ({{ classes_of_vector("class", c) }})),
                );
            }
{% endfor %}
        }
    }
}
