//! Keys and values in pages: the same answers wherever the pages stand, and nothing read but what the block table names.

use wgpu_attention::operations::{Append, AppendBuffers};
use wgpu_attention::{
    Causal, Element, Error, Kernel, Layout, Obstacle, Options, Paged, Problem, Strides, Window, with,
};

use crate::support::staged::{Guarded, Staged};
use crate::support::{Adapter, Case, Data, Tensor, floor, gpus, is_small};
use crate::{everywhere, problem, ways};

const PAGE_SIZES: [u32; 4] = [1, 7, 16, 64];

/// Three sequences of up to 150 keys, two query heads a key/value head, with all that a decoding loop has.
fn paged(seq_q: u32, page_size: u32, set: impl FnOnce(&mut Problem)) -> Problem {
    problem([3, 4, seq_q, 150, 20], |p| {
        (p.kv_heads, p.weights, p.logits) = (2, false, None);
        (p.causal, p.key_lengths) = (Causal::BottomRight, true);
        // Pages to spare: some stay unused.
        p.paged = Some(Paged { pages: 3 * 150u32.div_ceil(page_size) + 3, page_size });
        set(p);
    })
}

/// Random data, each sequence with pages of its own, in no order.
fn own_pages(p: &Problem, lengths: [u32; 3]) -> Data {
    let mut operands = Data::random(p, 5, 1.0);
    operands.key_lengths = Some(lengths.to_vec());
    let (entries, pages) = (p.check().unwrap().block_table_len() as u32, p.paged.unwrap().pages);
    // A step without a common factor visits each page once.
    let step = (pages / 2..).find(|step| (2..=pages).all(|n| pages % n != 0 || step % n != 0)).unwrap();
    operands.block_table = Some((0..entries).map(|n| n * step % pages).collect());
    operands
}

/// Each element of k and v, and whether a visible key needs it.
fn needed(p: &Problem, operands: &Data) -> [Vec<bool>; 2] {
    let shape = p.check().unwrap();
    let (size, table) = (p.paged.unwrap().page_size, operands.block_table.as_ref().unwrap());
    let columns = table.len() / p.batch as usize;
    [shape.k(), shape.v()].map(|tensor| {
        let mut needed = vec![false; tensor.extent() as usize];
        for (b, &length) in operands.key_lengths.as_ref().unwrap().iter().enumerate() {
            for (h, j) in (0..p.kv_heads).flat_map(|h| (0..length).map(move |j| (h, j))) {
                let page = table[b * columns + (j / size) as usize];
                let at = tensor.at(page, h, j % size) as usize;
                needed[at..at + tensor.dim as usize].fill(true);
            }
        }
        needed
    })
}

#[test]
fn every_kernel_reads_keys_in_pages() {
    for page_size in PAGE_SIZES {
        for seq_q in [2, 35] {
            for element in [Element::F32, Element::F16, Element::Bf16] {
                // Random pages: some are shared, also by one sequence with itself.
                let p = paged(seq_q, page_size, |p| {
                    (p.element, p.sinks) = (element, true);
                    if element == Element::F16 {
                        (p.k, p.v) = (Layout::Bshd, Layout::Bshd);
                    }
                });
                everywhere(Case::random(p, 1));
            }
        }
    }
}

#[test]
fn the_planner_takes_the_same_kernels_as_for_keys_in_line() {
    for gpu in gpus() {
        for (seq_q, on_cpu) in [(1, "split"), (100, "rows")] {
            let plan = gpu.library().plan(&paged(seq_q, 16, |_| ())).unwrap();
            let caps = gpu.library().caps();
            if caps.cpu && caps.subgroup_size.is_none_or(|size| size >= 8) {
                assert!(plan.kernel().starts_with(on_cpu), "{plan}");
            } else {
                assert!(!plan.kernel().contains("scores"), "{plan}");
            }
        }
    }
}

