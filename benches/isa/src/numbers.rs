//! The GPU kernels by numbers: what a tile of keys takes ([`Work`]), what AMD's compiler made of it (the records), and the bound that
//! follows for five classes of cards.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use serde::Deserialize;
use wgpu_attention::internal::Variant;
use wgpu_attention::internal::kernel::fused::OperandSet;
use wgpu_attention::internal::model::{Unit, Work};
#[cfg(test)]
use wgpu_attention::proof::Trial;
#[cfg(test)]
use wgpu_attention::{Caps, Element, Kernel, Options, Plan, Problem, wgpu, with};

/// Lanes of a subgroup in the columns that are the same for all cards.
const LANES: u32 = 32;

/// Dims of q and k for `scores`, which has no bucket of dims of its own. In the other kernels all dims of the tile are used.
pub const HEAD_DIM: u32 = 64;

/// Dims of q and k that a variant is counted for.
pub fn head_dim(variant: &Variant) -> u32 {
    match variant {
        Variant::Flash(x) => x.tile.dims,
        Variant::Matrix(x) => x.tile.dims,
        _ => HEAD_DIM,
    }
}

/// A class of cards: what one unit (compute unit, streaming multiprocessor, core, dual subslice) does a clock.
///
/// Bytes of workgroup memory are those that reach registers: a lane that reads the same address as its neighbour counts too.
struct Class {
    name: &'static str,
    card: &'static str,
    units: f64,
    ghz: f64,
    /// Multiply-adds of f32.
    fma: f64,
    /// Size of cooperative matrices, and their multiply-adds, f16 operands and f32 sums.
    matrix: Option<(u32, f64)>,
    /// Lanes of a subgroup.
    lanes: u32,
    /// How often each element of an operand of cooperative matrices is loaded by a subgroup.
    copies: f64,
    /// Bytes of workgroup memory.
    shared: f64,
    /// Exponentials.
    exps: f64,
    /// Bytes a second from the cache that all units share, in 10⁹, where its maker states them.
    cache: Option<f64>,
    /// Bytes a second from memory, in 10⁹.
    memory: f64,
    sources: &'static str,
}

/// The machine model. Rates follow from the peak rates that the makers state, divided by units and clock; a rate that no document of
/// the maker states is said to be assumed.
const CLASSES: [Class; 5] = [
    Class {
        name: "integrated",
        card: "Intel Iris Xe, 96 EU",
        units: 6.0,
        ghz: 1.35,
        fma: 128.0,
        matrix: None,
        lanes: 32,
        copies: 1.0,
        shared: 128.0,
        exps: 32.0,
        cache: None,
        memory: 68.0,
        sources: "oneAPI GPU Optimization Guide, Xe-LP: 16 EUs of 8 lanes and 2 for extended mathematics, 128 bytes a clock for a dual \
                  subslice; LPDDR4x-4267 of 128 bits",
    },
    Class {
        name: "RDNA 3",
        card: "Radeon RX 7900 XTX",
        units: 96.0,
        ghz: 2.5,
        fma: 128.0,
        matrix: Some((16, 256.0)),
        // What AMD's compiler takes where it has the choice.
        lanes: 64,
        copies: 4.0,
        shared: 128.0,
        exps: 16.0,
        cache: Some(5300.0),
        memory: 960.0,
        sources: "AMD's product page: 61 TFLOP/s f32 with two instructions at once, 123 f16, 960 GB/s; AMD's launch of RDNA 3: links \
                  of 5.3 TB/s at peak to the dies of the Infinity Cache; RDNA whitepaper: 32 banks of 4 bytes, transcendentals at a \
                  quarter of 64 lanes; \
                  RDNA 3 ISA guide: each 16 of 64 lanes hold the same A and B",
    },
    Class {
        name: "Ada",
        card: "GeForce RTX 4090",
        units: 128.0,
        ghz: 2.52,
        fma: 128.0,
        matrix: Some((16, 256.0)),
        lanes: 32,
        copies: 1.0,
        shared: 128.0,
        exps: 16.0,
        cache: None,
        memory: 1008.0,
        sources: "Ada whitepaper: 82.6 TFLOP/s f32, 165.2 f16 with f32 sums, dense; CUDA programming guide, compute capability 8.9: 32 \
                  banks of 4 bytes, 16 special functions a clock",
    },
    Class {
        name: "Hopper",
        card: "H100 SXM5",
        units: 132.0,
        ghz: 1.83,
        fma: 128.0,
        matrix: Some((16, 2048.0)),
        lanes: 32,
        copies: 1.0,
        shared: 128.0,
        exps: 16.0,
        // 5120 bytes a clock.
        cache: Some(9370.0),
        memory: 3350.0,
        sources: "Hopper whitepaper: 989 TFLOP/s f16, dense (by instructions that Vulkan cannot reach: cooperative matrices get less); \
                  data sheet of the H100: 3.35 TB/s; CUDA programming guide, compute capability 9.0; A100 whitepaper for the \
                  second-level cache: 5120 bytes a clock, assumed \
                  to be no less here",
    },
    Class {
        name: "Apple",
        card: "M1 Max, 32 cores",
        units: 32.0,
        ghz: 1.296,
        fma: 128.0,
        matrix: Some((8, 128.0)),
        lanes: 32,
        copies: 1.0,
        shared: 128.0,
        exps: 32.0,
        cache: None,
        memory: 400.0,
        sources: "Apple's launch of M1 Max: 10.4 TFLOP/s, 400 GB/s; philipturner/metal-benchmarks: 128 lanes a core, f16 no faster than f32; \
                  threadgroup memory and exponentials are assumed, Apple states neither, and measurements by others have 64 or \
                  128 bytes",
    },
];

