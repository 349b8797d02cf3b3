//! How a picture shows weights: the choices of the reader, and the colours that follow from them.

use clap::ValueEnum;
use colorgrad::Gradient;
use serde::Serialize;

use crate::error::{Error, Result};

/// Decades that [`Scale::Log`] covers.
pub const DECADES: f32 = 4.0;

/// How colours follow weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// In proportion to the weight
    Linear,
    /// In proportion to the square root of the weight, which tells small weights apart
    #[default]
    Sqrt,
    /// In proportion to the logarithm of the weight, over the four decades below the end of the colour scale
    Log,
}

impl Scale {
    /// The place of a weight on the colour scale, from 0 to 1, where `max` is the weight at its end.
    pub fn share(self, weight: f32, max: f32) -> f32 {
        let linear = (weight / max).clamp(0.0, 1.0);
        match self {
            Scale::Linear => linear,
            Scale::Sqrt => linear.sqrt(),
            Scale::Log => (1.0 + linear.log10() / DECADES).max(0.0),
        }
    }

    /// The weight at a place on the colour scale: the inverse of [`Scale::share`].
    pub fn weight(self, share: f32, max: f32) -> f32 {
        match self {
            Scale::Linear => share * max,
            Scale::Sqrt => share * share * max,
            Scale::Log => 10f32.powf((share - 1.0) * DECADES) * max,
        }
    }
}

/// The choices of the reader, as options of a command.
#[derive(clap::Args, Clone, Debug, PartialEq)]
#[command(next_help_heading = "Picture")]
pub struct Style {
    /// How colours follow weights
    #[arg(long = "scale", id = "colour_scale", value_name = "SCALE", value_enum, default_value_t)]
    pub scale: Scale,
    /// Weight at the end of the colour scale; larger weights have the same colour [default: the largest weight drawn]
    #[arg(long, value_name = "WEIGHT")]
    pub max: Option<f32>,
    /// Leave out the first key, which draws most of the weight in many models; all queries stay, and the other weights of
    /// their rows are drawn as they are, so that a row adds up to less than 1
    #[arg(long)]
    pub skip_first: bool,
    /// Pixels that the heads of a sequence may take on a side of an .svg or .png; where tokens are more than that, a cell
    /// stands for several tokens and shows their largest weight
    #[arg(long, value_name = "PIXELS", default_value_t = 2400, value_parser = clap::value_parser!(u32).range(200..=16_000))]
    pub size: u32,
}

impl Default for Style {
    fn default() -> Self {
        Style { scale: Scale::default(), max: None, skip_first: false, size: 2400 }
    }
}

impl Style {
    pub(crate) fn check(&self) -> Result<()> {
        match self.max {
            Some(value) if !(value > 0.0 && value <= 1.0) => Err(Error::Max { value }),
            _ => Ok(()),
        }
    }

    /// How many keys are left out.
    pub(crate) fn first_key(&self) -> usize {
        usize::from(self.skip_first)
    }
}

/// The number of colours.
pub const COLOURS: usize = 256;

/// Red, green and blue of each colour, from no weight to the end of the scale: ColorBrewer's YlGnBu.
pub fn palette() -> Vec<u8> {
    let rgb = |colour: colorgrad::Color| {
        let [red, green, blue, _] = colour.to_rgba8();
        [red, green, blue]
    };
    colorgrad::preset::yl_gn_bu().colors(COLOURS).flat_map(rgb).collect()
}

/// The colour at a place on the scale.
pub fn colour(share: f32) -> u8 {
    (share * (COLOURS - 1) as f32).round() as u8
}

/// A weight with two significant digits.
pub fn number(weight: f32) -> String {
    match weight {
        0.0 => "0".into(),
        _ if weight < 1e-4 => format!("{weight:.0e}"),
        _ => format!("{weight:.*}", (1.0 - weight.log10().floor()).clamp(2.0, 6.0) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_place_weights_and_take_them_back() {
        for (scale, weight, share) in [
            (Scale::Linear, 0.125, 0.25),
            (Scale::Sqrt, 0.125, 0.5),
            (Scale::Log, 0.5, 1.0),
            (Scale::Log, 0.005, 0.5),
            (Scale::Log, 0.000_05, 0.0),
        ] {
            assert!((scale.share(weight, 0.5) - share).abs() < 1e-6, "{scale:?} {weight}");
            assert!((scale.weight(share, 0.5) - weight).abs() < 1e-6, "{scale:?} {share}");
        }
        for scale in [Scale::Linear, Scale::Sqrt, Scale::Log] {
            // No weight, and more than the end of the scale.
            assert_eq!((scale.share(0.0, 0.5), scale.share(0.9, 0.5)), (0.0, 1.0), "{scale:?}");
        }
    }

    #[test]
    fn colours_darken_with_the_weight() {
        let palette = palette();
        let light = |colour: u8| -> u32 { palette[3 * usize::from(colour)..][..3].iter().map(|&c| u32::from(c)).sum() };
        assert_eq!(palette.len(), 3 * COLOURS);
        assert!((0..=254).all(|n| light(n) >= light(n + 1)) && light(0) > 600 && light(255) < 150);
        assert_eq!((colour(0.0), colour(1.0)), (0, 255));
    }

    #[test]
    fn numbers_have_two_significant_digits() {
        for (weight, text) in
            [(0.0, "0"), (1.0, "1.00"), (0.25, "0.25"), (0.0625, "0.062"), (0.0001, "0.00010"), (2e-5, "2e-5")]
        {
            assert_eq!(number(weight), text);
        }
    }
}
