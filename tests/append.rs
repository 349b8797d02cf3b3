//! Appending to a cache on real drivers: every bit as the reference puts it, and every other bit as it was.

mod support;

use support::operations::{nothing, run};
use support::staged::Guarded;
use support::{Random, Tensor, floor, gpus};
use wgpu_attention::operations::{Append, AppendBuffers, Operation};
use wgpu_attention::{Element, Elements, Error, Gpu, Layout, Options, Paged, Strides, reference, wgpu, with};

/// Elements from the start of a tensor to its last one.
fn extent(layout: Layout, [batch, heads, rows]: [u32; 3], dim: u32) -> usize {
    match layout {
        Layout::Strided(s) => {
            let last = [(batch, s.batch), (heads, s.head), (rows, s.row)].map(|(n, stride)| u64::from(n - 1) * stride);
            (s.offset + last.iter().sum::<u64>() + u64::from(dim)) as usize
        }
        _ => (batch * heads * rows * dim) as usize,
    }
}

/// Random bits, NaNs of every kind among them, in the new rows and in the cache; every bit is compared.
fn check(gpu: &Gpu, append: &Append, starts: &[u32], options: &Options) {
    check_table(gpu, append, starts, None, options);
}

/// The same with a block table.
fn check_table(gpu: &Gpu, append: &Append, starts: &[u32], table: Option<&[u32]>, options: &Options) {
    let rows = extent(append.x, [append.batch, append.heads, append.rows], append.dim);
    let cache = match append.paged {
        None => [append.batch, append.heads, append.capacity],
        Some(paged) => [paged.pages, append.heads, paged.page_size],
    };
    let places = extent(append.cache, cache, append.dim);
    let bytes = append.element.bytes() as usize;
    let mut random = Random(u64::from(append.dim) + 100 * u64::from(append.rows));
    let mut bits = |elements: usize| -> Vec<u8> { (0..elements * bytes).map(|_| random.below(256) as u8).collect() };
    let (x, cache) = (bits(rows), bits(places));
    let guarded = |bytes: &[u8]| Guarded::new(gpu.device(), bytes);
    let buffers = [&x[..], &cache, bytemuck::cast_slice(starts)].map(guarded);
    let operation = gpu.library().append(append, options).unwrap_or_else(|error| panic!("{error}: {append:?}"));
    let pages = table.map(|table| guarded(bytemuck::cast_slice(table)));
    let mut bound = AppendBuffers::new(buffers[0].slice(), buffers[1].slice(), buffers[2].slice());
    bound.block_table = pages.as_ref().map(Guarded::slice);
    run(gpu, &operation, &bound);
    // The read asserts that nothing was written behind the cache, not even in its last word.
    let got = buffers[1].read(gpu.device(), gpu.queue());
    let [x, before, after] = [&x, &cache, &got[..cache.len()]].map(|bytes| Tensor::from_bytes(append.element, bytes));
    let [x, before, after] = [&x, &before, &after].map(Tensor::elements);
    let found = reference::compare_append(append, x, before, starts, table, after).expect("a whole cache");
    assert!(found.passed(), "on {}: {append:?}\n{found}", gpu.info().name);
}

#[test]
fn rows_go_where_the_reference_puts_them_bit_for_bit() {
    for gpu in gpus() {
        for element in [Element::F32, Element::F16, Element::Bf16] {
            for (rows, dim) in [(1, 64), (1, 5), (3, 6), (7, 1), (2, 40), (9, 7)] {
                for circular in [false, true] {
                    for [x, cache] in
                        [[Layout::Bhsd, Layout::Bhsd], [Layout::Bshd, Layout::Bhsd], [Layout::Bhsd, Layout::Bshd]]
                    {
                        let mut append = Append::new(3, 2, rows, 9, dim);
                        (append.element, append.x, append.cache, append.circular) = (element, x, cache, circular);
                        // The last batch starts as far back as it can; in a circular cache it goes round.
                        let starts = [0, (9 - rows) / 2, if circular { 8 } else { 9 - rows }];
                        check(gpu, &append, &starts, &Options::default());
                    }
                }
            }
        }
    }
}

