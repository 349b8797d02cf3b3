// Project:  y = x w (+ b). This is the body for GPUs; project_lanes.wgsl is the one for CPU adapters.
// y is split into heads of params.head_columns columns, which may stand anywhere. The weights are stored as
// [{{ "out, in" if transposed else "in, out" }}]; x, b and y are f32.
{% if rotated %}
// Then the first params.rotary_dim of each params.rotated_head_dim columns before params.rotated_end are rotated by the
// position of their row (shaders/rotary.wgsl).
{% endif %}
//
// A workgroup owns {{ tile_rows }} rows × {{ tile_cols }} columns. A loop iteration stages {{ dims }} inputs of both in
// workgroup memory, the weights as [column][input] whatever their order in memory, and adds their products to the sums.
// An invocation owns {{ rows }} × {{ cols }} of the sums, which it keeps in registers.
//
// Grid:      columns = tiles of output columns, rows = tiles of rows, then batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     1 ≤ rows, columns and inputs of the part. Where the inputs come in several dispatches, the later ones add
//            to y.
{% if rotated %}
//            Multiples of eight are: all columns, those of a head, those of it that are rotated, and params.col0.
{% endif %}
// Reference: src/reference/project.rs
{% include "shared/params.wgsl" %}
{% include "shared/project.wgsl" %}

