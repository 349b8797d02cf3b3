{# Logits as numbers and codes. #}
// Drivers assume that NaN and infinities do not occur, so that a comparison or a maximum of them may give anything.
// Logits therefore are finite numbers everywhere, of which the outermost are codes. A maximum keeps the strongest code
// of a row without further ado.
//
// Why this survives fast-math rules: a code is only copied, compared, or taken by max, min, clamp and select, each of
// which gives one of its operands bit for bit. A difference or product of finite numbers that overflows goes through
// max or clamp at once, and no compiler can leave those out, because finite results need them too. No shader asks
// whether x != x, or forms x − x or 0 · x for what NaN would make of it.
const HIDDEN: f32 = -3.40282346638528859812e+38f; // 0xff7fffff: the row does not see the key
const MINUS: f32 = -3.40282326356119256160e+38f; // 0xff7ffffe: visible, the logit is −∞
const LOWEST: f32 = -3.40282306073709652508e+38f; // 0xff7ffffd: the lowest finite logit
const HIGHEST: f32 = 3.40282306073709652508e+38f; // 0x7f7ffffd: the highest finite logit
const PLUS: f32 = 3.40282326356119256160e+38f; // 0x7f7ffffe: +∞
const UNDEFINED: f32 = 3.40282346638528859812e+38f; // 0x7f7fffff: NaN

// The code or number for the bits of an f32 that comes from memory. Integer tests of such bits survive every compiler.
fn coded(bits: u32) -> f32 {
    let size = bits & 0x7fffffffu;
    let number = clamp(bitcast<f32>(select(bits, 0u, size >= 0x7f800000u)), LOWEST, HIGHEST);
    let infinite = select(PLUS, MINUS, (bits >> 31u) != 0u);
    return select(select(number, infinite, size == 0x7f800000u), UNDEFINED, size > 0x7f800000u);
}

// Whether a row of which m is the largest logit (or sink) has no finite result: it sees NaN, +∞ or nothing but −∞.
fn broken(m: f32) -> bool {
    return (m >= PLUS) | (m == MINUS);
}

// The code of a dot product of which an operand holds NaN or an infinity, as the bits of what was loaded told: the code
// of what arithmetic made of it. A compiler that assumes that neither occurs may give anything else here, which counts
// as NaN.
fn code_of(dot_product: f32) -> f32 {
    let bits = bitcast<u32>(dot_product);
    return select(UNDEFINED, coded(bits), (bits & 0x7fffffffu) == 0x7f800000u);
}
