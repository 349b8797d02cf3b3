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
// written out. Loops over rows that do run have the counter r, and `take` and `put` connect it with the variables. The
// variables of the row of such a loop have `row` for the number.
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
// what it loads. Only if there are, the careful pass starts again, with codes for logits (shared/code.wgsl) and classes
// for the values that a row sees (shared/value.wgsl). It takes one row at a time and as few keys as the lanes can share
// the loads of, because the time that a driver takes to compile the text grows with its length.
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
{# Keys of a block of the careful pass. #}
{% set careful_keys = [1, lanes // vectors] | max if subgroup else 1 %}
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
{% if carry %}
{% for w in range(words) %}
    var class_{{ r }}_{{ w }} = 0u;
{% endfor %}
{% endif %}
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

{# Step 3, where earlier dispatches had keys: m, l and o of row r as they left them. #}
{% macro restore() %}
        let from_place = state_at + r * {{ state_row }}u;
        let kept = bitcast<vec4<f32>>(state[from_place]);
{% for c in range(vectors) %}
        let kept_{{ c }} = bitcast<vec4<f32>>(state[from_place + {{ (1 + c) * state_vector }}u]);
{% endfor %}
{% endmacro %}
{% macro restore_rows() %}
    for (var r = 0u; r < select(0u, own_rows, (params.flags & CARRIED) != 0u); r++) {
{{ restore() }}
{{ put(rows, "m_#", "kept.x") }}
{{ put(rows, "l_#", "kept.y") }}
{% for w in range(words) %}
        let class_of_{{ w }} = {{ classes_word("kept", w * 4) }};
{{ put(rows, "class_#_%s" | format(w), "class_of_%s" | format(w)) }}
{% endfor %}
{% for c in range(vectors) %}
{{ put(rows, "o_#_%s" | format(c), "finite_or_zero(kept_%s)" | format(c)) }}
{% endfor %}
    }
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

{# Steps 4 to 7 take the rows of `those`, and all keys of a block. Step 4: the dot products s_r_j. The dims are
   outermost, so that a q that the compiler keeps in memory is read once for all keys. Products of four vectors are
   added up before they join the sum: that is exact where a long chain of equal terms would round, such as those of the
   largest numbers of f16. #}
{% macro dot_products(those, keys, careful) %}
{% if subgroup %}
{% for t in range(keys * vectors // lanes) %}
            let k_{{ t }} = {{ key_vector("key + key_%s" | format(t), "dim_%s" | format(t)) }};
{% if not careful %}
            sizes = larger(sizes, k_{{ t }});
{% endif %}
{% endfor %}
{% endif %}
{% if careful %}
{% for j in range(keys) %}
            var bad_{{ j }} = (q_bad & (1u << r)) != 0u;
{% endfor %}
{% endif %}
{% for c in range(vectors) %}
{% for j in range(keys) %}
{% if subgroup %}
            let k_{{ j }}_{{ c }} = {{ broadcast("k", j, c) }};
{% else %}
            let k_{{ j }}_{{ c }} = {{ key_vector("key + %su" | format(j), "%su" | format(c * 4)) }};
{% if not careful %}
            sizes = larger(sizes, k_{{ j }}_{{ c }});
{% endif %}
{% endif %}
{% if careful %}
            bad_{{ j }} |= !finite(k_{{ j }}_{{ c }});
{% endif %}
{% for r in those %}
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
{% macro logits(those, keys, careful) %}
{% for r in those %}
{% for j in range(keys) %}
{% if careful %}
            s_{{ r }}_{{ j }} = select(
                scaled(s_{{ r }}_{{ j }}),
                scaled_code(s_{{ r }}_{{ j }}),
                bad_{{ j }},
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
{% if careful %}
{% for j in range(keys) %}
            s_row_{{ j }} = select(
                HIDDEN,
                logit(batch, head, min(row, row_last), key + {{ j }}u, position_{{ j }}, seq, s_row_{{ j }}),
                key + {{ j }}u < end,
            );
{% endfor %}
{% else %}
            for (var r = 0u; r < own_rows; r++) {
                let row = min(row_first + r * LANES + lane, row_last);
{% for j in range(keys) %}
{{ take(rows, "x_%s" | format(j), "s_#_%s" | format(j)) }}
                x_{{ j }} = select(
                    HIDDEN,
                    quick_logit(batch, head, row, key + {{ j }}u, position_{{ j }}, seq, x_{{ j }}),
                    key + {{ j }}u < end,
                );
{{ put(rows, "s_#_%s" | format(j), "x_%s" | format(j)) }}
{% endfor %}
            }
{% endif %}
{% else %}
{% for r in those %}
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
{% macro online_softmax(those, keys) %}
{% for r in those %}
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
{% macro add_values(those, keys, careful) %}
{% if subgroup %}
{% for t in range(keys * vectors // lanes) %}
            let v_{{ t }} = {{ value_vector("key + key_%s" | format(t), "dim_%s" | format(t)) }};
{% if not careful %}
            sizes = larger(sizes, v_{{ t }});
{% endif %}
{% endfor %}
{% endif %}
{% for c in range(vectors) %}
{% for j in range(keys) %}
{% set loaded = "raw" if careful else "v" %}
{% if subgroup %}
            let {{ loaded }}_{{ j }}_{{ c }} = {{ broadcast("v", j, c) }};
{% else %}
            let {{ loaded }}_{{ j }}_{{ c }} = {{ value_vector("key + %su" | format(j), "%su" | format(c * 4)) }};
{% if not careful %}
            sizes = larger(sizes, v_{{ j }}_{{ c }});
{% endif %}
{% endif %}
{% if careful %}
            let v_{{ j }}_{{ c }} = finite_or_zero(raw_{{ j }}_{{ c }});
{% endif %}
{% endfor %}
{% for r in those %}
            o_{{ r }}_{{ c }} =
                o_{{ r }}_{{ c }} * shrink_{{ r }} + {{ joined(keys, " + ", "p_%s_# * v_#_%s" | format(r, c)) }};
{% endfor %}
{% endfor %}
{% if careful %}
{% for j in range(keys) %}
{% for w in range(words) %}
            class_row_{{ w }} |= classes_seen(
                {{ classes_word("raw_%s" | format(j), w * 4) }}, s_row_{{ j }} > HIDDEN, s_row_{{ j }} == MINUS,
            );
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Steps 4 to 7 for all keys, page by page. Without pages all keys are in one. #}
{% macro pass_over_keys(those, keys, careful) %}
    var first = key_first;
    while (first < key_end) {
        let end = page_end(first, key_end);
        let at = stored_at(seq, batch, first);
        let k_at = {{ row_at("k", "at.x", "(head / params.group)", "(at.y - first)") }};
        let v_at = {{ row_at("v", "at.x", "(head / params.group)", "(at.y - first)") }};
{% if not full %}
{% for r in those %}
        let end_{{ r }} = min(range_{{ r }}.y, end);
{% endfor %}
{% endif %}
        for (var key = first; key < end; key += {{ keys }}u) {
{{ dot_products(those, keys, careful) }}
{{ logits(those, keys, careful) }}
{{ online_softmax(those, keys) }}
{{ add_values(those, keys, careful) }}
        }
        first = end;
    }
{% endmacro %}

{# Step 8: the variables of row r. #}
{% macro take_row() %}
{% for name in ("m", "l") %}
{{ take(rows, name ~ "_row", name ~ "_#") }}
{% endfor %}
{% for w in range(words) %}
{% if carry %}
{{ take(rows, "class_row_%s" | format(w), "class_#_%s" | format(w)) }}
{% else %}
        var class_row_{{ w }} = 0u;
{% endif %}
{% endfor %}
{% for c in range(vectors) %}
{{ take(rows, "o_row_%s" | format(c), "o_#_%s" | format(c)) }}
{% endfor %}
{% endmacro %}

{# Step 9, where NaN or an infinity was met: the row once more, by the careful pass. #}
{% macro start_again() %}
            m_row = HIDDEN;
            l_row = 0.0;
{% for c in range(vectors) %}
            o_row_{{ c }} = vec4<f32>();
{{ take(rows, "q_row_%s" | format(c), "q_#_%s" | format(c)) }}
{% endfor %}
{% if carry %}
            if ((params.flags & CARRIED) != 0u) {
{{ restore() }}
                m_row = kept.x;
                l_row = kept.y;
{% for c in range(vectors) %}
                o_row_{{ c }} = finite_or_zero(kept_{{ c }});
{% endfor %}
            }
{% endif %}
{% endmacro %}

{# Step 10, where more keys come in a later dispatch: the state of row r waits for it. #}
{% macro keep_state() %}
            let to_place = state_at + r * {{ state_row }}u;
            state[to_place] = vec4<u32>(bitcast<u32>(m), bitcast<u32>(l), 0u, 0u);
{% for c in range(vectors) %}
            state[to_place + {{ (1 + c) * state_vector }}u] =
                result_bits(o_row_{{ c }}, {{ classes_of_vector("class_row", c) }});
{% endfor %}
{% endmacro %}

{# Step 11: the output of row r. #}
{% macro store_output() %}
{% for c in range(vectors) %}
            if ({{ c * 4 }}u < params.value_dim) {
                store_out(
                    at + {{ c * 4 }}u,
                    params.value_dim - {{ c * 4 }}u,
                    result_bits(o_row_{{ c }} * factor, all_nan | ({{ classes_of_vector("class_row", c) }})),
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
{{ restore_rows() }}
{% endif %}

    // The quick pass. In `sizes` it leaves the largest magnitudes, as bits, of the keys and values that this lane
    // loaded.
    var sizes = vec4<u32>();
{{ pass_over_keys(range(rows), keys, false) }}

    // Whether the careful pass is needed, because a lane has met NaN or an infinity.
{% if full %}
    let own = u32(
        any_ends(sizes) | (q_bad != 0u) | slope_ends(head) | {{ joined(rows, " | ", "(m_# == UNDEFINED)") }},
    );
{% else %}
    let own = u32(any_ends(sizes) | (q_bad != 0u));
{% endif %}
    let again = {{ joined(lanes, " | ", "subgroupBroadcast(own, #u)") if subgroup else "own" }};

    // What the rows leave, one row after the other.
    for (var r = 0u; r < own_rows; r++) {
        let row = row_first + r * LANES + lane;
{{ take_row() }}
        // A loop of one iteration or none: unlike a branch, drivers on the CPU skip it.
        for (var once = again; once > 0u; once--) {
{% if not full %}
            let range_row = key_range(seq, min(row, row_last));
{% endif %}
{{ start_again() }}
{{ pass_over_keys(["row"], careful_keys, true) }}
        }
        var m = m_row;
        var l = l_row;
{% if carry %}
        let more = params.key_end < params.seq_kv;
        if (more) {
{{ keep_state() }}
        }
{% endif %}
{{ join_sinks("head") }}
        let all_nan = select(0u, 0xffu, broken(m));
        let factor = {{ over_sum("shrink") }};
        if (row < row_end{{ " && !more" if carry }}) {
{{ leave_lse(lse_at("batch_of(batch)", "head", "seq.token_q + row")) }}
            let at = {{ row_at("out", "batch_of(batch)", "head", "(seq.token_q + row)") }};
{{ store_output() }}
        }
    }
}
