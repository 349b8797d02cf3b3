//! The kernels around attention and the layer as a whole, on real drivers.

mod support;

use support::operations::{nothing, run, take_turns};
use support::staged::Guarded;
use support::{Data, Random, floor, gpus, small};
use wgpu_attention::kernel::Variant;
use wgpu_attention::layer::RotaryEmbedding;
use wgpu_attention::{
    Bias, Broadcast, CacheBuffers, Call, Causal, Element, Elements, Error, Form, Gpu, Layer, LayerBuffers, LayerInputs,
    Linear, MultiHeadAttention, Operands, Operation, Options, Order, Paged, Positions, PreparedLayer, Problem,
    Projection, ProjectionBuffers, Rotation, RotationBuffers, Sources, Strides, Weights, Window, reference, wgpu,
};

const FORMS: [Option<Form>; 2] = [Some(Form::Tiled), Some(Form::Lanes)];

fn forced(form: Option<Form>) -> Options {
    Options { form, ..Options::default() }
}

/// Signed values in one of the element types.
struct Values {
    bytes: Vec<u8>,
    element: Element,
}

impl Values {
    fn new(values: &[f32], element: Element) -> Self {
        let bytes = match element {
            Element::F32 => bytemuck::cast_slice(values).to_vec(),
            Element::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
            Element::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        };
        Values { bytes, element }
    }

    /// Decoded again: what a kernel reads.
    fn widened(&self) -> Vec<f32> {
        match self.element {
            Element::F32 => bytemuck::pod_collect_to_vec(&self.bytes),
            Element::F16 => {
                bytemuck::pod_collect_to_vec::<_, half::f16>(&self.bytes).iter().map(|x| x.to_f32()).collect()
            }
            Element::Bf16 => {
                bytemuck::pod_collect_to_vec::<_, half::bf16>(&self.bytes).iter().map(|x| x.to_f32()).collect()
            }
        }
    }
}

fn upload(gpu: &Gpu, bytes: &[u8]) -> wgpu::Buffer {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(4).max(16), 0);
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: padded.len() as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    gpu.queue().write_buffer(&buffer, 0, &padded);
    buffer
}

/// One projection against its reference, every element under its own bound, the rest of y untouched.
fn check_projection(gpu: &Gpu, p: &Projection, options: &Options, seed: u64) {
    let mut r = Random(seed);
    let x_end = p.x.offset + u64::from(p.batch - 1) * p.x.batch + u64::from(p.rows - 1) * p.x.row + u64::from(p.inputs);
    let major = if p.order == Order::InOut { p.inputs } else { p.outputs };
    let x = r.signed_vec(x_end as usize, 2.0);
    let w = Values::new(&r.signed_vec((p.weight_offset + u64::from(major) * p.weight_row) as usize, 1.0), p.element);
    let biases = p.bias.map(|at| r.signed_vec((at + u64::from(p.outputs)) as usize, 3.0));
    let place = |b: u32, row: u32, c: u32| {
        let [b, h, row] = [b, c / p.head_columns, row].map(u64::from);
        (p.y.offset + b * p.y.batch + h * p.y.head + row * p.y.row) as usize + (c % p.head_columns) as usize
    };
    let end = place(p.batch - 1, p.rows - 1, p.outputs - 1).max(place(0, 0, p.outputs - 1)) + 1;
    let [rows, weight] = [bytemuck::cast_slice(&x), &w.bytes[..]].map(|bytes| upload(gpu, bytes));
    let given = biases.as_ref().map(|biases| upload(gpu, bytemuck::cast_slice(biases)));
    let y = upload(gpu, bytemuck::cast_slice(&vec![f32::NAN; end]));
    let operation = gpu.library().project(p, options).unwrap_or_else(|error| panic!("{error}: {p:?}"));
    let mut buffers = ProjectionBuffers::new(rows.slice(..), weight.slice(..), y.slice(..));
    buffers.biases = given.as_ref().map(|biases| biases.slice(..));
    run(gpu, &operation, &buffers);
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&gpu.read(y.slice(..)).expect("read"));
    let wide = w.widened();
    let (want, bounds) = reference::project::<f64>(p, &x, Elements::F32(&wide), biases.as_deref()).expect("valid");
    let mut at = 0;
    let mut written = vec![false; end];
    for b in 0..p.batch {
        for row in 0..p.rows {
            for c in 0..p.outputs {
                let place = place(b, row, c);
                let error = (f64::from(got[place]) - want[at]).abs();
                assert!(
                    error <= bounds[at],
                    "batch {b} row {row} column {c}: got {}, want {}, {error:e} off where {:e} is allowed, on {}\n{p:?} {options:?}",
                    got[place],
                    want[at],
                    bounds[at],
                    gpu.info().name
                );
                written[place] = true;
                at += 1;
            }
        }
    }
    for (place, _) in written.iter().enumerate().filter(|(_, written)| !**written) {
        assert!(got[place].is_nan(), "place {place} belongs to no element and was written: {p:?}");
    }
}

fn projections(rows: u32, inputs: u32, outputs: u32) -> impl Iterator<Item = Projection> {
    [Order::InOut, Order::OutIn].into_iter().flat_map(move |order| {
        [Element::F32, Element::F16, Element::Bf16]
            .map(move |element| Projection::new(rows, inputs, outputs, order, element))
    })
}

#[test]
fn projections_match_on_odd_sizes() {
    let sizes = [
        (1, 64, 96),
        (7, 37, 29),
        (33, 128, 100),
        (65, 31, 65),
        (1, 5, 1),
        (130, 260, 132),
        (7, 2049, 63),
        (1000, 63, 1),
    ];
    let sizes = if small("larger projections") { &sizes[..3] } else { &sizes[..] };
    for gpu in gpus() {
        for (seed, &(rows, inputs, outputs)) in sizes.iter().enumerate() {
            for form in FORMS {
                // bf16 differs from f16 in one line, which the test of layouts runs.
                let wanted = |p: &Projection| p.element != Element::Bf16;
                for mut projection in projections(rows, inputs, outputs).filter(wanted) {
                    projection.bias = (rows % 2 == 1).then_some(0);
                    check_projection(gpu, &projection, &forced(form), seed as u64);
                }
            }
        }
    }
}

#[test]
fn projections_read_and_write_any_layout() {
    for gpu in gpus() {
        for form in FORMS {
            for mut p in projections(9, 24, 36) {
                // Three batches of a time-major tensor in, heads of 12 columns in a cache of 16 rows from row 5 on out.
                (p.batch, p.bias, p.head_columns) = (3, Some(8), 12);
                (p.x.offset, p.x.batch, p.x.row) = (8, 24, 3 * 24);
                (p.y.offset, p.y.batch, p.y.head, p.y.row) = (5 * 12, 3 * 16 * 12, 16 * 12, 12);
                p.weight_row += 4;
                p.weight_offset = 4;
                check_projection(gpu, &p, &forced(form), 7);
                // The same, not aligned to vectors.
                (p.x.offset, p.weight_offset, p.bias) = (3, 1, Some(7));
                check_projection(gpu, &p, &forced(form), 8);
            }
        }
    }
}

