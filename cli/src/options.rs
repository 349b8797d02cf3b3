//! Values of command line options.

use std::fmt::Debug;
use std::str::FromStr;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use wgpu_attention::{Causal, Element, Form, Kernel, Layout, Precision, Problem, Window};

/// `B,H,HKV,SQ,SKV,D`: batch, query heads, key/value heads, queries, keys and head dimension.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShapeArg(pub [u32; 6]);

impl FromStr for ShapeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let want =
            || "six whole numbers B,H,HKV,SQ,SKV,D (batch, heads, kv_heads, seq_q, seq_kv, head_dim)".to_string();
        let sizes: Vec<u32> =
            text.split(',').map(|size| size.trim().parse().map_err(|_| want())).collect::<Result<_, _>>()?;
        Ok(ShapeArg(sizes.try_into().map_err(|_| want())?))
    }
}

impl std::fmt::Display for ShapeArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [b, h, hkv, sq, skv, d] = self.0;
        write!(f, "{b},{h},{hkv},{sq},{skv},{d}")
    }
}

impl ShapeArg {
    /// The sizes of a problem.
    pub fn of(p: &Problem) -> Self {
        ShapeArg([p.batch, p.heads, p.kv_heads, p.seq_q, p.seq_kv, p.head_dim])
    }

    /// The dense problem of this shape, not checked.
    pub fn problem(&self) -> Problem {
        let [batch, heads, kv_heads, seq_q, seq_kv, head_dim] = self.0;
        let mut problem = Problem::new(batch, heads, seq_q, seq_kv, head_dim);
        problem.kv_heads = kv_heads;
        problem
    }
}

/// Reads a value of the library by its name. The help lists the names, each with its line.
fn named<T>(names: &[(&'static str, &'static str)]) -> impl TypedValueParser<Value = T> + use<T>
where
    T: FromStr<Err: Debug> + Clone + Send + Sync + 'static,
{
    let value = |&(name, help): &(&'static str, &'static str)| {
        let value = PossibleValue::new(name);
        if help.is_empty() { value } else { value.help(help) }
    };
    let names: Vec<PossibleValue> = names.iter().map(value).collect();
    PossibleValuesParser::new(names).map(|name| name.parse().expect("the library has a value of this name"))
}

pub fn kernel() -> impl TypedValueParser<Value = Kernel> {
    named(&[
        ("unfused", "Scores, softmax and values, with the score matrix in between"),
        ("rows", "Fused, one query row per lane: for adapters that run on a CPU"),
        ("flash", "Fused, tiles shared by a workgroup: for GPUs"),
        ("matrix", "Fused, products by cooperative matrices: for GPUs that have them, f16 only"),
        ("split", "Fused, keys of a row divided among workgroups: for few queries, as in decoding"),
    ])
}

pub fn form() -> impl TypedValueParser<Value = Form> {
    named(&[
        ("tiled", "Tiles shared by a workgroup: for GPUs"),
        ("lanes", "One row per invocation: for adapters that run on a CPU"),
        ("emulated", "The matrix kernel on plain arithmetic, without hardware for matrices (slow)"),
    ])
}

pub fn precision() -> impl TypedValueParser<Value = Precision> {
    named(&[
        ("strict", "The sum has the digits of f32"),
        ("fast", "Each weight may be rounded to f16 once: the budget of f16 outputs is larger by that"),
    ])
}

pub fn element() -> impl TypedValueParser<Value = Element> {
    named(&Element::ALL.map(|element| (element.name(), "")))
}

/// The causal rules without an operand.
pub fn causal() -> impl TypedValueParser<Value = Causal> {
    named(&[
        ("none", ""),
        ("top-left", "The first query has the position of the first key"),
        ("bottom-right", "The last query has the position of the last key"),
    ])
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, Default)]
pub enum LayoutArg {
    /// [batch, heads, seq, dim]
    #[default]
    Bhsd,
    /// [batch, seq, heads, dim]
    Bshd,
}

