// Merge, totals:  the first of two passes over N partial results of the same rows, each over a part of the keys. It
// forms m and l of each row{{ " and its lse" if lse }}; merge.wgsl then forms out. With ADD it goes on from the m and l
// of the partials before.
//   m = max lse_n,  l = Σ exp(lse_n − m) (+ exp(sink − m)),  lse = m + ln l.
// merge.wgsl says what partials may hold, and what TOTALS changes.
//
// Grid:      columns = tiles of {{ threads }} items, an item being a row. No other axis.
// Memory:    no workgroup memory.
// Given:     partials params.partial0 .. params.partial_end are bound. Items are numbered through from params.batch0,
//            params.head0 and params.row0 on.
// Reference: src/reference/merge.rs
{% include "shared/params.wgsl" %}
{% include "shared/code.wgsl" %}
{% include "shared/normaliser.wgsl" %}

@group(0) @binding(1) var<storage, read> partial_lse: array<u32>;
@group(0) @binding(2) var<storage, read_write> totals: array<vec2<f32>>;
{% if lse %}
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;
{% endif %}
{% if sinks %}
@group(0) @binding({{ 4 if lse else 3 }}) var<storage, read> sinks: array<u32>;
{% endif %}

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
    let number = item;
{% include "shared/merge_row.wgsl" %}
    var m = HIDDEN;
    var l = 0.0;
    if ((params.flags & ADD) != 0u) {
        m = totals[params.lse_base + at].x;
        l = totals[params.lse_base + at].y;
    }
    let before = m;
    for (var n = params.partial0; n < params.partial_end; n++) {
        m = max(m, partial(n, at).x);
    }
    l *= weigh(before, m);
    for (var n = params.partial0; n < params.partial_end; n++) {
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
}
