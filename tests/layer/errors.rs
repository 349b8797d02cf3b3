//! What is wrong with layers and their calls.

use wgpu_attention::multihead::RotaryEmbedding;
use wgpu_attention::multihead::{Call, Layer, LayerInputs, MultiHeadAttention, Sources};
use wgpu_attention::operations::Order;
use wgpu_attention::{Element, Error, Options, Paged, Problem};

use crate::layers::layer;
use crate::support::{Random, gpus};

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
    let rotated = |change: &dyn Fn(&mut RotaryEmbedding)| {
        make(&|l| {
            let mut rotary = rotary;
            change(&mut rotary);
            l.rotary = Some(rotary);
        })
    };
    assert_eq!(rotated(&|_| ()), Ok(()));
    for base in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        assert!(matches!(rotated(&|r| r.base = base), Err(Error::Number { field: "rotary.base", .. })), "{base}");
    }
    assert_eq!(rotated(&|r| r.dim = 10), Err(Error::TooLarge { field: "rotary.dim", value: 10, limit: 8 }));
    // Terabytes, which must not be asked for.
    assert!(matches!(
        rotated(&|r| r.positions = u32::MAX),
        Err(Error::Room { field: "rotary table", unit: "bytes", .. })
    ));
    let resident = MultiHeadAttention::new(gpu.library(), gpu.queue(), &good, Element::F32).expect("valid");
    let x = vec![0.0; 2 * 3 * 20];
    let inputs = LayerInputs::new(&x);
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
    // A row beyond the table would be rotated like its last one.
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
