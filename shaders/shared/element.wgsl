{# Loads and stores of four consecutive elements per element type. `vector`: every address is a multiple of four
   elements. f16 and bf16 are packed in u32 (`native` f16 uses the adapter's own type for loads). `wide`: whole vectors
   are loaded by 64 bits, for drivers that load component by component. Arithmetic is f32. #}

{% macro storage(element, native, vector, wide=false) -%}
{% if wide and vector %}array<{{ "vec2<u64>" if element == "f32" else "u64" }}>
{%- elif element == "f32" %}array<{{ "vec4<f32>" if vector else "f32" }}>
{%- elif native %}array<{{ "vec4<f16>" if vector else "f16" }}>
{%- else %}array<{{ "vec2<u32>" if vector else "u32" }}>{% endif %}
{%- endmacro %}

{% macro words(name, wide) -%}
{% if wide -%}
vec2<u32>(u32({{ name }}[index >> 2u]), u32({{ name }}[index >> 2u] >> 32u))
{%- else -%}
{{ name }}[index >> 2u]
{%- endif %}
{%- endmacro %}

{% macro load(name, element, native, vector, wide=false) %}
{% if not vector %}
fn {{ name }}_at(index: u32) -> f32 {
{% if element == "f32" or native %}
    return f32({{ name }}[index]);
{% elif element == "f16" %}
    return unpack2x16float({{ name }}[index >> 1u] >> ((index & 1u) * 16u)).x;
{% else %}
    return bitcast<f32>(({{ name }}[index >> 1u] >> ((index & 1u) * 16u)) << 16u);
{% endif %}
}
{% endif %}

// Elements index .. index + 3 of {{ name }}; those from `valid` (at least 1) on are 0.
fn load_{{ name }}(index: u32, valid: u32) -> vec4<f32> {
{% if not vector %}
    let last = valid - 1u;
    return vec4<f32>(
        {{ name }}_at(index),
        select(0.0, {{ name }}_at(index + min(1u, last)), last >= 1u),
        select(0.0, {{ name }}_at(index + min(2u, last)), last >= 2u),
        select(0.0, {{ name }}_at(index + min(3u, last)), last >= 3u),
    );
{% elif wide and element == "f32" %}
    let words = {{ name }}[index >> 2u];
    return bitcast<vec4<f32>>(vec4<u32>(u32(words.x), u32(words.x >> 32u), u32(words.y), u32(words.y >> 32u)));
{% elif element == "f32" %}
    return {{ name }}[index >> 2u];
{% elif native %}
    return vec4<f32>({{ name }}[index >> 2u]);
{% elif element == "f16" %}
    let words = {{ words(name, wide) }};
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
{% else %}
    let words = {{ words(name, wide) }};
    return bitcast<vec4<f32>>(vec4<u32>(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
{% endif %}
}
{% endmacro %}

{# The type in which four elements are kept in workgroup memory: their own, so that 16-bit ones take half the room. #}
{% macro staged(element, native) -%}
{% if element == "f32" %}vec4<f32>{% elif native %}vec4<f16>{% else %}vec2<u32>{% endif %}
{%- endmacro %}

{% macro stage(name, element, native, vector) %}
{% if element == "f32" %}
{{ load(name, element, native, vector) }}
{% elif not native and not vector %}
fn {{ name }}_half(index: u32) -> u32 {
    return ({{ name }}[index >> 1u] >> ((index & 1u) * 16u)) & 0xffffu;
}
{% endif %}

// Elements index .. index + 3 of {{ name }} as they are staged; those from `valid` (at least 1) on are 0.
fn stage_{{ name }}(index: u32, valid: u32) -> {{ staged(element, native) }} {
{% if element == "f32" %}
    return load_{{ name }}(index, valid);
{% elif vector %}
    return {{ name }}[index >> 2u];
{% else %}
    let last = valid - 1u;
{% set at = name if native else name ~ "_half" %}
{% set open, close = ("[", "]") if native else ("(", ")") %}
{% set zero = "0.0h" if native else "0u" %}
    let x = {{ at }}{{ open }}index{{ close }};
    let y = select({{ zero }}, {{ at }}{{ open }}index + min(1u, last){{ close }}, last >= 1u);
    let z = select({{ zero }}, {{ at }}{{ open }}index + min(2u, last){{ close }}, last >= 2u);
    let w = select({{ zero }}, {{ at }}{{ open }}index + min(3u, last){{ close }}, last >= 3u);
    return {{ "vec4<f16>(x, y, z, w)" if native else "vec2<u32>(x | (y << 16u), z | (w << 16u))" }};
{% endif %}
}
{% endmacro %}

{% macro widen(element, native) %}
// What was staged, as f32.
fn widen(x: {{ staged(element, native) }}) -> vec4<f32> {
{% if element == "f32" %}
    return x;
{% elif native %}
    return vec4<f32>(x);
{% elif element == "f16" %}
    return vec4<f32>(unpack2x16float(x.x), unpack2x16float(x.y));
{% else %}
    return bitcast<vec4<f32>>(vec4<u32>(x.x << 16u, x.x & 0xffff0000u, x.y << 16u, x.y & 0xffff0000u));
{% endif %}
}
{% endmacro %}

{% macro staged_finite(element, native) %}
{% if element != "f32" %}
// What was staged, with 0 for what is not finite. Needs value.wgsl.
fn staged_finite(x: {{ staged(element, native) }}) -> {{ staged(element, native) }} {
    let keep = finite_each(widen(x));
{% if native %}
    return select(vec4<f16>(), x, keep);
{% else %}
    let mask = select(vec4<u32>(), vec4<u32>(0xffffu, 0xffff0000u, 0xffffu, 0xffff0000u), keep);
    return x & vec2<u32>(mask.x | mask.y, mask.z | mask.w);
{% endif %}
}
{% endif %}
{% endmacro %}

{% macro rounding(element) %}
{% if element == "bf16" %}
// bf16 bits of x, to nearest, ties to even.
fn half_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return select((bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u, 0x7fc0u, nan);
}
{% else %}
// f16 bits of x, to nearest, ties to even: in integers, because drivers may truncate in pack2x16float.
fn half_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign_bit = (bits >> 16u) & 0x8000u;
    let size = bits & 0x7fffffffu;
    let normal = (size - 0x38000000u + 0xfffu + ((size >> 13u) & 1u)) >> 13u;
    let subnormal = u32(round(bitcast<f32>(min(size, 0x38800000u)) * 16777216.0));
    let finite = select(normal, subnormal, size < 0x38800000u);
    let special = select(0x7c00u, 0x7e00u, size > 0x7f800000u);
    return sign_bit | select(finite, special, size >= 0x477ff000u);
}
{% endif %}
{% endmacro %}

{% macro store(name, element, vector) %}
{% if element != "f32" %}
{{ rounding(element) }}
{% endif %}
// Writes the bits of f32 values to elements index .. index + 3 of {{ name }}, only the first `valid` where they are not
// whole vectors.
fn store_{{ name }}(index: u32, valid: u32, bits: vec4<u32>) {
{% if element != "f32" %}
    let x = bitcast<vec4<f32>>(bits);
    {{ name }}[index >> 2u] =
        vec2<u32>(half_bits(x.x) | (half_bits(x.y) << 16u), half_bits(x.z) | (half_bits(x.w) << 16u));
{% elif vector %}
    {{ name }}[index >> 2u] = bits;
{% else %}
    {{ name }}[index] = bits.x;
    if (valid > 1u) {
        {{ name }}[index + 1u] = bits.y;
    }
    if (valid > 2u) {
        {{ name }}[index + 2u] = bits.z;
    }
    if (valid > 3u) {
        {{ name }}[index + 3u] = bits.w;
    }
{% endif %}
}
{% endmacro %}

{# Type of an output binding: bits, so that NaN and −inf can be written. #}
{% macro output(element, vector) -%}
{% if element != "f32" %}array<vec2<u32>>{% else %}array<{{ "vec4<u32>" if vector else "u32" }}>{% endif %}
{%- endmacro %}
