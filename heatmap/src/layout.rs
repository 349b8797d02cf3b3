//! Where everything stands on a picture, in pixels.

use plotters::prelude::IntoTextStyle;
use serde::Serialize;

use crate::bins::{Axis, largest};
use crate::error::{Error, Result};
use crate::style::{Scale, Style, colour, number};
use crate::{Layer, Sequence, bitmap};

/// Longest side of a picture.
const LIMIT: usize = 16_384;
/// Space around the page and between its parts.
const MARGIN: usize = 16;
/// Height of a line of text.
const LINE: usize = 20;
/// Space between two heads.
const GAP: usize = LINE + MARGIN;
/// Space between a label and its cells.
const TICK: usize = 5;
/// The side that the heads should not exceed where their cells are large enough for labels.
const COMFORTABLE: usize = 1_360;
/// The smallest cell beside which a label can be read, and the largest that is useful.
const CELL: (usize, usize) = (9, 20);
/// Least side of a panel, as far as cells may grow.
const PANEL: usize = 48;
/// Width and height of the colour bar.
const BAR: (usize, usize) = (18, 160);
/// Width of the colour bar's numbers.
const NUMBERS: usize = 90;
/// Heights of the letters: titles, words on the page.
const TITLE: usize = 18;
const TEXT: usize = 14;
/// Larger pictures have larger letters: they are looked at from further away.
const LARGE: usize = 1_700;

/// One picture: what is drawn, back to front.
#[derive(Debug, Serialize)]
pub struct Page {
    pub width: usize,
    pub height: usize,
    pub panels: Vec<Panel>,
    pub texts: Vec<Text>,
    /// How large letters and the space around them are, in halves of the usual.
    #[serde(skip)]
    halves: usize,
}

/// A frame with coloured cells.
#[derive(Debug, Serialize)]
pub struct Panel {
    pub x: usize,
    pub y: usize,
    pub width: usize,
    pub height: usize,
    /// How many cells are side by side; each has the same size.
    #[serde(skip)]
    pub columns: usize,
    /// The colour of each cell.
    #[serde(skip)]
    pub cells: Vec<u8>,
}

/// A piece of text, `y` being the middle of its height; upright text is turned to read from below.
#[derive(Debug, PartialEq, Serialize)]
pub struct Text {
    pub x: usize,
    pub y: usize,
    pub size: usize,
    pub anchor: Anchor,
    pub upright: bool,
    pub text: String,
}

/// Which part of a text stands at its place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// The heads of a layer side by side.
#[derive(Debug, PartialEq)]
struct Grid {
    /// How many heads are side by side.
    per_line: usize,
    lines: usize,
    across: Axis,
    down: Axis,
}

impl Grid {
    fn new(heads: usize, rows: usize, columns: usize, size: usize) -> Self {
        let per_line = per_line(heads, rows.max(columns / 16), columns.max(rows / 16));
        let lines = heads.div_ceil(per_line);
        let room = |side: usize, panels: usize| (side / panels).saturating_sub(GAP).max(1);
        let fit = |side| (room(side, per_line) / columns).min(room(side, lines) / rows);
        let cell = fit(size).min(fit(COMFORTABLE).clamp(CELL.0, CELL.1));
        let per_cell = columns.div_ceil(room(size, per_line)).max(rows.div_ceil(room(size, lines)));
        let axis = |tokens: usize| {
            let few = tokens <= PANEL;
            let pixels = cell.max(if few { (PANEL / tokens).min(CELL.1) } else { 1 });
            Axis { tokens, per_cell: if few { 1 } else { per_cell }, pixels }
        };
        Grid { per_line, lines, across: axis(columns), down: axis(rows) }
    }

    fn of(sequence: &Sequence, layer: &Layer, style: &Style) -> Self {
        let keys = sequence.keys.len() - style.first_key();
        Grid::new(layer.heads, sequence.queries.len(), keys, style.size as usize)
    }

    /// The longer side in pixels.
    fn side(&self) -> usize {
        (self.per_line * (self.across.length() + GAP)).max(self.lines * (self.down.length() + GAP))
    }
}

/// How many heads stand side by side, so that the page is a little wider than high and few places stay empty.
fn per_line(heads: usize, height: usize, width: usize) -> usize {
    let cost = |per_line: usize| {
        let lines = heads.div_ceil(per_line);
        let aspect = (per_line * width) as f64 / (lines * height) as f64;
        let empty = (lines * per_line - heads) as f64 / heads as f64;
        (aspect / 1.3).ln().abs() + 4.0 * empty
    };
    (1..=heads).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).expect("there is a head")
}

