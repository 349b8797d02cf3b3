{# What the two passes of `merge` share: what a partial result says of a row. Needs normaliser.wgsl and the binding
   partial_lse. #}
{% from "shared/weigh.wgsl" import weigh %}
const EMPTY: u32 = 0xff800000u;

// Maximum and sum of a row of partial n: those that `split` left, with TOTALS, else its lse, a number or a code, and
// 1.
fn partial(n: u32, at: u32) -> vec2<f32> {
    let row = n * params.next_lse + at;
    if ((params.flags & TOTALS) != 0u) {
        let first = params.first_lse + 2u * row;
        return vec2<f32>(bitcast<f32>(partial_lse[first]), bitcast<f32>(partial_lse[first + 1u]));
    }
    let bits = partial_lse[params.first_lse + row];
    return vec2<f32>(select(coded(bits), HIDDEN, bits == EMPTY), 1.0);
}

// Below this difference f32 cannot tell the weight from 0.
{{ weigh("f32", "-150.0") }}
