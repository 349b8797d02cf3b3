//! Draws attention weights as heat maps: a panel for each head, tokens on the axes, one colour scale for all.
//!
//! A row is a query, a column is a key; the darker a cell, the larger the weight. The file's ending says what is written:
//!
//! - `.svg` or `.png`, a picture with the heads in a grid. Where there are more tokens than pixels, a cell stands for several
//!   neighbouring queries and keys and shows the largest of their weights; the picture says of how many. The cells of an SVG are
//!   one bitmap for each head. Text in a PNG is drawn in a font that comes with this crate; an SVG asks its viewer for a
//!   sans-serif font.
//! - `.html`, a page that needs no network, to look at one head at a time and to point at weights. Weights are rounded to f16
//!   there. In a dark browser, large weights are light.
//!
//! A file that was there before stays until the new one is whole.

mod bins;
mod bitmap;
mod crop;
mod error;
mod html;
mod layout;
mod replace;
mod style;

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};

pub use crop::used;
pub use error::{Error, Result};
pub use replace::replace;
pub use style::{Scale, Style};

/// The weights of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequence {
    /// Stands above the heads.
    pub title: String,
    /// Tokens of the queries, one for each row.
    pub queries: Vec<String>,
    /// Tokens of the keys, one for each column.
    pub keys: Vec<String>,
    /// One layer or more. An SVG or PNG shows them below each other.
    pub layers: Vec<Layer>,
    /// Index of the layer that an HTML page shows first.
    pub shown: usize,
}

/// The weights of one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// Stands beside the title; may be empty.
    pub name: String,
    /// How many heads there are.
    pub heads: usize,
    /// `[heads, queries, keys]`, each from 0 to 1.
    pub weights: Vec<f32>,
}

/// Whether a number can be a weight: from 0 to 1, but for what rounding may add.
pub fn is_weight(value: f32) -> bool {
    (0.0..=1.001).contains(&value)
}

impl Sequence {
    fn check(&self, style: &Style) -> Result<()> {
        let keys = self.keys.len().saturating_sub(style.first_key());
        for (what, n) in [("layers", self.layers.len()), ("queries", self.queries.len()), ("keys", keys)] {
            if n == 0 {
                return Err(Error::Nothing { what });
            }
        }
        self.layers.iter().try_for_each(|layer| layer.check(self.queries.len() * self.keys.len()))
    }
}

impl Layer {
    fn check(&self, per_head: usize) -> Result<()> {
        if self.heads == 0 {
            return Err(Error::Nothing { what: "heads" });
        }
        let want = self.heads * per_head;
        if self.weights.len() != want {
            return Err(Error::Length { got: self.weights.len(), want });
        }
        match self.weights.iter().position(|&weight| !is_weight(weight)) {
            Some(index) => Err(Error::Weight { index, value: self.weights[index] }),
            None => Ok(()),
        }
    }
}

/// What is written, by the ending of the file's name.
enum Format {
    Svg,
    Png,
    Html,
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        let ending = path.extension().map_or_else(String::new, |ending| ending.to_string_lossy().to_lowercase());
        match ending.as_str() {
            "svg" => Ok(Format::Svg),
            "png" => Ok(Format::Png),
            "html" => Ok(Format::Html),
            _ => Err(Error::Ending { path: path.into() }),
        }
    }
}

/// Whether [`draw`] writes a page for this file, which has room for all layers.
///
/// # Errors
///
/// [`Error::Ending`] for a file that ends in neither `.svg`, `.png` nor `.html`.
pub fn is_page(path: &Path) -> Result<bool> {
    Ok(matches!(Format::of(path)?, Format::Html))
}

/// Draws sequences into a file that ends in `.svg`, `.png` or `.html`.
///
/// # Errors
///
/// [`Error::Nothing`], [`Error::Length`] or [`Error::Weight`] for sequences that cannot be drawn, [`Error::Max`] for a colour
/// scale that has no end, [`Error::TooLarge`] or [`Error::TooMany`] for a picture or page that is too large, [`Error::Ending`] for
/// a file with another ending, [`Error::Font`] or [`Error::Draw`] if drawing fails, and [`Error::File`] if the file cannot be
/// written.
pub fn draw(path: &Path, sequences: &[Sequence], style: &Style) -> Result<()> {
    let format = Format::of(path)?;
    style.check()?;
    if sequences.is_empty() {
        return Err(Error::Nothing { what: "sequences" });
    }
    sequences.iter().try_for_each(|sequence| sequence.check(style))?;
    let failed = |why: String| Error::Draw { path: path.into(), why };
    let bytes = match format {
        Format::Svg => {
            svg(&layout::Page::new(sequences, style)?).map_err(|error| failed(error.to_string()))?.into_bytes()
        }
        Format::Png => bitmap::page(&layout::Page::new(sequences, style)?).map_err(failed)?,
        Format::Html => html::page(sequences, style)?.into_bytes(),
    };
    // As a whole at the end: a full disk leaves the picture that was there.
    replace(path, &bytes).map_err(|source| Error::File { path: path.into(), source })
}

