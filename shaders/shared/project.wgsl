{# What the two bodies of `project` share: bindings, addresses, and the columns that are rotated by their position.
   Needs params.wgsl. #}
{% from "shared/element.wgsl" import storage, load %}
{% from "shared/rotate.wgsl" import rotate %}
{% from "shared/address.wgsl" import row_at %}
@group(0) @binding(1) var<storage, read> x: {{ storage("f32", false, vector, wide) }};
@group(0) @binding(2) var<storage, read> w: {{ storage(element, false, vector, wide) }};
@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: {{ storage("f32", false, vector and lanes) }};
{% if rotated %}
@group(0) @binding(5) var<storage, read> table: {{ storage("f32", false, lanes) }};
@group(0) @binding(6) var<storage, read> positions: array<u32>;
{% endif %}

{{ load("x", "f32", false, vector, wide) }}
{{ load("w", element, false, vector, wide) }}

fn x_place(batch: u32, row: u32) -> u32 {
    return params.x_base + batch * params.x_batch + row * params.x_row;
}

fn y_place(batch: u32, row: u32, col: u32) -> u32 {
    return {{ row_at("y", "batch", "(col / params.head_columns)", "row") }} + col % params.head_columns;
}

fn bias(col: u32) -> f32 {
    return b[params.b_base + min(col, params.col_end - 1u)];
}

{% if rotated %}
{{ rotate("vec4<f32>" if lanes else "f32") }}
// Columns are numbered so that each eight hold four whole pairs. Where pairs are neighbours, the numbers are the
// columns themselves; where they stand half a rotation apart, four first columns are followed by their partners.
fn column(number: u32) -> u32 {
    let within = number % params.rotated_head_dim;
    let moved = number - within + within / 8u * 4u + (within / 4u) % 2u * (params.rotary_dim / 2u) + within % 4u;
    return select(
        number,
        moved,
        (params.flags & HALVES) != 0u && number < params.rotated_end && within < params.rotary_dim,
    );
}

// Whether the eight columns from this number on are rotated now: all inputs are in.
fn is_rotated(number: u32) -> bool {
    let within = number % params.rotated_head_dim;
    return (params.flags & ROTATE) != 0u && number < params.rotated_end && within < params.rotary_dim;
}

// The row of the table for a row, where rows of all batches may be numbered through.
fn angles(batch: u32, row: u32) -> u32 {
    return position(batch + row / params.batch_rows, row % params.batch_rows) * params.rotary_dim;
}
{% endif %}