#[test]
fn projections_split_under_small_limits() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 8 << 10, 3);
        for form in FORMS {
            for mut p in projections(70, 100, 90) {
                (p.batch, p.bias) = (2, Some(0));
                (p.x.batch, p.y.batch) = (100 * 70, 90 * 70);
                check_projection(gpu, &p, &forced(form), 9);
                p.head_columns = 30;
                (p.y.head, p.y.row, p.y.batch) = (30 * 75, 30, 3 * 30 * 75);
                check_projection(gpu, &p, &forced(form), 10);
            }
        }
    }
}

#[test]
fn wrong_projections_are_errors() {
    let gpu = &gpus()[0];
    let plan = |change: &dyn Fn(&mut Projection)| {
        let mut p = Projection::new(4, 8, 12, Order::OutIn, Element::F32);
        change(&mut p);
        gpu.library().project(&p, &Options::default()).map(|_| ())
    };
    assert_eq!(plan(&|_| ()), Ok(()));
    assert_eq!(plan(&|p| p.inputs = 0), Err(Error::Zero { field: "inputs" }));
    assert_eq!(plan(&|p| p.outputs = 0), Err(Error::Zero { field: "outputs" }));
    assert!(matches!(
        plan(&|p| p.head_columns = 5),
        Err(Error::Divide { field: "head_columns", value: 5, whole: 12, .. })
    ));
    assert!(matches!(plan(&|p| p.weight_row = 7), Err(Error::Entry { field: "weight_row", value: 7, limit: 8, .. })));
    assert!(matches!(plan(&|p| p.x.row = 1 << 40), Err(Error::Room { field: "a stride of x", .. })));
    let operation = gpu.library().project(&Projection::new(4, 8, 12, Order::OutIn, Element::F32), &Options::default());
    let operation = operation.expect("valid");
    let (big, small, y) = (upload(gpu, &[0; 1024]), upload(gpu, &[0; 16]), upload(gpu, &[0; 1024]));
    let encode = |operation: &Operation<Projection>, weight: &wgpu::Buffer, y: &wgpu::Buffer| {
        let buffers = ProjectionBuffers::new(big.slice(..), weight.slice(..), y.slice(..));
        operation.encode(&mut gpu.device().create_command_encoder(&Default::default()), &buffers)
    };
    assert_eq!(encode(&operation, &big, &y), Ok(()));
    let short = Error::BufferSize { field: "weight", got: 16, want: 384 };
    assert_eq!(encode(&operation, &small, &y), Err(short));
    assert_eq!(encode(&operation, &big, &big), Err(Error::Aliased { output: "y", other: "x" }));
    let mut biased = Projection::new(4, 8, 12, Order::OutIn, Element::F32);
    biased.bias = Some(0);
    let operation = gpu.library().project(&biased, &Options::default()).expect("valid");
    assert_eq!(encode(&operation, &big, &y), Err(Error::Missing { field: "biases" }));
    let run = |p: &Projection, x: usize, weight: usize, biases: Option<&[f32]>| {
        gpu.project(p, &vec![0.0; x], Elements::F32(&vec![0.0; weight]), biases).map(|_| ())
    };
    assert_eq!(run(&biased, 32, 96, Some(&[0.0; 12])), Ok(()));
    assert_eq!(run(&biased, 31, 96, Some(&[0.0; 12])), Err(Error::Length { field: "x", got: 31, want: 32 }));
    assert_eq!(run(&biased, 32, 95, Some(&[0.0; 12])), Err(Error::Length { field: "weight", got: 95, want: 96 }));
    assert_eq!(run(&biased, 32, 96, Some(&[0.0; 11])), Err(Error::Length { field: "biases", got: 11, want: 12 }));
    assert_eq!(run(&biased, 32, 96, None), Err(Error::Missing { field: "biases" }));
    biased.bias = None;
    assert_eq!(run(&biased, 32, 96, Some(&[])), Err(Error::Unexpected { field: "biases" }));
    biased.element = Element::F16;
    let wrong = Error::Element { field: "weight", got: Element::F32, want: Element::F16 };
    assert_eq!(run(&biased, 32, 96, None), Err(wrong));
}

#[test]
fn host_slices_are_projected() {
    for gpu in gpus() {
        // y = x [[1, 2], [3, 4]] + [10, 20], each row of y followed by a place that belongs to no element.
        let mut p = Projection::new(2, 2, 2, Order::InOut, Element::F16);
        (p.bias, p.y.row) = (Some(1), 3);
        let weight = [1.0, 2.0, 3.0, 4.0].map(half::f16::from_f32);
        let got = gpu.project(&p, &[1.0, 0.0, 1.0, -1.0], Elements::F16(&weight), Some(&[0.0, 10.0, 20.0]));
        let got = got.expect("valid");
        assert_eq!((&got[..2], &got[3..]), (&[11.0, 22.0][..], &[8.0, 18.0][..]));
        assert!(got[2].is_nan());
    }
}

#[test]
fn without_a_batch_or_a_row_nothing_is_projected_or_turned() {
    for gpu in gpus() {
        for [batch, rows] in [[0, 3], [2, 0], [0, 0]] {
            for form in FORMS {
                let mut p = Projection::new(rows, 8, 12, Order::OutIn, Element::F32);
                (p.batch, p.x.batch, p.y.batch) = (batch, 24, 36);
                let operation = gpu.library().project(&p, &forced(form)).expect("valid");
                assert_eq!((operation.slices(), operation.needs().count()), (0, 0));
                let (none, none_too) = (nothing(gpu), nothing(gpu));
                let buffers = ProjectionBuffers::new(none.slice(..), none.slice(..), none_too.slice(..));
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                assert_eq!(operation.encode(&mut encoder, &buffers), Ok(()));
                assert_eq!(reference::project::<f64>(&p, &[], Elements::F32(&[]), None), Ok((vec![], vec![])));
                assert_eq!(gpu.project(&p, &[], Elements::F32(&[]), None), Ok(vec![]));
            }
            for table_rows in [0, 5] {
                for positions in [Positions::Rows, Positions::Starts] {
                    let mut rotation = Rotation::new(batch, 2, rows, 8, table_rows);
                    // What no element stands behind has no place either.
                    (rotation.positions, rotation.x.offset) = (positions, 4);
                    let table = Rotation::table(table_rows, 8, 100.0);
                    let starts = vec![0; if positions == Positions::Starts { batch as usize } else { 0 }];
                    assert_eq!(rotation.extent(), 0);
                    assert_eq!(gpu.rotate(&rotation, Elements::F32(&[]), &table, &starts), Ok(vec![]));
                    let turned = reference::rotary::<f64>(&rotation, Elements::F32(&[]), &table, &starts);
                    assert_eq!(turned, Ok((vec![], vec![])));
                }
            }
        }
    }
}