#[test]
fn rules_and_layouts_hold_in_pages() {
    let page_size = 7;
    let heads_last = Layout::Strided(Strides { offset: 5, batch: 2 * 2 * 7 * 9, head: 9, row: 2 * 9 });
    let odd = |p: &mut Problem| (p.head_dim, p.value_dim, p.k, p.v) = (9, 6, heads_last, Layout::Bshd);
    let window = |p: &mut Problem| {
        (p.causal, p.key_lengths) = (Causal::Offset, false);
        p.window = Window { left: Some(20), right: Some(3) };
    };
    let full = |p: &mut Problem| {
        (p.alibi, p.softcap) = (true, Some(2.0));
        p.mask = Some(wgpu_attention::Broadcast([3, 1, 1, 150]));
    };
    let rules: [&dyn Fn(&mut Problem); 3] = [&odd, &window, &full];
    for set in rules {
        for seq_q in [2, 35] {
            if is_small() && seq_q == 35 {
                break;
            }
            everywhere(Case::random(paged(seq_q, page_size, set), 2));
        }
    }
}

/// What no visible key needs is NaN: pages that nobody has, and the rows of last pages beyond the length. What the table says of
/// pages beyond the length is nonsense.
#[test]
fn garbage_in_unused_pages_and_rows_reaches_none() {
    for page_size in [7, 16] {
        for seq_q in [2, 35] {
            let p = paged(seq_q, page_size, |_| ());
            let clean = own_pages(&p, [150, 0, 17]);
            let case = Case::new(p.clone(), clean.clone());
            let mut dirty = clean.clone();
            for (tensor, needed) in [&mut dirty.k, &mut dirty.v].into_iter().zip(needed(&p, &clean)) {
                let unused = needed.iter().enumerate().filter(|(_, needed)| !**needed).map(|(at, _)| at);
                let count = unused.map(|at| tensor.set(at, f32::NAN)).count();
                assert!(count > needed.len() / 3, "{count} of {}", needed.len());
            }
            let table = dirty.block_table.as_mut().unwrap();
            let columns = table.len() / 3;
            table[columns..2 * columns].fill(u32::MAX);
            table[2 * columns + 17usize.div_ceil(page_size as usize)..].fill(1 << 31);
            for gpu in gpus() {
                for way in ways(gpu, &p) {
                    let plan = gpu.library().plan_with(&p, &way).unwrap();
                    case.compare(&gpu.attention_with(&p, &dirty.inputs(), &way).unwrap(), &plan);
                }
            }
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A sequence gives the same bits wherever its pages stand, shared or its own.
#[test]
fn where_pages_stand_does_not_show() {
    for seq_q in [2, 35] {
        let p = paged(seq_q, 16, |_| ());
        // All three sequences begin with the same two pages.
        let shape = p.check().unwrap();
        let mut shared = own_pages(&p, [150, 40, 97]);
        let table = shared.block_table.as_mut().unwrap();
        let columns = table.len() / 3;
        for b in 1..3 {
            (table[b * columns], table[b * columns + 1]) = (table[0], table[1]);
        }
        // Each sequence has its pages in order and for itself.
        let mut own = shared.clone();
        let in_order: Vec<u32> = (0..3 * columns as u32).collect();
        for (to, from, tensor) in [(&mut own.k, &shared.k, shape.k()), (&mut own.v, &shared.v, shape.v())] {
            for (&page, &old) in in_order.iter().zip(shared.block_table.as_ref().unwrap()) {
                let [at, old] = [page, old].map(|page| tensor.at(page, 0, 0) as usize);
                (0..tensor.strides.batch as usize).for_each(|n| to.set(at + n, from.f32()[old + n]));
            }
        }
        own.block_table = Some(in_order);
        for gpu in gpus() {
            for way in ways(gpu, &p) {
                let [a, b] = [&shared, &own].map(|data| gpu.attention_with(&p, &data.inputs(), &way).unwrap());
                assert_eq!(bits(&a.out), bits(&b.out), "{way:?}");
            }
        }
    }
}

#[test]
fn a_batch_invariant_plan_gives_a_paged_sequence_the_same_bits_in_any_company() {
    let of = |batch| {
        problem([batch, 4, 1, 1601, 64], |p| {
            (p.kv_heads, p.weights, p.logits) = (2, false, None);
            p.paged = Some(Paged { pages: 120, page_size: 16 });
        })
    };
    let options = with!(Options::default(), kernel: Some(Kernel::Split), batch_invariant: true);
    let three = Data::random(&of(3), 8, 1.0);
    // The sequence on its own is the last of the three, in the same pool.
    let mut one = three.clone();
    one.q = Tensor::new(Element::F32, &three.q.f32()[2 * 4 * 64..]);
    one.block_table = three.block_table.as_ref().map(|table| table[2 * table.len() / 3..].to_vec());
    for gpu in gpus() {
        let [alone, all] =
            [(of(1), &one), (of(3), &three)].map(|(p, data)| gpu.attention_with(&p, &data.inputs(), &options).unwrap());
        assert_eq!(bits(&alone.out), bits(&all.out[2 * 4 * 64..]));
    }
}

/// Page numbers on the GPU may be anything: those outside the pool count as its last page.
#[test]
fn page_numbers_outside_the_pool_read_its_last_page() {
    for seq_q in [2, 35] {
        let p = paged(seq_q, 64, |p| p.paged = Some(Paged { pages: 4, page_size: 64 }));
        let mut operands = own_pages(&p, [150, 130, 64]);
        let wild = [u32::MAX, 4, 1, 2, 1 << 31, i32::MAX as u32, 1 << 20, 0, 3];
        operands.block_table = Some(wild.iter().map(|&page| page.min(3)).collect());
        let case = Case::new(p.clone(), operands);
        for gpu in gpus() {
            for way in ways(gpu, &p) {
                let plan = gpu.library().plan_with(&p, &way).unwrap();
                let mut staged = Staged::new(gpu.device(), &plan, &case.operands);
                staged.operands.block_table = Some(Guarded::new(gpu.device(), bytemuck::cast_slice(&wild)));
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                gpu.library().prepare(&plan).unwrap().encode(&mut encoder, &staged.buffers()).unwrap();
                gpu.queue().submit([encoder.finish()]);
                gpu.wait().unwrap();
                case.compare(&staged.outputs(gpu.device(), gpu.queue()), &plan);
            }
        }
    }
}

/// Two sequences of a page each take turns in getting further pages while tokens come.
#[test]
fn a_decoding_loop_appends_to_its_pages_and_attends_to_them() {
    let (heads, capacity, dim, pool) = (2, 12, 8, Paged { pages: 7, page_size: 4 });
    let mut p = Problem::new(2, 4, 1, capacity, dim);
    (p.kv_heads, p.causal, p.key_lengths, p.paged) = (heads, Causal::BottomRight, true, Some(pool));
    let mut append = Append::new(2, heads, 1, capacity, dim);
    append.paged = Some(pool);
    for gpu in gpus() {
        decode(gpu, &p, &append);
    }
}

fn decode(gpu: &Adapter, p: &Problem, append: &Append) {
    let plan = gpu.library().plan(p).unwrap();
    let prepared = gpu.library().prepare(&plan).unwrap();
    let appending = gpu.library().append(append, &Options::default()).unwrap();
    let mut host = Data::random(p, 3, 1.0);
    let pages = p.paged.unwrap();
    host.k.fill(0..host.k.len(), f32::NAN);
    host.v.fill(0..host.v.len(), f32::NAN);
    let mut table = vec![u32::MAX; 6];
    let device = gpu.device();
    let make = |bytes: &[u8]| Guarded::new(device, bytes);
    let staged = Staged::new(device, &plan, &host);
    let (k, v) = (staged.buffers().k, staged.buffers().v);
    let mut free = [5, 0, 6, 2, 1, 4].into_iter();
    for step in 0..10 {
        // The second sequence began two tokens before the first.
        let starts = [step, step + 2].map(|n: u32| n);
        for (b, start) in starts.into_iter().enumerate() {
            if start % pages.page_size == 0 || step == 0 {
                table[b * 3 + (start / pages.page_size) as usize] = free.next().unwrap();
            }
        }
        if step == 0 {
            // What the second one had before.
            let at = |h, j| ((table[3] * 2 + h) * 4 + j) as usize * 8;
            (0..2).flat_map(|h| [at(h, 0), at(h, 1)]).for_each(|at| {
                for (tensor, slice) in [(&mut host.k, k), (&mut host.v, v)] {
                    tensor.fill(at..at + 8, 0.25);
                    let bytes = bytemuck::cast_slice(&[0.25f32; 8]);
                    gpu.queue().write_buffer(slice.buffer(), slice.offset() + 4 * at as u64, bytes);
                }
            });
        }
        let new = Data::random(&Problem::new(2, 2, 1, 1, 8), 40 + u64::from(step), 1.0);
        for (tensor, rows) in [(&mut host.k, &new.k), (&mut host.v, &new.v)] {
            let mut cache = tensor.f32().to_vec();
            wgpu_attention::reference::append(append, rows.f32(), &mut cache, &starts, Some(&table)).unwrap();
            *tensor = Tensor::new(Element::F32, &cache);
        }
        host.key_lengths = Some(starts.map(|n| n + 1).to_vec());
        host.block_table = Some(table.clone());
        let case = Case::new(p.clone(), host.clone());

        let on_gpu = [&starts[..], &starts.map(|n| n + 1)[..], &table[..]].map(|x| make(bytemuck::cast_slice(x)));
        let [starts, lengths, table] = &on_gpu;
        let new = [&new.k, &new.v].map(|x| make(x.elements().bytes()));
        let mut encoder = device.create_command_encoder(&Default::default());
        for (rows, cache) in new.iter().zip([k, v]) {
            let mut buffers = AppendBuffers::new(rows.slice(), cache, starts.slice());
            buffers.block_table = Some(table.slice());
            appending.encode(&mut encoder, &buffers).unwrap();
        }
        let mut buffers = staged.buffers();
        (buffers.operands.key_lengths, buffers.operands.block_table) = (Some(lengths.slice()), Some(table.slice()));
        prepared.encode(&mut encoder, &buffers).unwrap();
        gpu.queue().submit([encoder.finish()]);
        gpu.wait().unwrap();
        case.compare(&staged.outputs(device, gpu.queue()), &plan);
    }
}

#[test]
fn a_pool_or_block_table_beyond_a_binding_and_devices_without_a_kernel_are_refused() {
    for gpu in gpus() {
        let small = gpu.limited(|limits| limits.max_storage_buffer_binding_size = 1 << 16);
        let error = |p: &Problem| small.library().plan(p).unwrap_err();
        let large = paged(2, 16, |p| p.paged = Some(Paged { pages: 100, page_size: 16 }));
        let got = error(&large);
        assert!(matches!(got, Error::Room { field: "k", size, limit, .. } if size > limit && limit < 1 << 16), "{got}");
        let many = paged(2, 1, |p| (p.batch, p.seq_kv, p.paged) = (90, 300, Some(Paged { pages: 8, page_size: 1 })));
        let got = error(&many);
        assert!(matches!(got, Error::Room { field: "block_table", size, limit: 65536, .. } if size > 65536), "{got}");
        // Four storage buffers: no kernel has room for the block table.
        let floor = floor(gpu, 1 << 20, 65535);
        let p = paged(2, 16, |_| ());
        let got = floor.library().plan(&p).unwrap_err();
        let Error::Kernel { kernel: "unfused", why: Obstacle::Every { unfused, fused } } = &got else {
            panic!("{got}")
        };
        assert_eq!(**unfused, Obstacle::Pages);
        for kernel in [Kernel::Rows, Kernel::Split, Kernel::Flash] {
            assert!(fused.contains(&(kernel, Obstacle::Bindings { needed: 6, limit: 4 })), "{kernel:?} in {got}");
        }
    }
}
