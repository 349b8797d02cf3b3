//! Every error that there is, provoked, and its message.

mod support;

use std::collections::BTreeSet;

use support::staged::Staged;
use support::{Data, gpus};
use wgpu_attention::Strides;
use wgpu_attention::internal::Scalar;
use wgpu_attention::multihead::{CacheBuffers, Call, Layer, LayerBuffers, LayerInputs, Linear, MultiHeadAttention};
use wgpu_attention::operations::{Order, Projection, ProjectionBuffers, Rotation};
use wgpu_attention::{
    Bias, Broadcast, Causal, DeviceOptions, Element, Error, Gpu, HostSlice, Inputs, Kernel, Layout, Logits, Obstacle,
    Options, Packed, Paged, Plan, Problem, wgpu, with,
};

type Change<T> = fn(&mut T);

fn small() -> Problem {
    Problem::new(2, 4, 5, 7, 8)
}

fn with(set: impl FnOnce(&mut Problem)) -> Problem {
    let mut p = small();
    set(&mut p);
    p
}

/// The error of a problem, which must be what it says and name all of `parts`.
#[track_caller]
fn refused(set: impl FnOnce(&mut Problem), want: Error, parts: &[&str]) {
    says(with(set).check().unwrap_err(), want, parts);
}

#[track_caller]
fn says(got: Error, want: Error, parts: &[&str]) {
    assert_eq!(got, want);
    names(&got, parts);
}

#[track_caller]
fn names(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in {text:?}");
}

#[test]
fn heads_and_dims_of_zero_and_sizes_beyond_the_limit_are_refused() {
    let zero: [(&str, Change<Problem>); 4] = [
        ("heads", |p| p.heads = 0),
        ("kv_heads", |p| p.kv_heads = 0),
        ("head_dim", |p| p.head_dim = 0),
        ("value_dim", |p| p.value_dim = 0),
    ];
    for (field, set) in zero {
        refused(set, Error::Zero { field }, &[field, "0", "1"]);
    }
    let (big, max) = ((1u32 << 28) + 1, 1u64 << 28);
    let large: [(&str, u64, u64, Change<Problem>); 11] = [
        ("batch", big.into(), max, |p| p.batch = (1 << 28) + 1),
        ("seq_kv", big.into(), max, |p| p.seq_kv = (1 << 28) + 1),
        ("head_dim", 513, 512, |p| p.head_dim = 513),
        ("value_dim", 513, 512, |p| p.value_dim = 513),
        ("batch·heads", 1 << 30, max, |p| (p.batch, p.heads, p.kv_heads) = (1 << 15, 1 << 15, 1)),
        ("window.left", big.into(), max, |p| p.window.left = Some((1 << 28) + 1)),
        ("window.right", big.into(), max, |p| p.window.right = Some((1 << 28) + 1)),
        ("seq_q", 5, 4, |p| p.packed = Some(Packed { total_q: 4, total_kv: 9 })),
        ("seq_kv", 7, 6, |p| p.packed = Some(Packed { total_q: 9, total_kv: 6 })),
        ("seq_q", 5, 0, |p| p.packed = Some(Packed { total_q: 0, total_kv: 9 })),
        ("seq_kv", 7, 0, |p| p.packed = Some(Packed { total_q: 9, total_kv: 0 })),
    ];
    for (field, value, limit, set) in large {
        refused(set, Error::TooLarge { field, value, limit }, &[field, &value.to_string(), &limit.to_string()]);
    }
    // More scores than bytes can be counted, though each tensor is small enough.
    let error =
        with(|p| (p.heads, p.kv_heads, p.seq_q, p.seq_kv) = (1 << 27, 1, 1 << 28, 1 << 28)).check().unwrap_err();
    assert!(matches!(error, Error::Room { size: u64::MAX, unit: "elements", .. }), "{error:?}");
    names(
        &error,
        &["the score matrix, batch·heads·seq_q·seq_kv, takes 18446744073709551615 elements", "use smaller sizes"],
    );
    let far = Layout::Strided(Strides { offset: u64::MAX, batch: 0, head: 8, row: 32 });
    let error = with(|p| p.k = far).check().unwrap_err();
    assert!(matches!(error, Error::Room { field: "k", unit: "elements", .. }), "{error}");
}

#[test]
fn contradictory_problems_are_refused() {
    refused(|p| p.kv_heads = 3, Error::KvHeads { heads: 4, kv_heads: 3 }, &["heads is 4", "kv_heads is 3"]);
    for value in [f32::INFINITY, f32::NEG_INFINITY] {
        let want = Error::Number { field: "scale", value, want: "finite" };
        refused(|p| p.scale = Some(value), want, &["scale", "inf", "finite"]);
    }
    assert!(matches!(with(|p| p.scale = Some(f32::NAN)).check(), Err(Error::Number { field: "scale", .. })));
    for value in [0.0, -1.0, f32::INFINITY] {
        let want = Error::Number { field: "softcap", value, want: "finite and positive" };
        refused(|p| p.softcap = Some(value), want, &["softcap", &value.to_string(), "positive"]);
    }
    let target = [2, 4, 5, 7];
    for shape in [[2, 3, 5, 7], [2, 4, 5, 8], [3, 1, 1, 7], [1, 1, 0, 7], [1, 1, 1, 0]] {
        let broadcast = Error::Broadcast { field: "mask", shape, target };
        refused(|p| p.mask = Some(Broadcast(shape)), broadcast, &["mask", &format!("{shape:?}"), "[2, 4, 5, 7]"]);
        let bias = Bias { shape: Broadcast(shape), element: Element::F16 };
        refused(|p| p.bias = Some(bias), Error::Broadcast { field: "bias", shape, target }, &["bias"]);
    }
    says(
        Broadcast::new("mask", &[]).unwrap_err(),
        Error::Rank { field: "mask", rank: 0 },
        &["mask", "rank 0", "1 to 4"],
    );
    says(Broadcast::new("bias", &[1; 5]).unwrap_err(), Error::Rank { field: "bias", rank: 5 }, &["bias", "rank 5"]);
    let strides = |batch, head, row| Layout::Strided(Strides { offset: 0, batch, head, row });
    for (layout, got) in [
        (strides(160, 40, 7), [160, 40, 7]),
        (strides(160, 39, 8), [160, 39, 8]),
        (strides(0, 40, 8), [0, 40, 8]),
        (strides(159, 8, 32), [159, 8, 32]),
    ] {
        let want = Error::Overlap { field: "out", strides: got, sizes: [2, 4, 5, 8] };
        refused(|p| p.out = layout, want, &["out", &format!("{got:?}"), "overlap"]);
    }
    let error =
        with(|p| (p.key_lengths, p.packed) = (true, Some(Packed { total_q: 9, total_kv: 9 }))).check().unwrap_err();
    assert!(matches!(error, Error::Conflict { left: "packed", right: "key_lengths", .. }), "{error}");
    names(&error, &["packed", "key_lengths", "cu_seqlens"]);
}

