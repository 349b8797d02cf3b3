{% from "shared/element.wgsl" import storage, load, store, output %}
{% from "shared/address.wgsl" import row_at, lse_at %}
{% from "shared/finish.wgsl" import join_sinks, leave_lse, over_sum %}
{% from "shared/unroll.wgsl" import joined %}
// Matrix:  out = softmax(logits) v  over tiles of keys, both products by cooperative matrices of {{ size }}×{{ size }}:
// f16 operands, f32 sums. A workgroup owns {{ tile_rows }} query rows × {{ dims }} value dims and walks tiles of
// {{ keys }} keys:
//   s = scale · q kᵀ;  p = exp(s − m);  l = l + Σ p;  o = o + p v,   in the end  out = o / l and lse = m + ln l.
// More value dims than {{ dims }} are further workgroups, which form the scores again.
//
// Lazy rescale (the rule of FlashAttention-4): m is a reference that follows the row maximum only where that rises by
// more than {{ lazy }}; then o and l are multiplied by exp(m − m'). Any m gives the same quotient o / l and the same
// m + ln l, so this is as exact as the maximum. It saves what nearly every tile would cost: a matrix cannot be
// multiplied row by row, o must go through workgroup memory. By WGSL's letter exp may be off by 3 + 2|x| ulp, here up
// to 2·{{ lazy }} more for the largest keys; a kernel that follows the maximum multiplies by one more exp, 3 ulp, at
// every rise.
//
// Numbers: q, k and v are f16 as they stand (q is scaled after the product, in f32), products of f16 are exact in f32,
{% if fast %}
// sums are f32. p is f16, too: hi = f16({{ p_scale }} p), whose rounding costs 2⁻¹¹ Σ p |v|. l is the sum of p itself.
{% else %}
// sums are f32. p is not f16: rounded, it would cost 2⁻¹¹ Σ p |v|, which exceeds the 2⁻¹¹ |out| of the final rounding
// wherever values cancel. So p goes in as two matrices, hi = the leading 11 bits of {{ p_scale }} p and
// lo = f16({{ p_scale }} p − hi), which leave 2⁻²² p: 4u, within what the sum of the contract's budget allows
// ((8 + √keys) u max |v|, u = 2⁻²⁴).
{% endif %}
// At 1 ≤ l and p ≤ exp({{ lazy }}) the factor {{ p_scale }} keeps hi below f16's largest number, and what is too small
// for f16 at 2⁻³⁵, a 2048th of u; it leaves with 1 / l. (A driver that flushes subnormals of f16 leaves u for each
// key.)
//
// Who:       a subgroup owns {{ size }} rows for both products, and its o stays in registers.
{% if varying %}
//            A subgroup may have any number of lanes up to 64. Where there are fewer subgroups than blocks of rows,
//            each owns several blocks.
{% else %}
//            A subgroup has 32 lanes.
{% endif %}
//            For softmax, staging and stores {{ per_row }} invocations own
//            a row, wherever they run. They meet in workgroup memory behind workgroup barriers, never by lane. NaN and
//            infinities are found by their bits when they are staged: in q or k they make codes of logits
//            (shared/code.wgsl); in v they count as 0, so that 0 · NaN cannot leak from a hidden key, and each
//            invocation keeps the classes of those its row sees (shared/value.wgsl) until they meet at the end.
// Grid:      columns = blocks of value dims, rows = tiles of query rows, then heads and batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory. Rows of matrices there begin at multiples of 16 bytes, as
//            Vulkan wants.
// Given:     {{ threads }} invocations, in full subgroups{{ "; head_dim ≤ %s" | format(dims) if resident }}. Tiles of
//            keys that no row sees by range are not read.
{% if emulated %}
// Emulated:  matrices are plain numbers here, for tests on devices that have none: a subgroup is {{ lanes }}
//            neighbouring invocations.
{% endif %}
// Reference: src/reference.rs (attention)
enable f16;
{% if not emulated %}
enable wgpu_cooperative_matrix;
// naga cannot see that subgroup_id is the same in a whole subgroup.
diagnostic(off, derivative_uniformity);
{% endif %}
{% include "shared/params.wgsl" %}

{% set wide, carry = false, false %}
{% include "shared/operands.wgsl" %}