/// One rotation against its reference, in place and not.
fn check_rotation(gpu: &Gpu, rotation: &Rotation, seed: u64) {
    let mut r = Random(seed);
    let [batch, heads, rows, dim] = [rotation.batch, rotation.heads, rotation.rows, rotation.head_dim];
    let at = |s: &Strides, b: u32, h: u32, row: u32| {
        (s.offset + u64::from(b) * s.batch + u64::from(h) * s.head + u64::from(row) * s.row) as usize
    };
    let end = |s: &Strides| at(s, batch - 1, heads - 1, rows - 1) + dim as usize;
    let x = Values::new(&r.signed_vec(end(&rotation.x), 2.0), rotation.element);
    let table = Rotation::table(rotation.table_rows, rotation.rotary_dim, 100.0);
    // Some beyond the table.
    let positions: Vec<u32> = (0..rotation.position_count()).map(|_| r.below(rotation.table_rows + 3)).collect();
    let y = rotation.y.unwrap_or(rotation.x);
    let nan = Values::new(&vec![f32::NAN; end(&y)], rotation.element);
    let (from, to) = (upload(gpu, &x.bytes), rotation.y.map(|_| upload(gpu, &nan.bytes)));
    let [angles, places] =
        [bytemuck::cast_slice(&table), bytemuck::cast_slice(&positions)].map(|bytes| upload(gpu, bytes));
    let operation = gpu.library().rotate(rotation, &Options::default()).unwrap_or_else(|e| panic!("{e}: {rotation:?}"));
    let mut buffers = RotationBuffers::new(from.slice(..), angles.slice(..), places.slice(..));
    buffers.y = to.as_ref().map(|to| to.slice(..));
    run(gpu, &operation, &buffers);
    let mut got = gpu.read(to.as_ref().unwrap_or(&from).slice(..)).expect("read");
    got.truncate(nan.bytes.len());
    let got = Values { bytes: got, element: rotation.element }.widened();
    let wide = x.widened();
    let (want, bounds) = reference::rotary::<f64>(rotation, Elements::F32(&wide), &table, &positions).expect("valid");
    let mut n = 0;
    for b in 0..batch {
        for h in 0..heads {
            for row in 0..rows {
                for d in 0..dim as usize {
                    let got = got[at(&y, b, h, row) + d];
                    let error = (f64::from(got) - want[n]).abs();
                    assert!(
                        error <= bounds[n],
                        "{b} {h} {row} {d}: got {got}, want {}, {error:e} > {:e}: {rotation:?}",
                        want[n],
                        bounds[n]
                    );
                    n += 1;
                }
            }
        }
    }
}

#[test]
fn rotations_match() {
    for gpu in gpus() {
        for (seed, element) in [Element::F32, Element::F16, Element::Bf16].into_iter().enumerate() {
            for interleaved in [false, true] {
                for (dim, turning) in [(8, 8), (72, 72), (64, 20), (2, 2), (38, 12)] {
                    if element != Element::F32 && !interleaved && turning % 4 != 0 {
                        continue;
                    }
                    let mut r = Rotation::new(2, 3, 19, dim, 30);
                    (r.rotary_dim, r.interleaved, r.element) = (turning, interleaved, element);
                    check_rotation(gpu, &r, seed as u64);
                    // Out of place, from merged heads into a cache with room, positions counted from a start.
                    let d = u64::from(dim);
                    r.x = Strides { offset: 2, batch: 19 * 3 * d, head: d, row: 3 * d };
                    r.y = Some(Strides { offset: 4 * d, batch: 3 * 40 * d, head: 40 * d, row: d });
                    r.positions = Positions::Starts;
                    check_rotation(gpu, &r, seed as u64 + 10);
                }
            }
        }
        let small = &floor(gpu, 8 << 10, 3);
        let mut r = Rotation::new(5, 3, 190, 24, 30);
        check_rotation(small, &r, 20);
        r.y = Some(r.x);
        check_rotation(small, &r, 21);
    }
}

/// Pairs (1, 0) turned by "angles" of any cosine c and sine s become (c, s), rounded once.
#[test]
fn turned_rows_of_sixteen_bits_are_rounded_to_the_nearest_and_ties_to_even() {
    for element in [Element::F16, Element::Bf16] {
        let one = |bits: u32| f32::from_bits(bits);
        // Ties below and above an even number, and around each; the last one that is finite, and the first that is not.
        let cosines = match element {
            Element::F16 => [1.000_488_3, 1.001_464_8, 65519.996, 65520.0, 5.0 * 2f32.powi(-25), 7.0 * 2f32.powi(-25)],
            _ => [
                one(0x3f80_8000),
                one(0x3f81_8000),
                one(0x7f7f_7fff),
                one(0x7f7f_8000),
                one(0x4000_8001),
                one(0x0081_8000),
            ],
        };
        let numbers: Vec<f32> =
            cosines.iter().flat_map(|x| [-1, 0, 1].map(|n| one(x.to_bits().wrapping_add_signed(n)))).collect();
        let mut rotation = Rotation::new(1, 1, numbers.len() as u32, 4, numbers.len() as u32);
        (rotation.interleaved, rotation.element) = (true, element);
        let x = Values::new(&[1.0, 0.0, 1.0, 0.0].repeat(numbers.len()), element);
        let table: Vec<f32> = numbers.iter().flat_map(|&x| [x, -x, -x, x]).collect();
        let positions: Vec<u32> = (0..rotation.position_count() as u32).collect();
        let want = Values::new(&numbers.iter().flat_map(|&x| [x, -x, -x, x]).collect::<Vec<_>>(), element);
        for gpu in gpus() {
            let operands = [&x.bytes[..], bytemuck::cast_slice(&table), bytemuck::cast_slice(&positions)];
            let operands = operands.map(|bytes| upload(gpu, bytes));
            let [rows, angles, positions] = operands.each_ref().map(|buffer| buffer.slice(..));
            let operation = gpu.library().rotate(&rotation, &Options::default()).unwrap();
            run(gpu, &operation, &RotationBuffers::new(rows, angles, positions));
            let got = gpu.read(rows).expect("read");
            let got = Values { bytes: got[..want.bytes.len()].to_vec(), element }.widened();
            assert_eq!(got, want.widened(), "{element} on {}", gpu.info().name);
        }
    }
}

#[test]
fn wrong_rotations_are_errors() {
    let gpu = &gpus()[0];
    let plan = |change: &dyn Fn(&mut Rotation)| {
        let mut r = Rotation::new(1, 2, 3, 12, 9);
        change(&mut r);
        gpu.library().rotate(&r, &Options::default()).map(|_| ())
    };
    assert_eq!(plan(&|_| ()), Ok(()));
    assert_eq!(plan(&|r| r.rotary_dim = 14), Err(Error::TooLarge { field: "rotary_dim", value: 14, limit: 12 }));
    assert_eq!(plan(&|r| r.rotary_dim = 3), Err(Error::Multiple { field: "rotary_dim", value: 3, of: 2 }));
    assert_eq!(plan(&|r| r.table_rows = 0), Err(Error::Zero { field: "table_rows" }));
    assert_eq!(plan(&|r| r.heads = 0), Err(Error::Zero { field: "heads" }));
    let odd = |r: &mut Rotation| (r.element, r.rotary_dim) = (Element::F16, 6);
    assert!(matches!(plan(&odd), Err(Error::Multiple { value: 6, of: 4, .. })));
    assert!(matches!(
        plan(&|r| (r.element, r.x.row) = (Element::F16, 13)),
        Err(Error::Multiple { value: 13, of: 2, .. })
    ));
    // Out of place, y must be given.
    let mut rotation = Rotation::new(1, 1, 1, 4, 1);
    rotation.y = Some(rotation.x);
    let operation = gpu.library().rotate(&rotation, &Options::default()).expect("valid");
    let buffers = [(); 3].map(|()| upload(gpu, &[0; 16]));
    let [x, table, positions] = buffers.each_ref().map(|buffer| buffer.slice(..));
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let error = operation.encode(&mut encoder, &RotationBuffers::new(x, table, positions));
    assert_eq!(error, Err(Error::Missing { field: "y" }));
}

