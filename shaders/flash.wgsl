{% from "shared/element.wgsl" import storage, staged, stage, widen, staged_finite, store, output %}
{% from "shared/address.wgsl" import row_at, lse_at %}
{% from "shared/finish.wgsl" import join_sinks, leave_lse, over_sum %}
{% from "shared/weigh.wgsl" import weigh %}
{% from "shared/unroll.wgsl" import joined, weighted, vector_of %}
{% from "shared/value.wgsl" import classes_of_vector %}
// Flash:  out = softmax(logits) v  over tiles of keys, without a score matrix (Dao et al., FlashAttention, 2022;
// Milakov and Gimelshein, 2018). A workgroup owns {{ tile_rows }} query rows × {{ dims }} value dims and walks tiles of
// {{ tile_keys }} keys:
//   s = scale · q kᵀ;  m' = max(m, s);  p = exp(s − m');  l = l · exp(m − m') + Σ p;  o = o · exp(m − m') + p v.
// At the end out = o / l and lse = m + ln l. More value dims than {{ dims }} are further workgroups, which form the
// scores again.
//
// Invocations form a grid of {{ across }} columns × {{ down }} rows. One in row n owns the query rows n + {{ down }}·r,
// r < {{ rows }}: four neighbouring keys of their scores, and {{ parts }} vectors of four dims of their output.
// m is the same in all columns; l is summed over the columns at the end. NaN and infinities are found by their bits
// when they are staged. In q or k they make codes of logits (shared/code.wgsl). In v they count as 0, so that 0 · NaN
// cannot leak from a hidden key, and each row keeps the classes of those it sees (shared/value.wgsl): of those whose
// weight is not 0, as that of a visible key never is.
{% if carry %}
// The keys come in several dispatches, params.key0 .. params.key_end in this one: m, l and o of each row wait in
// `state` in between.
{% endif %}
//
// Grid:      columns = blocks of value dims, rows = tiles of query rows, then heads and batches (shared/params.wgsl).
// Memory:    {{ workgroup_bytes }} bytes of workgroup memory.
// Given:     128 invocations{{ ", all in full subgroups of at least 8" if shuffle }}.
{% if resident %}
//            head_dim ≤ {{ dims }}.
{% endif %}
//            Tiles of keys that no row sees by range are not read.
// Reference: src/reference.rs (attention)
{% if native %}
enable f16;
{% endif %}
{% include "shared/params.wgsl" %}

{% set wide = false %}
{% include "shared/operands.wgsl" %}

