{% from "shared/lines.wgsl" import lines_until %}
{% from "shared/unroll.wgsl" import joined, all_good, take %}
{% from "shared/value.wgsl" import classes_word, classes_of_vector %}
// Values, lanes:  out = w v, with the weights w in the score scratch. Where the keys come in several dispatches, the
// later ones add to what `out` holds. This is the body of `values` for CPU adapters, where loads are the cost.
//
// A workgroup is one subgroup. It owns {{ rows * lanes }} rows × {{ dims }} value dims; all query heads of a key/value
// head are rows of one tile (shared/lines.wgsl). A lane owns {{ rows }} of the rows and keeps their sums in registers.
// A loop iteration takes four keys.
{% if subgroup %}
// Each of their vectors of values is loaded once per subgroup, by one lane, and broadcast to the others.
{% else %}
// Without subgroup operations every lane loads all of their values.
{% endif %}
// A value of NaN or an infinity counts as 0, so that 0 · NaN cannot leak from a hidden key. Each row keeps the classes
// of such values of the keys that it sees (shared/value.wgsl). Weights may be codes (shared/weight.wgsl).
//
// Grid:      columns = blocks of value dims, rows = tiles of rows, then key/value heads and batches
//            (shared/params.wgsl).
// Memory:    no workgroup memory.
// Given:     weights are 0 outside a row's range, over whole vectors of four within the range of the tile.
// Reference: src/reference/values.rs
{% include "shared/params.wgsl" %}
{% include "shared/values.wgsl" %}

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
    // The loop over rows is not written out, because drivers that compile on the CPU take long over each store.
    for (var r = 0u; r < ROWS; r++) {
        let line = line_first + r * LANES + lane;
{{ take(rows, "broken", "broken_#") }}
{% for g in range(groups) %}
{{ take(rows, "class_%s" | format(g), "class_#_%s" | format(g)) }}
{% endfor %}
{% for c in range(dims // 4) %}
{{ take(rows, "sum_%s" | format(c), "sum_#_%s" | format(c)) }}
{% endfor %}
        if (line <= line_last) {
            let at = out_place(batch, line_head(here.head, line), seq, line_row(line)) + dim;
{% for c in range(dims // 4) %}
            if ({{ c * 4 }}u < valid) {
                give(
                    at + {{ c * 4 }}u,
                    valid - {{ c * 4 }}u,
                    sum_{{ c }},
                    select({{ classes_of_vector("class", c) }}, 0xffu, broken),
                );
            }
{% endfor %}
        }
    }
}
