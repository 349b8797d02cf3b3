{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/address.wgsl" import row_at, lse_at %}
{% from "shared/finish.wgsl" import join_sinks, leave_lse, over_sum %}
{% from "shared/weigh.wgsl" import weigh %}
{% from "shared/unroll.wgsl" import joined, maximum, take, put %}
{% from "shared/value.wgsl" import classes_word, classes_of_vector %}
// Rows:  out = softmax(logits) v  in one pass over the keys, without a score matrix. This is the fused kernel for CPU
// adapters, and the kernel to read first: apart from broadcasts within the subgroup, each invocation works alone.
//
// A workgroup is one subgroup of {{ lanes }} lanes. It owns a tile of {{ rows * lanes }} query rows of one head and
// takes the keys of the tile one block after the other.
//
// An invocation is a lane. It owns up to {{ rows }} rows of the tile. In registers it keeps q of each row and the state
// of the online softmax: m, the maximum of the logits so far; l, the sum of exp(logit − m); and o, the sum of
// exp(logit − m) v. (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022.)
//
// A loop iteration adds a block of {{ keys }} keys to the state of each row:
//   s = scale · q kᵀ;  m' = max(m, s);  p = exp(s − m');  l = l · exp(m − m') + Σ p;  o = o · exp(m − m') + Σ p v.
// At the end out = o / l and lse = m + ln l.
//
// How to read the text: `main` stands at the end, and the steps that it names stand before it, in the order in which
// they run. A step is a macro, because drivers do not keep arrays in registers: each row r, key j of a block and vector
// c of four dims has variables of its own, such as q_r_c, s_r_j, p_r_j and o_r_c, and loops over these numbers are
// written out. Loops over rows that do run have the counter r, and `take` and `put` connect it with the variables.
{% if subgroup %}
//
// Loads are the cost on CPU adapters. So each vector of a block is loaded by one lane of the subgroup and broadcast to
// the others.
{% else %}
//
// Without subgroup operations every lane loads all keys and values.
{% endif %}
//
// NaN and infinities take a second pass. The quick pass over the keys only notes whether there are any, by the bits of
// what it loads. Only if there are, the careful pass starts again: it takes one key at a time, with codes for logits
// (shared/code.wgsl) and classes for the values that a row sees (shared/value.wgsl).
{% if carry %}
//
// The keys come in several dispatches; params.key0 .. params.key_end are those of this one. In between, m, l and o of
// each row wait in `state`.
{% endif %}
//
// Grid:      rows = tiles of {{ rows * lanes }} query rows, then heads and batches (shared/params.wgsl).
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
{% include "shared/value.wgsl" %}
{{ load("q", element, false, vector, wide) }}
{{ load("k", element, false, vector, wide) }}
{{ load("v", element, false, vector, wide) }}
{{ store("out", out, vector) }}

const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const KEYS: u32 = {{ keys }}u;
{# Vectors of four dims. #}
{% set vectors = dims // 4 %}
{# Words of classes of a row: four vectors each. #}
{% set words = vectors // 4 %}
{# Vectors of a block that each lane loads for the subgroup. #}
{% set loads = keys * vectors // lanes %}
{# From one vector of a row to its next one in `state`, and from one row of a lane to its next one. #}
{% set state_vector, state_row = lanes, (1 + vectors) * lanes %}

// Below this difference f32 cannot tell the weight from 0.
{{ weigh("f32", "-150.0") }}

{# Step 1: the variables of the rows, before any key. #}
{% macro declare_rows() %}
{% for r in range(rows) %}
{% if not full %}
    let range_{{ r }} = key_range(seq, min(row_first + {{ r * lanes }}u + lane, row_last));
{% endif %}
    var m_{{ r }} = HIDDEN;
    var l_{{ r }} = 0.0;
{% for w in range(words) %}
    var class_{{ r }}_{{ w }} = 0u;
{% endfor %}
{% for c in range(vectors) %}
    var q_{{ r }}_{{ c }} = vec4<f32>();
    var o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% endmacro %}

{# Step 2: q of each row. Dims beyond the last are 0. The loop over rows is not written out, because drivers that
   compile on the CPU take long over each load in the text. #}
{% macro load_queries() %}
    for (var r = 0u; r < own_rows; r++) {
        let row = min(row_first + r * LANES + lane, row_last);
        let at = {{ row_at("q", "batch_of(batch)", "head", "(seq.token_q + row)") }};
{% for c in range(vectors) %}
        let x_{{ c }} = select(
            vec4<f32>(),
            load_q(at + min({{ c * 4 }}u, q_last), params.head_dim - min({{ c * 4 }}u, q_last)),
            {{ c * 4 }}u < params.head_dim,
        );
{{ put(rows, "q_#_%s" | format(c), "x_%s" | format(c)) }}
{% endfor %}
        let good = {{ joined(vectors, " & ", "finite(x_#)") }};
        q_bad |= select(1u << r, 0u, good);
    }
{% endmacro %}

{# Step 3: m, l and o as they are before the first key of this dispatch. The careful pass takes this step again. #}
{% macro restore() %}
{% for r in range(rows) %}
    m_{{ r }} = HIDDEN;
    l_{{ r }} = 0.0;
{% for c in range(vectors) %}
    o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% if carry %}
    for (var r = 0u; r < select(0u, own_rows, (params.flags & CARRIED) != 0u); r++) {
        let from_place = state_at + r * {{ state_row }}u;
        let kept = bitcast<vec4<f32>>(state[from_place]);
{% for c in range(vectors) %}
        let kept_{{ c }} = bitcast<vec4<f32>>(state[from_place + {{ (1 + c) * state_vector }}u]);
{% endfor %}
{% for w in range(words) %}
        let class_of_{{ w }} = {{ classes_word("kept", w * 4) }};
{% endfor %}
{% for r in range(rows) %}
        m_{{ r }} = select(m_{{ r }}, kept.x, r == {{ r }}u);
        l_{{ r }} = select(l_{{ r }}, kept.y, r == {{ r }}u);
{% for w in range(words) %}
        class_{{ r }}_{{ w }} = select(class_{{ r }}_{{ w }}, class_of_{{ w }}, r == {{ r }}u);
{% endfor %}
{% for c in range(vectors) %}
        o_{{ r }}_{{ c }} = select(o_{{ r }}_{{ c }}, finite_or_zero(kept_{{ c }}), r == {{ r }}u);
{% endfor %}
{% endfor %}
    }
{% endif %}
{% endmacro %}

{# Four dims of a key and of a value, from memory. Dims of k beyond the last are 0. #}
{% macro key_vector(key, dim) -%}
select(
                vec4<f32>(),
                load_k(
                    k_at + min({{ key }}, end - 1u) * params.k_row + min({{ dim }}, q_last),
                    params.head_dim - min({{ dim }}, q_last),
                ),
                {{ dim }} < params.head_dim,
            )
{%- endmacro %}
{% macro value_vector(key, dim) -%}
load_v(
                v_at + min({{ key }}, end - 1u) * params.v_row + min({{ dim }}, v_last),
                params.value_dim - min({{ dim }}, v_last),
            )
{%- endmacro %}

{# Vector c of key j of a block, once lanes have loaded their vectors k_t or v_t of it for the whole subgroup. #}
{% macro broadcast(name, j, c) -%}
{% set number = j * vectors + c -%}
subgroupBroadcast({{ name }}_{{ number // lanes }}, {{ number % lanes }}u)
{%- endmacro %}

{# Step 4: the dot products s_r_j of all rows with all keys of a block. The dims are outermost, so that a q that the
   compiler keeps in memory is read once for all keys. Products of four vectors are added up before they join the sum:
   that is exact where a long chain of equal terms would round, such as those of the largest numbers of f16. #}
{% macro dot_products(keys, careful) %}
{% set spread = subgroup and not careful %}
{% if spread %}
{% for t in range(loads) %}
            let k_{{ t }} = {{ key_vector("key + key_%s" | format(t), "dim_%s" | format(t)) }};
            sizes = larger(sizes, k_{{ t }});
{% endfor %}
{% elif careful %}
            var k_bad = false;
{% endif %}
{% for c in range(vectors) %}
{% for j in range(keys) %}
{% if spread %}
            let k_{{ j }}_{{ c }} = {{ broadcast("k", j, c) }};
{% else %}
            let k_{{ j }}_{{ c }} = {{ key_vector("key + %su" | format(j), "%su" | format(c * 4)) }};
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
{% endmacro %}

{# Step 5: the logits, in the same variables; HIDDEN where a row does not see a key. #}
{% macro logits(keys, careful) %}
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
{% for j in range(keys) %}
            let position_{{ j }} = key_position(seq, key + {{ j }}u);
{% endfor %}
            for (var r = 0u; r < own_rows; r++) {
                let row = min(row_first + r * LANES + lane, row_last);
{% for j in range(keys) %}
{{ take(rows, "x_%s" | format(j), "s_#_%s" | format(j)) }}
                x_{{ j }} = select(
                    HIDDEN,
                    {{ "logit" if careful else "quick_logit" }}(
                        batch, head, row, key + {{ j }}u, position_{{ j }}, seq, x_{{ j }},
                    ),
                    key + {{ j }}u < end,
                );
{{ put(rows, "s_#_%s" | format(j), "x_%s" | format(j)) }}
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
{% endmacro %}

{# Step 6: m and l with the block, its weights p_r_j, and the factor shrink_r of what was summed before. #}
{% macro online_softmax(keys) %}
{% for r in range(rows) %}
            let higher_{{ r }} = {{ maximum(keys, "s_%s" | format(r), "m_%s" | format(r)) }};
            let shrink_{{ r }} = weigh(m_{{ r }}, higher_{{ r }});
            m_{{ r }} = higher_{{ r }};
{% for j in range(keys) %}
            let p_{{ r }}_{{ j }} = select(0.0, weigh(s_{{ r }}_{{ j }}, higher_{{ r }}), s_{{ r }}_{{ j }} > MINUS);
{% endfor %}
            l_{{ r }} = l_{{ r }} * shrink_{{ r }} + {{ joined(keys, " + ", "p_%s_#" | format(r)) }};
{% endfor %}
{% endmacro %}

{# Step 7: o with the values of the block. #}
{% macro add_values(keys, careful) %}
{% set spread = subgroup and not careful %}
{% if spread %}
{% for t in range(loads) %}
            let v_{{ t }} = {{ value_vector("key + key_%s" | format(t), "dim_%s" | format(t)) }};
            sizes = larger(sizes, v_{{ t }});
{% endfor %}
{% endif %}
{% for c in range(vectors) %}
{% for j in range(keys) %}
{% if spread %}
            let v_{{ j }}_{{ c }} = {{ broadcast("v", j, c) }};
{% elif careful %}
            let raw_{{ j }}_{{ c }} = {{ value_vector("key + %su" | format(j), "%su" | format(c * 4)) }};
            let v_{{ j }}_{{ c }} = finite_or_zero(raw_{{ j }}_{{ c }});
{% else %}
            let v_{{ j }}_{{ c }} = {{ value_vector("key + %su" | format(j), "%su" | format(c * 4)) }};
            sizes = larger(sizes, v_{{ j }}_{{ c }});
{% endif %}
{% endfor %}
{% for r in range(rows) %}
            o_{{ r }}_{{ c }} =
                o_{{ r }}_{{ c }} * shrink_{{ r }} + {{ joined(keys, " + ", "p_%s_# * v_#_%s" | format(r, c)) }};
{% endfor %}
{% endfor %}
{% if careful %}
{% for w in range(words) %}
            let class_of_{{ w }} = {{ classes_word("raw_0", w * 4) }};
{% for r in range(rows) %}
            class_{{ r }}_{{ w }} |= classes_seen(class_of_{{ w }}, s_{{ r }}_0 > HIDDEN, s_{{ r }}_0 == MINUS);
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Steps 4 to 7 for all keys, page by page. Without pages all keys are in one. #}
{% macro pass_over_keys(keys, careful) %}
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
{{ dot_products(keys, careful) }}
{{ logits(keys, careful) }}
{{ online_softmax(keys) }}
{{ add_values(keys, careful) }}
        }
        first = end;
    }
{% endmacro %}

{# Step 8: the state of row r, but for o. #}
{% macro take_state() %}
        var m = m_0;
        var l = l_0;
{% for w in range(words) %}
        var class_{{ w }} = class_0_{{ w }};
{% endfor %}
{% for r in range(1, rows) %}
        m = select(m, m_{{ r }}, r == {{ r }}u);
        l = select(l, l_{{ r }}, r == {{ r }}u);
{% for w in range(words) %}
        class_{{ w }} = select(class_{{ w }}, class_{{ r }}_{{ w }}, r == {{ r }}u);
{% endfor %}
{% endfor %}
{% endmacro %}

{# Step 9, where more keys come in a later dispatch: the state of row r waits for it. #}
{% macro keep_state() %}
            let to_place = state_at + r * {{ state_row }}u;
            state[to_place] = vec4<u32>(bitcast<u32>(m), bitcast<u32>(l), 0u, 0u);
{% for c in range(vectors) %}
{{ take(rows, "kept_%s" | format(c), "o_#_%s" | format(c)) }}
            state[to_place + {{ (1 + c) * state_vector }}u] =
                result_bits(kept_{{ c }}, {{ classes_of_vector("class", c) }});
{% endfor %}
{% endmacro %}

{# Step 10: the output of row r. #}
{% macro store_output() %}
{% for c in range(vectors) %}
            if ({{ c * 4 }}u < params.value_dim) {
{{ take(rows, "y", "o_#_%s" | format(c)) }}
                store_out(
                    at + {{ c * 4 }}u,
                    params.value_dim - {{ c * 4 }}u,
                    result_bits(y * factor, all_nan | ({{ classes_of_vector("class", c) }})),
                );
            }
{% endfor %}
{% endmacro %}

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
    // Tiles are taken from both ends in turn. Under a causal rule the late rows see the most keys, and drivers give
    // each thread a run of neighbouring workgroups.
    let from_end = here.row_tile / 2u;
    let row_tile = select(from_end, params.row_tiles - 1u - from_end, here.row_tile % 2u == 1u);
    let row_first = params.row0 + row_tile * (LANES * ROWS);
    let row_end = select(0u, min(params.row_end, seq.rows), here.inside);
    // The rows of this lane are row_first + lane + LANES · r for r < own_rows. There is no early return, because a CPU
    // driver would run all that follows under a mask; without rows the loops are empty.
    let own_rows = min(ROWS, (max(row_end, row_first) - row_first + LANES - 1u) / LANES);
    let row_last = max(row_end, 1u) - 1u;
    let range = tile_range(seq, min(row_first, row_last), min(row_first + LANES * ROWS - 1u, row_last));
{% if carry %}
    let key_first = max(range.x, params.key0);
    let key_end = select(0u, min(min(range.y, params.key_end), seq.stored), own_rows > 0u);
    let number = ((batch - params.batch0) * params.heads + head - params.head0) * params.row_tiles + row_tile;
    let state_at = number * {{ rows * state_row }}u + lane;
{% else %}
    let key_first = range.x;
    let key_end = select(0u, min(range.y, seq.stored), own_rows > 0u);
{% endif %}

{{ declare_rows() }}
    let q_last = (params.head_dim - 1u) & ~3u;
    // Bit r: row r of this lane holds NaN or an infinity in q.
    var q_bad = 0u;
{{ load_queries() }}
    let v_last = (params.value_dim - 1u) & ~3u;
{% if subgroup %}
    // The key of a block, and the dims of it, that this lane loads for the subgroup.
{% for t in range(loads) %}
    let key_{{ t }} = (lane + {{ t * lanes }}u) / {{ vectors }}u;
    let dim_{{ t }} = ((lane + {{ t * lanes }}u) % {{ vectors }}u) * 4u;
{% endfor %}
{% endif %}
{% if carry %}
{{ restore() }}
{% endif %}

    // The quick pass. In `sizes` it leaves the largest magnitudes, as bits, of the keys and values that this lane
    // loaded.
    var sizes = vec4<u32>();
{{ pass_over_keys(keys, false) }}

    // The careful pass, where any lane has met NaN or an infinity. It is a loop of one iteration or none: unlike a
    // branch, drivers on the CPU skip it.
{% if full %}
    let own = u32(
        any_ends(sizes) | (q_bad != 0u) | slope_ends(head) | {{ joined(rows, " | ", "(m_# == UNDEFINED)") }},
    );
{% else %}
    let own = u32(any_ends(sizes) | (q_bad != 0u));
{% endif %}
    let again = {{ joined(lanes, " | ", "subgroupBroadcast(own, #u)") if subgroup else "own" }};
    for (var once = again; once > 0u; once--) {
{{ restore() }}
{{ pass_over_keys(1, true) }}
    }

    // What the rows leave, one row after the other.
    for (var r = 0u; r < own_rows; r++) {
{{ take_state() }}
{% if carry %}
        let more = params.key_end < params.seq_kv;
        if (more) {
{{ keep_state() }}
        }
{% endif %}
{{ join_sinks("head") }}
        let all_nan = select(0u, 0xffu, broken(m));
        let factor = {{ over_sum("shrink") }};
        let row = row_first + r * LANES + lane;
        if (row < row_end{{ " && !more" if carry }}) {
{{ leave_lse(lse_at("batch_of(batch)", "head", "seq.token_q + row")) }}
            let at = {{ row_at("out", "batch_of(batch)", "head", "(seq.token_q + row)") }};
{{ store_output() }}
        }
    }
}
