{# Where keys and values stand: rows of their batch, or of the pages of a pool that the block table names. Needs
   visible.wgsl; without `lists` no problem with pages runs. #}

// Batch (or page) and row of k and v that hold key `key`. Page numbers come from the GPU: clamped, so that no value
// leaves the pool.
fn stored_at(s: Sequence, batch: u32, key: u32) -> vec2<u32> {
    var at = vec2<u32>(batch_of(batch), s.token_kv + key);
{% if lists %}
    if ((params.flags & PAGED) != 0u) {
        let page = lists[params.list_block_table + batch * params.table_row + key / params.page_size];
        at = vec2<u32>(min(page, params.pages - 1u), key % params.page_size);
    }
{% endif %}
    return at;
}

// End of the keys up to `end` that stand one row after the other from `key` on: those of its page.
fn page_end(key: u32, end: u32) -> u32 {
    return min(end, (key / params.page_size + 1u) * params.page_size);
}
