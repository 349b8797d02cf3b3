{% from "shared/element.wgsl" import storage, load, store, output %}
// Project:  y = x w (+ b), rows of x times a matrix; y is split into heads of params.col_head columns, which may stand anywhere.
// The weights are [{{ "out, in" if transposed else "in, out" }}], as they come; x, b and y are f32.
//
// Grid:      columns = tiles of output columns, rows = tiles of rows, then batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     1 ≤ rows, columns and inputs of the part; where the inputs come in several dispatches, later ones add to y.
// Reference: src/reference/project.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> x: {{ storage("f32", false, vector, wide) }};
@group(0) @binding(2) var<storage, read> w: {{ storage(element, false, vector, wide) }};
@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: {{ storage("f32", false, vector and lanes) }};

{{ load("x", "f32", false, vector, wide) }}
{{ load("w", element, false, vector, wide) }}

fn x_place(batch: u32, row: u32) -> u32 {
    return params.x_base + batch * params.x_batch + row * params.x_row;
}

fn y_place(batch: u32, row: u32, col: u32) -> u32 {
    return params.out_base + batch * params.out_batch + (col / params.col_head) * params.out_head + row * params.out_row + col % params.col_head;
}

fn bias(col: u32) -> f32 {
    return b[params.b_base + min(col, params.col_end - 1u)];
}

{% if lanes %}
{% if not vector %}
fn give(batch: u32, row: u32, col: u32, sum: f32) {
    if (col < params.col_end) {
        let at = y_place(batch, row, col);
        y[at] = sum + select(0.0, y[at], (params.flags & ADD) != 0u);
    }
}
{% endif %}

// Lane-per-row form, for CPU adapters, where loads are the cost: a lane owns {{ rows }} rows and {{ tile_cols }} columns of each in registers;
// the weights of four inputs are loaded once per subgroup, spread over its lanes, and broadcast. The workgroup is one subgroup.
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
    let w_{{ t }} = params.w_base + min(col_first + lane + {{ t * lanes }}u, col_last) * params.w_row;
{% else %}
    let in_{{ t }} = (lane + {{ t * lanes }}u) / {{ tile_cols // 4 }}u;
    let col_{{ t }} = min(col_first + ((lane + {{ t * lanes }}u) % {{ tile_cols // 4 }}u) * 4u, col_last4);
{% endif %}
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
        let part_{{ t }} = load_w(params.w_base + min(i + in_{{ t }}, in_end - 1u) * params.w_row + col_{{ t }}, params.col_end - col_{{ t }});
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
        let w_{{ c }}_{{ j }} = load_w(params.w_base + min(col_first + {{ part }}u, col_last) * params.w_row + i, valid);
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
    // One row after the other, so that each store stands once in the text: drivers that compile on the CPU pay for each place.
    for (var r = 0u; r < ROWS; r++) {
        let row = row_first + r * LANES + lane;
        if (row < row_end) {
{% for c in range(tile_cols // 4) %}
            let col_at_{{ c }} = col_first + {{ c * 4 }}u;
            if (col_at_{{ c }} < params.col_end) {
                var sum = sum_0_{{ c }};
{% for r in range(1, rows) %}
                sum = select(sum, sum_{{ r }}_{{ c }}, r == {{ r }}u);
{% endfor %}
                if ((params.flags & BIAS) != 0u) {
                    sum += vec4<f32>(bias(col_at_{{ c }}), bias(col_at_{{ c }} + 1u), bias(col_at_{{ c }} + 2u), bias(col_at_{{ c }} + 3u));
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
        }
    }
}
{% else %}
// Tiled form, for GPUs: a workgroup owns {{ tile_rows }} rows × {{ tile_cols }} columns, stages {{ dims }} inputs of both at a time (weights as
// [column][input], whatever their order in memory), and each invocation owns {{ rows }} × {{ cols }} of the tile in registers.
const TILE_ROWS: u32 = {{ tile_rows }}u;
const TILE_COLS: u32 = {{ tile_cols }}u;
const DEPTH: u32 = {{ dims }}u;
const THREADS: u32 = {{ threads }}u;
const PITCH: u32 = {{ dims // 4 + 1 }}u;

var<workgroup> sh_x: array<vec4<f32>, {{ tile_rows * (dims // 4 + 1) }}>;
var<workgroup> sh_w: array<vec4<f32>, {{ tile_cols * (dims // 4 + 1) }}>;

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
                let col = min(col_first + part / (DEPTH / 4u), params.col_end - 1u);
                a = load_w(params.w_base + col * params.w_row + i, params.in_end - i);
            }
            sh_w[part / (DEPTH / 4u) * PITCH + part % (DEPTH / 4u)] = a;
        }
{% else %}
        // Blocks of four inputs × four columns are turned over in registers.
        for (var part = thread; part < (TILE_COLS / 4u) * (DEPTH / 4u); part += THREADS) {
            let across4 = part % (TILE_COLS / 4u);
            let down4 = part / (TILE_COLS / 4u);
            let i = first + down4 * 4u;
            let col = col_first + across4 * 4u;
            let turned = transpose(mat4x4<f32>(w_row(i, col), w_row(i + 1u, col), w_row(i + 2u, col), w_row(i + 3u, col)));
            let at = across4 * 4u * PITCH + down4;
            sh_w[at] = turned[0];
            sh_w[at + PITCH] = turned[1];
            sh_w[at + 2u * PITCH] = turned[2];
            sh_w[at + 3u * PITCH] = turned[3];
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
{% for c in range(cols) %}
    let col_{{ c }} = col_first + across + {{ c * (tile_cols // cols) }}u;
    if (col_{{ c }} < params.col_end) {
        var shift = 0.0;
        if ((params.flags & BIAS) != 0u) {
            shift = bias(col_{{ c }});
        }
{% for r in range(rows) %}
        let row_{{ c }}_{{ r }} = row_first + down + {{ r * (tile_rows // rows) }}u;
        if (row_{{ c }}_{{ r }} <= row_last) {
            let at = y_place(batch, row_{{ c }}_{{ r }}, col_{{ c }});
            y[at] = sum_{{ r }}_{{ c }} + shift + select(0.0, y[at], (params.flags & ADD) != 0u);
        }
{% endfor %}
    }
{% endfor %}
}
{% endif %}
