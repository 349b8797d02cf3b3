{# What turns rows by their positions, for pairs of `type`: a number or a vector of them. Needs the bindings
   `positions`, u32, and `table`, whose rows of params.head_dim numbers hold the cosines, then the sines of a position.
   #}
{% macro turn(type) %}
// The row of the table for a row of a batch; positions beyond the table take its last one.
fn position(batch: u32, row: u32) -> u32 {
    let listed = positions[params.k_base + batch * params.k_batch + row * params.k_row];
    return min(listed + row * params.k_head, params.total_kv - 1u);
}

fn turn_first(a: {{ type }}, b: {{ type }}, cosine: {{ type }}, sine: {{ type }}) -> {{ type }} {
    return cosine * a - sine * b;
}

fn turn_second(a: {{ type }}, b: {{ type }}, cosine: {{ type }}, sine: {{ type }}) -> {{ type }} {
    return sine * a + cosine * b;
}
{% endmacro %}