#[test]
fn pages_that_cannot_be_are_refused() {
    const PAGED: Paged = Paged { pages: 3, page_size: 4 };
    let excluded: [(&str, &str, Change<Problem>); 3] = [
        ("packed", "key_lengths", |p| p.packed = Some(Packed { total_q: 9, total_kv: 9 })),
        ("weights", "score matrix", |p| p.weights = true),
        ("logits", "score matrix", |p| p.logits = Some(Logits::Raw)),
    ];
    for (other, why, set) in excluded {
        let mut p = with(|p| p.paged = Some(PAGED));
        set(&mut p);
        let error = p.check().unwrap_err();
        assert!(matches!(error, Error::Conflict { left: "paged", right, .. } if right == other), "{error}");
        names(&error, &["paged", other, why]);
    }
    let sizes = |pages, page_size| with(|p| p.paged = Some(Paged { pages, page_size })).check();
    let (big, limit) = ((1 << 28) + 1, 1 << 28);
    says(sizes(0, 4).unwrap_err(), Error::Zero { field: "paged.pages" }, &["paged.pages", "0"]);
    says(sizes(3, 0).unwrap_err(), Error::Zero { field: "paged.page_size" }, &["paged.page_size", "0"]);
    let large = |field| Error::TooLarge { field, value: big.into(), limit };
    says(sizes(big, 4).unwrap_err(), large("paged.pages"), &["paged.pages", "268435457"]);
    says(sizes(3, big).unwrap_err(), large("paged.page_size"), &["paged.page_size", "268435457"]);
    let advice = "use a smaller batch, larger pages or fewer keys";
    let entries = Error::Room { field: "block_table", size: 1 << 29, unit: "entries", limit, advice };
    let one_each = |p: &mut Problem| (p.seq_kv, p.paged) = (1 << 28, Some(Paged { pages: 3, page_size: 1 }));
    refused(one_each, entries, &["block_table", "536870912 entries", "268435456 entries", "larger pages"]);

    // Seven keys are two pages of four.
    let p = with(|p| (p.key_lengths, p.paged) = (true, Some(PAGED)));
    let (shape, operands) = (p.check().unwrap(), Data::random(&p, 1, 1.0));
    let check = |table: Option<&[u32]>| {
        let mut inputs = operands.inputs();
        inputs.operands.block_table = table.map(HostSlice::from);
        inputs.operands.key_lengths = Some((&[7u32, 4]).into());
        shape.check_inputs(&inputs)
    };
    // No entry beyond a length is read.
    check(Some(&[2, 0, 1, u32::MAX])).unwrap();
    says(check(None).unwrap_err(), Error::Missing { field: "block_table" }, &["block_table", "not given"]);
    let length = Error::Length { field: "block_table", got: 3, want: 4 };
    says(check(Some(&[0, 1, 2])).unwrap_err(), length, &["block_table", "3", "4"]);
    let entry = Error::Entry { field: "block_table", index: 1, value: 3, want: "at most", limit: 2 };
    says(check(Some(&[0, 3, 1, 0])).unwrap_err(), entry, &["block_table[1]", "3", "at most 2"]);
    let (shape, operands) = (small().check().unwrap(), Data::random(&small(), 1, 1.0));
    let mut inputs = operands.inputs();
    inputs.operands.block_table = Some((&[0u32]).into());
    let unexpected = Error::Unexpected { field: "block_table" };
    says(shape.check_inputs(&inputs).unwrap_err(), unexpected, &["block_table"]);

    for gpu in gpus() {
        let force = |kernel, form| {
            let options = with!(Options::default(), kernel, form);
            gpu.library().plan_with(&p, &options).unwrap_err()
        };
        for error in [force(Some(Kernel::Unfused), None), force(None, Some(wgpu_attention::Form::Tiled))] {
            says(error, Error::Kernel { kernel: "unfused", why: Obstacle::Pages }, &["unfused", "pages"]);
        }
        let plan = gpu.library().plan(&p).unwrap();
        let staged = Staged::new(gpu.device(), &plan, &Data::random(&p, 1, 1.0));
        let prepared = gpu.library().prepare(&plan).unwrap();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut buffers = staged.buffers();
        let table = buffers.operands.block_table.take();
        let error = prepared.encode(&mut encoder, &buffers).unwrap_err();
        says(error, Error::Missing { field: "block_table" }, &["block_table"]);
        buffers.operands.block_table = table.map(|table| table.slice(..12));
        let error = prepared.encode(&mut encoder, &buffers).unwrap_err();
        says(error, Error::BufferSize { field: "block_table", got: 12, want: 16 }, &["block_table", "12", "16"]);
    }
}

