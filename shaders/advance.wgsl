// Advance:  lengths[b] = min(lengths[b] + {{ "by[b]" if each else "by" }}, limit), where the sum does not wrap.
//
// Grid:      rows = {{ threads }} batches; an invocation owns a batch.
// Memory:    no workgroup memory.
// Given:     the rows params.row0 .. params.row_end are batches.
// Reference: src/reference/advance.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read_write> lengths: array<u32>;
{% if each %}
@group(0) @binding(2) var<storage, read> by: array<u32>;
{% endif %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let batch = params.row0 + here.row_tile * {{ threads }}u + thread;
    if (!here.inside || batch >= params.row_end) {
        return;
    }
    let step = {{ "by[params.by_base + batch]" if each else "params.by" }};
    let length = min(lengths[params.lengths_base + batch], params.limit);
    lengths[params.lengths_base + batch] = length + min(step, params.limit - length);
}