#[test]
fn strided_rows_go_to_strided_places() {
    for gpu in gpus() {
        for element in [Element::F32, Element::F16] {
            for odd in [0, 1] {
                // Keys of a packed projection go to a cache whose rows hold something else, too.
                let mut append = Append::new(2, 3, 4, 6, 8);
                append.element = element;
                append.x = Layout::Strided(Strides { offset: 24 + odd, batch: 4 * 72, head: 8, row: 72 });
                append.cache = Layout::Strided(Strides { offset: 4, batch: 6 * 50, head: 8 + odd, row: 50 });
                check(gpu, &append, &[2, 0], &Options::default());
            }
        }
    }
}

/// Starts that only the GPU knows may be anything: what stands around the cache, and its other rows, stay as they are.
#[test]
fn starts_on_the_gpu_cannot_write_outside() {
    for gpu in gpus() {
        for element in [Element::F32, Element::Bf16] {
            for circular in [false, true] {
                let mut append = Append::new(4, 2, 3, 5, 7);
                (append.element, append.circular) = (element, circular);
                for starts in [[3, 4, 5, 6], [u32::MAX, u32::MAX - 2, 1 << 31, 1 << 16]] {
                    check(gpu, &append, &starts, &Options::default());
                }
            }
        }
    }
}

#[test]
fn rows_go_to_the_pages_of_the_block_table() {
    for gpu in gpus() {
        for element in [Element::F32, Element::F16, Element::Bf16] {
            for (page_size, dim) in [(1, 64), (2, 5), (4, 6), (9, 40)] {
                for [x, cache] in [[Layout::Bhsd, Layout::Bhsd], [Layout::Bshd, Layout::Bshd]] {
                    for circular in [false, true] {
                        // Three sequences of up to nine rows, from both ends of a pool with pages to spare.
                        let mut append = Append::new(3, 2, 4, 9, dim);
                        (append.element, append.x, append.cache, append.circular) = (element, x, cache, circular);
                        let columns = 9u32.div_ceil(page_size);
                        let pages = 3 * columns + 2;
                        append.paged = Some(Paged { pages, page_size });
                        let table: Vec<u32> =
                            (0..3 * columns).map(|n| if n % 2 == 0 { pages - 1 - n / 2 } else { n / 2 }).collect();
                        let starts = [0, 3, if circular { 8 } else { 5 }];
                        check_table(gpu, &append, &starts, Some(&table), &Options::default());
                    }
                }
            }
        }
    }
}

/// Page numbers that only the GPU knows may be anything: those outside the pool, as -1, write nothing.
#[test]
fn page_numbers_outside_the_pool_write_nothing() {
    for gpu in gpus() {
        for element in [Element::F32, Element::Bf16] {
            let mut append = Append::new(3, 2, 5, 8, 7);
            (append.element, append.paged) = (element, Some(Paged { pages: 4, page_size: 4 }));
            // Heads are outermost: behind the last page of one stands the first of the next, which no driver guards,
            // and which no batch has.
            append.cache = Layout::Strided(Strides { offset: 0, batch: 4 * 7, head: 4 * 4 * 7, row: 7 });
            let table = [1, u32::MAX, 4, 1 << 31, 2, 3];
            check_table(gpu, &append, &[2, 0, u32::MAX], Some(&table), &Options::default());
        }
    }
}

