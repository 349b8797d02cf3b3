//! A page with everything in it, to point at weights.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use half::f16;
use minijinja::context;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::layout::largest_drawn;
use crate::style::{DECADES, Scale, Style, palette};
use crate::{Layer, Sequence, render};

/// The most weights of a page, which takes three bytes for each.
const LIMIT: usize = 32 << 20;

/// What the script of the page reads.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Data<'a> {
    sequences: Vec<Part<'a>>,
    /// The largest weight of all keys, and of all but the first.
    largest: [f32; 2],
    max: Option<f32>,
    scale: Scale,
    decades: f32,
    skip_first: bool,
    /// Red, green and blue of each colour, in base64.
    palette: String,
}

#[derive(Serialize)]
struct Part<'a> {
    title: &'a str,
    queries: &'a [String],
    keys: &'a [String],
    shown: usize,
    layers: Vec<PartLayer<'a>>,
}

#[derive(Serialize)]
struct PartLayer<'a> {
    name: &'a str,
    heads: usize,
    /// [heads, queries, keys], little-endian f16 in base64.
    weights: String,
}

impl<'a> Part<'a> {
    fn new(sequence: &'a Sequence) -> Self {
        let Sequence { title, queries, keys, layers, shown } = sequence;
        let layer =
            |layer: &'a Layer| PartLayer { name: &layer.name, heads: layer.heads, weights: f16s(&layer.weights) };
        Part { title, queries, keys, shown: *shown, layers: layers.iter().map(layer).collect() }
    }
}

fn f16s(weights: &[f32]) -> String {
    let bytes: Vec<u8> = weights.iter().flat_map(|&weight| f16::from_f32(weight).to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

/// The text of the page.
pub fn page(sequences: &[Sequence], style: &Style) -> Result<String> {
    let got = sequences.iter().flat_map(|sequence| &sequence.layers).map(|layer| layer.weights.len()).sum();
    if got > LIMIT {
        return Err(Error::TooMany { got, limit: LIMIT });
    }
    let data = Data {
        sequences: sequences.iter().map(Part::new).collect(),
        largest: [false, true].map(|skip_first| largest_drawn(sequences, skip_first)),
        max: style.max,
        scale: style.scale,
        decades: DECADES,
        skip_first: style.skip_first,
        palette: STANDARD.encode(palette()),
    };
    // No token may end the script.
    let data = serde_json::to_string(&data).expect("strings and numbers").replace('<', "\\u003c");
    let title = &sequences[0].title;
    Ok(render(include_str!("page.html"), context! { title, data, script => include_str!("page.js") }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::sequence;

    /// What the script of a page reads.
    fn data(html: &str) -> serde_json::Value {
        let (_, rest) = html.split_once("<script id=\"data\" type=\"application/json\">").unwrap();
        serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
    }

    #[test]
    fn a_page_has_its_tokens_and_weights_and_asks_no_network() {
        let mut sequence = sequence();
        sequence.keys[1] = "</script>".into();
        let style = Style { max: Some(0.5), scale: Scale::Sqrt, skip_first: true, ..Style::default() };
        let html = page(&[sequence], &style).unwrap();
        let data = data(&html);
        let part = &data["sequences"][0];
        assert_eq!((&part["keys"][1], &part["layers"][1]["name"]), (&"</script>".into(), &"layer 1".into()));
        let weights = STANDARD.decode(part["layers"][0]["weights"].as_str().unwrap()).unwrap();
        let weights: Vec<f32> = weights.as_chunks().0.iter().map(|&half| f16::from_le_bytes(half).to_f32()).collect();
        assert_eq!(weights, [1.0, 0.0, 0.25, 0.75].repeat(3));
        assert_eq!((&data["scale"], &data["max"], &data["skipFirst"]), (&"sqrt".into(), &0.5.into(), &true.into()));
        assert_eq!(data["largest"], serde_json::json!([1.0, 0.75]));
        assert!(!html.contains("http") && !html.contains("src=") && !html.contains("@import"), "{html}");
    }

    #[test]
    fn a_page_that_a_browser_cannot_hold_is_refused() {
        let mut sequence = sequence();
        sequence.layers[0].weights = vec![0.0; LIMIT];
        let error = page(&[sequence], &Style::default()).unwrap_err();
        assert!(matches!(error, Error::TooMany { got, limit: LIMIT } if got == LIMIT + 12), "{error}");
    }
}