/// Every how many-th token has a label of such a height: 1, 2, 5, 10, 20, …
fn every(axis: Axis, size: usize) -> usize {
    let steps = (0..).flat_map(|power| [1, 2, 5].map(|digit| digit * 10usize.pow(power)));
    let fits = |every: &usize| every * axis.pixels >= size * axis.per_cell;
    steps.into_iter().find(fits).expect("there are such steps without end")
}

/// Text as it is written: control characters would break the picture.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '·' } else { c }).collect()
}

/// A token as it is written: long ones would break the layout.
fn label(token: &str) -> String {
    const LONGEST: usize = 18;
    let clean = clean(token);
    if clean.chars().count() <= LONGEST {
        return clean;
    }
    clean.chars().take(LONGEST - 1).chain(['…']).collect()
}

/// Width of a text in pixels, with some room for a viewer's other fonts.
fn width(text: &str, size: usize) -> Result<usize> {
    let style = bitmap::font(size).into_text_style(&(0, 0));
    let (_, (right, _)) = style.font.layout_box(text).map_err(|_| Error::Font)?;
    Ok(right.max(0) as usize * 6 / 5)
}

fn widest(tokens: &[String], size: usize) -> Result<usize> {
    tokens.iter().try_fold(0, |most, token| Ok(most.max(width(&label(token), size)?)))
}

impl Page {
    pub fn new(sequences: &[Sequence], style: &Style) -> Result<Self> {
        bitmap::register_font()?;
        let mut page = Page { width: 0, height: 0, panels: Vec::new(), texts: Vec::new(), halves: 2 };
        let mut layers = sequences.iter().flat_map(|s| s.layers.iter().map(move |layer| Grid::of(s, layer, style)));
        if layers.any(|grid| grid.side() > LARGE) {
            page.halves = 3;
        }
        page.height = page.scaled(MARGIN);
        let top = style.max.unwrap_or_else(|| largest_drawn(sequences, style.skip_first));
        for sequence in sequences {
            for layer in &sequence.layers {
                page.layer(sequence, layer, style, top)?;
            }
        }
        let more = style.max.is_some_and(|max| largest_drawn(sequences, style.skip_first) > max);
        page.bar(style, top, more);
        let (width, height) = (page.width, page.height);
        if width.max(height) > LIMIT {
            return Err(Error::TooLarge { width, height, limit: LIMIT });
        }
        Ok(page)
    }

    fn scaled(&self, pixels: usize) -> usize {
        pixels * self.halves / 2
    }

    /// The height of the labels beside such cells.
    fn label_size(&self, axis: Axis) -> usize {
        if axis.pixels < CELL.0 { self.scaled(12) } else { axis.pixels.min(TEXT) }
    }

    fn text(&mut self, text: impl Into<String>, (x, y): (usize, usize), size: usize, anchor: Anchor, upright: bool) {
        self.texts.push(Text { x, y, size, anchor, upright, text: text.into() });
    }

    /// Draws the heads of a layer below what is there.
    fn layer(&mut self, sequence: &Sequence, layer: &Layer, style: &Style, top: f32) -> Result<()> {
        let (queries, keys) = (&sequence.queries, &sequence.keys);
        let grid = Grid::of(sequence, layer, style);
        let [margin, line, tick, title_size, text_size] =
            [MARGIN, LINE, TICK, TITLE, TEXT].map(|pixels| self.scaled(pixels));
        let title_top = self.height;
        let left = margin + line + widest(queries, self.label_size(grid.down))? + tick;
        let below = widest(keys, self.label_size(grid.across))? + tick;
        let title = match layer.name.as_str() {
            "" => clean(&sequence.title),
            name => clean(&format!("{} · {name}", sequence.title)),
        };
        let title_end = margin + width(&title, title_size)?;
        self.text(title, (margin, title_top + line / 2), title_size, Anchor::Start, false);

        let (step_x, step_y) = (grid.across.length() + margin, grid.down.length() + margin + line);
        let first = title_top + 2 * line + margin / 2;
        for head in 0..layer.heads {
            let (x, y) = (left + head % grid.per_line * step_x, first + head / grid.per_line * step_y);
            self.text(format!("head {head}"), (x, y - line / 2), text_size, Anchor::Start, false);
            let cells = cells(sequence, layer, head, &grid, style, top);
            let [width, height] = [grid.across, grid.down].map(|axis| axis.length());
            self.panels.push(Panel { x, y, width, height, columns: grid.across.cells(), cells });
            if head % grid.per_line == 0 {
                self.labels(queries, 0, grid.down, |middle| (x - tick, y + middle), false);
            }
            // The lowest head of each column.
            if head + grid.per_line >= layer.heads {
                let keys_top = y + height + tick;
                self.labels(keys, style.first_key(), grid.across, |middle| (x + middle, keys_top), true);
            }
        }
        let (end, bottom) = (left + grid.per_line * step_x - margin, first + grid.lines * step_y - margin - line);
        self.text("query", (margin + line / 2, (first + bottom) / 2), text_size, Anchor::Middle, true);
        self.text("key", ((left + end) / 2, bottom + below + line / 2), text_size, Anchor::Middle, false);
        self.height = bottom + below + line + margin;
        if let Some(note) = note(&grid) {
            self.text(note, (margin, self.height - line / 2), text_size, Anchor::Start, false);
            self.height += line;
        }
        self.width = self.width.max(title_end).max(end);
        Ok(())
    }

