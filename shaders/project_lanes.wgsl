// Project, lanes:  y = x w (+ b). This is the body of `project` for CPU adapters, where loads are the cost.
// y is split into heads of params.head_columns columns, which may stand anywhere. The weights are stored as
// [{{ "out, in" if transposed else "in, out" }}]; x, b and y are f32.
{% if rotated %}
// Then the first params.rotary_dim of each params.rotated_head_dim columns before params.rotated_end are rotated by the
// position of their row (shaders/rotary.wgsl).
{% endif %}
//
// A workgroup is one subgroup. It owns {{ rows * lanes }} rows × {{ tile_cols }} columns. A lane owns {{ rows }} of the
// rows and keeps their sums in registers. A loop iteration takes four inputs.
{% if subgroup %}
// Each vector of their weights is loaded once per subgroup, by one lane, and broadcast to the others.
{% else %}
// Without subgroup operations every lane loads all of their weights.
{% endif %}
//
// Grid:      columns = tiles of output columns, rows = tiles of rows, then batches (shared/params.wgsl).
// Memory:    no workgroup memory.
// Given:     1 ≤ rows, columns and inputs of the part. Where the inputs come in several dispatches, the later ones add
//            to y.
{% if rotated %}
//            Multiples of eight are: all columns, those of a head, those of it that are rotated, and params.col0.
{% endif %}
// Reference: src/reference/project.rs
{% include "shared/params.wgsl" %}
{% include "shared/project.wgsl" %}

{% if not vector %}
fn give(batch: u32, row: u32, col: u32, sum: f32) {
    if (col < params.col_end) {
        let at = y_place(batch, row, col);
        y[at] = sum + select(0.0, y[at], (params.flags & ADD) != 0u);
    }
}
{% endif %}