/// A problem with every operand, and them.
fn full() -> (Problem, Data) {
    let p = with(|p| {
        (p.key_lengths, p.alibi, p.sinks, p.causal) = (true, true, true, Causal::Offset);
        p.mask = Some(Broadcast([1, 1, 5, 7]));
        p.bias = Some(Bias { shape: Broadcast([1, 1, 1, 7]), element: Element::F32 });
    });
    let operands = Data::random(&p, 1, 1.0);
    (p, operands)
}

#[test]
fn host_operands_that_do_not_fit_are_refused() {
    let (p, operands) = full();
    let shape = p.check().unwrap();
    let refused = |change: &dyn Fn(&mut Inputs<'static>), want: Error, parts: &[&str]| {
        let leaked: &'static Data = Box::leak(Box::new(operands.clone()));
        let mut inputs = leaked.inputs();
        change(&mut inputs);
        says(shape.check_inputs(&inputs).unwrap_err(), want, parts);
    };
    let length = |field, got, want| Error::Length { field, got, want };
    refused(&|i| i.q = (&[0.0f32; 3][..]).into(), length("q", 3, 320), &["q", "3", "320"]);
    refused(&|i| i.k = (&[0.0f32; 449][..]).into(), length("k", 449, 448), &["k", "449", "448"]);
    refused(&|i| i.v = (&[0f32; 0]).into(), length("v", 0, 448), &["v"]);
    refused(&|i| i.operands.mask = Some((&[1u8; 34]).into()), length("mask", 34, 35), &["mask"]);
    refused(&|i| i.operands.bias = Some((&[0.0f32; 8]).into()), length("bias", 8, 7), &["bias"]);
    refused(&|i| i.operands.key_lengths = Some((&[1u32]).into()), length("key_lengths", 1, 2), &["key_lengths"]);
    refused(&|i| i.operands.offsets = Some((&[1i32; 3]).into()), length("offsets", 3, 2), &["offsets"]);
    refused(&|i| i.operands.alibi_slopes = Some((&[1.0f32]).into()), length("alibi_slopes", 1, 4), &["alibi_slopes"]);
    refused(&|i| i.operands.sinks = Some((&[1.0f32; 5]).into()), length("sinks", 5, 4), &["sinks"]);

    let missing: [(&str, Change<Inputs<'static>>); 6] = [
        ("mask", |i| i.operands.mask = None),
        ("bias", |i| i.operands.bias = None),
        ("key_lengths", |i| i.operands.key_lengths = None),
        ("offsets", |i| i.operands.offsets = None),
        ("alibi_slopes", |i| i.operands.alibi_slopes = None),
        ("sinks", |i| i.operands.sinks = None),
    ];
    for (field, change) in missing {
        refused(&change, Error::Missing { field }, &[field, "not given"]);
    }
    refused(
        &|i| i.operands.cu_seqlens_q = Some((&[0u32, 1, 2]).into()),
        Error::Unexpected { field: "cu_seqlens_q" },
        &["cu_seqlens_q"],
    );

    let f16 = [half::f16::ONE; 448];
    let f16: &'static [half::f16] = Box::leak(Box::new(f16));
    let want = Error::Element { field: "v", got: Element::F16, want: Element::F32 };
    refused(&|i| i.v = wgpu_attention::Elements::F16(f16), want, &["v", "f16", "f32"]);
    let want = Error::Element { field: "bias", got: Element::F16, want: Element::F32 };
    refused(&|i| i.operands.bias = Some(f16[..7].into()), want, &["bias"]);

    let want = Error::Scalar { field: "key_lengths", got: Scalar::I32, want: Scalar::U32 };
    refused(&|i| i.operands.key_lengths = Some((&[7i32, 7]).into()), want, &["key_lengths", "i32", "u32"]);
    let want = Error::Scalar { field: "mask", got: Scalar::Float(Element::F32), want: Scalar::U8 };
    refused(&|i| i.operands.mask = Some((&[1f32; 35]).into()), want, &["mask", "f32", "u8"]);

    let entry = |field, index, value, want, limit| Error::Entry { field, index, value, want, limit };
    refused(
        &|i| i.operands.key_lengths = Some((&[7u32, 8]).into()),
        entry("key_lengths", 1, 8, "at most", 7),
        &["key_lengths[1]", "8", "7"],
    );
    let number = Error::Number { field: "sinks", value: f32::INFINITY, want: "finite" };
    refused(&|i| i.operands.sinks = Some((&[0.0, 1.0, f32::INFINITY, 0.0]).into()), number, &["sinks", "inf"]);

    let packed = with(|p| p.packed = Some(Packed { total_q: 9, total_kv: 12 }));
    let (shape, operands) = (packed.check().unwrap(), Data::random(&packed, 1, 1.0));
    let check = |q: &[u32], kv: &[u32]| {
        let mut inputs = operands.inputs();
        (inputs.operands.cu_seqlens_q, inputs.operands.cu_seqlens_kv) = (Some(q.into()), Some(kv.into()));
        shape.check_inputs(&inputs)
    };
    check(&[0, 5, 9], &[0, 7, 12]).unwrap();
    let falls = entry("cu_seqlens_q", 2, 4, "at least", 5);
    says(check(&[0, 5, 4], &[0, 7, 12]).unwrap_err(), falls, &["cu_seqlens_q[2]", "4", "5"]);
    says(check(&[0, 5, 9], &[0, 7, 13]).unwrap_err(), entry("cu_seqlens_kv", 2, 13, "at most", 12), &["13", "12"]);
    says(check(&[0, 6, 9], &[0, 7, 12]).unwrap_err(), entry("cu_seqlens_q", 1, 6, "at most", 5), &["6", "5"]);
}

/// A device like a test's, from an instance of wgpu of its own or from the same one.
fn stranger(gpu: &support::Adapter, own_instance: bool) -> (wgpu::Device, wgpu::Queue) {
    let alike = |adapter: &wgpu::Adapter| adapter.get_info() == gpu.adapter().get_info();
    let adapter = if own_instance { Gpu::adapters().into_iter().find(alike) } else { Some(gpu.adapter().clone()) };
    let limits = gpu.device().limits();
    let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
    pollster::block_on(adapter.expect("the same one again").request_device(&descriptor)).expect("opens once more")
}

#[test]
fn what_belongs_to_another_device_is_refused_and_nothing_is_recorded() {
    for gpu in gpus() {
        let (p, operands) = full();
        let plan = gpu.library().plan(&p).unwrap();
        let prepared = gpu.library().prepare(&plan).unwrap();
        let staged = Staged::new(gpu.device(), &plan, &operands);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        for own_instance in [false, true] {
            let (device, queue) = stranger(gpu, own_instance);
            if own_instance {
                // wgpu numbers the buffers of each instance, and knows one of another by a number that it has not given.
                let usage = wgpu::BufferUsages::STORAGE;
                let small = wgpu::BufferDescriptor { label: None, size: 4, usage, mapped_at_creation: false };
                std::mem::forget((0..20_000).map(|_| device.create_buffer(&small)).collect::<Vec<_>>());
            }
            let other = Staged::new(&device, &plan, &operands);
            let (own, other) = (staged.buffers(), other.buffers());
            let mut mixed =
                vec![("q", with!(own, q: other.q)), ("v", with!(own, v: other.v)), ("out", with!(own, out: other.out))];
            for (operand, &theirs) in other.operands.iter() {
                let operands = own.operands.map(|each, slice| if each == operand { theirs } else { slice });
                mixed.push((operand.name(), with!(own, operands)));
            }
            assert_eq!(mixed.len(), 3 + 6);
            for (field, buffers) in mixed {
                let error = prepared.encode(&mut encoder, &buffers).unwrap_err();
                says(error, Error::OtherDevice { field }, &[field, "another device"]);
                let error = prepared.begin().unwrap().encode_slice(0, &mut encoder, &buffers);
                // A slice may not bind what is wrong.
                assert!(matches!(error, Ok(()) | Err(Error::OtherDevice { .. })), "{error:?}");
            }
            let mut theirs = device.create_command_encoder(&Default::default());
            match prepared.encode(&mut theirs, &own) {
                Err(error) => says(error, Error::OtherDevice { field: "encoder" }, &["encoder", "another device"]),
                // An encoder of the same instance is first looked at when it is finished.
                Ok(()) => {
                    assert!(!own_instance);
                    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
                    drop(theirs.finish());
                    assert!(pollster::block_on(scope.pop()).is_some());
                }
            }
            drop(queue);
        }
        // The encoder is as good as new.
        prepared.encode(&mut encoder, &staged.buffers()).unwrap();
        gpu.queue().submit([encoder.finish()]);
        gpu.wait().unwrap();

        // Two of these are never taken for one another, whatever wgpu's numbers are.
        let alike = |adapter: &wgpu::Adapter| adapter.get_info() == gpu.adapter().get_info();
        let adapter = Gpu::adapters().into_iter().find(alike).unwrap();
        let [one, two] = [(); 2].map(|()| Gpu::open(&adapter, &DeviceOptions::default()).unwrap());
        let third = Gpu::open(&Gpu::adapters().into_iter().find(alike).unwrap(), &DeviceOptions::default()).unwrap();
        let plan = one.library().plan(&p).unwrap();
        let prepared = one.library().prepare(&plan).unwrap();
        let resident = one.upload(&plan, &operands.inputs()).unwrap();
        one.run(&prepared, &resident, &mut |_, _| ()).unwrap();
        for other in [&two, &third] {
            let theirs = other.upload(&plan, &operands.inputs()).unwrap();
            let error = one.run(&prepared, &theirs, &mut |_, _| ()).unwrap_err();
            says(error, Error::OtherDevice { field: "resident" }, &["resident"]);
            says(one.download(&plan, &theirs).unwrap_err(), Error::OtherDevice { field: "resident" }, &["resident"]);
            let error = other.run(&prepared, &theirs, &mut |_, _| ()).unwrap_err();
            says(error, Error::OtherDevice { field: "prepared" }, &["prepared"]);
        }
        // What was uploaded for another plan.
        let mut more = p.clone();
        more.lse = !p.lse;
        let other = one.library().plan(&more).unwrap();
        let error = one.download(&other, &resident).unwrap_err();
        let want = if more.lse { Error::Missing { field: "lse" } } else { Error::Unexpected { field: "lse" } };
        says(error, want, &["lse"]);
        let mut longer = p.clone();
        longer.head_dim += 4;
        let error = one.download(&one.library().plan(&longer).unwrap(), &resident).unwrap_err();
        assert!(matches!(error, Error::BufferSize { field: "q", .. }), "{error}");
        let projection = Projection::new(4, 8, 12, Order::OutIn, Element::F32);
        let operation = one.library().project(&projection, &Options::default()).unwrap();
        let usage = wgpu::BufferUsages::STORAGE;
        let make = |gpu: &Gpu| {
            let descriptor = wgpu::BufferDescriptor { label: None, size: 1024, usage, mapped_at_creation: false };
            gpu.device().create_buffer(&descriptor)
        };
        let buffers = [make(&one), make(&two), make(&one)];
        let [x, theirs, y] = buffers.each_ref().map(|buffer| buffer.slice(..));
        let buffers = ProjectionBuffers::new(x, theirs, y);
        let error = operation.encode(&mut one.device().create_command_encoder(&Default::default()), &buffers);
        says(error.unwrap_err(), Error::OtherDevice { field: "weight" }, &["weight"]);

        let linear = || Linear { inputs: 8, outputs: 8, weight: vec![0.5; 64], order: Order::OutIn, bias: None };
        let layer = Layer::new(2, 2, [(); 4].map(|()| linear())).unwrap();
        let resident_layer = MultiHeadAttention::new(one.library(), one.queue(), &layer, Element::F32).unwrap();
        let prepare = |gpu: &Gpu| {
            let options = Options::default();
            resident_layer.prepare(gpu.library(), &layer.problem(1, 3, 3), &Call::default(), &options)
        };
        for other in [&two, &third] {
            says(prepare(other).unwrap_err(), Error::OtherDevice { field: "layer" }, &["layer"]);
        }
        let (x, result) = (make(&two), make(&one));
        let buffers = LayerBuffers::new(x.slice(..), result.slice(..));
        let mut encoder = one.device().create_command_encoder(&Default::default());
        let error = prepare(&one).unwrap().encode(&mut encoder, &buffers).unwrap_err();
        says(error, Error::OtherDevice { field: "query" }, &["query"]);

        // What the caller's own `Attention` on the same device prepared is at home.
        let own = wgpu_attention::Attention::new(one.device());
        let prepared = own.prepare(&own.plan(&p).unwrap()).unwrap();
        one.run(&prepared, &resident, &mut |_, _| ()).unwrap();
    }
}

#[test]
fn buffers_that_do_not_fit_are_refused_and_nothing_is_recorded() {
    for gpu in gpus() {
        let (p, operands) = full();
        let plan = gpu.library().plan(&p).unwrap();
        let prepared = gpu.library().prepare(&plan).unwrap();
        let staged = Staged::new(gpu.device(), &plan, &operands);
        let other = |size, usage| {
            gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        let storage = other(8192, wgpu::BufferUsages::STORAGE);
        let uniform = other(8192, wgpu::BufferUsages::UNIFORM);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut refused = |buffers: wgpu_attention::Buffers<'_>, want: Error, parts: &[&str]| {
            says(prepared.encode(&mut encoder, &buffers).unwrap_err(), want, parts);
        };
        let whole = || staged.buffers();
        let mut buffers = whole();
        buffers.v = storage.slice(..1788);
        refused(buffers, Error::BufferSize { field: "v", got: 1788, want: 1792 }, &["v", "1788", "1792"]);
        let mut buffers = whole();
        buffers.k = storage.slice(4..);
        let alignment = u64::from(gpu.device().limits().min_storage_buffer_offset_alignment).max(32);
        refused(buffers, Error::BufferOffset { field: "k", offset: 4, alignment }, &["k", "byte 4"]);
        let mut buffers = whole();
        buffers.q = uniform.slice(..);
        refused(buffers, Error::BufferUsage { field: "q", usage: "STORAGE" }, &["q", "STORAGE"]);
        let mut buffers = whole();
        buffers.operands.sinks = Some(storage.slice(..));
        refused(buffers, Error::BufferUsage { field: "sinks", usage: "COPY_SRC" }, &["sinks", "COPY_SRC"]);
        let mut buffers = whole();
        (buffers.q, buffers.out) = (storage.slice(..2048), storage.slice(4096..));
        refused(buffers, Error::Aliased { output: "out", other: "q" }, &["out", "q"]);
        let mut buffers = whole();
        (buffers.operands.mask, buffers.out) = (Some(storage.slice(..64)), storage.slice(4096..));
        refused(buffers, Error::Aliased { output: "out", other: "mask" }, &["out", "mask"]);
        let both = other(8192, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
        let mut buffers = whole();
        (buffers.operands.key_lengths, buffers.out) = (Some(both.slice(..8)), both.slice(4096..));
        refused(buffers, Error::Aliased { output: "out", other: "key_lengths" }, &["out", "key_lengths"]);
        let mut buffers = whole();
        buffers.operands.offsets = Some(both.slice(..4));
        refused(buffers, Error::BufferSize { field: "offsets", got: 4, want: 8 }, &["offsets", "4", "8"]);
        let mut buffers = whole();
        buffers.operands.alibi_slopes = Some(both.slice(2..));
        refused(buffers, Error::BufferOffset { field: "alibi_slopes", offset: 2, alignment: 4 }, &["byte 2", "4"]);
        let mut buffers = whole();
        buffers.operands.bias = None;
        refused(buffers, Error::Missing { field: "bias" }, &["bias"]);
        let mut buffers = whole();
        buffers.lse = Some(storage.slice(..));
        refused(buffers, Error::Unexpected { field: "lse" }, &["lse"]);
        let slices = prepared.slices() as u64;
        let slice = prepared.begin().unwrap().encode_slice(slices as usize, &mut encoder, &whole()).unwrap_err();
        let want = Error::TooLarge { field: "slice, counted from 1,", value: slices + 1, limit: slices };
        says(slice, want, &["slice, counted from 1,"]);
        let steps = prepared.plan().dispatches() as u64;
        let error = prepared.begin().unwrap().encode_steps(0..steps as usize + 1, &mut encoder, &whole()).unwrap_err();
        says(error, Error::TooLarge { field: "steps.end", value: steps + 1, limit: steps }, &["steps.end"]);
        // The encoder is as good as new.
        prepared.encode(&mut encoder, &whole()).unwrap();
        gpu.queue().submit([encoder.finish()]);
        gpu.wait().unwrap();
    }
}

#[test]
fn two_outputs_in_one_buffer_are_refused() {
    let p = with(|p| (p.lse, p.weights) = (true, true));
    let operands = Data::random(&p, 1, 1.0);
    for gpu in gpus() {
        let plan = gpu.library().plan(&p).unwrap();
        let prepared = gpu.library().prepare(&plan).unwrap();
        let staged = Staged::new(gpu.device(), &plan, &operands);
        let usage = wgpu::BufferUsages::STORAGE;
        let descriptor = wgpu::BufferDescriptor { label: None, size: 8192, usage, mapped_at_creation: false };
        let shared = gpu.device().create_buffer(&descriptor);
        let mut buffers = staged.buffers();
        (buffers.lse, buffers.weights) = (Some(shared.slice(..1024)), Some(shared.slice(4096..)));
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let error = prepared.encode(&mut encoder, &buffers).unwrap_err();
        says(error, Error::Aliased { output: "lse", other: "weights" }, &["lse", "weights"]);
    }
}

/// A layer's call with a cache: an error anywhere leaves nothing in the encoder, so that the cache stays as it was.
#[test]
fn caches_of_a_layer_that_do_not_fit_are_refused_and_stay_as_they_were() {
    let weights = |inputs: u32, outputs: u32| Linear {
        inputs,
        outputs,
        weight: vec![1.0; (inputs * outputs) as usize],
        order: Order::OutIn,
        bias: None,
    };
    let layer = Layer::new(2, 2, [(); 4].map(|()| weights(8, 8))).unwrap();
    for gpu in gpus() {
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).unwrap();
        let mut call = Call::default();
        call.cache = true;
        let mut problem = layer.problem(1, 3, 6);
        problem.mask = Some(Broadcast([1, 1, 3, 6]));
        let prepared = resident.prepare(gpu.library(), &problem, &call, &Options::default()).unwrap();
        let make = |size, usage| {
            gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        let (storage, read) = (wgpu::BufferUsages::STORAGE, wgpu::BufferUsages::COPY_SRC);
        let [x, y, k, v] = [96, 96, 192, 192].map(|size| make(size, storage | read));
        let (starts, mask) = (make(512, storage | read), make(20, storage));
        let plain = make(512, storage);
        let cache = |starts| CacheBuffers { k: k.slice(..), v: v.slice(..), starts };
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut encode = |cache: Option<CacheBuffers<'_>>, mask| {
            let mut buffers = LayerBuffers::new(x.slice(..), y.slice(..));
            (buffers.cache, buffers.operands.mask) = (cache, Some(mask));
            prepared.encode(&mut encoder, &buffers).unwrap_err()
        };
        let (good, whole) = (cache(starts.slice(..)), mask.slice(..));
        says(encode(None, whole), Error::Missing { field: "cache" }, &["cache"]);
        let short = CacheBuffers { k: k.slice(..188), ..good };
        let want = Error::BufferSize { field: "key cache", got: 188, want: 192 };
        says(encode(Some(short), whole), want, &["key cache", "188", "192"]);
        let want = Error::Aliased { output: "key cache", other: "value cache" };
        says(encode(Some(CacheBuffers { v: k.slice(..), ..good }), whole), want, &["key cache", "value cache"]);
        let want = Error::BufferUsage { field: "starts", usage: "COPY_SRC" };
        says(encode(Some(cache(plain.slice(..))), whole), want, &["starts", "COPY_SRC"]);
        let error = encode(Some(cache(starts.slice(4..))), whole);
        assert!(matches!(error, Error::BufferOffset { field: "starts", offset: 4, .. }), "{error}");
        // The mask is read long after the cache is written.
        let want = Error::BufferSize { field: "mask", got: 16, want: 20 };
        says(encode(Some(good), mask.slice(..16)), want, &["mask", "16", "20"]);
        gpu.queue().submit([encoder.finish()]);
        gpu.wait().unwrap();
        assert!(gpu.read(k.slice(..)).unwrap().iter().all(|&byte| byte == 0), "the cache was written");

        let long = layer.problem(1, 7, 6);
        let error = resident.prepare(gpu.library(), &long, &call, &Options::default()).map(drop).unwrap_err();
        says(
            error,
            Error::TooLarge { field: "seq_q of a call with a cache", value: 7, limit: 6 },
            &["seq_q", "7", "6"],
        );
    }
}

#[test]
fn adapters_that_are_not_there_and_devices_that_cannot_be_are_refused() {
    let error = Gpu::named("no such adapter").unwrap_err();
    assert!(matches!(&error, Error::NoAdapter { .. }));
    names(&error, &["no such adapter", "found"]);
    let error = Gpu::named("9999").unwrap_err();
    assert!(matches!(&error, Error::NoAdapter { .. }));
    names(&error, &["9999", "found"]);
    // A backend is no part of a name.
    let error = Gpu::find("Vulkan").map(|adapter| adapter.get_info()).unwrap_err();
    assert!(matches!(&error, Error::NoAdapter { .. }));
    names(&error, &["\"Vulkan\" in its name", "say \"vulkan:\""]);
    // Nobody sets variables in a process with threads: src/device/gpu/environment.rs tests which are refused, cli/tests/commands.rs that they are.
    let (variable, want) = ("WGPU_BACKEND", "vulkan");
    let error = Error::Environment { variable, value: "vulkna".into(), want };
    names(&error, &["WGPU_BACKEND is \"vulkna\"; it must be vulkan"]);
    assert_eq!(Gpu::check_environment(), Ok(()));
    // Every name contains nothing: with two adapters that is ambiguous, and the message lists them.
    let found = Gpu::adapters();
    match (Gpu::find(""), &found[..]) {
        (Ok(one), [only]) => assert_eq!(one.get_info(), only.get_info()),
        (Err(error @ Error::AmbiguousAdapter { .. }), [_, _, ..]) => {
            found.iter().for_each(|adapter| names(&error, &[&adapter.get_info().name]));
        }
        (other, found) => panic!("{other:?} of {found:?}"),
    }
    for gpu in gpus() {
        let limits = wgpu::Limits { max_compute_workgroup_size_x: u32::MAX, ..gpu.adapter().limits() };
        let options = with!(DeviceOptions::default(), limits: Some(limits));
        let error = Gpu::open(gpu.adapter(), &options).unwrap_err();
        assert!(matches!(error, Error::RequestDevice(_)), "{error}");
        names(&error, &["max_compute_workgroup_size_x"]);
    }
}

#[test]
fn kernels_and_devices_that_cannot_run_a_problem_say_why() {
    let shape = with(|p| p.element = Element::F16).check().unwrap();
    for gpu in gpus() {
        let caps = gpu.library().caps().clone();
        let lanes = with!(Options::default(), form: Some(wgpu_attention::Form::Lanes), native_f16: Some(true));
        let error = Plan::new(&shape, &caps, &lanes).unwrap_err();
        let why = |why: &Obstacle| matches!(why, Obstacle::LanesPackedF16 | Obstacle::NoF16);
        assert!(matches!(&error, Error::Kernel { kernel: "native f16", why: got } if why(got)), "{error}");
        names(&error, &["native f16", "cannot run"]);
        let mut few = caps.clone();
        few.limits.max_storage_buffers_per_shader_stage = 3;
        let error = Plan::new(&shape, &few, &Options::default()).unwrap_err();
        let limit = "max_storage_buffers_per_shader_stage";
        says(error, Error::Device { limit, got: 3, want: 4 }, &[limit, "3", "4"]);
        let mut small = caps.clone();
        small.limits.max_buffer_size = 4096;
        let wide = with(|p| (p.seq_q, p.seq_kv, p.weights) = (11, 12, true)).check().unwrap();
        let error = Plan::new(&wide, &small, &Options::default()).unwrap_err();
        assert!(matches!(error, Error::Room { field: "weights", size: 4224, limit: 4096, .. }), "{error:?}");
        names(&error, &["weights takes 4224 bytes; the limit is 4096 bytes: do not ask for weights"]);
        // What the caller can do instead.
        let masked = |p: &mut Problem| p.mask = Some(Broadcast([2, 4, 11, 48]));
        let mut wide = with(|p| (p.seq_q, p.seq_kv, p.head_dim, p.value_dim) = (11, 48, 1, 1));
        masked(&mut wide);
        let error = Plan::new(&wide.check().unwrap(), &small, &Options::default()).unwrap_err();
        names(&error, &["mask takes 4224 bytes; the limit is 4096 bytes", "a window"]);
        let long = with(|p| (p.batch, p.heads, p.kv_heads, p.seq_kv) = (1, 1, 1, 129)).check().unwrap();
        let error = Plan::new(&long, &small, &Options::default()).unwrap_err();
        names(&error, &["k takes 4128 bytes; the limit is 4096 bytes", "Merge"]);
        let mut tight = caps.clone();
        tight.limits.max_storage_buffer_binding_size = 100;
        let error = Plan::new(&shape, &tight, &Options::default()).unwrap_err();
        names(&error, &["max_storage_buffer_binding_size is 100 bytes; at least 4096 bytes"]);
        // Of several reasons the one that nobody can change: the dims, not what is asked for beside them.
        let (rows, split) = (Obstacle::LaneDims { dims: 300 }, Obstacle::SplitDims { dims: 300 });
        for (kernel, why) in [(Kernel::Rows, rows), (Kernel::Split, split)] {
            let p = with(|p| {
                (p.element, p.head_dim, p.weights, p.logits) = (Element::F16, 300, true, Some(Logits::Raw));
            });
            let options = with!(Options::default(), kernel: Some(kernel), native_f16: Some(true));
            let error = Plan::new(&p.check().unwrap(), &caps, &options).unwrap_err();
            says(error, Error::Kernel { kernel: kernel.name(), why }, &["300 dims"]);
        }
        let matrix = with!(Options::default(), kernel: Some(Kernel::Matrix), native_f16: Some(false));
        let p = with(|p| (p.element, p.logits) = (Element::Bf16, Some(Logits::Raw))).check().unwrap();
        let why = Obstacle::NotF16 { element: Element::Bf16 };
        says(
            Plan::new(&p, &caps, &matrix).unwrap_err(),
            Error::Kernel { kernel: "matrix", why },
            &["its operands are f16"],
        );

        // A plan for another device: its pipeline does not compile here, and that is an error, not a panic.
        let poor = gpu.limited_to(Some(wgpu::Features::empty()), |_| ());
        let rich = with!(caps, f16: true, cpu: false);
        let unfused = with!(Options::default(), kernel: Some(Kernel::Unfused));
        let plan = Plan::new(&shape, &rich, &unfused).unwrap();
        let error = poor.library().prepare(&plan).unwrap_err();
        assert!(matches!(error, Error::Pipeline { .. }), "{error}");
        names(&error, &["scores", "did not compile"]);
        poor.wait().expect("the device goes on");
    }
}

#[test]
fn a_sixteen_bit_output_with_gaps_and_odd_rows_is_refused() {
    let gaps = Layout::Strided(Strides { offset: 0, batch: 400, head: 100, row: 9 });
    let p = with(|p| (p.element, p.value_dim, p.out) = (Element::F16, 7, gaps));
    for gpu in gpus() {
        let error = gpu.library().plan(&p).unwrap_err();
        assert!(matches!(error, Error::Conflict { left: "element", right: "out", .. }), "{error}");
        names(&error, &["element", "out", "dense"]);
    }
}

#[test]
fn what_wgpu_reports_arrives_as_an_error_once() {
    for gpu in gpus() {
        let device = gpu.limited(|_| ());
        let usage = wgpu::BufferUsages::STORAGE;
        let buffer = device.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some("not to be read"),
            size: 16,
            usage,
            mapped_at_creation: false,
        });
        let error = device.read(buffer.slice(..)).unwrap_err();
        assert!(matches!(error, Error::Validation(_)), "{error}");
        names(&error, &["wgpu reported"]);
        device.wait().expect("told once");

        device.device().destroy();
        let error = device.wait().unwrap_err();
        assert!(matches!(error, Error::DeviceLost(_)), "{error}");
        names(&error, &["lost"]);
        assert_eq!(device.wait().unwrap_err(), error, "a lost device stays lost");
    }
}

