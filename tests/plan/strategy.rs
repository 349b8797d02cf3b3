//! Random problems, devices and options.

use std::time::Duration;

use proptest::prelude::*;
use wgpu_attention::{
    Bias, Broadcast, Caps, Causal, Element, Form, Kernel, Layout, Logits, Options, Packed, Paged, Precision, Problem,
    Strides, wgpu, with,
};

prop_compose! {
    fn sizes()(
        batch in 1u32..4, kv_heads in 1u32..4, group in 1u32..4,
        seq_q in prop_oneof![1u32..20, 30u32..70, 100u32..140], seq_kv in prop_oneof![1u32..20, 30u32..70, 250u32..300, 1000u32..1100],
        head_dim in prop_oneof![1u32..10, 16u32..80, Just(256)], value_dim in prop_oneof![1u32..10, 16u32..80, Just(256)],
    ) -> Problem {
        let mut p = Problem::new(batch, kv_heads * group, seq_q, seq_kv, head_dim);
        (p.kv_heads, p.value_dim) = (kv_heads, value_dim);
        p
    }
}

fn layout() -> impl Strategy<Value = u32> {
    0u32..6
}

fn layout_of(kind: u32, [_, heads, rows]: [u32; 3], dim: u32) -> Layout {
    let [heads, rows, dim] = [heads, rows, dim].map(u64::from);
    let padded = (dim + 5).next_multiple_of(4);
    match kind {
        0 | 1 => Layout::Bhsd,
        2 => Layout::Bshd,
        // Rows within heads and heads within rows; aligned with gaps, and odd.
        3 => {
            Layout::Strided(Strides { offset: 8, batch: heads * rows * padded + 64, head: rows * padded, row: padded })
        }
        4 => Layout::Strided(Strides {
            offset: 0,
            batch: 3 * heads * rows * padded,
            head: padded,
            row: 3 * heads * padded,
        }),
        _ => Layout::Strided(Strides {
            offset: 7,
            batch: heads * rows * (dim + 1) + 1,
            head: dim + 1,
            row: heads * (dim + 1),
        }),
    }
}

fn broadcast(bits: u32, full: [u32; 4], short: bool) -> Broadcast {
    let mut shape = [0, 1, 2, 3].map(|axis| if bits >> axis & 1 == 1 { full[axis] } else { 1 });
    if short && shape[3] > 3 {
        shape[3] -= 2;
    }
    Broadcast(shape)
}

prop_compose! {
    /// Everything that a problem can say.
    pub fn problem()(
        p in sizes(),
        element in prop_oneof![2 => Just(Element::F32), 1 => Just(Element::F16), 1 => Just(Element::Bf16)],
        bias_element in prop_oneof![Just(Element::F32), Just(Element::F16), Just(Element::Bf16)],
        causal in prop_oneof![Just(Causal::None), Just(Causal::TopLeft), Just(Causal::BottomRight), Just(Causal::Offset)],
        (mask, bias) in (proptest::option::of((0u32..16, any::<bool>())), proptest::option::of((0u32..16, any::<bool>()))),
        (softcap, lengths, alibi, sinks, lse, weights, positions) in any::<(bool, bool, bool, bool, bool, bool, bool)>(),
        logits in prop_oneof![
            3 => Just(None), 1 => Just(Some(Logits::Raw)), 1 => Just(Some(Logits::Capped)), 1 => Just(Some(Logits::Masked))
        ],
        layouts in (layout(), layout(), layout(), layout()),
        packed in proptest::option::weighted(0.2, (0u32..50, 0u32..50)),
        paged in proptest::option::weighted(0.2, (1u32..60, prop_oneof![Just(1u32), Just(7), Just(16), Just(64), 1u32..300])),
    ) -> Problem {
        let mut p: Problem = p;
        (p.element, p.causal, p.softcap, p.alibi, p.sinks) = (element, causal, softcap.then_some(3.0), alibi, sinks);
        (p.lse, p.weights, p.logits, p.key_positions) = (lse, weights, logits, positions);
        let full = [p.batch, p.heads, p.seq_q, p.seq_kv];
        p.mask = mask.map(|(bits, short)| broadcast(bits, full, short));
        p.bias = bias.map(|(bits, short)| Bias { shape: broadcast(bits, full, short), element: bias_element });
        p.packed = packed.map(|(q, kv)| Packed { total_q: p.seq_q + q, total_kv: p.seq_kv + kv });
        if p.packed.is_none() && let Some((pages, page_size)) = paged {
            p.paged = Some(Paged { pages, page_size });
            (p.weights, p.logits) = (false, None);
        }
        p.key_lengths = lengths && p.packed.is_none();
        let (batch, rows, keys) = p.packed.map_or((p.batch, p.seq_q, p.seq_kv), |x| (1, x.total_q, x.total_kv));
        let (kv_batch, keys) = p.paged.map_or((batch, keys), |x| (x.pages, x.page_size));
        p.q = layout_of(layouts.0, [batch, p.heads, rows], p.head_dim);
        p.k = layout_of(layouts.1, [kv_batch, p.kv_heads, keys], p.head_dim);
        p.v = layout_of(layouts.2, [kv_batch, p.kv_heads, keys], p.value_dim);
        p.out = layout_of(layouts.3, [batch, p.heads, rows], p.value_dim);
        p
    }
}