    /// Names the tokens of an axis, but for the first `skipped`, where `place` says by the middle of a token's cell.
    fn labels(
        &mut self,
        tokens: &[String],
        skipped: usize,
        axis: Axis,
        place: impl Fn(usize) -> (usize, usize),
        upright: bool,
    ) {
        let size = self.label_size(axis);
        for (index, token) in
            tokens.iter().enumerate().step_by(every(axis, size)).filter(|(index, _)| *index >= skipped)
        {
            self.text(label(token), place(axis.middle(index - skipped)), size, Anchor::End, upright);
        }
    }

    /// The colour bar, right of the first line of heads.
    fn bar(&mut self, style: &Style, top: f32, more: bool) {
        let [margin, line, tick, size, width, height, numbers] =
            [MARGIN, LINE, TICK, TEXT, BAR.0, BAR.1, NUMBERS].map(|pixels| self.scaled(pixels));
        let (x, y) = (self.width + 2 * margin, self.panels[0].y + line / 2);
        let name = clap::ValueEnum::to_possible_value(&style.scale).expect("no scale is hidden");
        self.text(format!("weight ({})", name.get_name()), (x, y - line), size, Anchor::Start, false);
        let cells = (0..height).map(|step| colour(1.0 - step as f32 / (height - 1) as f32)).collect();
        self.panels.push(Panel { x, y, width, height, columns: 1, cells });
        for quarter in 0..=4 {
            let weight = number(style.scale.weight(quarter as f32 / 4.0, top));
            let weight = match (quarter, style.scale) {
                (0, Scale::Log) => format!("≤ {weight}"),
                (4, _) if more => format!("≥ {weight}"),
                _ => weight,
            };
            self.text(weight, (x + width + tick, y + height - quarter * height / 4), size, Anchor::Start, false);
        }
        self.width = x + width + numbers + margin;
        self.height = self.height.max(y + height + 2 * margin);
    }
}

/// The colours of a head's cells.
fn cells(sequence: &Sequence, layer: &Layer, head: usize, grid: &Grid, style: &Style, top: f32) -> Vec<u8> {
    let (rows, columns) = (sequence.queries.len(), sequence.keys.len());
    let weights = &layer.weights[head * rows * columns..][..rows * columns];
    let row = |query: usize| &weights[query * columns..][style.first_key()..columns];
    let cells = largest(row, grid.down, grid.across);
    cells.into_iter().map(|weight| colour(style.scale.share(weight, top))).collect()
}

/// What a cell stands for, where that is more than one weight.
fn note(grid: &Grid) -> Option<String> {
    let (queries, keys) = (grid.down.per_cell, grid.across.per_cell);
    let several = queries * keys > 1;
    several.then(|| format!("each cell shows the largest weight of {queries} × {keys} (queries × keys)"))
}