{% include "shared/visible.wgsl" %}
{% include "shared/pages.wgsl" %}
{% include "shared/score.wgsl" %}
{% include "shared/normaliser.wgsl" %}
{% include "shared/weight.wgsl" %}
{% if lists %}
{% endif %}
{% include "shared/value.wgsl" %}
{{ stage("q", element, native, vector) }}
{{ stage("k", element, native, vector) }}
{{ stage("v", element, native, vector) }}
{{ widen(element, native) }}
{{ staged_finite(element, native) }}
{{ store("out", out, vector) }}
{% set kept = staged(element, native) %}
{# Maxima and sums of the columns are f32: they share a place with f32 operands only. #}
{% set tops = "sh_kv" if element == "f32" else "sh_top" %}

const TILE_Q: u32 = {{ tile_rows }}u;
const TILE_KV: u32 = {{ tile_keys }}u;
const ACROSS: u32 = {{ across }}u;
const DOWN: u32 = {{ down }}u;
const THREADS: u32 = {{ across * down }}u;
// Dims of q and k that are staged at once, in vectors of four.
const DEPTH: u32 = {{ depth // 4 }}u;
// Value dims of this workgroup, in vectors of four, and keys whose values are staged at once.
const DIMS: u32 = {{ dims // 4 }}u;
const KEYS: u32 = {{ value_keys }}u;

// Staged q; staged k and then v, as narrow as they are in memory; the weights p.
// Vectors lie side by side over rows or keys, so that neighbouring invocations read neighbouring words.
var<workgroup> sh_q: array<{{ kept }}, {{ staged_q }}>;
var<workgroup> sh_kv: array<{{ kept }}, {{ staged_kv }}>;
var<workgroup> sh_p: array<vec4<f32>, {{ tile_rows * tile_keys // 4 }}>;
{% if not shuffle and element != "f32" %}
var<workgroup> sh_top: array<vec4<f32>, {{ across * down }}>;
{% endif %}
// The last staging, counted from 1, in which key j (or any key) held a non-finite value: no reset, so no further
// barrier.
var<workgroup> sh_bad: array<u32, {{ value_keys }}>;
var<workgroup> sh_any: u32;
// The last tile of keys, counted from 1, in which key j (or any key) held NaN or an infinity; not 0: the row (or any)
// does.
var<workgroup> sh_k_bad: array<u32, TILE_KV>;
var<workgroup> sh_k_any: u32;
var<workgroup> sh_q_bad: array<u32, TILE_Q>;
var<workgroup> sh_q_any: u32;

// The clamp keeps the weight of a visible key above NOTHING, the weight of a key whose logit is −∞.
{{ weigh("vec4<f32>", "-87.0") }}

fn highest(x: vec4<f32>) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

@compute @workgroup_size({{ across * down }})
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
{% if shuffle %}
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
{% else %}
    @builtin(local_invocation_index) thread: u32,
{% endif %}
) {
{% if shuffle %}
    // The columns of a row of invocations are neighbours in one subgroup, whatever its size and however the device
    // numbers invocations.
    let thread = subgroup * subgroup_size + invocation;
{% endif %}
{% include "shared/tile.wgsl" %}
    // Between these every row of the tile sees every key by range.
    let all_first = key_range(seq, tile_last).x;
    let all_end = key_range(seq, row_first).y;
{% if carry %}
    let key_first = max(range.x, params.key0);
    let key_end = min(min(range.y, params.key_end), seq.stored);
{% else %}
    let key_first = range.x;
    let key_end = min(range.y, seq.stored);
{% endif %}
    let dim_first = here.col_tile * (DIMS * 4u);
    let column = thread % ACROSS;
    let thread_row = thread / ACROSS;
    let q_at = {{ row_at("q", "batch_of(batch)", "head", "seq.token_q") }};
    let k_at = params.k_base + (head / params.group) * params.k_head;
    let v_at = params.v_base + (head / params.group) * params.v_head;

{% for r in range(rows) %}
    var m_{{ r }} = HIDDEN;
    var l_{{ r }} = 0.0;
{% for w in range((parts + 3) // 4) %}
    var class_{{ r }}_{{ w }} = 0u;
{% endfor %}
{% for c in range(parts) %}
    var o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
    if (thread < KEYS) {
        sh_bad[thread] = 0u;
    }
    if (thread == 0u) {
        sh_any = 0u;
        sh_k_any = 0u;
        sh_q_any = 0u;
    }
    if (thread < TILE_KV) {
        sh_k_bad[thread] = 0u;
    }
    if (thread < TILE_Q) {
        sh_q_bad[thread] = 0u;
    }
    workgroupBarrier();
{% if carry %}
    let plane = (batch - params.batch0) * params.heads + head - params.head0;
    let number = (plane * params.row_tiles + here.row_tile) * params.col_tiles + here.col_tile;
    let state_at = number * {{ state_vectors * across * down }}u + thread;
    if ((params.flags & CARRIED) != 0u) {
        let kept_m = bitcast<vec4<f32>>(state[state_at]);
        let kept_l = bitcast<vec4<f32>>(state[state_at + THREADS]);
{% for r in range(rows) %}
        m_{{ r }} = kept_m.{{ "xyzw"[r] }};
        l_{{ r }} = kept_l.{{ "xyzw"[r] }};
{% for c in range(parts) %}
        let kept_{{ r }}_{{ c }} = bitcast<vec4<f32>>(state[state_at + {{ 2 + r * parts + c }}u * THREADS]);
        class_{{ r }}_{{ c // 4 }} |= classes(kept_{{ r }}_{{ c }}) << {{ c % 4 * 8 }}u;
        o_{{ r }}_{{ c }} = finite_or_zero(kept_{{ r }}_{{ c }});
{% endfor %}
{% endfor %}
    }
{% endif %}
{% if resident %}
    for (var part = thread; part < TILE_Q * {{ dims // 4 }}u; part += THREADS) {
        let row = part / {{ dims // 4 }}u;
        let d = (part % {{ dims // 4 }}u) * 4u;
        var x = {{ kept }}();
        if (d < params.head_dim) {
            x = stage_q(q_at + min(row_first + row, row_last) * params.q_row + d, params.head_dim - d);
        }
        for (var once = u32(!finite(widen(x))); once > 0u; once--) {
            sh_q_bad[row] = 1u;
            sh_q_any = 1u;
        }
        sh_q[(part % {{ dims // 4 }}u) * TILE_Q + row] = x;
    }
{% endif %}
    // Loops of one iteration or none stand for branches below: drivers on the CPU run both sides of a branch, but skip
    // a loop.
    var stage = 0u;
    var tile = 0u;
    for (var key = key_first; key < key_end; key += TILE_KV) {
        tile += 1u;
{% for r in range(rows) %}
        var s_{{ r }} = vec4<f32>();
{% endfor %}
        for (var dim = 0u; dim < params.head_dim; dim += DEPTH * 4u) {
{% if not resident %}
            for (var part = thread; part < TILE_Q * DEPTH; part += THREADS) {
                let row = part / DEPTH;
                let d = dim + (part % DEPTH) * 4u;
                var x = {{ kept }}();
                if (d < params.head_dim) {
                    x = stage_q(q_at + min(row_first + row, row_last) * params.q_row + d, params.head_dim - d);
                }
                for (var once = u32(!finite(widen(x))); once > 0u; once--) {
                    sh_q_bad[row] = 1u;
                    sh_q_any = 1u;
                }
                sh_q[(part % DEPTH) * TILE_Q + row] = x;
            }
{% endif %}
            for (var part = thread; part < TILE_KV * DEPTH; part += THREADS) {
                let j = part / DEPTH;
                let d = dim + (part % DEPTH) * 4u;
                var x = {{ kept }}();
                if (d < params.head_dim) {
                    let at = stored_at(seq, batch, min(key + j, key_end - 1u));
                    x = stage_k(k_at + at.x * params.k_batch + at.y * params.k_row + d, params.head_dim - d);
                }
                for (var once = u32(!finite(widen(x))); once > 0u; once--) {
                    sh_k_bad[j] = tile;
                    sh_k_any = tile;
                }
                // The four keys of a column stand ACROSS apart.
                sh_kv[(part % DEPTH) * TILE_KV + (j % 4u) * ACROSS + j / 4u] = x;
            }
            workgroupBarrier();
            // Sums of four vectors each, added up: exact where a long chain of equal terms would round (f16's largest,
            // say).
{% for d in range(depth // 4) %}
{% for c in range(4) %}
            let k_{{ d }}_{{ c }} = widen(sh_kv[{{ d * tile_keys + c * across }}u + column]);
{% endfor %}
{% for r in range(rows) %}
{% set q_first = "(dim / 4u + %su) * TILE_Q" | format(d) if resident else "%su" | format(d * tile_rows) %}
            let q_{{ d }}_{{ r }} = widen(sh_q[{{ q_first }} + thread_row + {{ r * down }}u]);
            {{ "var" if d == 0 else "" }} sum_{{ r }} {{ "" if d % 4 == 0 else "+" }}= vec4<f32>(
                {{ joined(4, ", ", "dot(q_%s_%s, k_%s_#)" | format(d, r, d)) }},
            );
{% if d % 4 == 3 %}
            s_{{ r }} += sum_{{ r }};
{% endif %}
{% endfor %}
{% endfor %}
            workgroupBarrier();
        }
        let key_own = key + column * 4u;
{% for r in range(rows) %}
        let dots_{{ r }} = s_{{ r }};
        s_{{ r }} = vec4<f32>(
            scaled(dots_{{ r }}.x),
            scaled(dots_{{ r }}.y),
            scaled(dots_{{ r }}.z),
            scaled(dots_{{ r }}.w),
        );
{% endfor %}
        let p_at = column * TILE_Q + thread_row;
{% if full %}
        // Through workgroup memory, each invocation its own words, so that the transform stands four times in the text.
{% for r in range(rows) %}
        sh_p[p_at + {{ r * down }}u] = s_{{ r }};
{% endfor %}
{% for j in range(4) %}
        let position_{{ j }} = key_position(seq, key_own + {{ j }}u);
{% endfor %}
        for (var r = 0u; r < {{ rows }}u; r++) {
            let row = min(row_first + thread_row + r * DOWN, row_last);
            let x = sh_p[p_at + r * DOWN];
            sh_p[p_at + r * DOWN] = vec4<f32>(
                logit(batch, head, row, key_own, position_0, seq, x.x),
                logit(batch, head, row, key_own + 1u, position_1, seq, x.y),
                logit(batch, head, row, key_own + 2u, position_2, seq, x.z),
                logit(batch, head, row, key_own + 3u, position_3, seq, x.w),
            );
        }
{% for r in range(rows) %}
        s_{{ r }} = sh_p[p_at + {{ r * down }}u];
{% endfor %}
{% else %}
        if ((key < all_first) | (key + TILE_KV > all_end)) {
            let keys = vec4<u32>(key_own, key_own + 1u, key_own + 2u, key_own + 3u);
{% for r in range(rows) %}
            let range_{{ r }} = key_range(seq, min(row_first + thread_row + {{ r * down }}u, row_last));
            s_{{ r }} = select(
                vec4<f32>(HIDDEN),
                s_{{ r }},
                (keys >= vec4<u32>(range_{{ r }}.x)) & (keys < vec4<u32>(range_{{ r }}.y)),
            );
{% endfor %}
        }
{% endif %}
{% if carry %}
        if (key + TILE_KV > params.key_end) {
            let own = vec4<u32>(key_own, key_own + 1u, key_own + 2u, key_own + 3u) < vec4<u32>(params.key_end);
{% for r in range(rows) %}
            s_{{ r }} = select(vec4<f32>(HIDDEN), s_{{ r }}, own);
{% endfor %}
        }
{% endif %}
        for (var once = sh_q_any | u32(sh_k_any == tile); once > 0u; once--) {
{% for c in "xyzw" %}
            let bad_{{ c }} = sh_k_bad[column * 4u + {{ loop.index0 }}u] == tile;
{% endfor %}
{% for r in range(rows) %}
            let q_bad_{{ r }} = sh_q_bad[thread_row + {{ r * down }}u] != 0u;
{% for c in "xyzw" %}
            s_{{ r }}.{{ c }} = with_code(s_{{ r }}.{{ c }}, dots_{{ r }}.{{ c }}, bad_{{ c }} | q_bad_{{ r }});
{% endfor %}
{% endfor %}
        }
        var top = vec4<f32>({{ vector_of(rows, "highest(s_#)", "HIDDEN") }});
{% if shuffle %}
{% for step in shuffles %}
        top = max(top, subgroupShuffleXor(top, {{ step }}u));
{% endfor %}
{% else %}
        {{ tops }}[column * DOWN + thread_row] = top;
        workgroupBarrier();
{% for c in range(across) %}
        top = max(top, {{ tops }}[{{ c * down }}u + thread_row]);
{% endfor %}
{% endif %}
{% for r in range(rows) %}
        let higher_{{ r }} = max(m_{{ r }}, top.{{ "xyzw"[r] }});
        let shrink_{{ r }} = exp(max(m_{{ r }} - higher_{{ r }}, -150.0));
        m_{{ r }} = higher_{{ r }};
        let visible_{{ r }} = select(vec4<f32>(), weigh(s_{{ r }}, higher_{{ r }}), s_{{ r }} > vec4<f32>(HIDDEN));
        let p_{{ r }} = select(visible_{{ r }}, vec4<f32>(NOTHING), s_{{ r }} == vec4<f32>(MINUS));
        l_{{ r }} = l_{{ r }} * shrink_{{ r }} + (p_{{ r }}.x + p_{{ r }}.y) + (p_{{ r }}.z + p_{{ r }}.w);
        sh_p[p_at + {{ r * down }}u] = p_{{ r }};
{% for c in range(parts) %}
        o_{{ r }}_{{ c }} *= shrink_{{ r }};
{% endfor %}
{% endfor %}
        workgroupBarrier();
        for (var skip = 0u; skip < TILE_KV; skip += KEYS) {
            stage += 1u;
            for (var part = thread; part < KEYS * DIMS; part += THREADS) {
                let j = key + skip + part / DIMS;
                let d = dim_first + (part % DIMS) * 4u;
                var x = {{ kept }}();
                if (j < key_end && d < params.value_dim) {
                    let at = stored_at(seq, batch, j);
                    x = stage_v(v_at + at.x * params.v_batch + at.y * params.v_row + d, params.value_dim - d);
                }
                for (var once = u32(!finite(widen(x))); once > 0u; once--) {
                    x = {{ "finite_or_zero(x)" if element == "f32" else "staged_finite(x)" }};
                    sh_bad[part / DIMS] = stage;
                    sh_any = stage;
                }
                sh_kv[part] = x;
            }
            workgroupBarrier();
{% for j4 in range(value_keys // 4) %}
{% for r in range(rows) %}
            let w_{{ j4 }}_{{ r }} = sh_p[(skip / 4u + {{ j4 }}u) * TILE_Q + thread_row + {{ r * down }}u];
{% endfor %}
{% for c in range(parts) %}
{% for j in range(4) %}
            let v_{{ j4 }}_{{ c }}_{{ j }} = widen(sh_kv[{{ (j4 * 4 + j) * (dims // 4) + c * across }}u + column]);
{% endfor %}
{% for r in range(rows) %}
            o_{{ r }}_{{ c }} += {{ weighted("w_%s_%s" | format(j4, r), "v_%s_%s" | format(j4, c)) }};
{% endfor %}
{% endfor %}
{% endfor %}
            for (var j = 0u; j < select(0u, min(KEYS, key_end - min(key_end, key + skip)), sh_any == stage); j++) {
                if (sh_bad[j] == stage) {
                    let at = stored_at(seq, batch, key + skip + j);
                    let v_row = v_at + at.x * params.v_batch + at.y * params.v_row;
{% for r in range(rows) %}
                    let weight_{{ r }} = sh_p[((skip + j) / 4u) * TILE_Q + thread_row + {{ r * down }}u][j % 4u];
{% endfor %}
{% for c in range(parts) %}
                    let d_{{ c }} = dim_first + (column + {{ c * across }}u) * 4u;
                    if (d_{{ c }} < params.value_dim) {
                        let all = classes(widen(stage_v(v_row + d_{{ c }}, params.value_dim - d_{{ c }})));
{% for r in range(rows) %}
                        class_{{ r }}_{{ c // 4 }} |=
                            classes_seen(all, weight_{{ r }} != 0.0, weight_{{ r }} == NOTHING) << {{ c % 4 * 8 }}u;
{% endfor %}
                    }
{% endfor %}
                }
            }
            workgroupBarrier();
        }
    }

{% if carry %}
    if (params.key_end < params.seq_kv) {
        state[state_at] = vec4<u32>({{ vector_of(rows, "bitcast<u32>(m_#)", "0u") }});
        state[state_at + THREADS] = vec4<u32>({{ vector_of(rows, "bitcast<u32>(l_#)", "0u") }});
{% for r in range(rows) %}
{% for c in range(parts) %}
        state[state_at + {{ 2 + r * parts + c }}u * THREADS] =
            result_bits(o_{{ r }}_{{ c }}, {{ classes_of_vector("class_%s" | format(r), c) }});
{% endfor %}
{% endfor %}
        return;
    }
{% endif %}
    var sums = vec4<f32>({{ vector_of(rows, "l_#", "0.0") }});
{% if shuffle %}
{% for step in shuffles %}
    sums += subgroupShuffleXor(sums, {{ step }}u);
{% endfor %}
{% else %}
    workgroupBarrier();
    {{ tops }}[column * DOWN + thread_row] = sums;
    workgroupBarrier();
    sums = vec4<f32>();
{% for c in range(across) %}
    sums += {{ tops }}[{{ c * down }}u + thread_row];
{% endfor %}
{% endif %}
{% for r in range(rows) %}
    let row_{{ r }} = row_first + thread_row + {{ r * down }}u;
    if (row_{{ r }} <= row_last) {
        var m = m_{{ r }};
        var l = sums.{{ "xyzw"[r] }};
{{ join_sinks("head", lists) }}
{% if lists %}
{% set lse_place = lse_at("batch_of(batch)", "head", "seq.token_q + row_%s" | format(r)) %}
{{ leave_lse(lse_place, "column == 0u && here.col_tile == 0u") }}
{% endif %}
        let factor = {{ over_sum("shrink") }};
        let all_nan = select(0u, 0xffu, broken(m));
        let at = {{ row_at("out", "batch_of(batch)", "head", "(seq.token_q + row_%s)" | format(r)) }};
{% for c in range(parts) %}
        let dim_{{ c }} = dim_first + (column + {{ c * across }}u) * 4u;
        if (dim_{{ c }} < params.value_dim) {
            store_out(
                at + dim_{{ c }},
                params.value_dim - dim_{{ c }},
                result_bits(o_{{ r }}_{{ c }} * factor, all_nan | ({{ classes_of_vector("class_%s" | format(r), c) }})),
            );
        }
{% endfor %}
    }
{% endfor %}
}