{% include "shared/visible.wgsl" %}
{% include "shared/pages.wgsl" %}
{% include "shared/score.wgsl" %}
{% include "shared/normaliser.wgsl" %}
{% include "shared/weight.wgsl" %}
{% include "shared/value.wgsl" %}
{% if lists %}
{% endif %}
{{ load("q", element, native, vector) }}
{{ load("k", element, native, vector) }}
{{ load("v", element, native, vector) }}
{{ store("out", out, vector) }}

const TILE_Q: u32 = {{ tile_rows }}u;
const TILE_KV: u32 = {{ keys }}u;
const THREADS: u32 = {{ threads }}u;
// Invocations that share a row in softmax, and how many of its keys each has: those that follow each other, so that
// scores and weights are loaded and stored by whole vectors.
const PER_ROW: u32 = {{ per_row }}u;
const EACH: u32 = {{ each }}u;
// Rows and columns of a matrix, and matrices that lie below each other in a tile of rows.
const SIZE: u32 = {{ size }}u;
const BLOCKS: u32 = {{ blocks }}u;
// Dims of q and k that are staged at once, value dims of this workgroup.
const DEPTH: u32 = {{ depth }}u;
const DIMS: u32 = {{ dims }}u;
// From one row to the next of q; of k; of v, whose rows there are its columns; of the scores; of the weights.
const Q_ROW: u32 = {{ depth + 8 }}u;
const K_ROW: u32 = {{ depth + 8 }}u;
const V_ROW: u32 = {{ keys + 8 }}u;
const S_ROW: u32 = {{ keys + 4 }}u;
const P_ROW: u32 = {{ keys + 8 }}u;
// Scores beyond this are formed again, see `large_dot`.
const LARGE: f32 = 4096.0;
const LAZY: f32 = {{ lazy }};
const P_SCALE: f32 = {{ p_scale }};

// q; k, then v; the leading bits of the weights{{ "" if fast else "; the rest of them" }}.
{% if held %}
// q leaves before k comes.
{% endif %}
const Q_AT: u32 = 0u;
const KV_AT: u32 = {{ kv_at }}u;
const HI_AT: u32 = {{ hi_at }}u;
{% if not fast %}
const LO_AT: u32 = {{ hi_at + tile_rows * (keys + 8) }}u;
{% endif %}
var<workgroup> sh_halves: array<f16, {{ halves }}>;
// Scores; then, as wide, a part of o on its way to the rows' owners.
var<workgroup> sh_s: array<f32, {{ tile_rows * (keys + 4) }}>;
// Of each invocation f32 numbers, as bits, and in the end classes.
var<workgroup> sh_row: array<u32, {{ threads }}>;
// The last tile, counted from 1, in which key j (or any key) held a non-finite value, and in which a row's m moved: no
// reset, so no further barrier.
var<workgroup> sh_bad: array<u32, {{ keys }}>;
var<workgroup> sh_any: u32;
// The last tile of keys, counted from 1, in which key j (or any key) held NaN or an infinity in k; not 0: the row does
// in q.
var<workgroup> sh_k_bad: array<u32, {{ keys }}>;
var<workgroup> sh_k_any: u32;
var<workgroup> sh_q_bad: array<u32, {{ tile_rows }}>;
var<workgroup> sh_moved: u32;

{% if emulated %}
// Of A an invocation holds its row, of C its part of that row; B stays where it stands until it is multiplied. The
// loops have bounds that no driver sees through: unrolled, each of their loads at each place of use, they take minutes
// to compile.
alias MatrixA = array<f32, {{ size }}>;
alias MatrixC = array<f32, {{ own }}>;
var<private> own_row: u32;
var<private> own_column: u32;
var<private> size: u32;
var<private> own_size: u32;

fn load_a(at: u32, row: u32) -> MatrixA {
    var a: MatrixA;
    for (var i = 0u; i < size; i++) {
        a[i] = f32(sh_halves[at + own_row * row + i]);
    }
    return a;
}

{% for of, row in [("k", "K_ROW"), ("v", "V_ROW")] %}
fn multiply_{{ of }}(a: MatrixA, at: u32, c: MatrixC) -> MatrixC {
    var row = a;
    var sum = c;
    for (var i = 0u; i < size; i++) {
        for (var j = 0u; j < own_size; j++) {
            sum[j] += row[i] * f32(sh_halves[at + (own_column + j) * {{ row }} + i]);
        }
    }
    return sum;
}