impl From<LayoutArg> for Layout {
    fn from(layout: LayoutArg) -> Self {
        match layout {
            LayoutArg::Bhsd => Layout::Bhsd,
            LayoutArg::Bshd => Layout::Bshd,
        }
    }
}

/// The fields of a problem that do not follow from the tensors of a file.
#[derive(Args, Clone, Copy, Debug)]
pub struct TermArgs {
    /// Causal rule
    #[arg(long, value_parser = causal(), default_value_t)]
    pub causal: Causal,
    /// Causal rule by which the first query of every batch has this position
    #[arg(long, value_name = "N", allow_negative_numbers = true, conflicts_with = "causal")]
    pub causal_offset: Option<i32>,
    /// Factor of q·k (default 1/√D)
    #[arg(long, allow_negative_numbers = true)]
    pub score_scale: Option<f32>,
    /// Soft cap of the scores
    #[arg(long, allow_negative_numbers = true)]
    pub softcap: Option<f32>,
    /// Keys visible before the position of a query
    #[arg(long)]
    pub window_left: Option<u32>,
    /// Keys visible after the position of a query
    #[arg(long)]
    pub window_right: Option<u32>,
    /// Layout of q, k, v and out; with cu_seqlens_q they are [tokens, heads, dim]
    #[arg(long, value_enum, default_value_t)]
    pub layout: LayoutArg,
}

impl TermArgs {
    /// Sets all fields but the layout, which is needed earlier, to read the tensors. A causal rule that the problem has stays where none
    /// is given.
    pub fn apply(&self, problem: &mut Problem) {
        match (self.causal, self.causal_offset) {
            (_, Some(_)) => problem.causal = Causal::Offset,
            (Causal::None, None) => (),
            (causal, None) => problem.causal = causal,
        }
        (problem.scale, problem.softcap) = (self.score_scale, self.softcap);
        problem.window = Window { left: self.window_left, right: self.window_right };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that a parser takes are read, and are those of all values but some.
    #[test]
    fn names_are_those_of_the_library() {
        fn check<T: std::fmt::Display + Clone + Send + Sync + 'static>(
            parser: impl TypedValueParser<Value = T>,
            want: &[&str],
        ) {
            let command = clap::Command::new("x").no_binary_name(true).arg(clap::Arg::new("y").value_parser(parser));
            let names: Vec<String> = command
                .get_arguments()
                .next()
                .unwrap()
                .get_possible_values()
                .iter()
                .map(|value| value.get_name().to_string())
                .collect();
            assert_eq!(names, want);
            for name in names {
                let matches = command.clone().try_get_matches_from([&name]).unwrap();
                assert_eq!(matches.get_one::<T>("y").unwrap().to_string(), name);
            }
            assert!(command.try_get_matches_from(["sideways"]).is_err());
        }
        check(kernel(), &Kernel::ALL.map(Kernel::name));
        check(form(), &Form::ALL.map(Form::name));
        check(precision(), &Precision::ALL.map(Precision::name));
        check(element(), &Element::ALL.map(Element::name));
        check(causal(), &Causal::ALL.map(Causal::name)[..3]);
    }

    #[test]
    fn shapes_are_six_numbers() {
        let shape: ShapeArg = "1, 8,2,512,1024,64".parse().unwrap();
        assert_eq!(shape, ShapeArg([1, 8, 2, 512, 1024, 64]));
        assert_eq!(shape.to_string(), "1,8,2,512,1024,64");
        let problem = shape.problem();
        assert_eq!((problem.heads, problem.kv_heads, problem.seq_kv), (8, 2, 1024));
        for wrong in ["", "1,2,3", "1,2,3,4,5,6,7", "1,2,3,4,5,x", "1,2,3,4,5,-6", "1,2,3,4,5,99999999999"] {
            assert!(wrong.parse::<ShapeArg>().unwrap_err().contains("six whole numbers"), "{wrong}");
        }
        assert!("1,8,3,4,4,64".parse::<ShapeArg>().unwrap().problem().check().is_err());
    }
}
