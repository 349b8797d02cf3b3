{# What every kernel starts with: its uniform, and which part of the work a workgroup owns. `params_fields` and `flags`
   are those that the kernel's module declares, see src/kernel/uniform.rs. #}
struct Params {
{{ params_fields }}}

@group(0) @binding(0) var<uniform> params: Params;

{% for name, bit in flags | items %}
const {{ name }}: u32 = {{ bit }}u;
{% endfor %}

// The part of the work that one workgroup owns: a batch, a head, a tile of rows and a tile of columns (keys or value
// dims).
struct Place {
    inside: bool,
    batch: u32,
    head: u32,
    row_tile: u32,
    col_tile: u32,
}

// Workgroups are numbered through, so that any count folds into three grid axes; columns run fastest, then rows, then
// heads.
fn place(workgroup: vec3<u32>, grid: vec3<u32>) -> Place {
    let number = params.first + workgroup.x + grid.x * (workgroup.y + grid.y * workgroup.z);
    // The grid may overshoot; whoever does not return then still forms addresses that exist.
    let index = min(number, params.end - 1u);
    let row_tile = index / params.col_tiles;
    let plane = row_tile / params.row_tiles;
    return Place(
        number < params.end,
        params.batch0 + plane / params.heads,
        params.head0 + plane % params.heads,
        row_tile % params.row_tiles,
        index % params.col_tiles,
    );
}