#[test]
fn new_rows_and_the_block_table_are_split_under_small_limits_and_the_pool_is_not() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 4096, 3);
        let options = with!(Options::default(), work_budget: std::time::Duration::from_micros(1));
        // More entries than fit a binding, and more new rows; the pool of 60 rows is bound whole.
        let mut append = Append::new(9, 2, 40, 128, 15);
        append.paged = Some(Paged { pages: 30, page_size: 1 });
        let mut table = vec![u32::MAX; 9 * 128];
        // Each page belongs to one row.
        (0..30).for_each(|page| table[(page % 9) * 128 + 3 * (page / 9)] = page as u32);
        let steps = append.plan(gpu.library().caps(), &options).expect("splits");
        assert!(steps.iter().flat_map(|step| &step.bindings).all(|bound| bound.size <= 4096));
        assert!(steps.iter().any(|step| step.uniform.place().batch0 > 0), "the block table is split");
        check_table(gpu, &append, &[0; 9], Some(&table), &options);
        append.paged = Some(Paged { pages: 80, page_size: 1 });
        let error = append.plan(gpu.library().caps(), &options).unwrap_err();
        assert!(matches!(error, Error::Room { field: "cache", size, limit: 4096, .. } if size > 4096), "{error}");
    }
}

#[test]
fn every_split_happens_under_small_limits() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 4096, 3);
        let options = with!(Options::default(), work_budget: std::time::Duration::from_micros(1));
        for (element, dim) in [(Element::F32, 20), (Element::F32, 7), (Element::F16, 20), (Element::Bf16, 9)] {
            for layout in [Layout::Bhsd, Layout::Bshd] {
                for circular in [false, true] {
                    let mut append = Append::new(2, 3, 240, 300, dim);
                    (append.element, append.x, append.cache, append.circular) = (element, layout, layout, circular);
                    let steps = append.plan(gpu.library().caps(), &options).expect("splits");
                    assert!(steps.iter().all(|step| step.grid.iter().all(|&side| side <= 3)));
                    assert!(steps.iter().flat_map(|step| &step.bindings).all(|bound| bound.size <= 4096));
                    assert!(steps.iter().any(|step| step.uniform.place().row0 > 0), "new rows are split");
                    assert!(steps.iter().any(|step| step.uniform["cache_row0"] > 0), "the cache is split");
                    check(gpu, &append, &[50, if circular { 299 } else { 60 }], &options);
                }
            }
        }
        // More batches than starts fit a binding, and the starts alone are what is split.
        let mut many = Append::new(1500, 1, 1, 1, 1);
        many.x = Layout::Strided(Strides::default());
        many.element = Element::F16;
        check(gpu, &many, &vec![0; 1500], &options);
    }
}

#[test]
fn host_slices_append_and_come_back_widened() {
    for gpu in gpus() {
        let mut append = Append::new(2, 1, 1, 3, 1);
        append.element = Element::F16;
        let half = |values: &[f32]| values.iter().map(|&x| half::f16::from_f32(x)).collect::<Vec<_>>();
        let (x, cache) = (half(&[7.0, -8.0]), half(&[0.5; 6]));
        let got = gpu.append(&append, Elements::F16(&x), Elements::F16(&cache), &[2, 0], None).expect("valid");
        assert_eq!(got, [0.5, 0.5, 7.0, -8.0, 0.5, 0.5]);
        append.paged = Some(Paged { pages: 3, page_size: 2 });
        let (x, cache, table) = (Elements::F16(&x), Elements::F16(&cache), [0, 2, 1, u32::MAX]);
        assert_eq!(
            gpu.append(&append, x, cache, &[2, 0], Some(&table)).expect("valid"),
            [0.5, 0.5, -8.0, 0.5, 7.0, 0.5]
        );
        let beyond = Error::Entry { field: "block_table", index: 3, value: u32::MAX.into(), want: "at most", limit: 2 };
        assert_eq!(gpu.append(&append, x, cache, &[2, 2], Some(&table)), Err(beyond));
        let short = Error::Length { field: "block_table", got: 3, want: 4 };
        assert_eq!(gpu.append(&append, x, cache, &[2, 0], Some(&table[..3])), Err(short));
        assert_eq!(gpu.append(&append, x, cache, &[2, 0], None), Err(Error::Missing { field: "block_table" }));
        append.paged = None;
        let unexpected = Error::Unexpected { field: "block_table" };
        assert_eq!(gpu.append(&append, x, cache, &[2, 0], Some(&table)), Err(unexpected));
    }
}

