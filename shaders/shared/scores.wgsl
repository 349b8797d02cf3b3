{# What the two bodies of `scores` share: bindings, the score transform, and addresses. Needs params.wgsl. #}
{% from "shared/element.wgsl" import storage, load %}
{% from "shared/address.wgsl" import row_at %}
@group(0) @binding(1) var<storage, read> q: {{ storage(element, native, vector, wide) }};
@group(0) @binding(2) var<storage, read> k: {{ storage(element, native, vector, wide) }};
@group(0) @binding(3) var<storage, read_write> s: array<{{ "vec4<f32>" if lanes else "f32" }}>;
@group(0) @binding(4) var<storage, read> lists: array<u32>;
{% if full %}
@group(0) @binding(5) var<storage, read> mask: array<u32>;
@group(0) @binding(6) var<storage, read> bias: array<u32>;
{% endif %}

{% include "shared/visible.wgsl" %}
{% include "shared/score.wgsl" %}
{% include "shared/value.wgsl" %}
{{ load("q", element, native, vector, wide) }}
{{ load("k", element, native, vector, wide) }}

fn q_place(batch: u32, head: u32, sequence: Sequence, row: u32) -> u32 {
    return {{ row_at("q", "batch_of(batch)", "head", "(sequence.token_q + min(row, max(sequence.rows, 1u) - 1u))") }};
}

fn k_place(batch: u32, head: u32, sequence: Sequence, key: u32) -> u32 {
    return {{ row_at("k", "batch_of(batch)", "(head / params.group)", "(sequence.token_kv + key)") }};
}

fn s_place(batch: u32, head: u32, row: u32) -> u32 {
    return {{ row_at("s", "batch", "head", "row") }};
}