{% endfor %}
fn load_c(at: u32) -> MatrixC {
    var c: MatrixC;
    for (var j = 0u; j < own_size; j++) {
        c[j] = sh_s[at + own_row * S_ROW + own_column + j];
    }
    return c;
}

fn store_c(c: MatrixC, at: u32) {
    var own = c;
    for (var j = 0u; j < own_size; j++) {
        sh_s[at + own_row * S_ROW + own_column + j] = own[j];
    }
}
{% else %}
alias MatrixA = coop_mat{{ size }}x{{ size }}<f16, A>;
alias MatrixB = coop_mat{{ size }}x{{ size }}<f16, B>;
alias MatrixC = coop_mat{{ size }}x{{ size }}<f32, C>;
{% endif %}
{# The operations, in both forms. A load without T takes the other order: rows of k are columns of kᵀ, rows of vᵀ those
   of v. #}
{% macro load_a(at, row) -%}
{{ "load_a(%s, %s)" | format(at, row) if emulated else "coopLoadT<MatrixA>(&sh_halves[%s], %s)" | format(at, row) }}
{%- endmacro %}
{% macro load_b(at, row) -%}
{{ at if emulated else "coopLoad<MatrixB>(&sh_halves[%s], %s)" | format(at, row) }}
{%- endmacro %}
{% macro multiply(of, a, b, c) -%}
{{ "multiply_" ~ of if emulated else "coopMultiplyAdd" }}({{ a }}, {{ b }}, {{ c }})
{%- endmacro %}
{% macro load_c(at) -%}
{{ "load_c(%s)" | format(at) if emulated else "coopLoadT<MatrixC>(&sh_s[%s], S_ROW)" | format(at) }}
{%- endmacro %}
{% macro store_c(c, at) -%}
{{ "store_c(%s, %s)" | format(c, at) if emulated else "coopStoreT(%s, &sh_s[%s], S_ROW)" | format(c, at) }}
{%- endmacro %}
{# Where matrix t of block n stands in sh_s. #}
{% macro block_at(n, t) -%}
block_{{ n }} * (SIZE * S_ROW) + {{ t * size }}u
{%- endmacro %}
{# What a subgroup does for its n-th block, if it has one. #}
{% macro for_block(n) %}{% if varying %}if (block_{{ n }} < BLOCKS) {% endif %}{% endmacro %}

// A dot product so large that its rounding shows: matrices add up one product after the other, which rounds equal terms
// all the same way. Sums of four vectors each, added up, do not.
fn large_dot(q_from: u32, k_from: u32) -> f32 {
    var s = 0.0;
    for (var d = 0u; d < params.head_dim; d += 16u) {
        var sum = 0.0;
        for (var i = d; i < min(d + 16u, params.head_dim); i += 4u) {
            sum += dot(load_q(q_from + i, params.head_dim - i), load_k(k_from + i, params.head_dim - i));
        }
        s += sum;
    }
    return s;
}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
{% if not emulated %}
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
{% endif %}
) {
{% include "shared/tile.wgsl" %}
    // Between these every row of the tile sees every key by range.
    let all_first = key_range(seq, tile_last).x;
    let all_end = key_range(seq, row_first).y;
    let key_end = min(range.y, seq.stored);
    let dim_first = here.col_tile * DIMS;
    let q_at = {{ row_at("q", "batch_of(batch)", "head", "seq.token_q") }};
    let k_at = params.k_base + (head / params.group) * params.k_head;
    let v_at = params.v_base + (head / params.group) * params.v_head;

    // This invocation's row, its place there, and its first key of a tile.
    let tile_row = thread / PER_ROW;
    let column = thread % PER_ROW;
    let own = column * EACH;
    let row = row_first + tile_row;
    let row_there = min(row, row_last);
    let s_at = tile_row * S_ROW + own;
    let p_at = tile_row * P_ROW + own;
{% if emulated %}
    let subgroup = thread / {{ lanes }}u;
    let subgroups = {{ threads // lanes }}u;
    own_row = thread % {{ lanes }}u / {{ lanes // size }}u;
    own_column = thread % {{ lanes // size }}u * {{ own }}u;
    size = select(0u, SIZE, params.heads > 0u);
    own_size = select(0u, {{ own }}u, params.heads > 0u);
{% endif %}
{% for n in range(per) %}
    let block_{{ n }} = subgroup + {{ n }}u * subgroups;
{% endfor %}

    // Zeros come from memory: what a constructor makes of a matrix is not the same in all languages.
    for (var i = thread; i < SIZE * S_ROW; i += THREADS) {
        sh_s[i] = 0.0;
    }
    if (thread < TILE_KV) {
        sh_bad[thread] = 0u;
    }
    if (thread == 0u) {
        sh_any = 0u;
        sh_k_any = 0u;
        sh_moved = 0u;
    }
    if (thread < TILE_KV) {
        sh_k_bad[thread] = 0u;
    }
    if (thread < TILE_Q) {
        sh_q_bad[thread] = 0u;
    }
    workgroupBarrier();
{% if resident %}
    for (var part = thread; part < TILE_Q * (DEPTH / 4u); part += THREADS) {
        let i = part / (DEPTH / 4u);
        let d = part % (DEPTH / 4u) * 4u;
        var x = vec4<f32>();
        if (d < params.head_dim) {
            x = load_q(q_at + min(row_first + i, row_last) * params.q_row + d, params.head_dim - d);
        }
        if (!finite(x)) {
            sh_q_bad[i] = 1u;
        }
        let at = Q_AT + i * Q_ROW + d;
{% for c in "xyzw" %}
        sh_halves[at + {{ loop.index0 }}u] = f16(x.{{ c }});
{% endfor %}
    }
{% endif %}
    workgroupBarrier();
    let zero = {{ load_c("0u") }};
{% if held %}
    // A block that is not there loads the last one.
{% for n in range(per) %}
{% for d in range(0, depth, size) %}
{% set at = "Q_AT + min(block_%s, BLOCKS - 1u) * (SIZE * Q_ROW) + %su" | format(n, d) %}
    let q_{{ n }}_{{ d }} = {{ load_a(at, "Q_ROW") }};
{% endfor %}
{% endfor %}
{% endif %}
{% for n in range(per) %}
{% for t in range(dims // size) %}
    var o_{{ n }}_{{ t }} = zero;
{% endfor %}
{% endfor %}
    var m = HIDDEN;
    var l = 0.0;
    // The classes of the values that this invocation's keys show its row, eight bits for each vector.
    var seen: array<u32, {{ dims // 16 }}>;
    var stage = 0u;
    for (var key = range.x; key < key_end; key += TILE_KV) {
        stage += 1u;
{% for n in range(per) %}
{% for t in range(keys // size) %}
        var s_{{ n }}_{{ t }} = zero;
{% endfor %}
{% endfor %}
        for (var dim = 0u; dim < params.head_dim; dim += DEPTH) {
            workgroupBarrier();
{% if not resident %}
            for (var part = thread; part < TILE_Q * (DEPTH / 4u); part += THREADS) {
                let i = part / (DEPTH / 4u);
                let d = part % (DEPTH / 4u) * 4u;
                var x = vec4<f32>();
                if (dim + d < params.head_dim) {
                    x = load_q(q_at + min(row_first + i, row_last) * params.q_row + dim + d, params.head_dim - dim - d);
                }
                if (!finite(x)) {
                    sh_q_bad[i] = 1u;
                }
                let at = Q_AT + i * Q_ROW + d;
{% for c in "xyzw" %}
                sh_halves[at + {{ loop.index0 }}u] = f16(x.{{ c }});
{% endfor %}
            }
{% endif %}
            for (var part = thread; part < TILE_KV * (DEPTH / 4u); part += THREADS) {
                let j = part / (DEPTH / 4u);
                let d = part % (DEPTH / 4u) * 4u;
                var x = vec4<f32>();
                if (dim + d < params.head_dim) {
                    let at = stored_at(seq, batch, min(key + j, key_end - 1u));
                    x = load_k(k_at + at.x * params.k_batch + at.y * params.k_row + dim + d, params.head_dim - dim - d);
                }
                if (!finite(x)) {
                    sh_k_bad[j] = stage;
                    sh_k_any = stage;
                }
                let at = KV_AT + j * K_ROW + d;
{% for c in "xyzw" %}
                sh_halves[at + {{ loop.index0 }}u] = f16(x.{{ c }});
{% endfor %}
            }
            workgroupBarrier();
            // Dims beyond the last were staged as 0, so that the last matrices are whole.
{% if held %}
{% for d in range(0, depth, size) %}
            if ({{ d }}u < params.head_dim) {
{% for t in range(keys // size) %}
                let k_{{ t }} = {{ load_b("KV_AT + %su * K_ROW + %su" | format(t * size, d), "K_ROW") }};
{% endfor %}
{% for n in range(per) %}
                {{ for_block(n) }}{
{% for t in range(keys // size) %}
{% set s = "s_%s_%s" | format(n, t) %}
                    {{ s }} = {{ multiply("k", "q_%s_%s" | format(n, d), "k_%s" | format(t), s) }};
{% endfor %}
                }
{% endfor %}
            }
{% endfor %}
{% else %}
            let depth = min(DEPTH, params.head_dim - dim);
            for (var d = 0u; d < depth; d += SIZE) {
{% for t in range(keys // size) %}
                let k_{{ t }} = {{ load_b("KV_AT + %su * K_ROW + d" | format(t * size), "K_ROW") }};
{% endfor %}
{% for n in range(per) %}
                {{ for_block(n) }}{
                    let a = {{ load_a("Q_AT + block_%s * (SIZE * Q_ROW) + d" | format(n), "Q_ROW") }};
{% for t in range(keys // size) %}
                    s_{{ n }}_{{ t }} = {{ multiply("k", "a", "k_%s" | format(t), "s_%s_%s" | format(n, t)) }};
{% endfor %}
                }
{% endfor %}
            }
{% endif %}
        }
{% for n in range(per) %}
        {{ for_block(n) }}{
{% for t in range(keys // size) %}
            {{ store_c("s_%s_%s" | format(n, t), block_at(n, t)) }};
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
        let q_bad = sh_q_bad[tile_row] != 0u;
        // k was read: v takes its place, transposed, so that what an invocation needs of a matrix is a row there. Each
        // stages four dims of four keys at a time.
        for (var part = thread; part < (TILE_KV / 4u) * (DIMS / 4u); part += THREADS) {
            let j = part % (TILE_KV / 4u) * 4u;
            let d = part / (TILE_KV / 4u) * 4u;
{% for i in range(4) %}
            var x_{{ i }} = vec4<f32>();
            if (key + j + {{ i }}u < key_end && dim_first + d < params.value_dim) {
                let at = stored_at(seq, batch, key + j + {{ i }}u);
                x_{{ i }} = load_v(
                    v_at + at.x * params.v_batch + at.y * params.v_row + dim_first + d,
                    params.value_dim - dim_first - d,
                );
            }
            if (!finite(x_{{ i }})) {
                x_{{ i }} = finite_or_zero(x_{{ i }});
                sh_bad[j + {{ i }}u] = stage;
                sh_any = stage;
            }
{% endfor %}
            let at = KV_AT + d * V_ROW + j;
{% for c in "xyzw" %}
{% set row = loop.index0 %}
{% for i in range(4) %}
            sh_halves[at + {{ row }}u * V_ROW + {{ i }}u] = f16(x_{{ i }}.{{ c }});
{% endfor %}
{% endfor %}
        }
{% if full %}
        // Each invocation its own words, so that the transform stands once in the text.
        for (var i = 0u; i < EACH; i++) {
            let at = s_at + i;
            let key_there = key + own + i;
            let bad = q_bad | (sh_k_bad[own + i] == stage);
            var dot_product = sh_s[at];
            if ((abs(dot_product * params.scale) > LARGE) & !bad) {
                let k_row = stored_at(seq, batch, min(key_there, key_end - 1u));
                dot_product = large_dot(
                    q_at + row_there * params.q_row,
                    k_at + k_row.x * params.k_batch + k_row.y * params.k_row,
                );
            }
            let x = select(scaled(dot_product), scaled_code(dot_product), bad);
            sh_s[at] = logit(batch, head, row_there, key_there, key_position(seq, key_there), seq, x);
        }
{% for i in range(each) %}
        let s_{{ i }} = sh_s[s_at + {{ i }}u];
{% endfor %}
{% else %}
{% for i in range(each) %}
        var s_{{ i }} = sh_s[s_at + {{ i }}u] * params.scale;
{% endfor %}
        var largest = abs(s_0);
{% for i in range(1, each) %}
        largest = max(largest, abs(s_{{ i }}));
{% endfor %}
        // What is not finite shows in the flags alone: arithmetic may make anything of it.
        let bad_there = q_bad | (sh_k_any == stage);
        if (bad_there | (largest > LARGE)) {
            for (var i = 0u; i < EACH; i++) {
                let at = s_at + i;
                let bad = q_bad | (sh_k_bad[own + i] == stage);
                var dot_product = sh_s[at];
                if ((abs(dot_product * params.scale) > LARGE) & !bad) {
                    let k_row = stored_at(seq, batch, min(key + own + i, key_end - 1u));
                    dot_product = large_dot(
                        q_at + row_there * params.q_row,
                        k_at + k_row.x * params.k_batch + k_row.y * params.k_row,
                    );
                }
                sh_s[at] = select(scaled(dot_product), scaled_code(dot_product), bad);
            }
{% for i in range(each) %}
            s_{{ i }} = sh_s[s_at + {{ i }}u];
{% endfor %}
        }
        if ((key < all_first) | (key + TILE_KV > all_end)) {
            let seen = key_range(seq, row_there);
{% for i in range(each) %}
            let j_{{ i }} = key + own + {{ i }}u;
            s_{{ i }} = select(HIDDEN, s_{{ i }}, (j_{{ i }} >= seen.x) & (j_{{ i }} < seen.y));
{% endfor %}
        }
{% endif %}
        var top = s_0;
{% for i in range(1, each) %}
        top = max(top, s_{{ i }});
{% endfor %}
        sh_row[thread] = bitcast<u32>(top);
        workgroupBarrier();
{% for c in range(per_row) %}
        top = max(top, bitcast<f32>(sh_row[tile_row * PER_ROW + {{ c }}u]));
{% endfor %}
        var shrink = 1.0;
        if (top - m > LAZY) {
            shrink = exp(max(m - top, -150.0));
            l *= shrink;
            // Before its first visible key a row has nothing to multiply.
            if (m > HIDDEN) {
                sh_moved = stage;
            }
            m = top;
        }
        // Its own sum first: equal weights that are small beside l would all round the same way.
        var sum = 0.0;
{% for i in range(each) %}
        let visible_{{ i }} = select(0.0, exp(max(s_{{ i }} - m, -87.0)), s_{{ i }} > HIDDEN);
        let p_{{ i }} = select(visible_{{ i }}, NOTHING, s_{{ i }} == MINUS);
{% if fast %}
        sh_halves[HI_AT + p_at + {{ i }}u] = f16(p_{{ i }} * P_SCALE);
{% else %}
        // The bits that f16 has: compilers take f32(f16(x)) for x, and x − x for 0, but they cannot see through a mask.
        let hi_{{ i }} = bitcast<f32>(bitcast<u32>(p_{{ i }} * P_SCALE) & 0xffffe000u);
        sh_halves[HI_AT + p_at + {{ i }}u] = f16(hi_{{ i }});
        sh_halves[LO_AT + p_at + {{ i }}u] = f16(p_{{ i }} * P_SCALE - hi_{{ i }});
{% endif %}
        sum += p_{{ i }};
{% endfor %}
        l += sum;
        // Between two barriers of its own: the same for all, and the weights and v are there.
        if (workgroupUniformLoad(&sh_moved) == stage) {
{% for first in range(0, dims, keys) %}
{% for n in range(per) %}
            {{ for_block(n) }}{
{% for t in range(keys // size) %}
                {{ store_c("o_%s_%s" | format(n, first // size + t), block_at(n, t)) }};
{% endfor %}
            }
{% endfor %}
            workgroupBarrier();
            for (var i = 0u; i < EACH; i++) {
                sh_s[s_at + i] *= shrink;
            }
            workgroupBarrier();
{% for n in range(per) %}
            {{ for_block(n) }}{
{% for t in range(keys // size) %}
                o_{{ n }}_{{ first // size + t }} = {{ load_c(block_at(n, t)) }};
{% endfor %}
            }
{% endfor %}
{% endfor %}
        }
        for (var j = 0u; j < TILE_KV; j += SIZE) {
{% for first in range(0, dims // size, together) %}
{% for t in range(first, first + together) %}
            let v_{{ t }} = {{ load_b("KV_AT + %su * V_ROW + j" | format(t * size), "V_ROW") }};
{% endfor %}
{% for n in range(per) %}
            {{ for_block(n) }}{
                let hi = {{ load_a("HI_AT + block_%s * (SIZE * P_ROW) + j" | format(n), "P_ROW") }};
{% if not fast %}
                let lo = {{ load_a("LO_AT + block_%s * (SIZE * P_ROW) + j" | format(n), "P_ROW") }};
{% endif %}
{% for t in range(first, first + together) %}
                o_{{ n }}_{{ t }} = {{ multiply("v", "hi", "v_%s" | format(t), "o_%s_%s" | format(n, t)) }};
{% if not fast %}
                o_{{ n }}_{{ t }} = {{ multiply("v", "lo", "v_%s" | format(t), "o_%s_%s" | format(n, t)) }};
{% endif %}
{% endfor %}
            }
{% endfor %}
{% endfor %}
        }
        if (sh_any == stage) {
            // A bit each: the row sees the key, with a weight of 0 because the logit is −∞.
            var sees = 0u;
            var nothing = 0u;
{% for i in range(each) %}
            sees |= select(0u, {{ 2 ** i }}u, p_{{ i }} != 0.0);
            nothing |= select(0u, {{ 2 ** i }}u, p_{{ i }} == NOTHING);
{% endfor %}
            for (var i = 0u; i < EACH; i++) {
                if ((((sees >> i) & 1u) != 0u) & (sh_bad[own + i] == stage)) {
                    let at = stored_at(seq, batch, key + own + i);
                    let v_row = v_at + at.x * params.v_batch + at.y * params.v_row + dim_first;
                    for (var d = 0u; d < min(DIMS, params.value_dim - dim_first); d += 4u) {
                        let all = classes(load_v(v_row + d, params.value_dim - dim_first - d));
                        let there = select(all, classes_of_zero(all), ((nothing >> i) & 1u) != 0u);
                        seen[d / 16u] |= there << (d / 4u % 4u * 8u);
                    }
                }
            }
        }
    }

    workgroupBarrier();
    sh_row[thread] = bitcast<u32>(l);
    workgroupBarrier();
    l = 0.0;
{% for c in range(per_row) %}
    l += bitcast<f32>(sh_row[tile_row * PER_ROW + {{ c }}u]);
{% endfor %}
    for (var i = 0u; i < {{ dims // 16 }}u; i++) {
        workgroupBarrier();
        sh_row[thread] = seen[i];
        workgroupBarrier();
        seen[i] = {{ joined(per_row, " | ", "sh_row[tile_row * PER_ROW + #u]") }};
    }
{{ join_sinks("head", lists) }}
{% if lists %}
{% set lse_place = lse_at("batch_of(batch)", "head", "seq.token_q + row") %}
{{ leave_lse(lse_place, "row <= row_last && column == 0u && here.col_tile == 0u") }}
{% endif %}
    let factor = {{ over_sum("shrink") }} / P_SCALE;
    let all_nan = select(0u, 0xffu, broken(m));
    let out_at = {{ row_at("out", "batch_of(batch)", "head", "(seq.token_q + row_there)") }};
{% for first in range(0, dims, keys) %}
    workgroupBarrier();
{% for n in range(per) %}
    {{ for_block(n) }}{
{% for t in range(keys // size) %}
        {{ store_c("o_%s_%s" | format(n, first // size + t), block_at(n, t)) }};
{% endfor %}
    }
{% endfor %}
    workgroupBarrier();
    for (var i = column * 4u; i < TILE_KV; i += PER_ROW * 4u) {
        let d = dim_first + {{ first }}u + i;
        if (row <= row_last && d < params.value_dim) {
            let at = tile_row * S_ROW + i;
            let x = vec4<f32>(sh_s[at], sh_s[at + 1u], sh_s[at + 2u], sh_s[at + 3u]) * factor;
            store_out(
                out_at + d,
                params.value_dim - d,
                result_bits(x, all_nan | (seen[({{ first }}u + i) / 16u] >> (({{ first }}u + i) / 4u % 4u * 8u))),
            );
        }
    }
{% endfor %}
}