impl Class {
    /// Bytes a clock of a unit.
    fn per_clock(&self, bytes: f64) -> f64 {
        bytes / (self.units * self.ghz)
    }

    /// What the library's model knows of a unit.
    fn unit(&self) -> Unit {
        let &Class { fma, matrix, lanes, copies, shared, exps, .. } = self;
        let (cache, memory) = (self.cache.map_or(f64::INFINITY, |of| self.per_clock(of)), self.per_clock(self.memory));
        Unit { fma, matrix, lanes, copies, shared, exps, cache, memory }
    }

    /// The share of the peak rate of the arithmetic that a kernel uses which it can reach if all else overlaps perfectly, and what
    /// bounds it; `None` where the class has no such arithmetic.
    fn bound(&self, variant: &Variant, work: &Work) -> Option<(f64, &'static str)> {
        let unit = self.unit();
        let rate = match variant {
            Variant::Matrix(x) => self.matrix.filter(|&(size, _)| size == x.tile.size)?.1,
            _ => self.fma,
        };
        // The few rows of `split` are those of a workgroup: no other one reads the keys.
        let work = match variant {
            Variant::Split(_) => Work { cached_bytes: 0.0, streamed_bytes: work.cached_bytes, ..*work },
            _ => *work,
        };
        let clocks = unit.clocks(variant, &work).into_iter().zip(["a", "w", "e", "c", "m"]);
        // The first of equals: arithmetic, if it is as slow as anything else.
        let (clocks, by) = clocks.reduce(|most, next| if next.0 > most.0 { next } else { most })?;
        Some((work.madds / rate / clocks, by))
    }
}

/// A line of a record, see [`crate::Row`].
#[derive(Deserialize)]
struct Compiled {
    driver: String,
    variant: String,
    subgroup: u32,
    vgprs: u64,
    subgroups_per_simd: u64,
}

/// One variant for each tile and for f32 and f16: whole vectors, no operands beside q, k and v, f16 with the adapter's own type where
/// the kernel has that.
pub fn representatives() -> Vec<Variant> {
    let plain = |variant: &Variant| {
        let format = match variant {
            Variant::Scores(x) if !x.full => x.format,
            Variant::Values(x) if x.out == x.format.element => x.format,
            Variant::Flash(x) if x.operands == OperandSet::Bare && !x.carry => x.format,
            Variant::Matrix(x) if x.operands == OperandSet::Bare && x.varying => x.format(),
            Variant::Split(x) if !x.full => x.format,
            _ => return false,
        };
        let single = format.element.to_string() == "f32";
        let half = format.element.to_string() == "f16" && (format.native || matches!(variant, Variant::Split(_)));
        format.vector && (single || half)
    };
    Variant::all().into_iter().filter(|variant| crate::for_gpus(variant) && plain(variant)).collect()
}