/// The text of a template of this crate.
fn render(template: &str, context: Value) -> String {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.render_str(template, context).expect("the templates of this crate have what they name")
}

fn svg(page: &layout::Page) -> Result<String, png::EncodingError> {
    let image = |panel| bitmap::cells(panel).map(|png| STANDARD.encode(png));
    let images = page.panels.iter().map(image).collect::<Result<Vec<String>, _>>()?;
    Ok(render(include_str!("picture.svg"), context! { page => Serde(page), images }))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn sequence() -> Sequence {
        let tokens = ["<s>", "a & b"].map(String::from).to_vec();
        let layer =
            |name: &str, heads| Layer { name: name.into(), heads, weights: [1.0, 0.0, 0.25, 0.75].repeat(heads) };
        Sequence {
            title: "two tokens".into(),
            queries: tokens.clone(),
            keys: tokens,
            layers: vec![layer("layer 0", 3), layer("layer 1", 3)],
            shown: 1,
        }
    }

    #[test]
    fn an_svg_has_each_token_on_both_axes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.SVG");
        draw(&path, &[sequence()], &Style::default()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        // Three heads stand two and one: the first column names the queries, and the lowest of each column the keys.
        for (label, times) in
            [("&lt;s&gt;", 8), ("a &amp; b", 8), ("head 2", 2), ("two tokens", 2), (">weight (sqrt)<", 1)]
        {
            assert_eq!(text.matches(label).count(), times, "{label}: {text}");
        }
        // A bitmap for each head and for the colour bar.
        assert_eq!((text.matches("data:image/png;base64,").count(), text.matches("pixelated").count()), (7, 7));
    }

    #[test]
    fn many_cells_make_a_small_svg() {
        let tokens: Vec<String> = (0..256).map(|n| n.to_string()).collect();
        // Weights without any order, as hard to compress as weights are.
        let exponentials = (0u32..16 << 16).map(|n| (-((n.wrapping_mul(2_654_435_761) >> 16) as f32 / 4096.0)).exp());
        let layer = Layer { name: String::new(), heads: 16, weights: exponentials.map(|e| e / 16.0).collect() };
        let sequence = Sequence { queries: tokens.clone(), keys: tokens, layers: vec![layer], ..Sequence::default() };
        let page = layout::Page::new(&[sequence], &Style::default()).unwrap();
        let (bytes, side) = (svg(&page).unwrap().len(), page.width.max(page.height));
        assert!(bytes < 1_000_000 && side < 3_000, "{bytes} bytes, {side} pixels");
    }

    #[test]
    fn wrong_input_is_refused() {
        let path = Path::new("x.svg");
        let plain = Style::default();
        assert!(matches!(draw(path, &[], &plain), Err(Error::Nothing { what: "sequences" })));
        assert!(matches!(draw(Path::new("x.gif"), &[sequence()], &plain), Err(Error::Ending { .. })));
        assert!(matches!(draw(Path::new("/no/such/folder/x.png"), &[sequence()], &plain), Err(Error::File { .. })));
        let with = |change: &dyn Fn(&mut Sequence)| {
            let mut sequence = sequence();
            change(&mut sequence);
            draw(path, &[sequence], &plain)
        };
        assert!(matches!(with(&|s| s.layers[1].weights[3] = f32::NAN), Err(Error::Weight { index: 3, .. })));
        assert!(matches!(with(&|s| s.layers[1].weights.truncate(11)), Err(Error::Length { got: 11, want: 12 })));
        assert!(matches!(with(&|s| s.layers[0].heads = 0), Err(Error::Nothing { what: "heads" })));
        assert!(matches!(with(&|s| s.layers.clear()), Err(Error::Nothing { what: "layers" })));
        let layers = vec![sequence().layers[0].clone(); 200];
        assert!(matches!(with(&|s| s.layers = layers.clone()), Err(Error::TooLarge { .. })));
        for max in [0.0, -1.0, 1.5, f32::NAN] {
            let style = Style { max: Some(max), ..Style::default() };
            let error = draw(path, &[sequence()], &style).unwrap_err();
            assert!(error.to_string().contains("must be above 0 and at most 1"), "{error}");
        }
        let mut one = Sequence { keys: vec!["a".into()], ..sequence() };
        one.layers = vec![Layer { name: String::new(), heads: 1, weights: vec![1.0; 2] }];
        let style = Style { skip_first: true, ..Style::default() };
        assert!(matches!(draw(path, &[one], &style), Err(Error::Nothing { what: "keys" })));
    }
}