fn linear(r: &mut Random, inputs: u32, outputs: u32, order: Order, bias: bool) -> Linear {
    let size = 1.5 / (inputs as f32).sqrt();
    let weight = r.signed_vec((inputs * outputs) as usize, size);
    // Rounded to eight bits, so that f16 or bf16 on the GPU and f32 in the reference are the same weights.
    let weight = weight.into_iter().map(|x| half::bf16::from_f32(half::f16::from_f32(x).to_f32()).to_f32()).collect();
    Linear { inputs, outputs, weight, order, bias: bias.then(|| r.signed_vec(outputs as usize, 0.5)) }
}

/// Heads, key/value heads, columns of a key and a value, width of query, key, value and output.
fn layer(r: &mut Random, [heads, kv_heads, dk, dv]: [u32; 4], widths: [u32; 4], order: Order, bias: bool) -> Layer {
    let parts = [
        linear(r, widths[0], heads * dk, order, bias),
        linear(r, widths[1], kv_heads * dk, order, bias),
        linear(r, widths[2], kv_heads * dv, order, bias),
        linear(r, heads * dv, widths[3], order, bias),
    ];
    Layer::new(heads, kv_heads, parts).expect("valid")
}

/// Within what the published cases of this layer allow a plain f32 evaluation.
fn assert_close(got: &[f32], want: &[f64], atol: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= atol * size, "{what}: element {i} is {got}, want {want}");
    }
}

/// Runs a layer and its reference on random inputs and operands.
fn check_layer(gpu: &Gpu, layer: &Layer, problem: &Problem, call: &Call, element: Element, options: &Options) {
    let mut r = Random(77);
    let mut input = |seq: u32, width: u32| r.signed_vec((problem.batch * seq * width) as usize, 1.0);
    let query = input(problem.seq_q, layer.query.inputs);
    let (key, value) = (input(problem.seq_kv, layer.key.inputs), input(problem.seq_kv, layer.value.inputs));
    let data = Data::random(problem, 5, 1.0);
    let inputs = LayerInputs {
        query: &query,
        key: (call.sources != Sources::Query).then_some(&key),
        value: (call.sources == Sources::Each).then_some(&value),
        operands: data.inputs().operands,
    };
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), layer, element).expect("fits");
    let got =
        resident.forward_with(gpu, problem, call, &inputs, options).unwrap_or_else(|e| panic!("{e}\n{problem:?}"));
    let want = reference::layer::<f64>(layer, problem, call, &inputs).expect("valid");
    let what = format!("{} {call:?} {problem:?} {options:?}", gpu.info().name);
    assert_close(&got.out, &want.out, 2e-5, &what);
    assert_eq!(got.weights.is_some(), want.weights.is_some());
    if let (Some(got), Some(want)) = (&got.weights, &want.weights) {
        assert_close(got, want, 5e-6, &format!("weights, {what}"));
    }
}

#[test]
fn layers_match() {
    for gpu in gpus() {
        let mut r = Random(40);
        for round in 0..if small("24 of the 36 random layers") { 12 } else { 36 } {
            let sources = [Sources::Query, Sources::Key, Sources::Each][round % 3];
            let (heads, kv_heads) = [(4, 4), (6, 2), (3, 1), (1, 1)][r.below(4) as usize];
            let (dk, dv) = [(8, 8), (16, 12), (10, 7), (6, 6)][r.below(4) as usize];
            let wide = 20 + r.below(30);
            let widths = match sources {
                Sources::Query => [wide, wide, wide, 24],
                Sources::Key => [wide, 28, 28, 36],
                Sources::Each => [wide, 20, 27, 25],
            };
            let order = [Order::InOut, Order::OutIn][r.below(2) as usize];
            let mut layer = layer(&mut r, [heads, kv_heads, dk, dv], widths, order, r_bool(round / 2));
            let (seq_q, other) = (1 + r.below(20), 1 + r.below(30));
            let seq_kv = if sources == Sources::Query { seq_q } else { other };
            let mut problem = layer.problem(1 + r.below(3), seq_q, seq_kv);
            layer.rotary = r_bool(r.below(2) as usize).then_some(RotaryEmbedding {
                dim: dk - dk % 4,
                interleaved: r_bool(round),
                base: 100.0,
                positions: 64,
            });
            layer.zero_attn = r.below(3) == 0;
            if r.below(3) == 0 {
                layer.bias_kv =
                    Some((r.signed_vec((kv_heads * dk) as usize, 1.0), r.signed_vec((kv_heads * dv) as usize, 1.0)));
            }
            problem.mask = (r.below(2) == 0).then_some(Broadcast([problem.batch, 1, seq_q, seq_kv]));
            problem.bias =
                (r.below(2) == 0).then_some(Bias { shape: Broadcast([1, heads, 1, seq_kv]), element: Element::F32 });
            let rules = [Causal::None, Causal::TopLeft, Causal::BottomRight, Causal::Offset];
            problem.causal = rules[r.below(4) as usize];
            problem.key_lengths = r.below(3) == 0;
            if r.below(3) == 0 {
                problem.window = Window { left: Some(r.below(9)), right: (r.below(2) == 0).then(|| r.below(5)) };
            }
            problem.alibi = r.below(3) == 0;
            problem.sinks = !layer.zero_attn && r.below(2) == 0;
            problem.softcap = (layer.bias_kv.is_none() && r.below(3) == 0).then_some(1.5);
            problem.scale = (r.below(3) == 0).then_some(0.6);
            let mut call = Call::default();
            call.sources = sources;
            call.seq_first = r.below(2) == 0;
            call.weights = [None, Some(Weights::Heads), Some(Weights::Mean)][r.below(3) as usize];
            let element = [Element::F32, Element::F16, Element::Bf16][r.below(3) as usize];
            check_layer(gpu, &layer, &problem, &call, element, &forced(FORMS[round % 2]));
        }
    }
}

