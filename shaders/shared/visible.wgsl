{# Lengths, positions and the key range of a row. Needs params.wgsl and, with `lists`, the binding of that name: the
   small per-batch and per-head arrays. Without it no problem that has any of them runs. #}

// One batch entry or packed sequence. Lengths that come from the GPU are clamped here, so that no value leaves a
// buffer.
struct Sequence {
    rows: u32,       // query rows
    keys: u32,       // keys that may be visible
    stored: u32,     // keys that stand in memory
    token_q: u32,    // first query token of a packed sequence, else 0
    token_kv: u32,   // first key token
    offset: i32,     // row i stands at position i + offset
    positions: u32,  // where the list of the positions of its keys begins
}

// Where batch b of q and out, or of k and v, begins: packed sequences share one batch.
fn batch_of(batch: u32) -> u32 {
    return select(batch, 0u, (params.flags & PACKED) != 0u);
}

fn sequence(batch: u32) -> Sequence {
    var s = Sequence(params.seq_q, params.seq_kv, params.seq_kv, 0u, 0u, 0, 0u);
{% if lists %}
    if ((params.flags & PACKED) != 0u) {
        s.token_q = min(lists[params.list_cu_seqlens_q + batch], params.total_q);
        s.token_kv = min(lists[params.list_cu_seqlens_kv + batch], params.total_kv);
        let end_q = min(lists[params.list_cu_seqlens_q + batch + 1u], params.total_q);
        let end_kv = min(lists[params.list_cu_seqlens_kv + batch + 1u], params.total_kv);
        s.rows = min(max(end_q, s.token_q) - s.token_q, params.seq_q);
        s.keys = min(max(end_kv, s.token_kv) - s.token_kv, params.seq_kv);
        s.stored = s.keys;
        // An empty sequence may begin where the tokens end: what kernels read of it without looking must exist.
        s.token_q = min(s.token_q, max(params.total_q, 1u) - 1u);
        s.token_kv = min(s.token_kv, max(params.total_kv, 1u) - 1u);
    }
    if ((params.flags & LENGTHS) != 0u) {
        s.keys = min(lists[params.list_key_lengths + batch], params.seq_kv);
    }
    s.positions = params.list_key_positions + batch * params.seq_kv;
{% endif %}
    if ((params.flags & BOTTOM_RIGHT) != 0u) {
        s.offset = i32(s.keys) - i32(s.rows);
    }
{% if lists %}
    if ((params.flags & OFFSETS) != 0u) {
        s.offset = clamp(bitcast<i32>(lists[params.list_offsets + batch]), -1073741824, 1073741824);
    }
{% endif %}
    return s;
}

// Positions [x, y) that causal rule and window leave to a row, below `limit`. Both ends never fall as the row rises.
fn position_range(s: Sequence, row: u32, limit: i32) -> vec2<u32> {
    let position = i32(row) + s.offset;
    var first = 0;
    var end = limit;
    if ((params.flags & WINDOW_LEFT) != 0u) {
        first = clamp(position - i32(params.window_left), 0, limit);
    }
    if ((params.flags & WINDOW_RIGHT) != 0u) {
        end = clamp(position + i32(params.window_right) + 1, 0, limit);
    }
    if ((params.flags & CAUSAL) != 0u) {
        end = min(end, clamp(position + 1, 0, limit));
    }
    return vec2<u32>(u32(first), u32(max(first, end)));
}

// Keys [x, y) that causal rule, window and lengths leave to a row. Where positions are listed, every key of the length
// may be visible.
fn key_range(s: Sequence, row: u32) -> vec2<u32> {
{% if lists %}
    if ((params.flags & POSITIONS) != 0u) {
        return vec2<u32>(0u, s.keys);
    }
{% endif %}
    return position_range(s, row, i32(s.keys));
}

// Keys that at least one of the rows first..last sees by range; all of them where every logit is asked for.
fn tile_range(s: Sequence, first: u32, last: u32) -> vec2<u32> {
    if ((params.flags & EVERY_KEY) != 0u) {
        return vec2<u32>(0u, params.seq_kv);
    }
    return vec2<u32>(key_range(s, first).x, key_range(s, last).y);
}
{% if full is defined and full %}

// Where no position is visible.
const NOWHERE: u32 = 0xffffffffu;

// The position of a key; NOWHERE for an empty slot and, where positions are listed, for a key beyond the length. Tiles
// reach beyond the last key.
fn key_position(s: Sequence, key: u32) -> u32 {
    if ((params.flags & POSITIONS) != 0u) {
        let listed = bitcast<i32>(lists[s.positions + min(key, max(params.seq_kv, 1u) - 1u)]);
        return select(NOWHERE, u32(min(listed, 1073741823)), (listed >= 0) & (key < s.keys));
    }
    return key;
}

// Positions [x, y) whose keys a row sees. Without a list, a key is its own position, and the length bounds both.
fn visible_positions(s: Sequence, row: u32) -> vec2<u32> {
    return position_range(s, row, select(i32(s.keys), 1073741824, (params.flags & POSITIONS) != 0u));
}
{% endif %}