/// The document: the kernels, then the machine model.
pub fn document(records: &[PathBuf]) -> Result<String, Box<dyn std::error::Error>> {
    let mut chips = Vec::new();
    for path in records {
        let lines = fs::read_to_string(path)?;
        let rows = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Compiled>, _>>()?;
        chips.push((path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(), rows));
    }
    let mut text = String::from("<!-- Written by wgpu-attention-isa --numbers, see benches/isa/run. -->\n\n");
    let driver = chips.iter().flat_map(|(_, rows)| rows).map(|row| row.driver.as_str()).next().unwrap_or("no record");
    let names: Vec<_> = chips.iter().map(|(name, _)| name.as_str()).collect();
    let classes = CLASSES.map(|class| class.name);
    writeln!(text, "Compiler: {driver}.\n")?;
    let head = ["kernel", "multiply-adds", "keys", "workgroup loads", "buffer loads", "barriers", "bytes"];
    let head: Vec<_> = head.into_iter().chain(names).chain(classes).collect();
    writeln!(text, "| {} |\n|{}", head.join(" | "), "---|".repeat(head.len()))?;
    for variant in representatives() {
        let work = Work::of(&variant, head_dim(&variant), LANES).ok_or_else(|| format!("{variant} is not counted"))?;
        write!(text, "| {variant} | {} | {} | ", work.madds, work.keys)?;
        write!(text, "{:.3} | {:.3} | ", work.shared_loads / work.madds, work.buffer_loads / work.madds)?;
        write!(text, "{} | {} |", work.barriers, variant.workgroup_bytes())?;
        for (_, rows) in &chips {
            match rows.iter().find(|row| row.variant == variant.to_string()) {
                Some(row) => write!(text, " {} × {} of {} |", row.vgprs, row.subgroups_per_simd, row.subgroup)?,
                None => write!(text, " – |")?,
            }
        }
        for class in &CLASSES {
            let work = Work::of(&variant, head_dim(&variant), class.lanes).unwrap_or(work);
            match class.bound(&variant, &work) {
                Some((share, by)) => write!(text, " {:.0} % {by} |", 100.0 * share)?,
                None => write!(text, " – |")?,
            }
        }
        text.push('\n');
    }
    text.push_str(&model()?);
    Ok(text)
}

/// The table of the machine model.
fn model() -> Result<String, std::fmt::Error> {
    let mut text = String::from(
        "\nThe machine model: what one unit does a clock.\n\n\
         | class | card | units | GHz | f32 multiply-adds | of matrices | workgroup bytes | exponentials | cache bytes | memory bytes | sources |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let known = |number: Option<f64>| number.map_or("–".to_owned(), |number| format!("{number:.1}"));
    for class in &CLASSES {
        let Class { name, card, units, ghz, fma, matrix, lanes, copies, shared, exps, cache, memory, sources } = *class;
        let (cache, memory) = (known(cache.map(|cache| class.per_clock(cache))), class.per_clock(memory));
        let matrix = matrix.map_or("–".to_owned(), |(size, rate)| {
            format!("{rate}, {size}×{size} by {lanes} lanes, loaded {copies} ×")
        });
        write!(
            text,
            "| {name} | {card} | {units} | {ghz} | {fma} | {matrix} | {shared} | {exps} | {cache} | {memory:.1} | "
        )?;
        writeln!(text, "{sources} |")?;
    }
    Ok(text)
}

/// The records of the repository, by name.
#[cfg(test)]
fn committed() -> (PathBuf, Vec<PathBuf>) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../record/radv-null");
    let mut records: Vec<_> = fs::read_dir(&folder)
        .expect("the folder is there")
        .map(|entry| entry.expect("it can be listed").path())
        .filter(|path| path.extension().is_some_and(|name| name == "jsonl"))
        .collect();
    records.sort();
    (folder, records)
}

#[test]
fn the_committed_table_is_what_the_records_give() {
    let (folder, records) = committed();
    assert!(!records.is_empty(), "no record in {}", folder.display());
    let found = fs::read_to_string(folder.join("numbers.md")).expect("benches/isa/run writes it");
    assert!(
        found == document(&records).expect("the records can be read"),
        "numbers.md is not up to date: run benches/isa/run"
    );
}

#[test]
fn a_bound_names_what_takes_longest() {
    let variant = representatives().into_iter().find(|variant| matches!(variant, Variant::Scores(_))).expect("scores");
    let work = Work {
        keys: 1,
        madds: 128.0,
        products: 128.0,
        shared_loads: 0.0,
        shared_bytes: 128.0,
        fragment_bytes: 0.0,
        buffer_loads: 0.0,
        cached_bytes: 0.0,
        streamed_bytes: 0.0,
        exps: 0.0,
        barriers: 0.0,
    };
    let ada = &CLASSES[2];
    assert_eq!(ada.bound(&variant, &work), Some((0.8, "a")));
    assert_eq!(ada.bound(&variant, &Work { shared_bytes: 512.0, ..work }), Some((0.25, "w")));
    // 1008 GB/s are 3.125 bytes a clock for each of 128 units at 2.52 GHz.
    assert_eq!(ada.bound(&variant, &Work { streamed_bytes: 31.25, ..work }), Some((0.1, "m")));
}