#[test]
fn without_a_batch_or_a_row_the_cache_stays_as_it_is() {
    for gpu in gpus() {
        for [batch, rows, capacity] in [[0, 2, 4], [2, 0, 4], [2, 0, 0], [0, 0, 0]] {
            for (paged, circular) in [(false, false), (false, true), (true, false)] {
                let mut append = Append::new(batch, 2, rows, capacity, 3);
                append.circular = circular;
                // Without room there need not be a page.
                append.paged = paged.then_some(Paged { pages: if capacity == 0 { 0 } else { 5 }, page_size: 2 });
                let pool = if paged { 2 * append.paged.map_or(0, |p| 2 * p.pages) } else { 2 * batch * capacity };
                let cache: Vec<f32> = (0..3 * pool).map(|n| n as f32).collect();
                let x = vec![-1.0; (batch * 2 * rows * 3) as usize];
                let table = vec![0; (batch * capacity.div_ceil(2)) as usize];
                let (starts, table) = (vec![0; batch as usize], paged.then_some(&table[..]));
                let got = gpu.append(&append, (&x).into(), (&cache).into(), &starts, table);
                assert_eq!(got.as_ref(), Ok(&cache), "{append:?}");
                let mut want = cache.clone();
                reference::append(&append, &x, &mut want, &starts, table).expect("valid");
                assert_eq!(want, cache, "{append:?}");
                // Nothing is bound, so that it does not matter what is given.
                let operation = gpu.library().append(&append, &Options::default()).expect("valid");
                assert_eq!((operation.slices(), operation.needs().count()), (0, 0));
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                let (none, none_too) = (nothing(gpu), nothing(gpu));
                let buffers = AppendBuffers::new(none.slice(..), none_too.slice(..), none.slice(..));
                assert_eq!(operation.encode(&mut encoder, &buffers), Ok(()));
                let none = Error::TooLarge { field: "slice, counted from 1,", value: 1, limit: 0 };
                assert_eq!(operation.begin().unwrap().encode_slice(0, &mut encoder, &buffers), Err(none));
            }
        }
    }
}

