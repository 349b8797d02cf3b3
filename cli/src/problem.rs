//! The options that describe a problem, the same for every command that makes one up, and operands for it.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use wgpu_attention::{Bias, Broadcast, Causal, Element, Packed, Paged, Problem};

use crate::archive::Archive;
use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::json;
use crate::options::{self, ShapeArg, TermArgs};

/// The share of the keys that a random mask leaves visible where none is given.
const DENSITY: f64 = 0.75;

/// The options that make a problem up, beside those of [`TermArgs`].
pub const MADE: [&str; 9] =
    ["shape", "value_dim", "alibi", "mask", "bias", "key_lengths", "sinks", "packed", "page_size"];

/// The other options of a problem, which one from a file takes too.
pub const STORED: [&str; 3] = ["problem", "save_problem", "dtype"];

/// What a problem is.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Problem")]
pub struct ProblemArgs {
    /// Batch, query heads, key/value heads, queries, keys and head dimension (repeatable)
    #[arg(long, value_name = "B,H,HKV,SQ,SKV,D")]
    pub shape: Vec<ShapeArg>,
    /// Read the problem from a JSON file, as --save-problem writes it, instead of from options (repeatable)
    #[arg(long, value_name = "FILE", conflicts_with_all = MADE, conflicts_with = "TermArgs")]
    pub problem: Vec<PathBuf>,
    /// Write the problem to a JSON file
    #[arg(long, value_name = "FILE")]
    pub save_problem: Option<PathBuf>,
    /// Last axis of v and out (default: the head dimension)
    #[arg(long, value_name = "N")]
    pub value_dim: Option<u32>,
    /// Type of q, k, v and out
    #[arg(long, value_parser = options::element())]
    pub dtype: Option<Element>,
    #[command(flatten)]
    pub terms: TermArgs,
    /// ALiBi with the slopes of its paper
    #[arg(long)]
    pub alibi: bool,
    /// Boolean mask: random, with this share of the keys visible (0 to 1), or the tensor "mask" of a safetensors file
    #[arg(long, value_name = "SHARE|FILE")]
    pub mask: Option<MaskArg>,
    /// Additive bias: "random", f32 [1, heads, queries, keys], or the tensor "bias" of a safetensors file
    #[arg(long, value_name = "random|FILE")]
    pub bias: Option<BiasArg>,
    /// Keys of each batch, or of all of them
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub key_lengths: Vec<u32>,
    /// A random attention sink for each head
    #[arg(long)]
    pub sinks: bool,
    /// Sequences laid end to end instead of batches, with lengths in equal steps up to SQ and SKV
    #[arg(long, conflicts_with = "page_size")]
    pub packed: bool,
    /// Keys and values in pages of so many keys, in random order
    #[arg(long, value_name = "N")]
    pub page_size: Option<u32>,
}

/// Where a mask comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum MaskArg {
    Random(f64),
    File(PathBuf),
}

impl FromStr for MaskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<f64>() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(MaskArg::Random(share)),
            Ok(_) => Err("the share of visible keys is from 0 to 1".into()),
            Err(_) => Ok(MaskArg::File(text.into())),
        }
    }
}

/// Where a bias comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum BiasArg {
    Random,
    File(PathBuf),
}

impl FromStr for BiasArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(if text == "random" { BiasArg::Random } else { BiasArg::File(text.into()) })
    }
}

/// A problem, and what its operands hold beside random numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    pub problem: Problem,
    pub values: Values,
}

/// What operands hold where it is not random or made up.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// The share of the keys that a random mask leaves visible.
    pub density: f64,
    pub mask: Option<Vec<u8>>,
    pub bias: Option<Floats>,
    pub key_lengths: Option<Vec<u32>>,
    /// Offset of the causal rule in every batch.
    pub offset: Option<i32>,
}

impl Default for Values {
    fn default() -> Self {
        Values { density: DENSITY, mask: None, bias: None, key_lengths: None, offset: None }
    }
}

impl From<Problem> for Given {
    fn from(problem: Problem) -> Self {
        Given { problem, values: Values::default() }
    }
}

impl std::fmt::Display for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.problem;
        write!(f, "{} {}", ShapeArg::of(p), p.element)?;
        if p.causal != Causal::None {
            write!(f, " causal {}", p.causal)?;
        }
        match terms(p).as_str() {
            "" => Ok(()),
            terms => write!(f, ", {terms}"),
        }
    }
}

/// What a problem has beside sizes, type and causal rule, in a few words; empty for a plain one.
pub fn terms(p: &Problem) -> String {
    let mut words = Vec::new();
    let mut add = |there: bool, word: String| {
        if there {
            words.push(word)
        }
    };
    add(p.value_dim != p.head_dim, format!("value dim {}", p.value_dim));
    let side = |side: Option<u32>| side.map_or("∞".into(), |side| side.to_string());
    let window = p.window.left.is_some() || p.window.right.is_some();
    add(window, format!("window {}:{}", side(p.window.left), side(p.window.right)));
    add(p.scale.is_some(), format!("scale {}", p.scale.unwrap_or_default()));
    add(p.softcap.is_some(), format!("softcap {}", p.softcap.unwrap_or_default()));
    add(p.alibi, "alibi".into());
    add(p.bias.is_some(), "bias".into());
    add(p.mask.is_some(), "mask".into());
    add(p.key_lengths, "key lengths".into());
    add(p.key_positions, "key positions".into());
    add(p.sinks, "sinks".into());
    add(p.packed.is_some(), "packed".into());
    add(p.paged.is_some(), format!("pages of {}", p.paged.map_or(0, |paged| paged.page_size)));
    add([p.q, p.k, p.v, p.out] != [Default::default(); 4], "other layout".into());
    words.join(", ")
}

