{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/turn.wgsl" import turn %}
{% from "shared/address.wgsl" import row_at %}
// Project:  y = x w (+ b), rows of x times a matrix; y is split into heads of params.col_head columns, which may stand
// anywhere. The weights are [{{ "out, in" if transposed else "in, out" }}], as they come; x, b and y are f32.
{% if turned %}
// Then the first params.head_dim of each params.turn_head columns before params.turn_end turn by the position of their
// row (shaders/rotary.wgsl).
{% endif %}
//
// Grid:      columns = tiles of output columns, rows = tiles of rows, then batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     1 ≤ rows, columns and inputs of the part; where the inputs come in several dispatches, later ones add to
//            y.
{% if turned %}
//            All columns, those of a head and those of it that turn are multiples of eight, and so is params.col0.
{% endif %}
// Reference: src/reference/project.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> x: {{ storage("f32", false, vector, wide) }};
@group(0) @binding(2) var<storage, read> w: {{ storage(element, false, vector, wide) }};
@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: {{ storage("f32", false, vector and lanes) }};
{% if turned %}
@group(0) @binding(5) var<storage, read> table: {{ storage("f32", false, lanes) }};
@group(0) @binding(6) var<storage, read> positions: array<u32>;
{% endif %}

{{ load("x", "f32", false, vector, wide) }}
{{ load("w", element, false, vector, wide) }}

fn x_place(batch: u32, row: u32) -> u32 {
    return params.x_base + batch * params.x_batch + row * params.x_row;
}

fn y_place(batch: u32, row: u32, col: u32) -> u32 {
    return {{ row_at("out", "batch", "(col / params.col_head)", "row") }} + col % params.col_head;
}

fn bias(col: u32) -> f32 {
    return b[params.b_base + min(col, params.col_end - 1u)];
}

{% if turned %}
{{ turn("vec4<f32>" if lanes else "f32") }}
// Columns are numbered so that each eight hold four whole pairs. Where pairs are neighbours, the numbers are the
// columns themselves; where they stand half a rotation apart, four first columns are followed by the four that turn
// with them.
fn column(number: u32) -> u32 {
    let within = number % params.turn_head;
    let moved = number - within + within / 8u * 4u + (within / 4u) % 2u * (params.head_dim / 2u) + within % 4u;
    return select(number, moved, (params.flags & HALVES) != 0u && number < params.turn_end && within < params.head_dim);
}

// Whether the eight columns from this number on turn now: all inputs are in.
fn turns(number: u32) -> bool {
    return (params.flags & TURN) != 0u && number < params.turn_end && number % params.turn_head < params.head_dim;
}

// The row of the table for a row, where rows of all batches may be numbered through.
fn angles(batch: u32, row: u32) -> u32 {
    return position(batch + row / params.seq_q, row % params.seq_q) * params.head_dim;
}
{% endif %}

{% if lanes %}
{% if not vector %}
fn give(batch: u32, row: u32, col: u32, sum: f32) {
    if (col < params.col_end) {
        let at = y_place(batch, row, col);
        y[at] = sum + select(0.0, y[at], (params.flags & ADD) != 0u);
    }
}
{% endif %}

// Lane-per-row form, for CPU adapters, where loads are the cost: a lane owns {{ rows }} rows and {{ tile_cols }}
// columns of each in registers; the weights of four inputs are loaded once per subgroup, spread over its lanes, and
// broadcast. The workgroup is one subgroup.
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
        + {{ "column" if turned else "" }}(min(col_first + lane + {{ t * lanes }}u, col_last)) * params.w_row;
{% else %}
    let in_{{ t }} = (lane + {{ t * lanes }}u) / {{ tile_cols // 4 }}u;
    let col_{{ t }} = min(col_first + ((lane + {{ t * lanes }}u) % {{ tile_cols // 4 }}u) * 4u, col_last4);
{% endif %}
{% endfor %}
{% elif transposed %}
{% for part in range(tile_cols) %}
    let w_{{ part }} = params.w_base
        + {{ "column" if turned else "" }}(min(col_first + {{ part }}u, col_last)) * params.w_row;
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
{% if turned %}
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
                if ((params.flags & BIAS) != 0u) {
                    sum += vec4<f32>(bias(col), bias(col + 1u), bias(col + 2u), bias(col + 3u));
                    next += vec4<f32>(bias(col_next), bias(col_next + 1u), bias(col_next + 2u), bias(col_next + 3u));
                }
                let at = y_place(batch, row, col) >> 2u;
                let at_next = y_place(batch, row, col_next) >> 2u;
                sum += select(vec4<f32>(), y[at], adds);
                next += select(vec4<f32>(), y[at_next], adds);
                if (turns(number_{{ c }})) {
                    let first = select(vec4<f32>(sum.xz, next.xz), sum, halves);
                    let second = select(vec4<f32>(sum.yw, next.yw), next, halves);
                    let pair = angle + number_{{ c }} % params.turn_head / 8u;
                    let cosine = table[pair];
                    let sine = table[pair + params.head_dim / 8u];
                    let a = turn_first(first, second, cosine, sine);
                    let b = turn_second(first, second, cosine, sine);
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
                if ((params.flags & BIAS) != 0u) {
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
{% else %}
// Tiled form, for GPUs: a workgroup owns {{ tile_rows }} rows × {{ tile_cols }} columns, stages {{ dims }} inputs of
// both at a time (weights as [column][input], whatever their order in memory), and each invocation owns
// {{ rows }} × {{ cols }} of the tile in registers.
const TILE_ROWS: u32 = {{ tile_rows }}u;
const TILE_COLS: u32 = {{ tile_cols }}u;
const DEPTH: u32 = {{ dims }}u;
const THREADS: u32 = {{ threads }}u;
const PITCH: u32 = {{ dims // 4 + 1 }}u;

var<workgroup> sh_x: array<vec4<f32>, {{ tile_rows * (dims // 4 + 1) }}>;
var<workgroup> sh_w: array<vec4<f32>, {{ tile_cols * (dims // 4 + 1) }}>;

{% if turned %}
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
{% if turned %}
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
        // Blocks of four inputs × four columns are turned over in registers.
        for (var part = thread; part < (TILE_COLS / 4u) * (DEPTH / 4u); part += THREADS) {
            let across4 = part % (TILE_COLS / 4u);
            let down4 = part / (TILE_COLS / 4u);
            let i = first + down4 * 4u;
            let col = col_first + across4 * 4u;
            let block = transpose(
                mat4x4<f32>(w_row(i, col), w_row(i + 1u, col), w_row(i + 2u, col), w_row(i + 3u, col)),
            );
{% if turned %}
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
{% if turned %}
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
        let within = pair_{{ c }} % (params.turn_head / 2u);
        var shift = vec2<f32>();
        if ((params.flags & BIAS) != 0u) {
            shift = vec2<f32>(bias(col), bias(col_next));
        }
{% for r in range(rows) %}
        if (row_{{ r }} <= row_last) {
            let at = y_place(batch, row_{{ r }}, col);
            let at_next = y_place(batch, row_{{ r }}, col_next);
            var sum = sum_{{ r }}_{{ c }} + shift.x + select(0.0, y[at], adds);
            var next = sum_{{ r }}_{{ c + 1 }} + shift.y + select(0.0, y[at_next], adds);
            if (turns(number_{{ c }})) {
                let a = sum;
                let cosine = table[angle_{{ r }} + within];
                let sine = table[angle_{{ r }} + params.head_dim / 2u + within];
                sum = turn_first(a, next, cosine, sine);
                next = turn_second(a, next, cosine, sine);
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
{% endif %}
}
{% endif %}
