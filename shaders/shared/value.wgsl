{# What every kernel that reads values shares. #}
fn finite(x: vec4<f32>) -> bool {
    let exponent = bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u);
    return all(exponent != vec4<u32>(0x7f800000u));
}