/// A key that every row sees and the ordinary key have scores far apart; the value of the lighter one makes up for its weight.
#[test]
fn an_extra_key_keeps_its_weight_however_light_or_heavy_it_is() {
    let dim = 4;
    let identity = |size: f32| Linear {
        inputs: dim,
        outputs: dim,
        weight: (0..dim * dim).map(|n| if n % (dim + 1) == 0 { size } else { 0.0 }).collect(),
        order: Order::InOut,
        bias: None,
    };
    for gpu in gpus() {
        for distance in [-60.0, -30.0, -9.0, 9.0, 30.0, 60.0] {
            // The value of the lighter of the two is as large as its weight is small.
            let (ordinary, added) = if distance > 0.0 { (f32::exp(distance), 1.0) } else { (1.0, f32::exp(-distance)) };
            let mut layer = Layer::new(1, 1, [1.0, 1.0, ordinary, 1.0].map(identity)).expect("valid");
            layer.bias_kv = Some((vec![distance, 0.0, 0.0, 0.0], vec![added; dim as usize]));
            let mut problem = layer.problem(1, 1, 1);
            problem.scale = Some(1.0);
            // q·k is 0 for the ordinary key and `distance` for the other.
            let (query, key, value) = (vec![1.0, 0.0, 0.0, 0.0], vec![0.0; 4], vec![1.0; 4]);
            let inputs =
                LayerInputs { query: &query, key: Some(&key), value: Some(&value), operands: Operands::default() };
            let mut call = Call::default();
            call.sources = Sources::Each;
            let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
            let got = resident.forward_with(gpu, &problem, &call, &inputs, &Options::default()).expect("valid").out;
            // One of the two weighs 1 to all digits, the other e^−|distance|, and both shares are 1.
            for x in got {
                assert!((f64::from(x) - 2.0).abs() < 1e-3, "{x} for scores {distance} apart on {}", gpu.info().name);
            }
        }
    }
}

#[test]
fn calls_of_one_layer_take_turns() {
    let mut r = Random(46);
    let mut layer = layer(&mut r, [4, 2, 8, 8], [24; 4], Order::OutIn, true);
    layer.bias_kv = Some((r.signed_vec(16, 1.0), r.signed_vec(16, 1.0)));
    let problem = layer.problem(2, 19, 19);
    let mut call = Call::default();
    call.weights = Some(Weights::Mean);
    for gpu in gpus() {
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        let options = Options { work_budget: std::time::Duration::from_micros(1), ..Options::default() };
        let prepared = resident.prepare(gpu.library(), &problem, &call, &options).expect("valid");
        assert!(prepared.slices() > 5);
        let guarded = |values: &[f32]| Guarded::new(gpu.device(), bytemuck::cast_slice(values));
        let stage = |seed| {
            let x = Random(seed).signed_vec(2 * 19 * 24, 1.0);
            [guarded(&x), guarded(&[f32::NAN; 2 * 19 * 24]), guarded(&[f32::NAN; 2 * 19 * 20])]
        };
        type Staged = [Guarded; 3];
        fn buffers(staged: &Staged) -> LayerBuffers<'_> {
            let mut buffers = LayerBuffers::new(staged[0].slice(), staged[1].slice());
            buffers.weights = Some(staged[2].slice());
            buffers
        }
        let read = |staged: &Staged| [1, 2].map(|n| staged[n].read(gpu.device(), gpu.queue()));
        let calls = [(); 2].map(|()| prepared.begin().expect("fits"));
        let record = calls.each_ref().map(|call| {
            move |slice, encoder: &mut wgpu::CommandEncoder, staged: &Staged| {
                call.encode_slice(slice, encoder, &buffers(staged)).expect("valid");
            }
        });
        let whole = |encoder: &mut wgpu::CommandEncoder, staged: &Staged| {
            prepared.encode(encoder, &buffers(staged)).expect("valid");
        };
        let left = take_turns(gpu, prepared.slices(), &stage, &read, &whole, [&record[0], &record[1]]);
        let finite = |bytes: &[u8]| bytemuck::pod_collect_to_vec::<_, f32>(bytes).iter().all(|x| x.is_finite());
        assert!(left.iter().flatten().all(|bytes| finite(bytes)) && left[0] != left[1]);
    }
}

#[test]
fn layers_without_a_batch_a_query_or_a_key_match() {
    for gpu in gpus() {
        for [batch, seq_q, seq_kv] in [[0, 5, 7], [2, 0, 7], [2, 5, 0], [2, 0, 0], [0, 0, 0]] {
            for (n, which) in [None, Some(Weights::Heads), Some(Weights::Mean)].into_iter().enumerate() {
                for (added, zero_attn) in [(false, false), (true, false), (false, true), (true, true)] {
                    let r = &mut Random(50 + n as u64);
                    let mut layer = layer(r, [4, 2, 8, 8], [24, 20, 20, 12], Order::OutIn, true);
                    layer.zero_attn = zero_attn;
                    layer.bias_kv = added.then(|| (r.signed_vec(16, 1.0), r.signed_vec(16, 1.0)));
                    layer.rotary =
                        (n == 1).then_some(RotaryEmbedding { dim: 8, interleaved: false, base: 100.0, positions: 9 });
                    let mut call = Call::default();
                    (call.sources, call.seq_first, call.weights) = (Sources::Key, n == 2, which);
                    let mut problem = layer.problem(batch, seq_q, seq_kv);
                    problem.mask = (n == 1).then_some(Broadcast([batch, 1, seq_q, seq_kv]));
                    problem.key_lengths = n == 2;
                    check_layer(gpu, &layer, &problem, &call, Element::F32, &forced(FORMS[n % 2]));
                }
            }
        }
    }
}

/// The outputs of a row that sees only what the layer adds, by hand: the added value alone, half of it beside a zero key of the
/// same score, or nothing but the output's bias.
#[test]
fn without_a_key_a_layer_sees_what_it_adds() {
    let linear = |weight: f32, bias: f32| Linear {
        inputs: 1,
        outputs: 1,
        weight: vec![weight],
        order: Order::OutIn,
        bias: Some(vec![bias]),
    };
    let parts = [linear(0.0, 0.0), linear(1.0, 0.0), linear(1.0, 0.0), linear(2.0, 0.5)];
    let mut layer = Layer::new(1, 1, parts).expect("valid");
    let mut call = Call::default();
    (call.sources, call.weights) = (Sources::Key, Some(Weights::Mean));
    for gpu in gpus() {
        for (added, zero_attn, out, weights) in [
            (false, false, 0.5, vec![]),
            (true, false, 8.5, vec![1.0]),
            (false, true, 0.5, vec![1.0]),
            (true, true, 4.5, vec![0.5, 0.5]),
        ] {
            (layer.bias_kv, layer.zero_attn) = (added.then(|| (vec![3.0], vec![4.0])), zero_attn);
            let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
            let options = Options::default();
            let prepared = resident.prepare(gpu.library(), &layer.problem(1, 1, 0), &call, &options).expect("valid");
            // wgpu would take an empty binding for the rest of the buffer.
            assert!(prepared.steps().flat_map(|step| &step.bindings).all(|bound| bound.size > 0));
            let inputs = LayerInputs { query: &[7.0], key: Some(&[]), ..LayerInputs::default() };
            let got = resident.forward(gpu, &layer.problem(1, 1, 0), &call, &inputs).expect("runs");
            let close = |got: &[f32], want: &[f32]| {
                got.len() == want.len() && got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6)
            };
            assert!(close(&got.out, &[out]) && close(&got.weights.clone().expect("asked for"), &weights), "{got:?}");
        }
    }
}