#[test]
fn descriptions_that_cannot_be_are_errors() {
    let check = |set: fn(&mut Append)| {
        let mut append = Append::new(2, 2, 2, 4, 4);
        set(&mut append);
        append.check()
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert_eq!(check(|a| a.heads = 0), Err(Error::Zero { field: "heads" }));
    assert_eq!(check(|a| a.dim = 0), Err(Error::Zero { field: "dim" }));
    // A cache without room takes no row.
    assert_eq!(check(|a| a.capacity = 0), Err(Error::TooLarge { field: "rows", value: 2, limit: 0 }));
    assert_eq!(check(|a| a.rows = 5), Err(Error::TooLarge { field: "rows", value: 5, limit: 4 }));
    let error = check(|a| a.dim = (1 << 28) + 1);
    assert_eq!(error, Err(Error::TooLarge { field: "dim", value: (1 << 28) + 1, limit: 1 << 28 }));
    let error = check(|a| (a.batch, a.heads, a.capacity, a.dim) = (1 << 28, 1 << 28, 1 << 28, 1 << 28));
    assert!(matches!(error, Err(Error::Room { field: "x", unit: "elements", .. })), "{error:?}");
    let error = check(|a| a.cache = Layout::Strided(Strides { offset: 0, batch: 32, head: 12, row: 4 }));
    assert_eq!(error, Err(Error::Overlap { field: "cache", strides: [32, 12, 4], sizes: [2, 2, 4, 4] }));
    let paged = |pages, page_size| move |a: &mut Append| a.paged = Some(Paged { pages, page_size });
    let check_paged = |set: &dyn Fn(&mut Append)| {
        let mut append = Append::new(2, 2, 2, 4, 4);
        set(&mut append);
        append.check()
    };
    assert_eq!(check_paged(&paged(1, 1)), Ok(()));
    assert_eq!(check_paged(&paged(0, 1)), Err(Error::Zero { field: "paged.pages" }));
    assert_eq!(check_paged(&paged(1, 0)), Err(Error::Zero { field: "paged.page_size" }));
    // New rows may share their place: one row for every batch.
    assert_eq!(check(|a| a.x = Layout::Strided(Strides::default())), Ok(()));
}

#[test]
fn wrong_operands_and_buffers_are_errors() {
    let gpu = &gpus()[0];
    let append = Append::new(2, 1, 1, 3, 4);
    let run = |x: usize, cache: usize, starts: &[u32]| {
        let (x, cache) = (vec![0.0; x], vec![0.0; cache]);
        gpu.append(&append, (&x).into(), (&cache).into(), starts, None).map(|_| ())
    };
    assert_eq!(run(8, 24, &[0, 2]), Ok(()));
    assert_eq!(run(7, 24, &[0, 2]), Err(Error::Length { field: "x", got: 7, want: 8 }));
    assert_eq!(run(8, 25, &[0, 2]), Err(Error::Length { field: "cache", got: 25, want: 24 }));
    assert_eq!(run(8, 24, &[0]), Err(Error::Length { field: "starts", got: 1, want: 2 }));
    let beyond = Error::Entry { field: "starts", index: 1, value: 3, want: "at most", limit: 2 };
    assert_eq!(run(8, 24, &[0, 3]), Err(beyond));
    let halves = [half::f16::ZERO; 8];
    let error = gpu.append(&append, Elements::F16(&halves), Elements::F32(&[0.0; 24]), &[0, 0], None).map(|_| ());
    assert_eq!(error, Err(Error::Element { field: "x", got: Element::F16, want: Element::F32 }));

    let operation = gpu.library().append(&append, &Options::default()).expect("compiles");
    let make = |size, usage| {
        gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let storage = wgpu::BufferUsages::STORAGE;
    let buffers = [make(1024, storage), make(1024, storage), make(96, storage)];
    let good = AppendBuffers::new(buffers[0].slice(..), buffers[2].slice(..), buffers[1].slice(..));
    let encode = |operation: &Operation<Append>, given: &AppendBuffers<'_>| {
        operation.encode(&mut gpu.device().create_command_encoder(&Default::default()), given)
    };
    assert_eq!(encode(&operation, &good), Ok(()));
    let (short, plain) = (make(92, storage), make(96, wgpu::BufferUsages::COPY_SRC));
    let with_cache =
        |buffer: &wgpu::Buffer| encode(&operation, &AppendBuffers::new(good.x, buffer.slice(..), good.starts));
    assert_eq!(with_cache(&short), Err(Error::BufferSize { field: "cache", got: 92, want: 96 }));
    assert_eq!(with_cache(&plain), Err(Error::BufferUsage { field: "cache", usage: "STORAGE" }));
    assert_eq!(with_cache(&buffers[0]), Err(Error::Aliased { output: "cache", other: "x" }));
    let odd = AppendBuffers::new(good.x, good.cache, buffers[1].slice(4..));
    assert!(matches!(encode(&operation, &odd), Err(Error::BufferOffset { field: "starts", offset: 4, .. })));
    let mut paged = append.clone();
    paged.paged = Some(Paged { pages: 2, page_size: 3 });
    let paged = gpu.library().append(&paged, &Options::default()).expect("compiles");
    assert_eq!(encode(&paged, &good), Err(Error::Missing { field: "block_table" }));
}