/// Lengths in equal steps up to the longest: the last one is full.
pub fn steps(batch: u32, longest: u32) -> Vec<u32> {
    let length = |b: u64| (u64::from(longest) * (b + 1)).div_ceil(u64::from(batch)) as u32;
    (0..u64::from(batch)).map(length).collect()
}

/// Where sequences begin and end whose lengths are in equal steps, but `total` together.
pub fn boundaries(batch: u32, longest: u32, total: u32) -> Vec<u32> {
    let mut lengths = steps(batch, longest);
    let mut left = i64::from(total) - lengths.iter().map(|&length| i64::from(length)).sum::<i64>();
    // What is too much is taken from the last ones, and what is too little is added to the first ones.
    for length in lengths.iter_mut().rev() {
        let less = (-left).clamp(0, (*length).into());
        (*length, left) = (*length - less as u32, left + less);
    }
    for length in &mut lengths {
        let more = left.clamp(0, (longest - *length).into());
        (*length, left) = (*length + more as u32, left - more);
    }
    let mut end = 0;
    let ends = lengths.iter().map(|length| {
        end += length;
        end
    });
    std::iter::once(0).chain(ends).collect()
}

impl ProblemArgs {
    /// The problems, checked. Without a shape and a file they are the default ones with the terms.
    pub fn problems(&self, default: &[Problem]) -> Result<Vec<Given>> {
        let files = self.problem.iter().map(|path| self.read(path));
        let default = if self.problem.is_empty() && self.shape.is_empty() { default } else { &[] };
        let shapes = self.shape.iter().map(ShapeArg::problem).chain(default.iter().cloned());
        let shapes = shapes.map(|problem| self.with_terms(problem));
        let problems = files.chain(shapes).collect::<Result<Vec<_>>>()?;
        self.save(&problems)?;
        Ok(problems)
    }

    /// The one problem that a command takes.
    pub fn one(&self) -> Result<Given> {
        let mut problems = self.problems(&[])?;
        match problems.len() {
            1 => Ok(problems.remove(0)),
            got => Err(Error::OneProblem { got }),
        }
    }

    fn read(&self, path: &Path) -> Result<Given> {
        let mut problem: Problem = json::read(path, "problem")?;
        problem.element = self.dtype.unwrap_or(problem.element);
        problem.check().map_err(|source| Error::Problem { path: path.into(), source })?;
        Ok(problem.into())
    }

    /// A problem of the given sizes with the terms that the options name.
    pub fn with_terms(&self, mut problem: Problem) -> Result<Given> {
        problem = problem.with_layout(self.terms.layout.into());
        problem.value_dim = self.value_dim.unwrap_or(problem.value_dim);
        problem.element = self.dtype.unwrap_or(problem.element);
        self.terms.apply(&mut problem);
        (problem.alibi, problem.sinks) = (self.alibi, self.sinks);
        let mut values = Values { offset: self.terms.causal_offset, ..Values::default() };
        self.mask(&mut problem, &mut values)?;
        self.bias(&mut problem, &mut values)?;
        problem.key_lengths = !self.key_lengths.is_empty();
        if problem.key_lengths {
            let batch = problem.batch as usize;
            let lengths = match &self.key_lengths[..] {
                [length] => vec![*length; batch],
                lengths if lengths.len() == batch => lengths.to_vec(),
                lengths => return Err(Error::KeyLengths { got: lengths.len(), batch }),
            };
            values.key_lengths = Some(lengths);
        }
        if self.packed {
            let total = |longest| steps(problem.batch, longest).iter().sum();
            problem.packed = Some(Packed { total_q: total(problem.seq_q), total_kv: total(problem.seq_kv) });
        }
        if let Some(page_size) = self.page_size {
            // The check below refuses pages of no keys.
            let pages = problem.batch.saturating_mul(problem.seq_kv.div_ceil(page_size.max(1)));
            problem.paged = Some(Paged { pages, page_size });
        }
        problem.check()?;
        Ok(Given { problem, values })
    }

    fn mask(&self, problem: &mut Problem, values: &mut Values) -> Result<()> {
        problem.mask = match &self.mask {
            None => None,
            Some(MaskArg::Random(density)) => {
                values.density = *density;
                Some(Broadcast([1, 1, problem.seq_q, problem.seq_kv]))
            }
            Some(MaskArg::File(path)) => {
                let archive = Archive::read(path)?;
                values.mask = Some(archive.bools("mask")?.to_vec());
                Some(archive.broadcast("mask", "mask")?)
            }
        };
        Ok(())
    }

    fn bias(&self, problem: &mut Problem, values: &mut Values) -> Result<()> {
        problem.bias = match &self.bias {
            None => None,
            Some(BiasArg::Random) => {
                let shape = Broadcast([1, problem.heads, problem.seq_q, problem.seq_kv]);
                Some(Bias { shape, element: Element::F32 })
            }
            Some(BiasArg::File(path)) => {
                let archive = Archive::read(path)?;
                let bias = archive.floats("bias")?.clone();
                let shape = archive.broadcast("bias", "bias")?;
                let element = bias.element();
                values.bias = Some(bias);
                Some(Bias { shape, element })
            }
        };
        Ok(())
    }

    fn save(&self, problems: &[Given]) -> Result<()> {
        let Some(path) = &self.save_problem else { return Ok(()) };
        let [given] = problems else { return Err(Error::OneProblem { got: problems.len() }) };
        json::write(path, &given.problem)
    }
}