/// A cache without a batch, without room, and of a call without a new row: nothing changes, and what cannot be bound may be given.
#[test]
fn caches_of_layers_may_be_empty_too() {
    for gpu in gpus() {
        let layer = layer(&mut Random(51), [4, 2, 8, 8], [24; 4], Order::OutIn, true);
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        let mut call = Call::default();
        call.cache = true;
        for [batch, rows, room] in [[0, 3, 6], [2, 0, 6], [2, 0, 0]] {
            let problem = layer.problem(batch, rows, room);
            let prepared = resident.prepare(gpu.library(), &problem, &call, &Options::default()).expect("valid");
            assert_eq!(prepared.slices(), 0);
            let none = nothing(gpu);
            let (filled, starts) = (upload(gpu, &[1; 2 * 2 * 6 * 8 * 4]), upload(gpu, &[0; 8]));
            let (query, result) = (upload(gpu, &[1; 16]), upload(gpu, &[2; 16]));
            let mut buffers = LayerBuffers::new(query.slice(..), result.slice(..));
            let cache = if batch * room == 0 { &none } else { &filled };
            let v = upload(gpu, &[1; 2 * 2 * 6 * 8 * 4]);
            let starts = if batch == 0 { &none } else { &starts };
            buffers.cache = Some(CacheBuffers { k: cache.slice(..), v: v.slice(..), starts: starts.slice(..) });
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            prepared.encode(&mut encoder, &buffers).expect("valid");
            let none = Error::TooLarge { field: "slice, counted from 1,", value: 1, limit: 0 };
            assert_eq!(prepared.begin().unwrap().encode_slice(0, &mut encoder, &buffers), Err(none));
            // A plan without a dispatch looks at what is given all the same.
            buffers.cache = None;
            assert_eq!(prepared.encode(&mut encoder, &buffers), Err(Error::Missing { field: "cache" }));
            gpu.queue().submit([encoder.finish()]);
            gpu.wait().expect("nothing ran");
            assert_eq!(gpu.read(filled.slice(..)), Ok(vec![1; 2 * 2 * 6 * 8 * 4]));
            assert_eq!(gpu.read(result.slice(..)), Ok(vec![2; 16]));
        }
    }
}

fn r_bool(n: usize) -> bool {
    n.is_multiple_of(2)
}

#[test]
fn layers_run_under_small_limits() {
    for gpu in gpus() {
        let gpu = &floor(gpu, 16 << 10, 3);
        for order in [Order::InOut, Order::OutIn] {
            let mut layer = layer(&mut Random(41), [4, 2, 16, 16], [80; 4], order, true);
            layer.zero_attn = true;
            let mut call = Call::default();
            call.weights = Some(Weights::Mean);
            let problem = layer.problem(2, 30, 30);
            check_layer(gpu, &layer, &problem, &call, Element::F32, &Options::default());
        }
    }
}

/// Dispatches of projections that turn, and of rotations of their own.
fn turning(prepared: &PreparedLayer) -> [usize; 2] {
    let count = |wanted: fn(&Variant) -> bool| prepared.steps().filter(|step| wanted(&step.variant)).count();
    [count(|v| matches!(v, Variant::Project(p) if p.turned)), count(|v| matches!(v, Variant::Rotary(_)))]
}

/// Runs a layer on two batches of odd length and two of one row, and gives what turns in it, and why.
fn check_turning(
    gpu: &Gpu,
    layer: &Layer,
    element: Element,
    options: &Options,
    sources: Sources,
) -> ([usize; 2], String) {
    let mut call = Call::default();
    call.sources = sources;
    let mut found = ([0, 0], String::new());
    for rows in [1, 19] {
        let mut problem = layer.problem(2, rows, if sources == Sources::Query { rows } else { 11 });
        problem.causal = Causal::TopLeft;
        check_layer(gpu, layer, &problem, &call, element, options);
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), layer, element).expect("fits");
        let prepared = resident.prepare(gpu.library(), &problem, &call, options).expect("valid");
        found = (turning(&prepared), prepared.reasons().join("; "));
    }
    found
}

/// The keys that a layer of self-attention puts into its cache, element by element: attention would not see the columns of
/// queries and keys change places alike.
fn check_cached_keys(gpu: &Gpu, layer: &Layer, element: Element, options: &Options) {
    let (starts, rows, room, width) = ([3u32, 0], 19, 24, layer.query.inputs);
    let (kv_heads, dk, dv) = (layer.kv_heads, layer.key_dim, layer.value_dim);
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), layer, element).expect("fits");
    let mut call = Call::default();
    call.cache = true;
    let prepared = resident.prepare(gpu.library(), &layer.problem(2, rows, room), &call, options).expect("valid");
    let x = Random(47).signed_vec((2 * rows * width) as usize, 1.0);
    let nan = |n: u32| upload(gpu, bytemuck::cast_slice(&vec![f32::NAN; n as usize]));
    let (query, result) = (upload(gpu, bytemuck::cast_slice(&x)), nan(2 * rows * layer.out.outputs));
    let (k, v) = (nan(2 * kv_heads * room * dk), nan(2 * kv_heads * room * dv));
    let starts_buffer = upload(gpu, bytemuck::cast_slice(&starts));
    let mut buffers = LayerBuffers::new(query.slice(..), result.slice(..));
    buffers.cache = Some(CacheBuffers { k: k.slice(..), v: v.slice(..), starts: starts_buffer.slice(..) });
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    prepared.encode(&mut encoder, &buffers).expect("valid");
    gpu.queue().submit([encoder.finish()]);
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&gpu.read(k.slice(..)).expect("read"));

    let (linear, rotary) = (&layer.key, layer.rotary.expect("turns"));
    let mut p = Projection::new(2 * rows, width, linear.outputs, linear.order, Element::F32);
    p.bias = linear.bias.as_ref().map(|_| 0);
    let keys = reference::project::<f64>(&p, &x, Elements::F32(&linear.weight), linear.bias.as_deref());
    let (keys, _) = keys.expect("valid");
    let keys: Vec<f32> = keys.into_iter().map(|x| x as f32).collect();
    let mut turn = Rotation::new(2, kv_heads, rows, dk, rotary.positions);
    (turn.rotary_dim, turn.interleaved, turn.positions) = (rotary.dim, rotary.interleaved, Positions::Starts);
    turn.x = Strides { offset: 0, batch: (rows * kv_heads * dk).into(), head: dk.into(), row: (kv_heads * dk).into() };
    let table = Rotation::table(rotary.positions, rotary.dim, rotary.base);
    let (want, _) = reference::rotary::<f64>(&turn, Elements::F32(&keys), &table, &starts).expect("valid");
    let line = (rows * dk) as usize;
    for (n, want) in want.chunks_exact(line).enumerate() {
        let at = (n * room as usize + starts[n / kv_heads as usize] as usize) * dk as usize;
        assert_close(&got[at..][..line], want, 2e-5, &format!("keys of batch and head {n}, {element} {options:?}"));
    }
}

