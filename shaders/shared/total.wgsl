{# What a fused kernel leaves of a row beside its output. Needs normaliser.wgsl and the binding `lse`. #}
// The log-sum-exp. With TOTALS m and l themselves, for `weights` and `merge`: m + ln l loses l where m is large.
fn store_lse(at: u32, m: f32, l: f32) {
    if ((params.flags & TOTALS) != 0u) {
        lse[2u * at] = bitcast<u32>(m);
        lse[2u * at + 1u] = bitcast<u32>(l);
    } else {
        lse[at] = lse_bits(m, l);
    }
}
