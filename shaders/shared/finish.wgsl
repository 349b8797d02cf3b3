{# How a kernel finishes a row, whose maximum and sum are the variables m and l. Needs normaliser.wgsl. #}

{# The sink of the head joins m and l where `lists`, which hold the sinks, are bound. With `rescale`, `shrink` becomes
   the factor of what was summed under the maximum before. #}
{% macro join_sinks(head, lists=true, rescale=true) %}
{% if rescale %}
        var shrink = 1.0;
{% endif %}
{% if lists %}
        if ((params.flags & SINKS) != 0u) {
            let with_sink = join_sink(m, l, coded(lists[params.list_sinks + {{ head }}]));
{% if rescale %}
            shrink = with_sink.shrink;
{% endif %}
            l = with_sink.l;
            m = with_sink.m;
        }
{% endif %}
{% endmacro %}

{# The log-sum-exp is stored where the caller asks for it. #}
{% macro leave_lse(at, condition="") %}
        if ((params.flags & LSE) != 0u{{ " && " ~ condition if condition }}) {
            let at = {{ at }};
            lse[at] = lse_bits(m, l);
        }
{% endmacro %}

{# What the weights or the output of a row are multiplied by at the end. A row that sees no key has the sum 0 and gives
   0. #}
{% macro over_sum(factor, l="l") -%}
select(0.0, {{ factor }} / {{ l }}, {{ l }} > 0.0)
{%- endmacro %}