#[test]
fn rotary_embedding_takes_no_pass_of_its_own_where_pairs_are_whole_vectors() {
    // Columns of a key and a value, elements that turn, width, order, interleaved, sources; then what turns the rows.
    let (halves, pairs) = (false, true);
    let cases = [
        ((16, 16, 16), 20, Order::OutIn, halves, Sources::Query, [1, 0], "which saves a pass"),
        ((24, 8, 8), 20, Order::OutIn, halves, Sources::Query, [1, 0], "which saves a pass"),
        ((32, 16, 32), 20, Order::OutIn, halves, Sources::Key, [2, 0], "which saves a pass"),
        ((72, 16, 48), 36, Order::OutIn, halves, Sources::Each, [2, 0], "which saves a pass"),
        ((24, 16, 16), 20, Order::OutIn, pairs, Sources::Query, [1, 0], "which saves a pass"),
        ((24, 8, 16), 20, Order::InOut, pairs, Sources::Query, [1, 0], "which saves a pass"),
        ((40, 16, 40), 36, Order::InOut, pairs, Sources::Each, [2, 0], "which saves a pass"),
        ((16, 16, 16), 20, Order::InOut, halves, Sources::Query, [0, 1], "stand apart in [in, out] weights"),
        ((16, 16, 16), 22, Order::OutIn, halves, Sources::Query, [0, 1], "not whole vectors"),
        ((16, 16, 12), 20, Order::OutIn, pairs, Sources::Query, [0, 1], "not whole vectors"),
        ((12, 16, 8), 20, Order::OutIn, pairs, Sources::Each, [0, 2], "not whole vectors"),
    ];
    let all = [Element::F32, Element::F16, Element::Bf16];
    let elements = if small("rotary embedding in the projection with 16-bit weights") { &all[..1] } else { &all[..] };
    for gpu in gpus() {
        let floor = &floor(gpu, 128 << 10, 64);
        for (n, ((dk, dv, dim), width, order, interleaved, sources, want, why)) in cases.into_iter().enumerate() {
            let mut layer = layer(&mut Random(45 + n as u64), [6, 2, dk, dv], [width; 4], order, n % 2 == 0);
            layer.rotary = Some(RotaryEmbedding { dim, interleaved, base: 100.0, positions: 30 });
            for form in FORMS {
                for &element in elements {
                    let (found, reasons) = check_turning(gpu, &layer, element, &forced(form), sources);
                    assert!(found == want && reasons.contains(why), "{n} {form:?} {element}: {found:?}, {reasons}");
                    if sources == Sources::Query {
                        check_cached_keys(gpu, &layer, element, &forced(form));
                    }
                }
                // Four bindings do not hold table and positions.
                let (found, reasons) = check_turning(floor, &layer, Element::F32, &forced(form), sources);
                let passes = [0, want[0] + want[1]];
                assert_eq!(found, passes, "{n} {form:?} {reasons}");
                assert!(want[0] == 0 || reasons.contains("it binds 6 storage buffers, the device 4"), "{reasons}");
            }
        }
    }
}

#[test]
fn inputs_that_are_shared_are_projected_at_once() {
    let gpu = &gpus()[0];
    let projections = |sources, widths, change: &dyn Fn(&mut Layer)| {
        let mut layer = layer(&mut Random(48), [4, 2, 8, 6], widths, Order::OutIn, true);
        change(&mut layer);
        let (problem, mut call) = (layer.problem(2, 9, 9), Call::default());
        call.sources = sources;
        check_layer(gpu, &layer, &problem, &call, Element::F32, &Options::default());
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        let prepared = resident.prepare(gpu.library(), &problem, &call, &Options::default()).expect("valid");
        prepared.steps().filter(|step| matches!(step.variant, Variant::Project(_))).count()
    };
    // Each with the one of the output.
    for order in [Order::InOut, Order::OutIn] {
        let alike = |layer: &mut Layer| {
            let parts = [&mut layer.query, &mut layer.key, &mut layer.value];
            parts.into_iter().for_each(|linear| linear.order = order);
        };
        assert_eq!(projections(Sources::Query, [20; 4], &alike), 2);
        assert_eq!(projections(Sources::Key, [20; 4], &alike), 3);
        assert_eq!(projections(Sources::Key, [24, 20, 20, 20], &alike), 3);
        assert_eq!(projections(Sources::Each, [20; 4], &alike), 4);
    }
    assert_eq!(projections(Sources::Query, [20; 4], &|layer| layer.query.order = Order::InOut), 3);
    assert_eq!(projections(Sources::Key, [20; 4], &|layer| layer.value.order = Order::InOut), 4);
}

#[test]
fn projections_that_turn_are_split_under_small_limits() {
    for gpu in gpus() {
        let gpu = &gpu.limited_to(Some(wgpu::Features::empty()), |limits| {
            limits.max_compute_workgroups_per_dimension = 3;
            limits.max_storage_buffer_binding_size = 12 << 10;
        });
        // Columns in two orders, and inputs: then the last part turns what the others have summed.
        for (order, interleaved) in [(Order::OutIn, false), (Order::OutIn, true), (Order::InOut, true)] {
            let mut layer = layer(&mut Random(46), [4, 2, 40, 16], [68; 4], order, true);
            layer.rotary = Some(RotaryEmbedding { dim: 40, interleaved, base: 100.0, positions: 30 });
            for form in FORMS {
                let problem = layer.problem(2, 25, 25);
                check_layer(gpu, &layer, &problem, &Call::default(), Element::F32, &forced(form));
                let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
                let prepared = resident.prepare(gpu.library(), &problem, &Call::default(), &forced(form));
                let [turned, apart] = turning(&prepared.expect("valid"));
                assert!(turned > 5 && apart == 0, "{turned} {apart}");
            }
        }
    }
}