/// A device of the class, as the planner sees it.
#[cfg(test)]
fn caps(class: &Class) -> Caps {
    let limits = wgpu::Limits { max_compute_workgroup_storage_size: 49_152, ..wgpu::Limits::default() };
    let [least, most] = [Some(32), Some(class.lanes)];
    let matrices = class.matrix.map(|(size, _)| size).into_iter().collect();
    let proved = [32, 64, 128, 256, 512].map(|dims| {
        let of_matrix =
            |trial: &Trial| trial.kernel == Kernel::Matrix && trial.element == Element::F16 && !trial.operands;
        let mut trial = Trial::all().find(of_matrix).expect("matrix has a trial");
        trial.dims = dims;
        trial
    });
    let size = most.filter(|_| least == most);
    let lanes = with!(Caps::new(limits), subgroup_size: size, subgroup_min_size: least, subgroup_max_size: most);
    with!(lanes, f16: true, matrices: matrices, proved: proved.to_vec())
}

#[test]
fn the_planner_expects_the_slowest_unit_of_the_classes() {
    for class in &CLASSES {
        let (own, planned) = (class.unit(), Unit::of(&caps(class)));
        let rates = |unit: &Unit| [unit.fma, unit.shared, unit.exps, unit.cache, unit.memory];
        for (own, planned) in rates(&own).into_iter().zip(rates(&planned)) {
            assert!(planned <= own, "{}: {planned} of {own}", class.name);
        }
        assert_eq!((planned.lanes, planned.copies), (own.lanes, own.copies), "{}", class.name);
        assert_eq!(planned.matrix.map(|(size, _)| size), own.matrix.map(|(size, _)| size), "{}", class.name);
        assert!(planned.matrix.map(|(_, rate)| rate) <= own.matrix.map(|(_, rate)| rate), "{}", class.name);
        assert_eq!(planned.has_fast_matrices(), own.has_fast_matrices(), "{}", class.name);
    }
    // Each rate is that of one of them, rounded down.
    let planned = Unit::of(&caps(&CLASSES[0]));
    let least = |rate: fn(&Unit) -> f64| CLASSES.iter().map(|class| rate(&class.unit())).fold(f64::INFINITY, f64::min);
    for (planned, least) in [
        (planned.fma, least(|unit| unit.fma)),
        (planned.shared, least(|unit| unit.shared)),
        (planned.exps, least(|unit| unit.exps)),
        (planned.cache, least(|unit| unit.cache)),
        (planned.memory, least(|unit| unit.memory)),
    ] {
        assert!(planned <= least && planned > 0.99 * least, "{planned} of {least}");
    }
}

/// What the planner chooses on a device, and the clocks of each kernel that can run there by a class of cards.
#[cfg(test)]
fn compared(problem: &Problem, class: &Class) -> (Kernel, Vec<(Kernel, f64)>) {
    let (shape, caps) = (problem.check().expect("a problem"), caps(class));
    let own = Plan::new(&shape, &caps, &Options::default()).expect("a kernel runs it").choice().kernel();
    // A cache of which nothing is known counts as the slowest one.
    let unit = class.unit();
    let unit = Unit { cache: if unit.cache.is_finite() { unit.cache } else { Unit::of(&caps).cache }, ..unit };
    let kernels = [Kernel::Split, Kernel::Matrix, Kernel::Flash, Kernel::Unfused].into_iter();
    let of = |kernel| {
        let options = with!(Options::default(), kernel: Some(kernel));
        let plan = Plan::new(&shape, &caps, &options).ok()?;
        let mut variants: Vec<Variant> = Vec::new();
        for variant in plan.steps().iter().map(|step| step.variant) {
            // What joins the parts of the keys is done once for a row.
            if !variants.contains(&variant) && Work::of(&variant, 1, 1).is_some() {
                variants.push(variant);
            }
        }
        Some((kernel, unit.of_pair(&variants, &shape)))
    };
    (own, kernels.filter_map(of).collect())
}

/// Between these numbers of rows tiles are partly empty, and the classes differ.
#[test]
fn the_planner_chooses_what_each_class_of_cards_would() {
    let many = [32, 64, 96, 128, 129, 160, 192, 256, 512].map(|dim| (dim, [48, 64, 512], 1.05));
    let few = [32, 64, 96, 128].map(|dim| (dim, [1, 4, 8], 1.1));
    for (class, (dim, rows, most)) in
        CLASSES.iter().flat_map(|class| many.iter().chain(&few).map(move |of| (class, *of)))
    {
        for (element, rows) in
            [Element::F32, Element::F16, Element::Bf16].into_iter().flat_map(|of| rows.map(|n| (of, n)))
        {
            let (own, all) = compared(&with!(Problem::new(1, 8, rows, 4096, dim), element: element), class);
            let of = |kernel| all.iter().find(|(of, _)| *of == kernel).map(|(_, clocks)| *clocks).expect("it can run");
            let least = all.iter().map(|(_, clocks)| *clocks).fold(f64::INFINITY, f64::min);
            let what = format!("{}, {dim} dims {element}, {rows} rows: {own} of {all:?}", class.name);
            assert!(of(own) <= most * least, "{what}");
        }
    }
}