#[test]
fn out_of_memory_and_internal_errors_keep_their_kind_and_text() {
    let error = Error::from(wgpu::Error::OutOfMemory { source: "heap 3".into() });
    says(error, Error::OutOfMemory("heap 3".into()), &["out of memory", "heap 3"]);
    let source = || "cause".into();
    let error = Error::from(wgpu::Error::Validation { source: source(), description: "bad call".into() });
    says(error, Error::Validation("bad call".into()), &["bad call"]);
    let error = Error::from(wgpu::Error::Internal { source: source(), description: "broke".into() });
    says(error, Error::DeviceLost("broke".into()), &["broke"]);
}

#[test]
fn projections_rotations_and_layers_that_do_not_fit_are_refused() {
    let gpu = &gpus()[0];
    let mut projection = Projection::new(4, 8, 12, Order::OutIn, Element::F32);
    projection.head_columns = 5;
    let want = Error::Divide { field: "head_columns", value: 5, of: "outputs", whole: 12 };
    let plan = gpu.library().project(&projection, &Options::default());
    says(plan.map(drop).unwrap_err(), want, &["head_columns is 5", "outputs", "12"]);
    let mut rotation = Rotation::new(1, 2, 3, 12, 9);
    rotation.rotary_dim = 3;
    let want = Error::Multiple { field: "rotary_dim", value: 3, of: 2 };
    let plan = gpu.library().rotate(&rotation, &Options::default());
    says(plan.map(drop).unwrap_err(), want, &["rotary_dim is 3", "multiple of 2"]);
    let zeros = |inputs, outputs| Linear {
        inputs,
        outputs,
        weight: vec![0.0; (inputs * outputs) as usize],
        order: Order::OutIn,
        bias: None,
    };
    let layer = Layer::new(2, 2, [(); 4].map(|()| zeros(8, 8))).unwrap();
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).unwrap();
    let mut problem = layer.problem(1, 3, 3);
    problem.head_dim = 5;
    let query = [0.0; 24];
    let inputs = LayerInputs::new(&query);
    let run = resident.forward(gpu, &problem, &Call::default(), &inputs);
    let want = Error::LayerSize { field: "head_dim", got: 5, want: 4 };
    says(run.map(drop).unwrap_err(), want, &["head_dim is 5", "4"]);
}

