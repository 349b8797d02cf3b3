//! Where everything stands, in pixels.

use plotters::prelude::IntoTextStyle;

use crate::error::{Error, Result};
use crate::{Sequence, paint};

/// Longest side of a picture.
const LIMIT: usize = 16_384;
/// Space around the page and between its parts.
pub const MARGIN: usize = 16;
/// Space between two heads.
const GAP: usize = 14;
/// Height of a line of text.
pub const LINE: usize = 20;
/// Space between a label and its cells.
pub const TICK: usize = 5;
/// Width that the heads of a sequence should not exceed.
const WIDTH: usize = 1_360;
/// Height of a label on the axes.
const LABEL: usize = 13;
/// Width and height of the colour bar.
pub const BAR: (usize, usize) = (18, 160);
/// Width of the colour bar's numbers.
const NUMBERS: usize = 60;

/// One picture.
pub struct Page<'a> {
    pub size: (u32, u32),
    /// The weight that the darkest colour stands for.
    pub top: f32,
    pub blocks: Vec<Block<'a>>,
    /// Left end of the colour bar.
    pub bar_left: usize,
}

/// The heads of one sequence.
pub struct Block<'a> {
    pub sequence: &'a Sequence,
    /// Top of its title.
    pub title_top: usize,
    pub cell: usize,
    /// Every how many-th token is named on the axes.
    pub every: usize,
    /// Top left corner of each head's cells, and whether its queries and keys are named there.
    pub heads: Vec<Head>,
    /// Left of each row of heads and below it, the words "query" and "key".
    pub query_names: Vec<(usize, usize)>,
    pub key_name: (usize, usize),
}

/// One small multiple.
pub struct Head {
    pub left: usize,
    pub top: usize,
    pub names_queries: bool,
    pub names_keys: bool,
}

/// The side of a cell: as large as lets the heads stand in a block that is wider than it is high, and large enough to name
/// every token where there are not too many.
fn cell(heads: usize, tokens: usize) -> usize {
    let per_line = (1.4 * heads as f64).sqrt().round().max(1.0) as usize;
    let least = if tokens <= 64 { LABEL } else { 3 };
    (WIDTH / per_line).saturating_sub(GAP).div_euclid(tokens).clamp(least, 20)
}

/// A token as it is written: control characters would break the picture, long tokens the layout.
pub fn label(token: &str) -> String {
    const LONGEST: usize = 18;
    let clean: String = token.chars().map(|c| if c.is_control() { '·' } else { c }).collect();
    if clean.chars().count() <= LONGEST {
        return clean;
    }
    clean.chars().take(LONGEST - 1).chain(['…']).collect()
}

/// The widest label in pixels.
fn widest(tokens: &[String]) -> Result<usize> {
    let font = paint::label_font();
    let width = |token: &String| font.font.layout_box(&label(token)).map(|(_, (right, _))| right.max(0) as usize);
    tokens.iter().map(width).try_fold(0, |most, width| Ok(most.max(width.map_err(|_| Error::Font)?)))
}

impl<'a> Page<'a> {
    pub fn new(sequences: &'a [Sequence]) -> Result<Self> {
        let (mut y, mut right, mut blocks) = (MARGIN, 0, Vec::new());
        for sequence in sequences {
            let (block, block_right, bottom) = Block::new(sequence, y)?;
            (y, right) = (bottom + MARGIN, right.max(block_right));
            blocks.push(block);
        }
        let bar_left = right + 2 * GAP;
        let bar_bottom = MARGIN + 3 * LINE + BAR.1 + MARGIN;
        let (width, height) = (bar_left + BAR.0 + NUMBERS + MARGIN, y.max(bar_bottom));
        if width.max(height) > LIMIT {
            return Err(Error::TooLarge { width, height, limit: LIMIT });
        }
        let weights = sequences.iter().flat_map(|sequence| &sequence.weights);
        let top = weights.copied().fold(0.0, f32::max);
        // Weights of nothing but 0 still need a scale.
        let top = if top > 0.0 { top } else { 1.0 };
        Ok(Page { size: (width as u32, height as u32), top, blocks, bar_left })
    }
}

impl<'a> Block<'a> {
    /// The block, its right end and its bottom.
    fn new(sequence: &'a Sequence, title_top: usize) -> Result<(Self, usize, usize)> {
        let (rows, columns) = (sequence.queries.len(), sequence.keys.len());
        let cell = cell(sequence.heads, rows.max(columns));
        let (width, height) = (columns * cell, rows * cell);
        let left = MARGIN + LINE + widest(&sequence.queries)? + TICK;
        let below = widest(&sequence.keys)? + TICK;
        let fit = (WIDTH / (width + GAP)).clamp(1, sequence.heads);
        // As many in each row of heads as in the next, as far as that goes.
        let lines = sequence.heads.div_ceil(fit);
        let per_line = sequence.heads.div_ceil(lines);
        let first = title_top + LINE + MARGIN / 2;
        let step = LINE + height + MARGIN;
        let place = |head: usize| {
            let (line, column) = (head / per_line, head % per_line);
            Head {
                left: left + column * (width + GAP),
                top: first + line * step + LINE,
                names_queries: column == 0,
                // The lowest head of each column.
                names_keys: head + per_line >= sequence.heads,
            }
        };
        let heads: Vec<_> = (0..sequence.heads).map(place).collect();
        let right = left + per_line * (width + GAP) - GAP;
        let keys_top = first + (lines - 1) * step + LINE + height + below;
        let block = Block {
            sequence,
            title_top,
            cell,
            every: [1, 2, 5, 10, 20].into_iter().find(|every| every * cell >= LABEL).expect("no cell is that small"),
            query_names: heads
                .iter()
                .filter(|head| head.names_queries)
                .map(|head| (MARGIN, head.top + height / 2))
                .collect(),
            key_name: (left + width / 2, keys_top + TICK),
            heads,
        };
        let title = paint::title_font().into_text_style(&(0, 0));
        let title_width = title.font.layout_box(&sequence.title).map_err(|_| Error::Font)?.1.0.max(0) as usize;
        Ok((block, right.max(MARGIN + title_width), keys_top + TICK + LINE))
    }
}