/// Prompts of different lengths into the cache, then token by token; each output as if everything had been given at once.
#[test]
fn decoding_with_a_cache_matches_whole_sequences() {
    // One projection for query, key and value together, and one for each; columns of a value and those of a key that turn, and
    // whether that is in the projection.
    let kinds = [(true, 6, 4, [0, 1]), (false, 6, 4, [0, 2]), (true, 8, 8, [1, 0]), (false, 8, 8, [2, 0])];
    for (gpu, (alike, dv, dim, turns)) in gpus().iter().flat_map(|gpu| kinds.map(|kind| (gpu, kind))) {
        let (lengths, room, width, new) = ([5u32, 2, 7], 12u32, 20u32, 3u32);
        let mut layer = layer(&mut Random(42), [4, 2, 8, dv], [width; 4], Order::OutIn, true);
        if !alike {
            // The same numbers as the weights of another matrix: three matrices that cannot be one.
            layer.value.order = Order::InOut;
        }
        layer.rotary = Some(RotaryEmbedding { dim, interleaved: false, base: 100.0, positions: 32 });
        let mut r = Random(43);
        let sequences: Vec<Vec<f32>> =
            lengths.iter().map(|n| r.signed_vec(((n + new) * width) as usize, 1.0)).collect();
        let mut causal = Call::default();
        let whole: Vec<Vec<f64>> = (sequences.iter().zip(lengths))
            .map(|(x, n)| {
                let mut problem = layer.problem(1, n + new, n + new);
                problem.causal = Causal::TopLeft;
                let inputs = LayerInputs { query: x, ..Default::default() };
                reference::layer::<f64>(&layer, &problem, &causal, &inputs).expect("valid").out
            })
            .collect();
        let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F32).expect("fits");
        causal.cache = true;
        let nan = |n: u32| upload(gpu, bytemuck::cast_slice(&vec![f32::NAN; n as usize]));
        let (k, v, starts) = (nan(3 * 2 * room * 8), nan(3 * 2 * room * dv), upload(gpu, &[0; 12]));
        let mut have = [0u32; 3];
        // The prompt padded to 7 rows, of which only the first count; then one row a step.
        for step in 0..=new {
            let rows = if step == 0 { 7 } else { 1 };
            let prepared = resident
                .prepare(gpu.library(), &layer.problem(3, rows, room), &causal, &Options::default())
                .expect("valid");
            assert_eq!(turning(&prepared), turns, "{:?}", prepared.reasons());
            let mut x = vec![0.5f32; (3 * rows * width) as usize];
            for (b, sequence) in sequences.iter().enumerate() {
                let n = (if step == 0 { lengths[b] } else { 1 } * width) as usize;
                let at = (have[b] * width) as usize;
                x[b * (rows * width) as usize..][..n].copy_from_slice(&sequence[at..at + n]);
            }
            let (x, y) = (upload(gpu, bytemuck::cast_slice(&x)), nan(3 * rows * width));
            gpu.queue().write_buffer(&starts, 0, bytemuck::cast_slice(&have));
            let mut buffers = LayerBuffers::new(x.slice(..), y.slice(..));
            buffers.cache = Some(CacheBuffers { k: k.slice(..), v: v.slice(..), starts: starts.slice(..) });
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            prepared.encode(&mut encoder, &buffers).expect("valid");
            gpu.queue().submit([encoder.finish()]);
            let got: Vec<f32> = bytemuck::pod_collect_to_vec(&gpu.read(y.slice(..)).expect("read"));
            for b in 0..3 {
                let n = if step == 0 { lengths[b] } else { 1 };
                let (at, count) = ((have[b] * width) as usize, (n * width) as usize);
                let got = &got[b * (rows * width) as usize..][..count];
                assert_close(got, &whole[b][at..at + count], 2e-5, &format!("batch {b} step {step}"));
                have[b] += n;
            }
        }
    }
}

#[test]
fn wrong_layers_and_calls_are_errors() {
    let gpu = &gpus()[0];
    let good = layer(&mut Random(44), [4, 2, 8, 6], [20; 4], Order::OutIn, true);
    let make = |change: &dyn Fn(&mut Layer)| {
        let mut layer = good.clone();
        change(&mut layer);
        MultiHeadAttention::new(gpu.library(), gpu.queue(), &layer, Element::F16).map(|_| ())
    };
    assert_eq!(make(&|_| ()), Ok(()));
    assert_eq!(make(&|l| l.kv_heads = 3), Err(Error::KvHeads { heads: 4, kv_heads: 3 }));
    assert_eq!(
        make(&|l| l.value.weight.truncate(239)),
        Err(Error::Length { field: "value weight", got: 239, want: 240 })
    );
    assert_eq!(make(&|l| l.out.bias = Some(vec![0.0; 3])), Err(Error::Length { field: "out bias", got: 3, want: 20 }));
    let rotary = RotaryEmbedding { dim: 4, interleaved: true, base: 100.0, positions: 2 };
    let turning = |change: &dyn Fn(&mut RotaryEmbedding)| {
        make(&|l| {
            let mut rotary = rotary;
            change(&mut rotary);
            l.rotary = Some(rotary);
        })
    };
    assert_eq!(turning(&|_| ()), Ok(()));
    for base in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        assert!(matches!(turning(&|r| r.base = base), Err(Error::Number { field: "rotary.base", .. })), "{base}");
    }
    assert_eq!(turning(&|r| r.dim = 10), Err(Error::TooLarge { field: "rotary.dim", value: 10, limit: 8 }));
    // Terabytes, which must not be asked for.
    assert!(matches!(
        turning(&|r| r.positions = u32::MAX),
        Err(Error::Room { field: "rotary table", unit: "bytes", .. })
    ));
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &good, Element::F32).expect("valid");
    let x = vec![0.0; 2 * 3 * 20];
    let inputs = LayerInputs { query: &x, ..Default::default() };
    let run = |change: &dyn Fn(&mut Problem, &mut Call)| {
        let (mut problem, mut call) = (good.problem(2, 3, 3), Call::default());
        change(&mut problem, &mut call);
        resident.forward(gpu, &problem, &call, &inputs).map(|_| ())
    };
    assert_eq!(run(&|_, _| ()), Ok(()));
    assert_eq!(run(&|p, _| p.head_dim = 4), Err(Error::LayerSize { field: "head_dim", got: 4, want: 8 }));
    assert_eq!(run(&|p, _| p.seq_kv = 4), Err(Error::LayerSize { field: "seq_kv", got: 4, want: 3 }));
    assert_eq!(run(&|p, _| (p.seq_q, p.seq_kv) = (4, 4)), Err(Error::Length { field: "query", got: 120, want: 160 }));
    assert_eq!(run(&|_, c| c.sources = Sources::Key), Err(Error::Missing { field: "key" }));
    assert_eq!(run(&|p, _| p.key_lengths = true), Err(Error::Missing { field: "key_lengths" }));
    assert!(matches!(run(&|_, c| c.cache = true), Err(Error::Conflict { left: "cache", .. })));
    let pages = Some(Paged { pages: 2, page_size: 3 });
    let refused = run(&|p, _| p.paged = pages);
    assert!(matches!(refused, Err(Error::Conflict { left: "paged", right: "the layer", .. })), "{refused:?}");
    assert!(matches!(run(&|p, _| p.element = Element::F16), Err(Error::Conflict { left: "element", .. })));
    // A row beyond the table would turn like its last one.
    let mut short = good.clone();
    short.rotary = Some(rotary);
    let short = MultiHeadAttention::new(gpu.library(), gpu.queue(), &short, Element::F32).expect("valid");
    let prepare = |rows, room, cache| {
        let mut call = Call::default();
        call.cache = cache;
        short.prepare(gpu.library(), &good.problem(2, rows, room), &call, &Options::default()).map(|_| ())
    };
    assert_eq!(prepare(2, 2, false), Ok(()));
    for refused in [prepare(3, 3, false), prepare(1, 3, true)] {
        let error = refused.expect_err("two positions").to_string();
        assert!(error.ends_with("bound by rotary.positions, is 3; the limit is 2"), "{error}");
    }
}