#[cfg(feature = "safetensors")]
#[test]
fn files_of_weights_that_do_not_fit_are_refused() {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    let data = [0u8; 1024];
    let load = |tensors: &[(&str, Dtype, &[usize])]| {
        let views = tensors.iter().map(|&(name, dtype, shape)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(dtype, shape.to_vec(), &data[..bytes]).unwrap())
        });
        wgpu_attention::load::pytorch(&safetensors::serialize(views, None).unwrap(), "", 2).unwrap_err()
    };
    let packed = ("in_proj_weight", Dtype::F32, &[12usize, 4][..]);
    let out = ("out_proj.weight", Dtype::F32, &[4usize, 4][..]);
    let want = Error::MissingTensor { tensor: "out_proj.weight".into() };
    says(load(&[packed]), want, &["out_proj.weight", "missing"]);
    let want = Error::ExtraTensor { tensor: "stranger".into() };
    says(load(&[packed, out, ("stranger", Dtype::F32, &[1])]), want, &["stranger", "not part"]);
    let want = Error::TensorShape { tensor: "in_proj_bias".into(), got: vec![11], want: "[12]".into() };
    says(load(&[packed, out, ("in_proj_bias", Dtype::F32, &[11])]), want, &["in_proj_bias", "[11]", "[12]"]);
    let want = Error::TensorType { tensor: "out_proj.weight".into(), got: "I64".into() };
    says(load(&[packed, (out.0, Dtype::I64, out.2)]), want, &["out_proj.weight", "I64", "F32"]);
    let error = wgpu_attention::load::pytorch(b"no header", "", 2).unwrap_err();
    assert!(matches!(error, Error::File(_)), "{error}");
    names(&error, &["safetensors"]);
}

