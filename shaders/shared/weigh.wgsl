{# The weight of a key before the division by the sum of its row, for logits x of `type` (a number or a vector of
   numbers) in a row whose maximum is m. Where x and m are far apart their difference may be −∞ in f32, so that it is
   clamped at `lowest`. #}
{% macro weigh(type, lowest) %}
fn weigh(x: {{ type }}, m: f32) -> {{ type }} {
    return exp(max(x - m, {{ lowest if type == "f32" else type ~ "(" ~ lowest ~ ")" }}));
}
{% endmacro %}
