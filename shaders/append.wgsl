{% from "shared/address.wgsl" import row_at %}
// Append:  new rows go into a cache that holds some already, bit for bit:  cache[b, h, place(b, r), :] = x[b, h, r, :].
//   In order:  place(b, r) = min(starts[b], capacity − rows) + r, so that no start puts a row outside.
//   Circular:  place(b, r) = (starts[b] + r) mod capacity.
//   Paged:     that row p is row p mod page_size of page block_table[b, p / page_size], which takes the place of b.
//              Rows without a page of the pool are left out.
// (ONNX `TensorScatter`.)
//
// Grid:      rows = {{ threads }} items of (row, unit), then heads and batches. An item copies one unit.
//            A unit has {{ bytes }} bytes.
// Memory:    no workgroup memory.
// Given:     sizes and strides count units; no more rows than capacity. The cache rows params.cache_row0 ..
//            params.cache_row_end are bound; rows that go elsewhere are left to another dispatch.
{% if half %}
//            Two rows may share a word, so that each half of a word changes by itself.
{% endif %}
// Reference: src/reference/append.rs
{% include "shared/params.wgsl" %}

@group(0) @binding(1) var<storage, read> x: array<{{ unit }}>;
@group(0) @binding(2) var<storage, read> starts: array<u32>;
@group(0) @binding(3) var<storage, read> block_table: array<u32>;
@group(0) @binding(4) var<storage, read_write> cache: array<{{ "atomic<u32>" if half else unit }}>;

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let here = place(workgroup, grid);
    let number = here.row_tile * {{ threads }}u + thread;
    let row = params.row0 + number / params.units;
    let unit = number % params.units;
    if (!here.inside || row >= params.row_end) {
        return;
    }
    let start = starts[params.starts_base + here.batch];
    var target_row = min(start, params.capacity - params.rows) + row;
    if ((params.flags & CIRCULAR) != 0u) {
        target_row = (start % params.capacity + row) % params.capacity;
    }
    if (target_row < params.cache_row0 || target_row >= params.cache_row_end) {
        return;
    }
    var slab = here.batch;
    if ((params.flags & PAGED) != 0u) {
        slab = block_table[params.table_base + here.batch * params.table_row + target_row / params.page_size];
        if (slab >= params.pages) {
            return;
        }
        target_row = target_row % params.page_size;
    }
    let source = {{ row_at("x", "here.batch", "here.head", "row") }} + unit;
    let to = {{ row_at("cache", "slab", "here.head", "target_row") }} + unit;
{% if half %}
    let bits = (x[source >> 1u] >> ((source & 1u) * 16u)) & 0xffffu;
    let shift = (to & 1u) * 16u;
    atomicAnd(&cache[to >> 1u], ~(0xffffu << shift));
    atomicOr(&cache[to >> 1u], bits << shift);
{% else %}
    cache[to] = x[source];
{% endif %}
}
