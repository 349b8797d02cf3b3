//! Values of command line options.

use std::str::FromStr;

use clap::Args;
use wgpu_attention::{Causal, Element, Layout, Problem, Window};

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
    /// The dense problem of this shape, not checked.
    pub fn problem(&self) -> Problem {
        let [batch, heads, kv_heads, seq_q, seq_kv, head_dim] = self.0;
        let mut problem = Problem::new(batch, heads, seq_q, seq_kv, head_dim);
        problem.kv_heads = kv_heads;
        problem
    }
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq)]
pub enum CausalArg {
    #[default]
    None,
    /// The first query has the position of the first key
    TopLeft,
    /// The last query has the position of the last key
    BottomRight,
}

impl From<CausalArg> for Causal {
    fn from(causal: CausalArg) -> Self {
        match causal {
            CausalArg::None => Causal::None,
            CausalArg::TopLeft => Causal::TopLeft,
            CausalArg::BottomRight => Causal::BottomRight,
        }
    }
}

/// The name of a causal rule as the option takes it.
pub fn causal_name(causal: Causal) -> &'static str {
    match causal {
        Causal::None => "none",
        Causal::TopLeft => "top-left",
        Causal::BottomRight => "bottom-right",
        _ => "offset",
    }
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
    #[arg(long, value_enum, default_value_t)]
    pub causal: CausalArg,
    /// Factor of q·k (default 1/√D)
    #[arg(long, allow_negative_numbers = true)]
    pub scale: Option<f32>,
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
    /// Sets all fields but the layout, which is needed earlier, to read the tensors.
    pub fn apply(&self, problem: &mut Problem) {
        problem.causal = self.causal.into();
        (problem.scale, problem.softcap) = (self.scale, self.softcap);
        problem.window = Window { left: self.window_left, right: self.window_right };
    }
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, Default)]
pub enum ElementArg {
    #[default]
    F32,
    F16,
    Bf16,
}

impl From<ElementArg> for Element {
    fn from(element: ElementArg) -> Self {
        match element {
            ElementArg::F32 => Element::F32,
            ElementArg::F16 => Element::F16,
            ElementArg::Bf16 => Element::Bf16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
