{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/finish.wgsl" import over_sum %}
{% from "shared/address.wgsl" import row_at %}
// Merge:  exact merge of N partial results of the same rows, each over a part of the keys. This is the second of two
// passes: it forms out from the m and l that merge_totals.wgsl left. With ADD it adds to what the partials before left
// in out, which is f32 then.
//   m = max lse_n,  l = Σ exp(lse_n − m) (+ exp(sink − m)),  lse = m + ln l,  out = Σ exp(lse_n − m) / l · out_n.
// A partial whose lse is −∞ is empty, and its out is not looked at. A row of which all partials are empty has out 0 and
// lse −∞. An lse of NaN or +∞ makes its row NaN; a NaN or an infinity in out shows in its element. m may be a code
// (shared/code.wgsl). With TOTALS a partial gives m and l instead of lse: m + ln l would lose l where m is large, as in
// a row of which every bias is the lowest number. (Rabe and Staats, "Self-attention Does Not Need O(n²) Memory", 2021.)
//
// Grid:      columns = tiles of {{ threads }} items, an item being a row and four of its elements. No other axis.
// Memory:    no workgroup memory.
// Given:     partials params.partial0 .. params.partial_end are bound. Items are numbered through from params.batch0,
//            params.head0 and params.row0 on.
// Reference: src/reference/merge.rs
{% include "shared/params.wgsl" %}
{% include "shared/code.wgsl" %}
{% include "shared/normaliser.wgsl" %}

@group(0) @binding(1) var<storage, read> partial_out: {{ storage("f32", false, vector) }};
@group(0) @binding(2) var<storage, read> partial_lse: array<u32>;
@group(0) @binding(3) var<storage, read> totals: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> out: {{ output(element, vector) }};

{% include "shared/value.wgsl" %}
{{ load("partial_out", "f32", false, vector) }}
{{ store("out", element, vector) }}

{% include "shared/merge.wgsl" %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let item = here.col_tile * {{ threads }}u + thread;
    if (!here.inside || item >= params.items) {
        return;
    }
    let groups = (params.value_dim + 3u) / 4u;
    let number = item / groups;
    let dim = (item % groups) * 4u;
{% include "shared/merge_row.wgsl" %}
    let total = totals[params.lse_base + at];
    let inverse = {{ over_sum("1.0", "total.y") }};
    let valid = min(4u, params.value_dim - dim);
    let to = {{ row_at("out", "batch", "head", "row") }} + dim;
    let from_place = {{ row_at("first_out", "batch", "head", "row") }} + dim;
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
    for (var n = params.partial0; n < params.partial_end; n++) {
        let one = partial(n, at);
        // A part of which all logits are −∞ weighs 0, but its NaN show.
        if (one.x > HIDDEN) {
            let part = load_partial_out(from_place + n * params.next_out, valid);
            all |= classes(part);
            sum += weigh(one.x, total.x) * one.y * inverse * part;
        }
    }
    store_out(to, valid, result_bits(sum, all));
}
