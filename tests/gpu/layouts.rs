//! Layouts, strides with gaps, one buffer for q, k and v, and sequences laid end to end.

use wgpu_attention::{Broadcast, Buffers, Causal, Element, Error, Layout, Outputs, Packed, Strides};

use crate::support::staged::Guarded;
use crate::support::{Case, Data, Random, gpus};
use crate::{everywhere, lean, problem, ways};

#[test]
fn dense_layouts_and_strides_with_gaps_hold() {
    let strided = |rows: u64, head: u64, row: u64, offset: u64| {
        Layout::Strided(Strides { offset, batch: rows * row + 24, head, row })
    };
    // Aligned rows with gaps; odd offsets and strides; heads inside rows and rows inside heads.
    let layouts = [
        [Layout::Bshd, Layout::Bshd, Layout::Bshd, Layout::Bshd],
        [Layout::Bhsd, Layout::Bshd, Layout::Bhsd, Layout::Bshd],
        [strided(9, 12, 48, 8), strided(35, 12, 40, 4), strided(35, 12, 28, 0), strided(9, 16, 52, 12)],
        [strided(9, 13, 47, 3), strided(35, 11, 37, 1), strided(35, 9, 25, 7), strided(9, 13, 45, 5)],
    ];
    for (n, [q, k, v, out]) in layouts.into_iter().enumerate() {
        let p = problem([2, 3, 9, 35, 8], |p| (p.q, p.k, p.v, p.out, p.causal) = (q, k, v, out, Causal::BottomRight));
        let case = Case::random(p, n as u64);
        everywhere(case);
    }
}

#[test]
fn keys_may_share_one_row_and_heads_one_place() {
    // Inputs may overlap: stride 0 repeats a head or a row.
    let same = Layout::Strided(Strides { offset: 4, batch: 0, head: 0, row: 8 });
    let p = problem([2, 3, 9, 11, 8], |p| (p.k, p.v) = (same, same));
    let case = Case::random(p, 1);
    everywhere(case);
}

#[test]
fn sixteen_bit_rows_with_gaps_hold() {
    let rows = |offset| Layout::Strided(Strides { offset, batch: 600, head: 12, row: 44 });
    for element in [Element::F16, Element::Bf16] {
        let mut p = problem([2, 3, 9, 11, 8], |p| {
            (p.element, p.q, p.k, p.v, p.out) = (element, rows(0), rows(4), rows(1), rows(8));
        });
        // v begins at an odd element, so that out would be summed unpacked, which needs a dense out.
        for gpu in gpus() {
            assert!(matches!(gpu.library().plan(&p), Err(Error::Conflict { left: "element", right: "out", .. })));
        }
        p.v = rows(12);
        let case = Case::random(p, 1);
        everywhere(case);
    }
}

#[test]
fn queries_keys_and_values_may_be_slices_of_one_buffer() {
    let (batch, seq, heads, dim) = (2, 21, 3, 12);
    let row = 3 * heads * dim;
    let part = |n: u64| Layout::Strided(Strides { offset: n * heads * dim, batch: seq * row, head: dim, row });
    let mut p = lean(&problem([batch, heads as u32, seq as u32, seq as u32, dim as u32], |_| ()));
    (p.q, p.k, p.v, p.out, p.lse) = (part(0), part(1), part(2), Layout::Bshd, false);
    let qkv = Random(5).normals((u64::from(batch) * seq * row) as usize, 1.0);
    let shape = p.check().unwrap();
    let mut operands = Data::random(&p, 1, 1.0);
    for (tensor, of) in [(&mut operands.q, shape.q()), (&mut operands.k, shape.k()), (&mut operands.v, shape.v())] {
        (0..of.extent() as usize).for_each(|i| tensor.set(i, qkv[i]));
    }
    let case = Case::new(p.clone(), operands);
    for gpu in gpus() {
        for way in ways(gpu, &p) {
            let plan = gpu.library().plan_with(&p, &way).unwrap();
            let all = Guarded::new(gpu.device(), bytemuck::cast_slice(&qkv));
            let out = Guarded::new(gpu.device(), &vec![0xff; case.want.out.len() * 4]);
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let buffers = Buffers::new(all.slice(), all.slice(), all.slice(), out.slice());
            gpu.library().prepare(&plan).unwrap().encode(&mut encoder, &buffers).unwrap();
            gpu.queue().submit([encoder.finish()]);
            let out = bytemuck::pod_collect_to_vec(&out.read(gpu.device(), gpu.queue()));
            case.compare(&Outputs::new(out), &plan);
            assert_eq!(all.read(gpu.device(), gpu.queue()), bytemuck::cast_slice::<f32, u8>(&qkv), "inputs stay");
        }
    }
}

#[test]
fn packed_sequences_some_of_them_empty_hold() {
    let cus: [([u32; 6], [u32; 6]); 2] =
        [([1, 4, 4, 37, 40, 40], [0, 7, 9, 9, 70, 71]), ([0, 0, 33, 36, 39, 40], [0, 0, 65, 67, 67, 70])];
    for (cu_q, cu_kv) in cus {
        for (causal, left) in [(Causal::None, None), (Causal::BottomRight, None), (Causal::TopLeft, Some(5))] {
            let mut p = problem([5, 4, 33, 65, 12], |p| {
                (p.kv_heads, p.causal, p.window.left) = (2, causal, left);
                p.packed = Some(Packed { total_q: 41, total_kv: 71 });
                p.mask = left.map(|_| Broadcast([5, 1, 33, 65]));
                (p.alibi, p.sinks) = (left.is_some(), left.is_some());
            });
            p = p.with_layout(Layout::Bshd);
            let outputs = [lean(&p), p.clone()];
            for p in outputs {
                let mut operands = Data::random(&p, 1, 1.0);
                (operands.cu_q, operands.cu_kv) = (Some(cu_q.to_vec()), Some(cu_kv.to_vec()));
                let case = Case::new(p, operands);
                for gpu in gpus() {
                    // What no sequence owns is not written: lse starts as NaN there, and the reference says 0.
                    let owned = |h: usize, t: usize| (cu_q[0] as usize..cu_q[5] as usize).contains(&t) && h < 4;
                    for way in ways(gpu, &case.problem) {
                        let plan = gpu.library().plan_with(&case.problem, &way).unwrap();
                        let mut got = gpu.attention_with(&case.problem, &case.operands.inputs(), &way).unwrap();
                        if let Some(lse) = &mut got.lse {
                            let strangers = (0..4 * 41).filter(|n| !owned(n / 41, n % 41));
                            strangers.for_each(|n| lse[n] = 0.0);
                        }
                        case.compare(&got, &plan);
                    }
                }
            }
        }
    }
}