/// The largest weight that is drawn, or 1 where there is none: weights of nothing but 0 still need a scale.
pub fn largest_drawn(sequences: &[Sequence], skip_first: bool) -> f32 {
    let of_layer = |layer: &Layer, keys: usize| {
        let rows = layer.weights.chunks(keys).map(|row| &row[usize::from(skip_first)..]);
        rows.flatten().copied().fold(0.0, f32::max)
    };
    let all = sequences.iter().flat_map(|s| s.layers.iter().map(|layer| of_layer(layer, s.keys.len())));
    let top = all.fold(0.0, f32::max);
    if top > 0.0 { top } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::sequence;

    #[test]
    fn heads_stand_in_a_grid_that_is_about_square() {
        for (heads, want) in [(1, 1), (4, 2), (8, 4), (12, 4), (16, 4), (32, 8)] {
            assert_eq!(per_line(heads, 100, 100), want, "{heads} heads");
        }
        // One query of many keys: below each other.
        assert_eq!(Grid::new(8, 1, 4096, 2400).per_line, 1);
    }

    #[test]
    fn cells_fit_the_size_and_are_joined_only_where_they_must() {
        // Heads, tokens, pixels of a cell, tokens of a cell.
        for (heads, tokens, pixels, per_cell) in
            [(12, 23, 13, 1), (16, 256, 2, 1), (1, 2048, 1, 1), (1, 2400, 1, 2), (12, 2048, 1, 4), (1, 3, 20, 1)]
        {
            let grid = Grid::new(heads, tokens, tokens, 2400);
            assert_eq!(grid.across, Axis { tokens, per_cell, pixels }, "{heads} heads, {tokens} tokens");
            assert_eq!(grid.across, grid.down);
            assert!(grid.side() <= 2400);
        }
        // Larger or smaller where that is asked for.
        assert_eq!(Grid::new(1, 2400, 2400, 2500).across.per_cell, 1);
        assert!(Grid::new(12, 256, 256, 800).side() <= 800);
        let one = Grid::new(1, 1, 4096, 2400);
        assert_eq!((one.down.length(), one.across.per_cell), (20, 2));
    }

    #[test]
    fn labels_do_not_touch() {
        for (pixels, per_cell, want) in [(20, 1, 1), (12, 1, 1), (9, 1, 2), (2, 1, 10), (1, 1, 20), (1, 4, 50)] {
            let axis = Axis { tokens: 4096, per_cell, pixels };
            assert_eq!(every(axis, 12), want, "{axis:?}");
        }
    }

    #[test]
    fn numbers_on_the_axis_of_keys_stay_round_without_the_first_key() {
        let tokens: Vec<String> = (0..300).map(|n| n.to_string()).collect();
        let layer = Layer { name: String::new(), heads: 1, weights: vec![0.0; 300] };
        let sequence = Sequence { queries: vec!["q".into()], keys: tokens, layers: vec![layer], ..Sequence::default() };
        let axis = |skip_first| {
            let page = Page::new(std::slice::from_ref(&sequence), &Style { skip_first, ..Style::default() }).unwrap();
            let keys = page.texts.iter().filter(|text| text.upright && text.anchor == Anchor::End);
            keys.map(|text| text.text.clone()).take(2).collect::<Vec<_>>()
        };
        assert_eq!((axis(false), axis(true)), (vec!["0".into(), "5".into()], vec!["5".to_string(), "10".into()]));
    }

    #[test]
    fn labels_are_short_and_without_control_characters() {
        assert_eq!(label("a\tb\u{7f}"), "a·b·");
        assert_eq!(label("donaudampfschifffahrt"), "donaudampfschifff…");
    }

    /// The texts of a page that start so.
    fn texts(page: &Page, start: &str) -> Vec<String> {
        page.texts.iter().map(|text| text.text.clone()).filter(|text| text.starts_with(start)).collect()
    }

    #[test]
    fn the_first_key_is_left_out_and_the_scale_follows_what_is_drawn() {
        let style = Style { skip_first: true, ..Style::default() };
        let page = Page::new(&[sequence()], &style).unwrap();
        assert_eq!((page.panels[0].columns, page.panels[0].cells.as_slice()), (1, &[0, 255][..]));
        assert_eq!(texts(&page, "0.75"), ["0.75"]);
        // Both queries still have their label, and only one key.
        assert_eq!((texts(&page, "<s>").len(), texts(&page, "a & b").len()), (2, 8));
    }

    #[test]
    fn weights_above_the_end_of_the_scale_have_its_colour_and_the_bar_says_so() {
        let style = |max| Style { scale: Scale::Linear, max: Some(max), ..Style::default() };
        let page = Page::new(&[sequence()], &style(0.5)).unwrap();
        assert_eq!(page.panels[0].cells, [255, 0, 128, 255]);
        assert_eq!(texts(&page, "≥"), ["≥ 0.50"]);
        assert!(texts(&Page::new(&[sequence()], &style(1.0)).unwrap(), "≥").is_empty());
    }

    #[test]
    fn a_cell_of_several_weights_is_told() {
        let tokens: Vec<String> = (0..300).map(|n| n.to_string()).collect();
        let layer = Layer { name: String::new(), heads: 1, weights: vec![0.0; 90_000] };
        let sequence = Sequence { queries: tokens.clone(), keys: tokens, layers: vec![layer], ..Sequence::default() };
        let page = Page::new(&[sequence], &Style { size: 200, ..Style::default() }).unwrap();
        assert_eq!(texts(&page, "each cell"), ["each cell shows the largest weight of 2 × 2 (queries × keys)"]);
    }
}
