{% from "shared/lines.wgsl" import lines_until %}
{% from "shared/unroll.wgsl" import joined, four_dots, put %}
// Scores, lanes:  s = scale · q kᵀ, in f32, into the score scratch. This is the body of `scores` for CPU adapters,
// where loads are the cost.
//
// A workgroup is one subgroup. It owns {{ rows * lanes }} rows and {{ tile_cols }} keys; all query heads of a key/value
// head are rows of one tile (shared/lines.wgsl). A lane owns {{ rows }} of the rows and keeps {{ dims }} dims of them
// in registers. Head dims beyond {{ dims }} take further passes over the keys, which add to the scratch. A loop
// iteration takes four keys.
{% if subgroup %}
// Each of their vectors is loaded once per subgroup, by one lane, and broadcast to the others.
{% else %}
// Without subgroup operations every lane loads all of them.
{% endif %}
// A NaN or an infinity in q or k is found by its bits when it is loaded. It makes codes of the scores that it enters
// (shared/code.wgsl).
//
// Grid:      columns = tiles of keys, rows = tiles of rows, then key/value heads and batches (shared/params.wgsl).
// Memory:    no workgroup memory.
// Given:     1 ≤ rows, keys. Rows of the scratch and tiles of keys start at multiples of four. Tiles that no row sees
//            are not written.
// Reference: src/reference/scores.rs
{% include "shared/params.wgsl" %}
{% include "shared/scores.wgsl" %}

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
        var q_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
        // The loop over rows is not written out, because drivers that compile on the CPU take long over each load.
        for (var r = 0u; r < ROWS; r++) {
            let line = min(line_first + r * LANES + lane, line_last);
            let place = q_place(batch, line_head(here.head, line), seq, line_row(line));
{% for c in range(dims // 4) %}
            let x_{{ c }} = select(vec4<f32>(), load_q(place + at_{{ c }}, left_{{ c }}), held_{{ c }});
{{ put(rows, "q_#_%s" | format(c), "x_%s" | format(c)) }}
{% endfor %}
            q_bad |= select(1u << r, 0u, {{ joined(dims // 4, " & ", "finite(x_#)") }});
        }
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