const TILE_ROWS: u32 = {{ tile_rows }}u;
const TILE_COLS: u32 = {{ tile_cols }}u;
const DEPTH: u32 = {{ dims }}u;
const THREADS: u32 = {{ threads }}u;
const PITCH: u32 = {{ dims // 4 + 1 }}u;

var<workgroup> sh_x: array<vec4<f32>, {{ tile_rows * (dims // 4 + 1) }}>;
var<workgroup> sh_w: array<vec4<f32>, {{ tile_cols * (dims // 4 + 1) }}>;

{% if rotated %}
{% set apart = tile_cols // cols %}
// The columns of a pair stand {{ apart }} apart in sh_w, so that one invocation owns both.
fn pair_at(place: u32) -> u32 {
    return place / {{ 2 * apart }}u * {{ apart }}u + place % {{ apart }}u;
}

// The number of the first (side 0) or second column of a pair.
fn number_of(pair: u32, side: u32) -> u32 {
    return select(pair * 2u + side, pair / 4u * 8u + side * 4u + pair % 4u, (params.flags & HALVES) != 0u);
}
{% endif %}

{% if not transposed %}
// Four columns of one input row; 0 outside the part.
fn w_row(i: u32, col: u32) -> vec4<f32> {
    if (i >= params.in_end || col >= params.col_end) {
        return vec4<f32>();
    }
    return load_w(params.w_base + i * params.w_row + col, params.col_end - col);
}
{% endif %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    if (!here.inside) {
        return;
    }
    let batch = here.batch;
    let row_first = params.row0 + here.row_tile * TILE_ROWS;
    let col_first = params.col0 + here.col_tile * TILE_COLS;
    let row_last = params.row_end - 1u;
    let across = thread % {{ tile_cols // cols }}u;
    let down = thread / {{ tile_cols // cols }}u;
{% for r in range(rows) %}
{% for c in range(cols) %}
    var sum_{{ r }}_{{ c }} = 0.0;
{% endfor %}
{% endfor %}
    for (var first = params.in0; first < params.in_end; first += DEPTH) {
        for (var part = thread; part < TILE_ROWS * (DEPTH / 4u); part += THREADS) {
            let i = first + (part % (DEPTH / 4u)) * 4u;
            var a = vec4<f32>();
            if (i < params.in_end) {
                a = load_x(x_place(batch, min(row_first + part / (DEPTH / 4u), row_last)) + i, params.in_end - i);
            }
            sh_x[part / (DEPTH / 4u) * PITCH + part % (DEPTH / 4u)] = a;
        }
{% if transposed %}
        for (var part = thread; part < TILE_COLS * (DEPTH / 4u); part += THREADS) {
            let i = first + (part % (DEPTH / 4u)) * 4u;
            var a = vec4<f32>();
            if (i < params.in_end) {
{% if rotated %}
                let place = part / (DEPTH / 4u);
                let number = number_of(pair_at(place), place / {{ apart }}u % 2u);
                let col = column(min(col_first + number, params.col_end - 1u));
{% else %}
                let col = min(col_first + part / (DEPTH / 4u), params.col_end - 1u);
{% endif %}
                a = load_w(params.w_base + col * params.w_row + i, params.in_end - i);
            }
            sh_w[part / (DEPTH / 4u) * PITCH + part % (DEPTH / 4u)] = a;
        }
{% else %}
        // Blocks of four inputs × four columns are transposed in registers.
        for (var part = thread; part < (TILE_COLS / 4u) * (DEPTH / 4u); part += THREADS) {
            let across4 = part % (TILE_COLS / 4u);
            let down4 = part / (TILE_COLS / 4u);
            let i = first + down4 * 4u;
            let col = col_first + across4 * 4u;
            let block = transpose(
                mat4x4<f32>(w_row(i, col), w_row(i + 1u, col), w_row(i + 2u, col), w_row(i + 3u, col)),
            );
{% if rotated %}
            // Two pairs: neighbours in memory.
            let pair = across4 * 2u;
            let at = (pair / {{ apart }}u * {{ 2 * apart }}u + pair % {{ apart }}u) * PITCH + down4;
            sh_w[at] = block[0];
            sh_w[at + {{ apart }}u * PITCH] = block[1];
            sh_w[at + PITCH] = block[2];
            sh_w[at + {{ apart + 1 }}u * PITCH] = block[3];
{% else %}
            let at = across4 * 4u * PITCH + down4;
            sh_w[at] = block[0];
            sh_w[at + PITCH] = block[1];
            sh_w[at + 2u * PITCH] = block[2];
            sh_w[at + 3u * PITCH] = block[3];
{% endif %}
        }
{% endif %}
        workgroupBarrier();
{% for d in range(dims // 4) %}
{% for r in range(rows) %}
        let x_{{ d }}_{{ r }} = sh_x[(down + {{ r * (tile_rows // rows) }}u) * PITCH + {{ d }}u];
{% endfor %}
{% for c in range(cols) %}
        let w_{{ d }}_{{ c }} = sh_w[(across + {{ c * (tile_cols // cols) }}u) * PITCH + {{ d }}u];
{% for r in range(rows) %}
        sum_{{ r }}_{{ c }} += dot(x_{{ d }}_{{ r }}, w_{{ d }}_{{ c }});
{% endfor %}
{% endfor %}
{% endfor %}
        workgroupBarrier();
    }
{% if rotated %}
    let adds = (params.flags & ADD) != 0u;
{% for r in range(rows) %}
    let row_{{ r }} = row_first + down + {{ r * (tile_rows // rows) }}u;
    let angle_{{ r }} = angles(batch, min(row_{{ r }}, row_last));
{% endfor %}
{% for c in range(0, cols, 2) %}
    let pair_{{ c }} = col_first / 2u + pair_at(across + {{ c * apart }}u);
    let number_{{ c }} = number_of(pair_{{ c }}, 0u);
    if (number_{{ c }} < params.col_end) {
        let col = column(number_{{ c }});
        let col_next = column(number_of(pair_{{ c }}, 1u));
        let within = pair_{{ c }} % (params.rotated_head_dim / 2u);
        var column_bias = vec2<f32>();
        if ((params.flags & COLUMN_BIAS) != 0u) {
            column_bias = vec2<f32>(bias(col), bias(col_next));
        }
{% for r in range(rows) %}
        if (row_{{ r }} <= row_last) {
            let at = y_place(batch, row_{{ r }}, col);
            let at_next = y_place(batch, row_{{ r }}, col_next);
            var sum = sum_{{ r }}_{{ c }} + column_bias.x + select(0.0, y[at], adds);
            var next = sum_{{ r }}_{{ c + 1 }} + column_bias.y + select(0.0, y[at_next], adds);
            if (is_rotated(number_{{ c }})) {
                let a = sum;
                let cosine = table[angle_{{ r }} + within];
                let sine = table[angle_{{ r }} + params.rotary_dim / 2u + within];
                sum = rotated_first(a, next, cosine, sine);
                next = rotated_second(a, next, cosine, sine);
            }
            y[at] = sum;
            y[at_next] = next;
        }
{% endfor %}
    }
{% endfor %}
{% else %}
{% for c in range(cols) %}
    let col_{{ c }} = col_first + across + {{ c * (tile_cols // cols) }}u;
    if (col_{{ c }} < params.col_end) {
        var column_bias = 0.0;
        if ((params.flags & COLUMN_BIAS) != 0u) {
            column_bias = bias(col_{{ c }});
        }
{% for r in range(rows) %}
        let row_{{ c }}_{{ r }} = row_first + down + {{ r * (tile_rows // rows) }}u;
        if (row_{{ c }}_{{ r }} <= row_last) {
            let at = y_place(batch, row_{{ c }}_{{ r }}, col_{{ c }});
            y[at] = sum_{{ r }}_{{ c }} + column_bias + select(0.0, y[at], (params.flags & ADD) != 0u);
        }
{% endfor %}
    }
{% endfor %}
{% endif %}
}
