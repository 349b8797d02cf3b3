//! Draws attention weights as heat maps: a small multiple for each head, tokens on the axes, one colour scale for all.
//!
//! A row is a query, a column is a key; the darker a cell, the larger the weight. The file's ending says what is written,
//! SVG or PNG. Text in a PNG is drawn in a font that comes with this crate; an SVG asks its viewer for a sans-serif font.
//! A picture that was there before stays until the new one is whole.

mod error;
mod layout;
mod paint;
mod replace;

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::{
    BitMapBackend, DrawingArea, DrawingAreaErrorKind, DrawingBackend, IntoDrawingArea, SVGBackend,
};

pub use error::{Error, Result};
pub use replace::replace;

/// The weights of one sequence in one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequence {
    /// Stands above the heads.
    pub title: String,
    /// Tokens of the queries, one for each row.
    pub queries: Vec<String>,
    /// Tokens of the keys, one for each column.
    pub keys: Vec<String>,
    /// How many heads there are.
    pub heads: usize,
    /// `[heads, queries, keys]`, each from 0 to 1.
    pub weights: Vec<f32>,
}

impl Sequence {
    /// Cuts the first `rows` and `columns` of sequence `batch` out of `[batches, heads, seq_q, seq_kv]` weights.
    ///
    /// `queries` and `keys` say how many are kept: what follows them is padding.
    ///
    /// # Panics
    ///
    /// If `weights` has no such sequence, rows or columns.
    pub fn cut(
        title: String,
        weights: &[f32],
        shape: [usize; 4],
        batch: usize,
        queries: Vec<String>,
        keys: Vec<String>,
    ) -> Self {
        let [_, heads, seq_q, seq_kv] = shape;
        let rows = (0..heads).flat_map(|head| (0..queries.len()).map(move |row| (batch * heads + head) * seq_q + row));
        let cut = rows.flat_map(|row| &weights[row * seq_kv..][..keys.len()]).copied().collect();
        Sequence { title, queries, keys, heads, weights: cut }
    }

    fn check(&self) -> Result<()> {
        for (what, n) in [("heads", self.heads), ("queries", self.queries.len()), ("keys", self.keys.len())] {
            if n == 0 {
                return Err(Error::Nothing { what });
            }
        }
        let want = self.heads * self.queries.len() * self.keys.len();
        if self.weights.len() != want {
            return Err(Error::Length { got: self.weights.len(), want });
        }
        match self.weights.iter().position(|weight| !(0.0..=1.001).contains(weight)) {
            Some(index) => Err(Error::Weight { index, value: self.weights[index] }),
            None => Ok(()),
        }
    }
}

/// Draws sequences below each other into a file that ends in `.svg` or `.png`.
///
/// # Errors
///
/// [`Error::Nothing`], [`Error::Length`] or [`Error::Weight`] for sequences that cannot be drawn, [`Error::TooLarge`] for a
/// picture that is too large, [`Error::Ending`] for a file with another ending, [`Error::Font`] or [`Error::Draw`] if drawing
/// fails, and [`Error::File`] if the file cannot be written.
pub fn draw(path: &Path, sequences: &[Sequence]) -> Result<()> {
    let ending = path.extension().map_or_else(String::new, |ending| ending.to_string_lossy().to_lowercase());
    if sequences.is_empty() {
        return Err(Error::Nothing { what: "sequences" });
    }
    sequences.iter().try_for_each(Sequence::check)?;
    paint::register_font()?;
    let page = layout::Page::new(sequences)?;
    if !["svg", "png"].contains(&ending.as_str()) {
        return Err(Error::Ending { path: path.into() });
    }
    let mut svg = String::new();
    let bytes = if ending == "svg" {
        paint_on(path, SVGBackend::with_string(&mut svg, page.size), &page)?;
        svg.into_bytes()
    } else {
        let (width, height) = page.size;
        let mut pixels = vec![0; 3 * width as usize * height as usize];
        paint_on(path, BitMapBackend::with_buffer(&mut pixels, page.size), &page)?;
        png(page.size, &pixels).map_err(|error| Error::Draw { path: path.into(), why: error.to_string() })?
    };
    // As a whole at the end: a full disk leaves the picture that was there.
    replace(path, &bytes).map_err(|source| Error::File { path: path.into(), source })
}

/// A PNG of rows of red, green and blue.
fn png((width, height): (u32, u32), pixels: &[u8]) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

fn paint_on<B: DrawingBackend>(path: &Path, backend: B, page: &layout::Page<'_>) -> Result<()> {
    let failed = |error: DrawingAreaErrorKind<B::ErrorType>| Error::Draw { path: path.into(), why: error.to_string() };
    let area: DrawingArea<B, Shift> = backend.into_drawing_area();
    paint::page(&area, page).map_err(failed)?;
    area.present().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence() -> Sequence {
        let tokens = ["<s>", "a & b"].map(String::from).to_vec();
        Sequence {
            title: "two tokens".into(),
            queries: tokens.clone(),
            keys: tokens,
            heads: 3,
            weights: [1.0, 0.0, 0.25, 0.75].repeat(3),
        }
    }

    #[test]
    fn an_svg_has_each_token_on_both_axes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.SVG");
        draw(&path, &[sequence(), sequence()]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for (label, times) in [("&lt;s&gt;", 8), ("a &amp; b", 8), ("head 2", 2), ("two tokens", 2), ("weight", 1)] {
            assert_eq!(text.matches(label).count(), times, "{label}: {text}");
        }
    }

    #[test]
    fn a_png_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.png");
        draw(&path, &[sequence()]).unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"\x89PNG"));
    }

    #[test]
    fn padding_is_cut_off() {
        let weights: Vec<f32> = (0..2 * 2 * 3 * 3).map(|n| n as f32).collect();
        let one =
            Sequence::cut(String::new(), &weights, [2, 2, 3, 3], 1, vec!["a".into()], vec!["b".into(), "c".into()]);
        assert_eq!((one.heads, one.weights), (2, vec![18.0, 19.0, 27.0, 28.0]));
    }

    #[test]
    fn wrong_input_is_refused() {
        let path = Path::new("x.svg");
        assert!(matches!(draw(path, &[]), Err(Error::Nothing { what: "sequences" })));
        assert!(matches!(draw(Path::new("x.gif"), &[sequence()]), Err(Error::Ending { .. })));
        assert!(matches!(draw(Path::new("/no/such/folder/x.png"), &[sequence()]), Err(Error::File { .. })));
        let mut nan = sequence();
        nan.weights[3] = f32::NAN;
        assert!(matches!(draw(path, &[nan]), Err(Error::Weight { index: 3, .. })));
        let mut short = sequence();
        short.weights.pop();
        assert!(matches!(draw(path, &[short]), Err(Error::Length { got: 11, want: 12 })));
        let tokens: Vec<_> = (0..20_000).map(|n| n.to_string()).collect();
        let huge =
            Sequence { heads: 1, weights: vec![0.0; 20_000], queries: tokens, keys: vec!["a".into()], ..sequence() };
        assert!(matches!(draw(path, &[huge]), Err(Error::TooLarge { .. })));
    }
}
