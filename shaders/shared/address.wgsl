{# Addresses in tensors, which are buffers with a base and strides in the uniform. #}

{# The element where a row of a tensor begins. The names of its base and strides start with `tensor`. #}
{% macro row_at(tensor, batch, head, row) -%}
params.{{ tensor }}_base + {{ batch }} * params.{{ tensor }}_batch + {{ head }} * params.{{ tensor }}_head
{{- " + " ~ row }} * params.{{ tensor }}_row
{%- endmacro %}

{# The log-sum-exp of a row: lse has no stride of rows, because its rows are neighbours. #}
{% macro lse_at(batch, head, row) -%}
params.lse_base + {{ batch }} * params.lse_batch + {{ head }} * params.lse_head + {{ row }}
{%- endmacro %}
