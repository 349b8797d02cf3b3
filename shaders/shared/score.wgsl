{# The score transform of the contract, once for every kernel that forms dot products. Needs visible.wgsl.
   `full`: with soft cap, ALiBi, bias and boolean mask (bindings `mask`, `bias`); otherwise the scale alone, and the key range is left to softmax. #}

// Finite f32 has no room below its lowest value, so that one means "hidden" and visible logits start one step above.
const HIDDEN: f32 = -3.40282346638528859812e+38f;
const LOWEST: f32 = -3.40282326356119256160e+38f;
const HIGHEST: f32 = 3.40282346638528859812e+38f;

{% if full %}
// tanh through exp (WGSL's own may be off by 1e-5); a series where 1 − exp cancels.
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
    let at = params.mask_base + batch * params.mask_batch + head * params.mask_head + row * params.mask_row + key * params.mask_key;
    return ((mask[at >> 2u] >> ((at & 3u) * 8u)) & 0xffu) != 0u;
}

// The bits of the bias as f32; −inf, which also stands for "beyond a short last axis", hides the key.
fn bias_bits(batch: u32, head: u32, row: u32, key: u32) -> u32 {
    if (key >= params.bias_keys) {
        return 0xff800000u;
    }
    let at = params.bias_base + batch * params.bias_batch + head * params.bias_head + row * params.bias_row + key * params.bias_key;
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

// Steps 2 to 4 of the contract: from scale · q·k to the logit, or HIDDEN.
fn logit(batch: u32, head: u32, row: u32, key: u32, s: Sequence, scaled: f32) -> f32 {
    var x = scaled;
    if ((params.flags & SOFTCAP) != 0u) {
        x = params.softcap * tanh_exact(x / params.softcap);
    }
    if ((params.flags & ALIBI) != 0u) {
        let distance = abs(i32(row) + s.offset - i32(key));
        x -= bitcast<f32>(lists[params.list_slopes + head]) * f32(distance);
    }
    var visible = mask_allows(batch, head, row, key);
    if ((params.flags & BIAS) != 0u) {
        let bits = bias_bits(batch, head, row, key);
        visible = visible && bits != 0xff800000u;
        x += bitcast<f32>(select(bits, 0u, bits == 0xff800000u));
    }
    let range = key_range(s, row);
    visible = visible && key >= range.x && key < range.y;
    return select(HIDDEN, clamp(x, LOWEST, HIGHEST), visible);
}
{% endif %}

// Step 1 alone. What is beyond f32 is clamped and stays visible.
fn scaled(dot_product: f32) -> f32 {
    return clamp(dot_product * params.scale, LOWEST, HIGHEST);
}
