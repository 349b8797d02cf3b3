{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/address.wgsl" import row_at %}
{% from "shared/lines.wgsl" import lines_until %}
{% from "shared/finish.wgsl" import join_sinks, over_sum %}
{% from "shared/weigh.wgsl" import weigh %}
{% from "shared/unroll.wgsl" import joined, bits_unless, maximum, all_good, chosen %}
{% from "shared/value.wgsl" import classes_word %}
// Split:  out = softmax(logits) v  for few queries and many keys: the keys of a tile of rows are shared out to several
// workgroups, and all query heads of a key/value head are rows of one tile, so that each key is loaded once for
// {{ rows }} of them. {{ across }} lanes form a stream: each holds every {{ across }}th vector of four dims of q, k, v
// and o. A workgroup has {{ streams }} stream{{ "s" if streams > 1 }}; stream n takes every {{ streams }}th block of
// {{ keys }} keys, with a running maximum m, sum l and unnormalised output o of its own:
//   s = scale · q kᵀ;  m' = max(m, s);  p = exp(s − m');  l = l · exp(m − m') + Σ p;  o = o · exp(m − m') + p v.
// At the end the streams are merged: out = Σ o exp(m − max m) / Σ l exp(m − max m), lse = max m + ln of that sum. Where
// several workgroups share the keys of a row, merge.wgsl does the same with what they write. (Dao et al.,
// Flash-Decoding, 2023.) Lanes of a stream sum their parts of a dot product by
// {{ "subgroup shuffles" if shuffle else "way of workgroup memory" }}. NaN and infinities are found by their bits when
// they are loaded. In q or k they make codes of logits (shared/code.wgsl); in v they count as 0, so that 0 · NaN cannot
// leak from a hidden key, and each lane keeps the classes of its dims of what a row sees (shared/value.wgsl).
//
// Grid:      columns = parts of the keys, rows = tiles of {{ rows }} rows (query row by query row all heads of the
//            group), then key/value heads (counted by head0 and heads) and batches (shared/params.wgsl).
// Memory:    {{ bytes }} bytes of workgroup memory.
// Given:     1 ≤ head_dim, value_dim ≤ {{ dims }}; no packed sequences. No key outside the range of the tile is read.
// Reference: src/reference.rs (attention)
{% include "shared/params.wgsl" %}
{% include "shared/lines.wgsl" %}

{% set native, out, carry = false, "f32", false %}
{% include "shared/operands.wgsl" %}

{% include "shared/visible.wgsl" %}
{% include "shared/pages.wgsl" %}
{% include "shared/score.wgsl" %}
{% include "shared/normaliser.wgsl" %}
{% include "shared/value.wgsl" %}
{{ load("q", element, false, vector, wide) }}
{{ load("k", element, false, vector, wide) }}
{{ load("v", element, false, vector, wide) }}
{{ store("out", "f32", vector) }}

const ACROSS: u32 = {{ across }}u;
const STREAMS: u32 = {{ streams }}u;
const ROWS: u32 = {{ rows }}u;
const KEYS: u32 = {{ keys }}u;
{% set pairs = rows * keys %}
{% set threads = across * streams %}
{% if not shuffle %}
// Of each row and key of a stream the lanes' parts, then their sum.
var<workgroup> parts: array<f32, {{ threads * pairs }}>;
var<workgroup> sums: array<f32, {{ streams * pairs }}>;
var<workgroup> marks: array<u32, {{ threads }}>;
{% endif %}
{% if streams > 1 %}
// Of each row and stream: maximum and sum. Of one row and each stream: the output, relative to the common maximum.
var<workgroup> totals: array<vec2<f32>, {{ rows * streams }}>;
var<workgroup> outputs: array<vec4<f32>, {{ streams * dims // 4 }}>;
// Of each row: the classes of each vector of dims. They are seldom touched, and registers are few.
var<workgroup> row_classes: array<atomic<u32>, {{ rows * dims // 4 }}>;
{% endif %}

// Below this difference f32 cannot tell the weight from 0.
{{ weigh("f32", "-150.0") }}

// Writes four elements of a row of out.
fn write(batch: u32, head: u32, row: u32, part: u32, dim: u32, y: vec4<f32>, all: u32) {
    let at = params.out_base + part * params.next_out
        + batch * params.out_batch + head * params.out_head + row * params.out_row;
    store_out(at + dim, params.value_dim - dim, result_bits(y, all));
}

{# The union of what the lanes of a stream have marked. #}
{% macro union(mark) -%}
{{ joined(across, " | ", "subgroupBroadcast(%s, #u)" | format(mark)) if streams == 1 else "marked(%s)" | format(mark) }}
{%- endmacro %}
{% if streams > 1 and shuffle %}
fn marked(mark: u32) -> u32 {
    var all = mark;
    all |= subgroupShuffleXor(all, 1u);
    all |= subgroupShuffleXor(all, 2u);
    all |= subgroupShuffleXor(all, 4u);
    return all;
}
{% endif %}

{% set chunks = dims // (4 * across) %}
{# Classes of a lane's dims of a row: 32-bit words of four vectors each. #}
{% set words = (chunks + 3) // 4 %}
@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let batch = here.batch;
    let seq = sequence(batch);
    let lane = thread % ACROSS;
    let stream = thread / ACROSS;

    let row_end = max(params.row0, select(params.row0, min(params.row_end, seq.rows), here.inside));
    let line_first = here.row_tile * ROWS;
    let line_end = {{ lines_until("row_end") }};
    let own_rows = min(ROWS, max(line_end, line_first) - line_first);
    let line_last = max(line_end, 1u) - 1u;
{% for r in range(rows) %}
    let row_{{ r }} = line_row(min(line_first + {{ r }}u, line_last));
    let head_{{ r }} = line_head(here.head, min(line_first + {{ r }}u, line_last));
{% endfor %}
    let seen = tile_range(seq, row_0, row_{{ rows - 1 }});
    // Those of this dispatch.
    let range = clamp(seen, vec2<u32>(params.key0), vec2<u32>(params.key_end));
    let visible = select(0u, range.y - range.x, own_rows > 0u);
    let share = (visible + params.col_tiles - 1u) / params.col_tiles;
    let key_first = range.x + min(visible, here.col_tile * share);
    let key_end = range.x + min(visible, (here.col_tile + 1u) * share);

    let q_last = (params.head_dim - 1u) & ~3u;
    let v_last = (params.value_dim - 1u) & ~3u;
{% for c in range(chunks) %}
    let dim_{{ c }} = (lane + {{ c * across }}u) * 4u;
    let q_dim_{{ c }} = min(dim_{{ c }}, q_last);
    let v_dim_{{ c }} = min(dim_{{ c }}, v_last);
{% endfor %}
{% for r in range(rows) %}
{% if not full %}
    let range_{{ r }} = key_range(seq, row_{{ r }});
{% endif %}
    let q_at_{{ r }} = {{ row_at("q", "batch", "head_%s" | format(r), "row_%s" | format(r)) }};
    var m_{{ r }} = HIDDEN;
    var l_{{ r }} = 0.0;
{% if streams == 1 %}
{% for w in range(words) %}
    var class_{{ r }}_{{ w }} = 0u;
{% endfor %}
{% endif %}
{% for c in range(chunks) %}
    let q_{{ r }}_{{ c }} = select(
        vec4<f32>(),
        load_q(q_at_{{ r }} + q_dim_{{ c }}, params.head_dim - q_dim_{{ c }}),
        dim_{{ c }} < params.head_dim,
    );
    var o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}

{% if streams > 1 %}
    for (var i = thread; i < {{ rows * dims // 4 }}u; i += {{ threads }}u) {
        atomicStore(&row_classes[i], 0u);
    }
    workgroupBarrier();
{% endif %}
    // Bit r: row r holds NaN or an infinity in q.
    let q_own = {{ bits_unless(rows, joined(chunks, " & ", "finite(q_@_#)")) }};
{% if streams > 1 and not shuffle %}
    marks[thread] = q_own;
    workgroupBarrier();
    let q_bad = {{ joined(across, " | ", "marks[stream * ACROSS + #u]") }};
    workgroupBarrier();
{% else %}
    let q_bad = {{ union("q_own") }};
{% endif %}

    let k_at = params.k_base + here.head * params.k_head;
    let v_at = params.v_base + here.head * params.v_head;
{% if streams == 1 %}
    // Page by page; without pages all keys stand in one.
{% else %}
    // All keys at once: a page may be shorter than a step of all streams, so that each key is looked up.
{% endif %}
    var first = key_first;
    while (first < key_end) {
        let end = {{ "page_end(first, key_end)" if streams == 1 else "key_end" }};
{% if streams == 1 %}
        let at = stored_at(seq, batch, first);
        let k_page = k_at + at.x * params.k_batch + (at.y - first) * params.k_row;
        let v_page = v_at + at.x * params.v_batch + (at.y - first) * params.v_row;
{% endif %}
        // All streams take the same number of steps, because they shuffle or wait together.
        for (var step = first; step < end; step += KEYS * STREAMS) {
            let key = step + stream * KEYS;
{% for j in range(keys) %}
{% if streams == 1 %}
            let k_place_{{ j }} = k_page + min(key + {{ j }}u, end - 1u) * params.k_row;
{% else %}
            let at_{{ j }} = stored_at(seq, batch, min(key + {{ j }}u, end - 1u));
            let k_place_{{ j }} = k_at + at_{{ j }}.x * params.k_batch + at_{{ j }}.y * params.k_row;
{% endif %}
{% for c in range(chunks) %}
            let k_{{ j }}_{{ c }} = select(
                vec4<f32>(),
                load_k(k_place_{{ j }} + q_dim_{{ c }}, params.head_dim - q_dim_{{ c }}),
                dim_{{ c }} < params.head_dim,
            );
{% endfor %}
{% endfor %}
            let k_own = {{ bits_unless(keys, joined(chunks, " & ", "finite(k_@_#)")) }};
            // Bit j: key j holds NaN or an infinity.
{% if shuffle %}
            let k_bad = {{ union("k_own") }};
{% else %}
            marks[thread] = k_own;
{% endif %}
{% for r in range(rows) %}
{% for j in range(keys) %}
            var s_{{ r }}_{{ j }} = {{ joined(chunks, " + ", "dot(q_%s_#, k_%s_#)" | format(r, j)) }};
{% if shuffle %}
            s_{{ r }}_{{ j }} += subgroupShuffleXor(s_{{ r }}_{{ j }}, 1u);
            s_{{ r }}_{{ j }} += subgroupShuffleXor(s_{{ r }}_{{ j }}, 2u);
            s_{{ r }}_{{ j }} += subgroupShuffleXor(s_{{ r }}_{{ j }}, 4u);
{% else %}
            parts[(stream * {{ pairs }}u + {{ r * keys + j }}u) * ACROSS + lane] = s_{{ r }}_{{ j }};
{% endif %}
{% endfor %}
{% endfor %}
{% if not shuffle %}
            workgroupBarrier();
            for (var pair = lane; pair < {{ pairs }}u; pair += ACROSS) {
                let at = (stream * {{ pairs }}u + pair) * ACROSS;
                sums[stream * {{ pairs }}u + pair] =
                    ((parts[at] + parts[at + 1u]) + (parts[at + 2u] + parts[at + 3u]))
                    + ((parts[at + 4u] + parts[at + 5u]) + (parts[at + 6u] + parts[at + 7u]));
            }
            let k_bad = {{ joined(across, " | ", "marks[stream * ACROSS + #u]") }};
            workgroupBarrier();
{% for r in range(rows) %}
{% for j in range(keys) %}
            s_{{ r }}_{{ j }} = sums[stream * {{ pairs }}u + {{ r * keys + j }}u];
{% endfor %}
{% endfor %}
{% endif %}
{% for r in range(rows) %}
{% for j in range(keys) %}
            var x_{{ r }}_{{ j }} = scaled(s_{{ r }}_{{ j }});
{% endfor %}
{% endfor %}
{% if full %}
{% for j in range(keys) %}
            let position_{{ j }} = key_position(seq, key + {{ j }}u);
{% endfor %}
            for (var r = 0u; r < own_rows; r++) {
                let line = line_first + r;
                let row = line_row(line);
                let head = line_head(here.head, line);
{% for j in range(keys) %}
                var x_{{ j }} = x_0_{{ j }};
{% for r in range(1, rows) %}
                x_{{ j }} = select(x_{{ j }}, x_{{ r }}_{{ j }}, r == {{ r }}u);
{% endfor %}
                x_{{ j }} = select(
                    HIDDEN,
                    logit(batch, head, row, key + {{ j }}u, position_{{ j }}, seq, x_{{ j }}),
                    key + {{ j }}u < end,
                );
{% for r in range(rows) %}
                x_{{ r }}_{{ j }} = select(x_{{ r }}_{{ j }}, x_{{ j }}, r == {{ r }}u);
{% endfor %}
{% endfor %}
            }
{% else %}
{% for r in range(rows) %}
{% for j in range(keys) %}
            x_{{ r }}_{{ j }} = select(
                HIDDEN,
                x_{{ r }}_{{ j }},
                (key + {{ j }}u >= range_{{ r }}.x) & (key + {{ j }}u < min(range_{{ r }}.y, end)),
            );
{% endfor %}
{% endfor %}
{% endif %}
            // A loop of one iteration or none: unlike a branch, drivers on the CPU skip it.
            for (var once = u32((q_bad | k_bad) != 0u); once > 0u; once--) {
{% for r in range(rows) %}
{% for j in range(keys) %}
                x_{{ r }}_{{ j }} = with_code(
                    x_{{ r }}_{{ j }},
                    s_{{ r }}_{{ j }},
                    ((q_bad & {{ 2 ** r }}u) | (k_bad & {{ 2 ** j }}u)) != 0u,
                );
{% endfor %}
{% endfor %}
            }
{% for r in range(rows) %}
            let higher_{{ r }} = {{ maximum(keys, "x_%s" | format(r), "m_%s" | format(r)) }};
            let shrink_{{ r }} = weigh(m_{{ r }}, higher_{{ r }});
            m_{{ r }} = higher_{{ r }};
{% for j in range(keys) %}
            let p_{{ r }}_{{ j }} = select(0.0, weigh(x_{{ r }}_{{ j }}, higher_{{ r }}), x_{{ r }}_{{ j }} > MINUS);
{% endfor %}
            l_{{ r }} = l_{{ r }} * shrink_{{ r }} + {{ joined(keys, " + ", "p_%s_#" | format(r)) }};
{% endfor %}
{% for j in range(keys) %}
{% if streams == 1 %}
            let v_place_{{ j }} = v_page + min(key + {{ j }}u, end - 1u) * params.v_row;
{% else %}
            let v_place_{{ j }} = v_at + at_{{ j }}.x * params.v_batch + at_{{ j }}.y * params.v_row;
{% endif %}
{% for c in range(chunks) %}
            let raw_{{ j }}_{{ c }} = load_v(v_place_{{ j }} + v_dim_{{ c }}, params.value_dim - v_dim_{{ c }});
            let good_{{ j }}_{{ c }} = finite(raw_{{ j }}_{{ c }});
            let v_{{ j }}_{{ c }} = finite_or_zero(raw_{{ j }}_{{ c }});
{% endfor %}
{% endfor %}
{% for r in range(rows) %}
{% for c in range(chunks) %}
            o_{{ r }}_{{ c }} =
                o_{{ r }}_{{ c }} * shrink_{{ r }} + {{ joined(keys, " + ", "p_%s_# * v_#_%s" | format(r, c)) }};
{% endfor %}
{% endfor %}
            for (var once = u32(!({{ all_good(keys, chunks) }})); once > 0u; once--) {
{% if streams == 1 %}
{% for j in range(keys) %}
{% for w in range(words) %}
                let class_of_{{ j }}_{{ w }} =
                    {{ classes_word("raw_%s" | format(j), 4 * w, [4, chunks - 4 * w] | min) }};
{% for r in range(rows) %}
                class_{{ r }}_{{ w }} |=
                    classes_seen(class_of_{{ j }}_{{ w }}, x_{{ r }}_{{ j }} > HIDDEN, x_{{ r }}_{{ j }} == MINUS);
{% endfor %}
{% endfor %}
{% endfor %}
{% else %}
{% for j in range(keys) %}
{% for c in range(chunks) %}
                let class_of_{{ j }}_{{ c }} = classes(raw_{{ j }}_{{ c }});
{% for r in range(rows) %}
                let own_{{ r }}_{{ j }}_{{ c }} =
                    classes_seen(class_of_{{ j }}_{{ c }}, x_{{ r }}_{{ j }} > HIDDEN, x_{{ r }}_{{ j }} == MINUS);
                if (own_{{ r }}_{{ j }}_{{ c }} != 0u) {
                    atomicOr(&row_classes[lane + {{ r * dims // 4 + c * across }}u], own_{{ r }}_{{ j }}_{{ c }});
                }
{% endfor %}
{% endfor %}
{% endfor %}
{% endif %}
            }
        }
        first = end;
    }
{% if streams > 1 %}

    if (lane == 0u) {
{% for r in range(rows) %}
        totals[{{ r * streams }}u + stream] = vec2<f32>(m_{{ r }}, l_{{ r }});
{% endfor %}
    }
    workgroupBarrier();
{% endif %}
    // One row after the other, so that each store stands once in the text.
    for (var r = 0u; r < ROWS; r++) {
        let line = min(line_first + r, line_last);
        let row = line_row(line);
        let head = line_head(here.head, line);
{% macro pick(name) %}{{ chosen(rows, "r", name) }}{% endmacro %}
        let own = {{ pick("m_#") }};
        var m = own;
        var l = {{ pick("l_#") }};
{% if streams > 1 %}
{% for n in range(streams) %}
        m = max(m, totals[r * STREAMS + {{ n }}u].x);
{% endfor %}
        l = 0.0;
        for (var n = 0u; n < STREAMS; n++) {
            l += totals[r * STREAMS + n].y * weigh(totals[r * STREAMS + n].x, m);
        }
{% endif %}
{{ join_sinks("head") }}
        // Where `merge` goes on, other parts or the sink decide what becomes of logits of which all are −∞.
        let decided = (m != MINUS) | ((params.flags & PARTIAL) == 0u);
        let all_nan = select(0u, 0xffu, broken(m) & decided);
        let factor = {{ over_sum("weigh(own, m)" if streams > 1 else "shrink") }};
        if (thread == 0u && r < own_rows) {
            let at = params.lse_base + here.col_tile * params.next_lse
                + batch * params.lse_batch + head * params.lse_head + row;
            // For `merge` m and l themselves: m + ln l loses l where m is large.
            if ((params.flags & PARTIAL) != 0u) {
                lse[2u * at] = bitcast<u32>(m);
                lse[2u * at + 1u] = bitcast<u32>(l);
            } else if ((params.flags & LSE) != 0u) {
                lse[at] = lse_bits(m, l);
            }
        }
{% for c in range(chunks) %}
        let y_{{ c }} = {{ pick("o_#_" ~ c) }} * factor;
{% if streams > 1 %}
        outputs[stream * {{ dims // 4 }}u + lane + {{ c * across }}u] = y_{{ c }};
{% else %}
        if (r < own_rows && dim_{{ c }} < params.value_dim) {
{% set classes = "((%s >> %su) & 0xffu)" | format(pick("class_#_" ~ c // 4), c % 4 * 8) %}
            write(batch, head, row, here.col_tile, dim_{{ c }}, y_{{ c }}, all_nan | {{ classes }});
        }
{% endif %}
{% endfor %}
{% if streams > 1 %}
        workgroupBarrier();
        if (r < own_rows && thread * 4u < params.value_dim) {
            var sum = vec4<f32>();
            for (var n = 0u; n < STREAMS; n++) {
                sum += outputs[n * {{ dims // 4 }}u + thread];
            }
{% set classes = "atomicLoad(&row_classes[r * %su + thread])" | format(dims // 4) %}
            write(batch, head, row, here.col_tile, thread * 4u, sum, all_nan | {{ classes }});
        }
        workgroupBarrier();
{% endif %}
    }
}
