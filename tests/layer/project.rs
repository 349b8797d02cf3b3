//! Projections against their reference.

use wgpu_attention::operations::{Operation, Order, Positions, Projection, ProjectionBuffers, Rotation};
use wgpu_attention::{Element, Elements, Error, Gpu, Options, reference};

use crate::support::operations::{nothing, run};
use crate::support::staged::Guarded;
use crate::support::{Random, Tensor, floor, gpus, small};
use crate::{FORMS, forced, guarded, read};

/// One projection against its reference, every element under its own bound, the rest of y untouched.
fn check_projection(gpu: &Gpu, p: &Projection, options: &Options, seed: u64) {
    let mut r = Random(seed);
    let x_end = p.x.offset + u64::from(p.batch - 1) * p.x.batch + u64::from(p.rows - 1) * p.x.row + u64::from(p.inputs);
    let major = if p.order == Order::InOut { p.inputs } else { p.outputs };
    let x = r.signed_vec(x_end as usize, 2.0);
    let weights = r.signed_vec((p.weight_offset + u64::from(major) * p.weight_row) as usize, 1.0);
    let w = Tensor::new(p.element, &weights);
    let biases = p.bias.map(|at| r.signed_vec((at + u64::from(p.outputs)) as usize, 3.0));
    let place = |b: u32, row: u32, c: u32| {
        let [b, h, row] = [b, c / p.head_columns, row].map(u64::from);
        (p.y.offset + b * p.y.batch + h * p.y.head + row * p.y.row) as usize + (c % p.head_columns) as usize
    };
    let end = place(p.batch - 1, p.rows - 1, p.outputs - 1).max(place(0, 0, p.outputs - 1)) + 1;
    let [rows, weight] = [guarded(gpu, &x), guarded(gpu, w.elements().bytes())];
    let given = biases.as_ref().map(|biases| guarded(gpu, biases));
    let y = guarded(gpu, &vec![f32::NAN; end]);
    let operation = gpu.library().project(p, options).unwrap_or_else(|error| panic!("{error}: {p:?}"));
    let mut buffers = ProjectionBuffers::new(rows.slice(), weight.slice(), y.slice());
    buffers.biases = given.as_ref().map(Guarded::slice);
    run(gpu, &operation, &buffers);
    let got: Vec<f32> = read(gpu, &y);
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
    let [big, small, y] = [1024, 16, 1024].map(|bytes| guarded(gpu, &vec![0u8; bytes]));
    let encode = |operation: &Operation<Projection>, weight: &Guarded, y: &Guarded| {
        let buffers = ProjectionBuffers::new(big.slice(), weight.slice(), y.slice());
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
                    let rotated = reference::rotary::<f64>(&rotation, Elements::F32(&[]), &table, &starts);
                    assert_eq!(rotated, Ok((vec![], vec![])));
                }
            }
        }
    }
}
