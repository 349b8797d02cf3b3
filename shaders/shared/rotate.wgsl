{# What rotates rows by their positions, for pairs of `type`: a number or a vector of them. Needs the bindings
   `positions`, u32, and `table`, whose rows of params.rotary_dim numbers hold the cosines, then the sines of a
   position. #}
{% macro rotate(type) %}
// The row of the table for a row of a batch; positions beyond the table take its last one.
fn position(batch: u32, row: u32) -> u32 {
    let listed = positions[params.positions_base + batch * params.positions_batch + row * params.positions_row];
    return min(listed + row * params.position_step, params.table_rows - 1u);
}

fn rotated_first(a: {{ type }}, b: {{ type }}, cosine: {{ type }}, sine: {{ type }}) -> {{ type }} {
    return cosine * a - sine * b;
}

fn rotated_second(a: {{ type }}, b: {{ type }}, cosine: {{ type }}, sine: {{ type }}) -> {{ type }} {
    return sine * a + cosine * b;
}
{% endmacro %}
