{# What the two bodies of `values` share: bindings, addresses, and how results are stored. Needs params.wgsl. #}
{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/address.wgsl" import row_at %}
@group(0) @binding(1) var<storage, read> s: {{ storage("f32", false, true, wide) }};
@group(0) @binding(2) var<storage, read> v: {{ storage(element, native, vector, wide) }};
@group(0) @binding(3) var<storage, read_write> out: {{ output(out, vector) }};
@group(0) @binding(4) var<storage, read> lists: array<u32>;

{% include "shared/visible.wgsl" %}
{% include "shared/value.wgsl" %}
{% include "shared/weight.wgsl" %}
{{ load("s", "f32", false, true, wide) }}
{{ load("v", element, native, vector, wide) }}
{{ store("out", out, vector) }}

fn v_place(batch: u32, head: u32, sequence: Sequence, key: u32) -> u32 {
    return {{ row_at("v", "batch_of(batch)", "(head / params.group)", "(sequence.token_kv + key)") }};
}

fn s_place(batch: u32, head: u32, row: u32) -> u32 {
    return ({{ row_at("s", "batch", "head", "row") }}) >> 2u;
}

fn out_place(batch: u32, head: u32, sequence: Sequence, row: u32) -> u32 {
    return {{ row_at("out", "batch_of(batch)", "head", "(sequence.token_q + row)") }};
}

// Four dims of one row: the sum so far where the keys are split, and the classes of the values.
fn give(at: u32, valid: u32, sum: vec4<f32>, own: u32) {
    var total = sum;
    var all = own;
{% if out == "f32" %}
    if ((params.flags & ADD) != 0u) {
{% if vector %}
        let before = bitcast<vec4<f32>>(out[at >> 2u]);
{% else %}
        let last = valid - 1u;
        let before = bitcast<vec4<f32>>(
            vec4<u32>(out[at], out[at + min(1u, last)], out[at + min(2u, last)], out[at + min(3u, last)]),
        );
{% endif %}
        total += before;
        all |= classes(before);
    }
{% endif %}
    store_out(at, valid, result_bits(total, all));
}

// The classes of a value for a row that gives its key this weight.
fn seen(all: u32, weight: f32) -> u32 {
    return classes_seen(all, weight != 0.0, weight == NOTHING);
}
