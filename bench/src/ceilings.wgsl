// Ceilings of an adapter: how fast it multiplies and adds, and how fast it copies.
//
// `source` holds the data; `sink` takes the results, so that no work can be left out as unused.

@group(0) @binding(0) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> sink: array<vec4<f32>>;

// Multiply-add rate, twice: independent chains of vec4, 48 multiply-adds of 4 lanes in one round. source[0] is the factor, source[1]
// the addend; their fixed point is 1, so values stay ordinary. The number of rounds comes from memory, so that no compiler knows it.
// Written as product and sum: compilers fuse these where that is native, while fma() may be emulated where it is not.

// Three chains: twelve values stay in registers even on a CPU adapter, where a value takes a whole vector register.
@compute @workgroup_size(64)
fn few_chains(@builtin(global_invocation_id) id: vec3<u32>) {
    let factor = source[0];
    let addend = source[1];
    let rounds = u32(source[2].x);
    let start = vec4<f32>(f32(id.x % 64u) * 0.01);
    var a00 = start + 0.0000;
    var a01 = start + 0.0625;
    var a02 = start + 0.1250;
    for (var round = 0u; round < rounds; round++) {
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
    }
    sink[id.x] = a00 + a01 + a02;
}

// Sixteen chains: hide any latency, also where few invocations run at a time.
@compute @workgroup_size(64)
fn many_chains(@builtin(global_invocation_id) id: vec3<u32>) {
    let factor = source[0];
    let addend = source[1];
    let rounds = u32(source[2].x);
    let start = vec4<f32>(f32(id.x % 64u) * 0.01);
    var a00 = start + 0.0000;
    var a01 = start + 0.0625;
    var a02 = start + 0.1250;
    var a03 = start + 0.1875;
    var a04 = start + 0.2500;
    var a05 = start + 0.3125;
    var a06 = start + 0.3750;
    var a07 = start + 0.4375;
    var a08 = start + 0.5000;
    var a09 = start + 0.5625;
    var a10 = start + 0.6250;
    var a11 = start + 0.6875;
    var a12 = start + 0.7500;
    var a13 = start + 0.8125;
    var a14 = start + 0.8750;
    var a15 = start + 0.9375;
    for (var round = 0u; round < rounds; round++) {
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a03 = a03 * factor + addend;
        a04 = a04 * factor + addend;
        a05 = a05 * factor + addend;
        a06 = a06 * factor + addend;
        a07 = a07 * factor + addend;
        a08 = a08 * factor + addend;
        a09 = a09 * factor + addend;
        a10 = a10 * factor + addend;
        a11 = a11 * factor + addend;
        a12 = a12 * factor + addend;
        a13 = a13 * factor + addend;
        a14 = a14 * factor + addend;
        a15 = a15 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a03 = a03 * factor + addend;
        a04 = a04 * factor + addend;
        a05 = a05 * factor + addend;
        a06 = a06 * factor + addend;
        a07 = a07 * factor + addend;
        a08 = a08 * factor + addend;
        a09 = a09 * factor + addend;
        a10 = a10 * factor + addend;
        a11 = a11 * factor + addend;
        a12 = a12 * factor + addend;
        a13 = a13 * factor + addend;
        a14 = a14 * factor + addend;
        a15 = a15 * factor + addend;
        a00 = a00 * factor + addend;
        a01 = a01 * factor + addend;
        a02 = a02 * factor + addend;
        a03 = a03 * factor + addend;
        a04 = a04 * factor + addend;
        a05 = a05 * factor + addend;
        a06 = a06 * factor + addend;
        a07 = a07 * factor + addend;
        a08 = a08 * factor + addend;
        a09 = a09 * factor + addend;
        a10 = a10 * factor + addend;
        a11 = a11 * factor + addend;
        a12 = a12 * factor + addend;
        a13 = a13 * factor + addend;
        a14 = a14 * factor + addend;
        a15 = a15 * factor + addend;
    }
    sink[id.x] = a00 + a01 + a02 + a03 + a04 + a05 + a06 + a07
        + a08 + a09 + a10 + a11 + a12 + a13 + a14 + a15;
}

// Copy bandwidth: four vec4 an invocation, each a whole grid apart, so that neighbours touch neighbouring addresses.
@compute @workgroup_size(256)
fn copy(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let grid = groups.x * 256u;
    sink[id.x] = source[id.x];
    sink[id.x + grid] = source[id.x + grid];
    sink[id.x + 2u * grid] = source[id.x + 2u * grid];
    sink[id.x + 3u * grid] = source[id.x + 3u * grid];
}
