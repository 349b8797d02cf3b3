{% from "shared/address.wgsl" import row_at %}
{# The score transform of the contract, once for every kernel that forms dot products. Needs visible.wgsl. `full`: with
   soft cap, ALiBi, bias and boolean mask (bindings `mask`, `bias`); otherwise the scale alone, and the key range is
   left to softmax. #}

{% include "shared/code.wgsl" %}

{% if full %}
// tanh through exp (WGSL's own may be off by 1e-5); a series where 1 − exp cancels. No compiler knows 1 − exp(x) as
// anything else, so that there is nothing to simplify.
fn tanh_exact(x: f32) -> f32 {
    let e = exp(-2.0 * min(abs(x), 20.0));
    let far = sign(x) * (1.0 - e) / (1.0 + e);
    let xx = x * x;
    let near = x * (1.0 - xx * (0.33333333 - xx * (0.13333333 - xx * 0.053968254)));
    return select(far, near, abs(x) < 0.125);
}

// Row and key address of an operand that broadcasts; strides of broadcast axes are 0.
fn mask_allows(batch: u32, head: u32, row: u32, key: u32) -> bool {
    if ((params.flags & MASK) == 0u) {
        return true;
    }
    if (key >= params.mask_keys) {
        return false;
    }
    let at = {{ row_at("mask", "batch", "head", "row") }} + key * params.mask_key;
    return ((mask[at >> 2u] >> ((at & 3u) * 8u)) & 0xffu) != 0u;
}

// The bits of the bias as f32; −inf, which also stands for "beyond a short last axis", hides the key.
fn bias_bits(batch: u32, head: u32, row: u32, key: u32) -> u32 {
    if (key >= params.bias_keys) {
        return 0xff800000u;
    }
    let at = {{ row_at("bias", "batch", "head", "row") }} + key * params.bias_key;
    if ((params.flags & BIAS_F32) != 0u) {
        return bias[at];
    }
    let half_word = (bias[at >> 1u] >> ((at & 1u) * 16u)) & 0xffffu;
    if ((params.flags & BIAS_BF16) != 0u) {
        return half_word << 16u;
    }
    if ((half_word & 0x7c00u) == 0x7c00u) {
        return ((half_word & 0x8000u) << 16u) | 0x7f800000u | ((half_word & 0x3ffu) << 13u);
    }
    return bitcast<u32>(unpack2x16float(half_word).x);
}

// x + y, each a number or a code. Finite sums beyond f32 are clamped.
fn sum_of(x: f32, y: f32) -> f32 {
    let x_ends = abs(x) > HIGHEST;
    let y_ends = abs(y) > HIGHEST;
    let ended = select(select(y, x, x_ends), UNDEFINED, x_ends & y_ends & (x != y));
    return select(clamp(x + y, LOWEST, HIGHEST), ended, x_ends | y_ends);
}

// Steps 2 to 4 of the contract: from scale · q·k, a number or a code, to the logit, or HIDDEN. `position` is the
// position of the key. It comes from `key_position`, which may load it, so a kernel calls that function once for all
// rows that meet the key.
fn logit(batch: u32, head: u32, row: u32, key: u32, position: u32, s: Sequence, scaled: f32) -> f32 {
    var x = scaled;
    if ((params.flags & SOFTCAP) != 0u) {
        // ± the cap for an infinity, as for all that is large.
        x = select(params.softcap * tanh_exact(x / params.softcap), UNDEFINED, x == UNDEFINED);
    }
    if ((params.flags & ALIBI) != 0u) {
        let distance = f32(abs(i32(row) + s.offset - i32(position)));
        let slope = coded(lists[params.list_alibi_slopes + head]);
        // An infinite slope is 0 · ∞ at distance 0.
        let ended = select(-slope, UNDEFINED, (slope == UNDEFINED) | (distance == 0.0));
        x = sum_of(x, select(max(min(-slope * distance, HIGHEST), LOWEST), ended, abs(slope) > HIGHEST));
    }
    var visible = mask_allows(batch, head, row, key);
    if ((params.flags & BIAS) != 0u) {
        let bits = bias_bits(batch, head, row, key);
        visible &= bits != 0xff800000u;
        x = sum_of(x, coded(bits));
    }
    let range = visible_positions(s, row);
    visible &= (position >= range.x) & (position < range.y);
    return select(HIDDEN, x, visible);
}

{% if quick is defined %}
// The same for a number, where nothing but the bias is NaN or an infinity: UNDEFINED tells that it was, and `logit`
// what comes of it.
fn quick_logit(batch: u32, head: u32, row: u32, key: u32, position: u32, s: Sequence, scaled: f32) -> f32 {
    var x = scaled;
    if ((params.flags & SOFTCAP) != 0u) {
        x = params.softcap * tanh_exact(x / params.softcap);
    }
    if ((params.flags & ALIBI) != 0u) {
        let distance = abs(i32(row) + s.offset - i32(position));
        x -= bitcast<f32>(lists[params.list_alibi_slopes + head]) * f32(distance);
    }
    var visible = mask_allows(batch, head, row, key);
    var ended = false;
    if ((params.flags & BIAS) != 0u) {
        let bits = bias_bits(batch, head, row, key);
        visible &= bits != 0xff800000u;
        ended = (bits & 0x7f800000u) == 0x7f800000u;
        x += bitcast<f32>(select(bits, 0u, ended));
    }
    let range = visible_positions(s, row);
    visible &= (position >= range.x) & (position < range.y);
    return select(HIDDEN, select(clamp(x, LOWEST, HIGHEST), UNDEFINED, ended), visible);
}

// Whether a slope is NaN or an infinity, which `quick_logit` does not see.
fn slope_ends(head: u32) -> bool {
    return (params.flags & ALIBI) != 0u && (lists[params.list_alibi_slopes + head] & 0x7f800000u) == 0x7f800000u;
}
{% endif %}
{% endif %}

// Step 1 alone, of finite q and k. What is beyond f32 is clamped and stays visible.
fn scaled(dot_product: f32) -> f32 {
    return clamp(dot_product * params.scale, LOWEST, HIGHEST);
}

// Step 1 of a code: the sign of the scale changes that of an infinity, and 0 · ∞ is NaN.
fn scale_code(code: f32) -> f32 {
    let signed = select(code, -code, params.scale < 0.0);
    return select(signed, UNDEFINED, (code == UNDEFINED) | (params.scale == 0.0));
}

fn scaled_code(dot_product: f32) -> f32 {
    return scale_code(code_of(dot_product));
}

// The logit x of a pair as arithmetic clamped it, or its code where q or k of the pair holds NaN or an infinity (`bad`)
// and the row sees the key. A soft cap makes a number of an infinite score, so that x stays.
fn with_code(x: f32, dot_product: f32, bad: bool) -> f32 {
    let code = scaled_code(dot_product);
    let capped = ((params.flags & SOFTCAP) != 0u) & (code != UNDEFINED);
    // Infinities of both signs, of which one may come from a bias or a slope.
    let undefined = ((code == MINUS) & (x >= PLUS)) | ((code == PLUS) & ((x == MINUS) | (x == UNDEFINED)));
    return select(select(code, UNDEFINED, undefined), x, !bad | (x <= HIDDEN) | capped);
}
