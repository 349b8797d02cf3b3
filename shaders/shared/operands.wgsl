{# The bindings of the fused kernels. `lists`: the log-sum-exp and the small arrays per batch and per head are bound.
   `full`: mask and bias are bound too. `carry`: m, l and o of each row wait in `state` between dispatches. The kernels
   that have no native f16, no wide loads or no state set these to false. #}
@group(0) @binding(1) var<storage, read> q: {{ storage(element, native, vector, wide) }};
@group(0) @binding(2) var<storage, read> k: {{ storage(element, native, vector, wide) }};
@group(0) @binding(3) var<storage, read> v: {{ storage(element, native, vector, wide) }};
@group(0) @binding(4) var<storage, read_write> out: {{ output(out, vector) }};
{% if lists %}
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
@group(0) @binding(6) var<storage, read> lists: array<u32>;
{% endif %}
{% if full %}
@group(0) @binding(7) var<storage, read> mask: array<u32>;
@group(0) @binding(8) var<storage, read> bias: array<u32>;
{% endif %}
{% if carry %}
// First m and l, of each row or invocation, and then o. NaN and infinities in o stand for the classes of values that
// were seen.
@group(0) @binding({{ 9 if full else 7 }}) var<storage, read_write> state: array<vec4<u32>>;
{% endif %}
