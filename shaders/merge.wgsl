{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/finish.wgsl" import over_sum %}
{% from "shared/weigh.wgsl" import weigh %}
{% from "shared/address.wgsl" import row_at %}
// Merge:  exact merge of N partial results of the same rows, each over a part of the keys:
//   m = max lse_n,  l = Σ exp(lse_n − m) (+ exp(sink − m)),  lse = m + ln l,  out = Σ exp(lse_n − m) / l · out_n.
// A partial with lse −inf is empty and not looked at; all empty: out 0, lse −inf. An lse of NaN or +inf makes its row
// NaN; a NaN or an infinity in out shows in its element. m may be a code (shared/code.wgsl). With TOTALS a partial
// gives m and l instead: m + ln l would lose l where m is large, as in a row of which every bias is the lowest number.
// (Rabe and Staats, "Self-attention Does Not Need O(n²) Memory", 2021.)
{% if totals %}
// This pass: m and l of each row{{ ", and its lse" if lse }}. With ADD it goes on from those of the partials before.
{% else %}
// This pass: out from m and l. With ADD it adds to what the partials before left in out, which is f32 then.
{% endif %}
//
// Grid:      columns = tiles of {{ threads }} items, an item being a
//            row{{ "" if totals else " and four of its elements" }}. No other axis.
// Memory:    no workgroup memory.
// Given:     partials params.key0 .. params.key_end are bound; items number params.batch0 .., params.head0 ..,
//            params.row0 .. through.
// Reference: src/reference/merge.rs
{% include "shared/params.wgsl" %}
{% include "shared/code.wgsl" %}
{% include "shared/normaliser.wgsl" %}

{% if totals %}
@group(0) @binding(1) var<storage, read> partial_lse: array<u32>;
@group(0) @binding(2) var<storage, read_write> totals: array<vec2<f32>>;
{% if lse %}
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;
{% endif %}
{% if sinks %}
@group(0) @binding({{ 4 if lse else 3 }}) var<storage, read> sinks: array<u32>;
{% endif %}
{% else %}
@group(0) @binding(1) var<storage, read> partial_out: {{ storage("f32", false, vector) }};
@group(0) @binding(2) var<storage, read> partial_lse: array<u32>;
@group(0) @binding(3) var<storage, read> totals: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> out: {{ output(element, vector) }};

{% include "shared/value.wgsl" %}
{{ load("partial_out", "f32", false, vector) }}
{{ store("out", element, vector) }}
{% endif %}

const EMPTY: u32 = 0xff800000u;

// Maximum and sum of a line of partial n: those that `split` left, with TOTALS, else its lse, a number or a code, and
// 1.
fn partial(n: u32, at: u32) -> vec2<f32> {
    let line = n * params.partial_lse + at;
    if ((params.flags & TOTALS) != 0u) {
        let first = params.partial_base + 2u * line;
        return vec2<f32>(bitcast<f32>(partial_lse[first]), bitcast<f32>(partial_lse[first + 1u]));
    }
    let bits = partial_lse[params.partial_base + line];
    return vec2<f32>(select(coded(bits), HIDDEN, bits == EMPTY), 1.0);
}

// Below this difference f32 cannot tell the weight from 0.
{{ weigh("f32", "-150.0") }}
@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let item = here.col_tile * {{ threads }}u + thread;
    if (!here.inside || item >= params.item_count) {
        return;
    }
{% if totals %}
    let line = item;
{% else %}
    let groups = (params.value_dim + 3u) / 4u;
    let line = item / groups;
    let dim = (item % groups) * 4u;
{% endif %}
    let rows = params.row_end - params.row0;
    let plane = line / rows;
    let row = params.row0 + line % rows;
    let head = params.head0 + plane % params.heads;
    let batch = params.batch0 + plane / params.heads;
    // Of lse, totals and, from partial_base on, of each partial's lse.
    let at = batch * params.lse_batch + head * params.lse_head + row;
{% if totals %}
    var m = HIDDEN;
    var l = 0.0;
    if ((params.flags & ADD) != 0u) {
        m = totals[params.lse_base + at].x;
        l = totals[params.lse_base + at].y;
    }
    let before = m;
    for (var n = params.key0; n < params.key_end; n++) {
        m = max(m, partial(n, at).x);
    }
    l *= weigh(before, m);
    for (var n = params.key0; n < params.key_end; n++) {
        let one = partial(n, at);
        l += select(0.0, weigh(one.x, m) * one.y, one.x > MINUS);
    }
{% if sinks %}
    let with_sink = join_sink(m, l, coded(sinks[head]));
    m = with_sink.m;
    l = with_sink.l;
{% endif %}
{% if lse %}
    lse[params.lse_base + at] = lse_bits(m, l);
{% endif %}
    totals[params.lse_base + at] = vec2<f32>(m, l);
{% else %}
    let total = totals[params.lse_base + at];
    let inverse = {{ over_sum("1.0", "total.y") }};
    let valid = min(4u, params.value_dim - dim);
    let to = {{ row_at("out", "batch", "head", "row") }} + dim;
    let from_place = {{ row_at("x", "batch", "head", "row") }} + dim;
    var sum = vec4<f32>();
    var all = select(0u, 0xffu, broken(total.x));
{% if element == "f32" %}
    if ((params.flags & ADD) != 0u) {
{% if vector %}
        sum = bitcast<vec4<f32>>(out[to >> 2u]);
{% else %}
        for (var i = 0u; i < valid; i++) {
            sum[i] = bitcast<f32>(out[to + i]);
        }
{% endif %}
        all |= classes(sum);
    }
{% endif %}
    for (var n = params.key0; n < params.key_end; n++) {
        let one = partial(n, at);
        if (one.x > MINUS) {
            let part = load_partial_out(from_place + n * params.partial_out, valid);
            all |= classes(part);
            sum += weigh(one.x, total.x) * one.y * inverse * part;
        }
    }
    store_out(to, valid, result_bits(sum, all));
{% endif %}
}