const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const COLS: u32 = {{ tile_cols }}u;

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    {{ "@builtin(subgroup_invocation_id)" if subgroup else "@builtin(local_invocation_index)" }} lane: u32,
) {
    // No early return: a CPU driver would run all that follows under a mask. Without work the loops are empty.
    let here = place(workgroup, grid);
    let batch = here.batch;
    let row_first = params.row0 + here.row_tile * (LANES * ROWS);
    let col_first = params.col0 + here.col_tile * COLS;
    let row_end = select(0u, params.row_end, here.inside);
    let in_end = select(0u, params.in_end, here.inside);
    let col_last = params.col_end - 1u;
{% if not transposed %}
    let col_last4 = params.col0 + ((col_last - params.col0) & ~3u);
{% endif %}
{% for r in range(rows) %}
    let x_{{ r }} = x_place(batch, min(row_first + {{ r * lanes }}u + lane, params.row_end - 1u));
{% for c in range(tile_cols // 4) %}
    var sum_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% if subgroup %}
{% for t in range(tile_cols // lanes) %}
{% if transposed %}
    let w_{{ t }} = params.w_base
        + {{ "column" if rotated else "" }}(min(col_first + lane + {{ t * lanes }}u, col_last)) * params.w_row;
{% else %}
    let in_{{ t }} = (lane + {{ t * lanes }}u) / {{ tile_cols // 4 }}u;
    let col_{{ t }} = min(col_first + ((lane + {{ t * lanes }}u) % {{ tile_cols // 4 }}u) * 4u, col_last4);
{% endif %}
{% endfor %}
{% elif transposed %}
{% for part in range(tile_cols) %}
    let w_{{ part }} = params.w_base
        + {{ "column" if rotated else "" }}(min(col_first + {{ part }}u, col_last)) * params.w_row;
{% endfor %}
{% endif %}
    for (var i = params.in0; i < in_end; i += 4u) {
        let valid = in_end - i;
{% for r in range(rows) %}
        let a_{{ r }} = load_x(x_{{ r }} + i, valid);
{% endfor %}
{% if subgroup %}
{% for t in range(tile_cols // lanes) %}
{% if transposed %}
        let part_{{ t }} = load_w(w_{{ t }} + i, valid);
{% else %}
        let part_{{ t }} = load_w(
            params.w_base + min(i + in_{{ t }}, in_end - 1u) * params.w_row + col_{{ t }},
            params.col_end - col_{{ t }},
        );
{% endif %}
{% endfor %}
{% endif %}
{% for c in range(tile_cols // 4) %}
{% for j in range(4) %}
{% set component = "xyzw"[j] %}
{% set part = c * 4 + j if transposed else j * (tile_cols // 4) + c %}
{% if subgroup %}
        let w_{{ c }}_{{ j }} = subgroupBroadcast(part_{{ part // lanes }}, {{ part % lanes }}u);
{% elif transposed %}
        let w_{{ c }}_{{ j }} = load_w(w_{{ part }} + i, valid);
{% else %}
        let w_{{ c }}_{{ j }} = load_w(
            params.w_base + min(i + {{ j }}u, in_end - 1u) * params.w_row + min(col_first + {{ c * 4 }}u, col_last4),
            params.col_end - min(col_first + {{ c * 4 }}u, col_last4),
        );
{% endif %}
{% for r in range(rows) %}
{% if transposed %}
        sum_{{ r }}_{{ c }}.{{ component }} += dot(a_{{ r }}, w_{{ c }}_{{ j }});
{% else %}
        sum_{{ r }}_{{ c }} += a_{{ r }}.{{ component }} * w_{{ c }}_{{ j }};
{% endif %}
{% endfor %}
{% endfor %}
{% endfor %}
    }
    // One row after the other, so that each store stands once in the text: drivers that compile on the CPU pay for each
    // place.
    for (var r = 0u; r < ROWS; r++) {
        let row = row_first + r * LANES + lane;
        if (row < row_end) {
{% if rotated %}
            let angle = angles(batch, row) >> 2u;
            let adds = (params.flags & ADD) != 0u;
            let halves = (params.flags & HALVES) != 0u;
{% for c in range(0, tile_cols // 4, 2) %}
            let number_{{ c }} = col_first + {{ c * 4 }}u;
            if (number_{{ c }} < params.col_end) {
                var sum = sum_0_{{ c }};
                var next = sum_0_{{ c + 1 }};
{% for r in range(1, rows) %}
                sum = select(sum, sum_{{ r }}_{{ c }}, r == {{ r }}u);
                next = select(next, sum_{{ r }}_{{ c + 1 }}, r == {{ r }}u);
{% endfor %}
                let col = column(number_{{ c }});
                let col_next = column(number_{{ c }} + 4u);
                if ((params.flags & COLUMN_BIAS) != 0u) {
                    sum += vec4<f32>(bias(col), bias(col + 1u), bias(col + 2u), bias(col + 3u));
                    next += vec4<f32>(bias(col_next), bias(col_next + 1u), bias(col_next + 2u), bias(col_next + 3u));
                }
                let at = y_place(batch, row, col) >> 2u;
                let at_next = y_place(batch, row, col_next) >> 2u;
                sum += select(vec4<f32>(), y[at], adds);
                next += select(vec4<f32>(), y[at_next], adds);
                if (is_rotated(number_{{ c }})) {
                    let first = select(vec4<f32>(sum.xz, next.xz), sum, halves);
                    let second = select(vec4<f32>(sum.yw, next.yw), next, halves);
                    let pair = angle + number_{{ c }} % params.rotated_head_dim / 8u;
                    let cosine = table[pair];
                    let sine = table[pair + params.rotary_dim / 8u];
                    let a = rotated_first(first, second, cosine, sine);
                    let b = rotated_second(first, second, cosine, sine);
                    sum = select(vec4<f32>(a.x, b.x, a.y, b.y), a, halves);
                    next = select(vec4<f32>(a.z, b.z, a.w, b.w), b, halves);
                }
                y[at] = sum;
                y[at_next] = next;
            }
{% endfor %}
{% else %}
{% for c in range(tile_cols // 4) %}
            let col_at_{{ c }} = col_first + {{ c * 4 }}u;
            if (col_at_{{ c }} < params.col_end) {
                var sum = sum_0_{{ c }};
{% for r in range(1, rows) %}
                sum = select(sum, sum_{{ r }}_{{ c }}, r == {{ r }}u);
{% endfor %}
                if ((params.flags & COLUMN_BIAS) != 0u) {
                    let col = col_at_{{ c }};
                    sum += vec4<f32>(bias(col), bias(col + 1u), bias(col + 2u), bias(col + 3u));
                }
{% if vector %}
                let at = y_place(batch, row, col_at_{{ c }}) >> 2u;
                y[at] = sum + select(vec4<f32>(), y[at], (params.flags & ADD) != 0u);
{% else %}
{% for j in range(4) %}
                give(batch, row, col_at_{{ c }} + {{ j }}u, sum.{{ "xyzw"[j] }});
{% endfor %}
{% endif %}
            }
{% endfor %}
{% endif %}
        }
    }
}
