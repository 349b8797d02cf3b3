{# Expressions that are written out once for each of several numbers, because drivers do not keep arrays in registers.
   A # in a text stands for the number. #}

{# The text for 0, 1, .. n − 1, joined by an operator. #}
{% macro joined(n, operator, text) -%}
{% for i in range(n) %}{{ operator if not loop.first }}{{ text | replace("#", i) }}{% endfor %}
{%- endmacro %}

{# A word in which bit i is set unless the condition holds for i. An @ in the condition stands for the number, so that
   the condition may itself be joined. #}
{% macro bits_unless(n, condition) -%}
{% for i in range(n) -%}
{{ " | " if not loop.first }}select({{ 2 ** i }}u, 0u, {{ condition | replace("@", i) }})
{%- endfor %}
{%- endmacro %}

{# Whichever of n variables has the number that the variable `which` holds. #}
{% macro chosen(n, which, name) -%}
{% for i in range(1, n) %}select({% endfor %}{{ name | replace("#", 0) }}
{%- for i in range(1, n) %}, {{ name | replace("#", i) }}, {{ which }} == {{ i }}u){% endfor %}
{%- endmacro %}

{# The variable that a loop with the counter r works on: that of number r, of n whose names have the number for #. #}
{% macro take(n, name, of_number) %}
        var {{ name }} = {{ of_number | replace("#", 0) }};
{% for i in range(1, n) %}
        {{ name }} = select({{ name }}, {{ of_number | replace("#", i) }}, r == {{ i }}u);
{% endfor %}
{% endmacro %}

{# The opposite: the variable of number r becomes the value, and the others stay. #}
{% macro put(n, of_number, value) %}
{% for i in range(n) %}
        {{ of_number | replace("#", i) }} = select({{ of_number | replace("#", i) }}, {{ value }}, r == {{ i }}u);
{% endfor %}
{% endmacro %}

{# The four components of a vector w times the four vectors whose names begin with v. #}
{% macro weighted(w, v) -%}
{% for c in "xyzw" %}{{ " + " if not loop.first }}{{ w }}.{{ c }} * {{ v }}_{{ loop.index0 }}{% endfor %}
{%- endmacro %}

{# A vector of four: the text for those of 0 .. 3 that are below n, and `other` for the rest. #}
{% macro vector_of(n, text, other) -%}
{% for i in range(4) %}{{ ", " if not loop.first }}{{ text | replace("#", i) if i < n else other }}{% endfor %}
{%- endmacro %}

{# A part of a dot product over four vectors, from number c on: two pairs, and then their sum. A sum of four vectors at
   a time is exact where one long chain of equal terms would round, such as those of the largest numbers of f16. #}
{% macro four_dots(a, b, c) -%}
{% for i in range(0, 4, 2) -%}
{{ " + " if i }}(dot({{ a }}_{{ c + i }}, {{ b }}_{{ c + i }}) + dot({{ a }}_{{ c + i + 1 }}, {{ b }}_{{ c + i + 1 }}))
{%- endfor %}
{%- endmacro %}

{# The maximum of n variables name_0, name_1, and so on, and of another one. #}
{% macro maximum(n, name, other) -%}
{% for i in range(n) %}max({{ name }}_{{ i }}, {% endfor %}{{ other }}{{ ")" * n }}
{%- endmacro %}

{# Whether every vector of values that was loaded is finite: `good_j_c` tells it of vector c of key j. #}
{% macro all_good(keys, vectors) -%}
{% for j in range(keys) %}{{ " & " if j }}{{ joined(vectors, " & ", "good_%s_#" | format(j)) }}{% endfor %}
{%- endmacro %}
