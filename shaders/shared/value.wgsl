{# NaN and infinities in what is loaded and stored, by their bits: drivers assume that arithmetic does not meet them. #}
fn finite_each(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u);
}

fn finite(x: vec4<f32>) -> bool {
    return all(finite_each(x));
}

// 0 for what is not finite.
fn finite_or_zero(x: vec4<f32>) -> vec4<f32> {
    return select(vec4<f32>(), x, finite_each(x));
}

// What a visible value makes of an element of out, a bit each: bit c where component c is NaN or +∞, bit 4 + c where it
// is NaN or −∞. Of the classes of several values, those of their weighted sum are the union.
fn classes(x: vec4<f32>) -> u32 {
    let bits = bitcast<vec4<u32>>(x);
    let size = bits & vec4<u32>(0x7fffffffu);
    let nan = size > vec4<u32>(0x7f800000u);
    let infinite = size == vec4<u32>(0x7f800000u);
    let negative = bits > vec4<u32>(0x7fffffffu);
    let plus = select(vec4<u32>(), vec4<u32>(1u, 2u, 4u, 8u), nan | (infinite & !negative));
    let minus = select(vec4<u32>(), vec4<u32>(16u, 32u, 64u, 128u), nan | (infinite & negative));
    let both = plus | minus;
    return both.x | both.y | both.z | both.w;
}

// The classes where the weight is exactly 0, because the logit is −∞: 0 · ∞ is NaN. For any number of classes side by
// side.
fn classes_of_zero(all: u32) -> u32 {
    return all | ((all >> 4u) & 0x0f0f0f0fu) | ((all & 0x0f0f0f0fu) << 4u);
}

// The classes that a row takes from a value whose key it sees or not, and weighs exactly 0 or not. For any number of
// classes side by side.
fn classes_seen(all: u32, visible: bool, weighs_zero: bool) -> u32 {
    return select(0u, select(all, classes_of_zero(all), weighs_zero), visible);
}

// The bits of four elements of out with these classes: NaN where both bits are set, else the infinity.
fn result_bits(x: vec4<f32>, all: u32) -> vec4<u32> {
    let plus = (vec4<u32>(all) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>();
    let minus = (vec4<u32>(all) & vec4<u32>(16u, 32u, 64u, 128u)) != vec4<u32>();
    let one = select(select(bitcast<vec4<u32>>(x), vec4<u32>(0x7f800000u), plus), vec4<u32>(0xff800000u), minus);
    return select(one, vec4<u32>(0x7fc00000u), plus & minus);
}

// The larger sizes of bits, component by component: for one test of many vectors, see `any_ends`.
fn larger(sizes: vec4<u32>, x: vec4<f32>) -> vec4<u32> {
    return max(sizes, bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu));
}

// Whether one of them is that of NaN or an infinity.
fn any_ends(sizes: vec4<u32>) -> bool {
    return max(max(sizes.x, sizes.y), max(sizes.z, sizes.w)) >= 0x7f800000u;
}

{# A word with the classes of up to four vectors, eight bits each. The vectors are the variables name_first,
   name_(first + 1), and so on. #}
{% macro classes_word(name, first, count=4) -%}
{% for i in range(count) -%}
{{ " | " if not loop.first }}(classes({{ name }}_{{ first + i }}) << {{ i * 8 }}u)
{%- endfor %}
{%- endmacro %}

{# The classes of vector c, in the lowest bits. The words of four vectors each are the variables name_0, name_1, and so
   on. #}
{% macro classes_of_vector(name, c) -%}
{{ name }}_{{ c // 4 }} >> {{ c % 4 * 8 }}u
{%- endmacro %}