prop_compose! {
    /// Devices from the floor to large ones.
    pub fn caps()(
        (cpu, f16, int64) in any::<(bool, bool, bool)>(),
        // Fixed sizes, and the ranges that AMD, Metal and WARP report.
        subgroups in prop_oneof![
            1 => Just(None), 1 => Just(Some([4, 4])), 1 => Just(Some([8, 8])), 1 => Just(Some([16, 16])), 2 => Just(Some([32, 32])),
            1 => Just(Some([64, 64])), 1 => Just(Some([32, 64])), 1 => Just(Some([4, 64])), 1 => Just(Some([4, 128]))
        ],
        matrices in prop_oneof![2 => Just(vec![]), 1 => Just(vec![16]), 1 => Just(vec![8]), 1 => Just(vec![16, 8])],
        binding in prop_oneof![Just(4096u64), Just(8192), Just(20_000), Just(1 << 20), Just(128 << 20), Just(u64::from(u32::MAX))],
        buffers in prop_oneof![Just(4u32), Just(5), Just(6), Just(8)],
        side in prop_oneof![Just(1u32), Just(3), Just(50), Just(65_535)],
        workgroup_bytes in prop_oneof![Just(8192u32), Just(16_352), Just(16_384), Just(49_152)],
        invocations in prop_oneof![Just(64u32), Just(128), Just(256), Just(1024)],
        alignment in prop_oneof![Just(16u32), Just(32), Just(64), Just(256)],
    ) -> Caps {
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: binding,
            max_buffer_size: 1 << 32,
            max_storage_buffers_per_shader_stage: buffers,
            max_compute_workgroups_per_dimension: side,
            max_compute_workgroup_storage_size: workgroup_bytes,
            max_compute_invocations_per_workgroup: invocations,
            max_compute_workgroup_size_x: invocations,
            min_storage_buffer_offset_alignment: alignment,
            ..wgpu::Limits::default()
        };
        let subgroup_size = subgroups.filter(|[min, max]| min == max).map(|[size, _]| size);
        let [subgroup_min_size, subgroup_max_size] = [0, 1].map(|end| subgroups.map(|range| range[end]));
        with!(Caps::new(limits), cpu, f16, int64, subgroup_size, subgroup_min_size, subgroup_max_size, matrices)
    }
}

prop_compose! {
    pub fn options()(
        kernel in prop_oneof![3 => Just(None), 1 => Just(Some(Kernel::Rows)), 1 => Just(Some(Kernel::Flash)), 1 => Just(Some(Kernel::Split)), 2 => Just(Some(Kernel::Matrix)), 1 => Just(Some(Kernel::Unfused))],
        form in prop_oneof![
            2 => Just(None), 2 => Just(Some(Form::Tiled)), 2 => Just(Some(Form::Lanes)), 1 => Just(Some(Form::Emulated))
        ],
        native_f16 in prop_oneof![4 => Just(None), 1 => Just(Some(true)), 1 => Just(Some(false))],
        scratch_budget in prop_oneof![Just(1500u64), Just(16_384), Just(256 << 20)],
        batch_invariant in any::<bool>(),
        precision in prop_oneof![Just(Precision::Strict), Just(Precision::Fast)],
        micros in prop_oneof![Just(2u64), Just(100), Just(50_000)],
    ) -> Options {
        with!(Options::default(), kernel, form, native_f16, batch_invariant, precision, scratch_budget, work_budget: Duration::from_micros(micros))
    }
}
