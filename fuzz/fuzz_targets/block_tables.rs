//! Block tables, page pools and the planner: operands that pass the check give the same result as dense ones, operands that do
//! not pass are wrong, and a plan keeps to the limits of its device.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use wgpu_attention::{Causal, Element, Error, HostSlice, Inputs, Kernel, Layout, Operands, Options, Paged, Plan, with};
use wgpu_attention::{Problem, Shape, Strides, Window, reference};
use wgpu_attention_fuzz::devices;

/// Elements of a tensor that is still worth the time.
const ELEMENTS: u64 = 1 << 14;

#[derive(Arbitrary, Debug)]
struct Subject {
    /// Sizes as they are, or small ones.
    any_size: bool,
    sizes: [u32; 7],
    pages: u32,
    page_size: u32,
    key_lengths: Option<Vec<u32>>,
    table: Vec<u32>,
    causal: u8,
    window: [Option<u32>; 2],
    softcap: Option<f32>,
    element: u8,
    bshd: bool,
    strides: Option<[u64; 4]>,
    outputs: [bool; 2],
    device: u8,
    kernel: u8,
    scratch: u32,
}

impl Subject {
    fn problem(&self) -> Problem {
        let size = |n: u32, most: u32| if self.any_size { n } else { n % most + 1 };
        let [batch, heads, kv_heads, seq_q, seq_kv, head_dim, value_dim] = self.sizes;
        let mut problem =
            Problem::new(size(batch, 4), size(heads, 4), size(seq_q, 8), size(seq_kv, 40), size(head_dim, 20));
        problem.kv_heads = size(kv_heads, 4);
        problem.value_dim = size(value_dim, 20);
        problem.paged = Some(Paged { pages: size(self.pages, 16), page_size: size(self.page_size, 20) });
        problem.key_lengths = self.key_lengths.is_some();
        problem.causal = [Causal::None, Causal::TopLeft, Causal::BottomRight][usize::from(self.causal % 3)];
        problem.window = Window { left: self.window[0], right: self.window[1] };
        problem.softcap = self.softcap;
        problem.element = [Element::F32, Element::F16, Element::Bf16][usize::from(self.element % 3)];
        if self.bshd {
            problem = problem.with_layout(Layout::Bshd);
        }
        if let Some([offset, batch, head, row]) = self.strides {
            problem.k = Layout::Strided(Strides { offset, batch, head, row });
        }
        [problem.lse, problem.weights] = self.outputs;
        problem
    }
}

fuzz_target!(|subject: Subject| {
    let problem = subject.problem();
    let Ok(shape) = problem.check() else { return };
    plan(&subject, &shape);
    let pool = shape.k().extent().max(shape.v().extent());
    if problem.element == Element::F32
        && [shape.q().extent(), pool, shape.scores_len(), shape.block_table_len()].iter().all(|&n| n <= ELEMENTS)
    {
        compare(&subject, &problem, &shape);
    }
});

fn plan(subject: &Subject, shape: &Shape) {
    // The planner walks the rows of a window one by one.
    if shape.problem().seq_q > 1 << 12 {
        return;
    }
    let caps = &devices()[usize::from(subject.device % 4)];
    let kernel = Kernel::ALL.get(usize::from(subject.kernel)).copied();
    let scratch_budget = u64::from(subject.scratch);
    let Ok(plan) = Plan::new(shape, caps, &with!(Options::default(), kernel, scratch_budget)) else { return };
    for step in plan.steps() {
        let most = caps.limits.max_compute_workgroups_per_dimension;
        assert!(step.grid.iter().all(|n| (1..=most).contains(n)), "{:?}", step.grid);
        for bound in &step.bindings {
            assert!(bound.size > 0 && bound.size <= caps.limits.max_storage_buffer_binding_size, "{bound:?}");
            assert_eq!(bound.offset % u64::from(caps.limits.min_storage_buffer_offset_alignment), 0, "{bound:?}");
        }
    }
}

fn compare(subject: &Subject, problem: &Problem, shape: &Shape) {
    let values =
        |n: u64, seed: u64| -> Vec<f32> { (0..n).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0).collect() };
    let [q, k, v] = [(shape.q(), 1), (shape.k(), 2), (shape.v(), 3)].map(|(x, seed)| values(x.extent(), seed));
    let paged = problem.paged.expect("every subject has pages");
    let operands = with!(Operands::default(), key_lengths: subject.key_lengths.as_ref().map(HostSlice::from), block_table: Some((&subject.table).into()));
    let inputs = with!(Inputs::new(&q, &k, &v), operands);
    let each = shape.problem().seq_kv.div_ceil(paged.page_size) as usize;
    let batches = shape.problem().batch as usize;
    let lengths = subject.key_lengths.clone().unwrap_or(vec![shape.problem().seq_kv; batches]);
    // What the documentation asks of them, once more.
    let right = subject.table.len() == batches * each
        && lengths.len() == batches
        && lengths.iter().all(|&length| length <= shape.problem().seq_kv)
        && lengths.iter().zip(subject.table.chunks(each)).all(|(length, pages)| {
            pages[..length.div_ceil(paged.page_size) as usize].iter().all(|&page| page < paged.pages)
        });
    match shape.check_inputs(&inputs) {
        Ok(()) => assert!(right),
        Err(Error::Length { .. } | Error::Entry { .. }) => return assert!(!right),
        Err(error) => panic!("{error}"),
    }
    // Every key where a dense tensor has it; those beyond a sequence's length stay zero.
    let mut dense = problem.clone();
    dense.paged = None;
    (dense.k, dense.v) = (Layout::Bhsd, Layout::Bhsd);
    let gather = |x: &[f32], tensor: &wgpu_attention::internal::Tensor| {
        let dim = tensor.dim as usize;
        let mut out = Vec::new();
        for b in 0..shape.problem().batch {
            for head in 0..shape.problem().kv_heads {
                for j in 0..shape.problem().seq_kv {
                    let row = if j < lengths[b as usize] {
                        let page = subject.table[b as usize * each + (j / paged.page_size) as usize];
                        &x[tensor.at(page, head, j % paged.page_size) as usize..][..dim]
                    } else {
                        &[0.0; 512][..dim]
                    };
                    out.extend_from_slice(row);
                }
            }
        }
        out
    };
    let (k, v) = (gather(&k, shape.k()), gather(&v, shape.v()));
    let operands = with!(operands, block_table: None);
    let want = reference::attention::<f32>(&dense, &with!(inputs, k: (&k).into(), v: (&v).into(), operands));
    let got = reference::attention::<f32>(problem, &inputs);
    assert_eq!(got.expect("the operands are right"), want.expect("the operands are right"));
}
