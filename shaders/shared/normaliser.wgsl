{# Maximum and sum of a row, of which the log-sum-exp is m + ln l. Needs code.wgsl. #}
// The bits of the log-sum-exp of a row with maximum m, a number or a code, and sum l of exp(x − m).
fn lse_bits(m: f32, l: f32) -> u32 {
    // The ends of what is finite stand for those of f32.
    let top = select(select(m, HIDDEN, m == LOWEST), UNDEFINED, m == HIGHEST);
    let finite_or_minus = select(0xff800000u, bitcast<u32>(top + log(l)), (l > 0.0) & (m > MINUS));
    return select(select(finite_or_minus, 0x7f800000u, m == PLUS), 0x7fc00000u, m == UNDEFINED);
}

// Maximum and sum of a row with a sink, and the factor of what was summed under the maximum before. A sink of −∞ is
// none.
struct Joined {
    m: f32,
    l: f32,
    shrink: f32,
}

fn join_sink(m: f32, l: f32, sink: f32) -> Joined {
    let own = select(HIDDEN, sink, sink > MINUS);
    let higher = max(m, own);
    let shrink = exp(max(m - higher, -150.0));
    return Joined(higher, l * shrink + select(0.0, exp(max(own - higher, -150.0)), own > MINUS), shrink);
}
