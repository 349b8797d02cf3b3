//! Rotations against their reference.

use wgpu_attention::operations::{Positions, Rotation, RotationBuffers};
use wgpu_attention::{Element, Elements, Error, Gpu, Options, Strides, reference};

use crate::support::operations::run;
use crate::support::staged::Guarded;
use crate::support::{Random, Tensor, floor, gpus};
use crate::{guarded, read};

/// One rotation against its reference, in place and not.
fn check_rotation(gpu: &Gpu, rotation: &Rotation, seed: u64) {
    let mut r = Random(seed);
    let [batch, heads, rows, dim] = [rotation.batch, rotation.heads, rotation.rows, rotation.head_dim];
    let at = |s: &Strides, b: u32, h: u32, row: u32| {
        (s.offset + u64::from(b) * s.batch + u64::from(h) * s.head + u64::from(row) * s.row) as usize
    };
    let end = |s: &Strides| at(s, batch - 1, heads - 1, rows - 1) + dim as usize;
    let x = Tensor::new(rotation.element, &r.signed_vec(end(&rotation.x), 2.0));
    let table = Rotation::table(rotation.table_rows, rotation.rotary_dim, 100.0);
    // Some beyond the table.
    let positions: Vec<u32> = (0..rotation.position_count()).map(|_| r.below(rotation.table_rows + 3)).collect();
    let y = rotation.y.unwrap_or(rotation.x);
    let nan = Tensor::new(rotation.element, &vec![f32::NAN; end(&y)]);
    let tensor = |tensor: &Tensor| guarded(gpu, tensor.elements().bytes());
    let (from, to) = (tensor(&x), rotation.y.map(|_| tensor(&nan)));
    let [angles, places] = [guarded(gpu, &table), guarded(gpu, &positions)];
    let operation = gpu.library().rotate(rotation, &Options::default()).unwrap_or_else(|e| panic!("{e}: {rotation:?}"));
    let mut buffers = RotationBuffers::new(from.slice(), angles.slice(), places.slice());
    buffers.y = to.as_ref().map(Guarded::slice);
    run(gpu, &operation, &buffers);
    let got = Tensor::from_bytes(rotation.element, &read(gpu, to.as_ref().unwrap_or(&from))).widened();
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
                for (dim, rotated) in [(8, 8), (72, 72), (64, 20), (2, 2), (38, 12)] {
                    if element != Element::F32 && !interleaved && rotated % 4 != 0 {
                        continue;
                    }
                    let mut r = Rotation::new(2, 3, 19, dim, 30);
                    (r.rotary_dim, r.interleaved, r.element) = (rotated, interleaved, element);
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

/// Pairs (1, 0) rotated by "angles" of any cosine c and sine s become (c, s), rounded once.
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
        let x = Tensor::new(element, &[1.0, 0.0, 1.0, 0.0].repeat(numbers.len()));
        let table: Vec<f32> = numbers.iter().flat_map(|&x| [x, -x, -x, x]).collect();
        let positions: Vec<u32> = (0..rotation.position_count() as u32).collect();
        let want = Tensor::new(element, &numbers.iter().flat_map(|&x| [x, -x, -x, x]).collect::<Vec<_>>());
        for gpu in gpus() {
            let rows = guarded(gpu, x.elements().bytes());
            let (angles, positions) = (guarded(gpu, &table), guarded(gpu, &positions));
            let operation = gpu.library().rotate(&rotation, &Options::default()).unwrap();
            run(gpu, &operation, &RotationBuffers::new(rows.slice(), angles.slice(), positions.slice()));
            let got = Tensor::from_bytes(element, &read(gpu, &rows)).widened();
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
    let buffers = [(); 3].map(|()| guarded(gpu, &[0u8; 16]));
    let [x, table, positions] = buffers.each_ref().map(Guarded::slice);
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let error = operation.encode(&mut encoder, &RotationBuffers::new(x, table, positions));
    assert_eq!(error, Err(Error::Missing { field: "y" }));
}