#[test]
fn names_that_nobody_knows() {
    let want = Error::Name { field: "form", value: "Tiled".into(), known: &["tiled", "lanes", "emulated"] };
    says("Tiled".parse::<wgpu_attention::Form>().unwrap_err(), want, &["\"Tiled\"", "tiled, lanes, emulated"]);
}

#[test]
fn a_stored_plan_that_is_planned_in_another_way_now() {
    let shape = Problem::new(1, 1, 4, 4, 8).check().unwrap();
    let plan = Plan::new(&shape, &wgpu_attention::Caps::new(wgpu::Limits::default()), &Options::default()).unwrap();
    let mut stored = serde_json::to_value(&plan).unwrap();
    stored["slices"] = 7.into();
    let error = serde_json::from_value::<Plan>(stored).unwrap_err().to_string();
    let want = Error::StoredPlan { stored: plan.kernel(), made: plan.kernel() };
    assert_eq!(error, want.to_string());
    names(&want, &["stored plan", "plan it anew"]);
}

#[test]
fn every_error_is_provoked_here() {
    // The enum is non-exhaustive, so that the compiler cannot ask; its source is read instead.
    let names: BTreeSet<&str> = include_str!("../src/contract/error.rs")
        .split("pub enum Error {")
        .nth(1)
        .unwrap()
        .split("\n}\n")
        .next()
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()))
        .map(|line| line.split([' ', '(', ',']).next().unwrap())
        .collect();
    let tests = include_str!("errors.rs");
    let untested: Vec<_> = names.iter().filter(|name| !tests.contains(&format!("Error::{name}"))).collect();
    assert!(names.len() > 20 && untested.is_empty(), "no test provokes {untested:?}");
}
