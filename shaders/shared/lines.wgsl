{# Rows of several query heads in one tile: line n of a key/value head is query row n / each of its head n % each,
   `each` being the query heads of the group that the part has. So keys and values are loaded once for all of them.
   Needs params.wgsl. #}
fn line_row(line: u32) -> u32 {
    return params.row0 + line / (params.group_end - params.group0);
}

fn line_head(kv_head: u32, line: u32) -> u32 {
    return kv_head * params.group + params.group0 + line % (params.group_end - params.group0);
}

{# How many lines the rows of this dispatch before `row_end` make. #}
{% macro lines_until(row_end) -%}
({{ row_end }} - params.row0) * (params.group_end - params.group0)
{%- endmacro %}
