//! The drawing itself.

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font as register;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};
use crate::layout::{BAR, Block, Head, LINE, MARGIN, Page, TICK, label};

type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

const INK: RGBColor = RGBColor(40, 40, 40);
const FRAME: RGBColor = RGBColor(190, 190, 190);
/// From no weight to the largest: ColorBrewer's YlGnBu, with white for none.
const COLOURS: [RGBColor; 6] = [
    RGBColor(255, 255, 255),
    RGBColor(237, 248, 177),
    RGBColor(127, 205, 187),
    RGBColor(44, 127, 184),
    RGBColor(37, 52, 148),
    RGBColor(8, 20, 70),
];

pub fn register_font() -> Result<()> {
    register("sans-serif", FontStyle::Normal, UBUNTU_LIGHT).map_err(|_| Error::Font)
}

/// The font of the tokens.
pub fn label_font() -> TextStyle<'static> {
    ("sans-serif", 15).into_font().color(&INK)
}

/// The font of the titles.
pub fn title_font() -> FontDesc<'static> {
    ("sans-serif", 19).into_font()
}

fn colour(share: f32) -> RGBColor {
    let at = share.clamp(0.0, 1.0) * (COLOURS.len() - 1) as f32;
    let (low, high) = (COLOURS[at.floor() as usize], COLOURS[at.ceil() as usize]);
    let mix = |low: u8, high: u8| (f32::from(low) + (f32::from(high) - f32::from(low)) * at.fract()).round() as u8;
    RGBColor(mix(low.0, high.0), mix(low.1, high.1), mix(low.2, high.2))
}

fn text<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    text: String,
    (x, y): (i32, i32),
    style: &TextStyle<'_>,
    (h, v): (HPos, VPos),
) -> Drawn<B> {
    area.draw(&Text::new(text, (x, y), style.pos(Pos::new(h, v))))
}

pub fn page<B: DrawingBackend>(area: &DrawingArea<B, Shift>, page: &Page<'_>) -> Drawn<B> {
    area.fill(&WHITE)?;
    for block in &page.blocks {
        paint_block(area, block, page.top)?;
    }
    bar(area, page)
}

fn paint_block<B: DrawingBackend>(area: &DrawingArea<B, Shift>, block: &Block<'_>, top: f32) -> Drawn<B> {
    let title = title_font().color(&INK);
    let at = (MARGIN as i32, block.title_top as i32);
    text(area, block.sequence.title.clone(), at, &title, (HPos::Left, VPos::Top))?;
    for (index, head) in block.heads.iter().enumerate() {
        paint_head(area, block, index, head, top)?;
    }
    let plain = label_font();
    let upright = label_font().transform(FontTransform::Rotate270);
    for &(x, y) in &block.query_names {
        text(area, "query".into(), (x as i32, y as i32), &upright, (HPos::Center, VPos::Top))?;
    }
    let (x, y) = block.key_name;
    text(area, "key".into(), (x as i32, y as i32), &plain, (HPos::Center, VPos::Top))
}

fn paint_head<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    block: &Block<'_>,
    index: usize,
    head: &Head,
    top: f32,
) -> Drawn<B> {
    let (rows, columns) = (block.sequence.queries.len(), block.sequence.keys.len());
    let (left, upper, cell) = (head.left as i32, head.top as i32, block.cell as i32);
    let (right, lower) = (left + columns as i32 * cell, upper + rows as i32 * cell);
    let plain = label_font();
    let above = (left, upper - LINE as i32 + 2);
    text(area, format!("head {index}"), above, &plain, (HPos::Left, VPos::Top))?;
    let weights = &block.sequence.weights[index * rows * columns..][..rows * columns];
    for (place, &weight) in weights.iter().enumerate() {
        let fill = colour(weight / top);
        // The page is white already.
        if fill != WHITE {
            let (x, y) = (left + (place % columns) as i32 * cell, upper + (place / columns) as i32 * cell);
            area.draw(&Rectangle::new([(x, y), (x + cell, y + cell)], fill.filled()))?;
        }
    }
    area.draw(&Rectangle::new([(left, upper), (right, lower)], FRAME))?;
    if head.names_queries {
        for (row, token) in block.sequence.queries.iter().enumerate().step_by(block.every) {
            let at = (left - TICK as i32, upper + row as i32 * cell + cell / 2);
            text(area, label(token), at, &plain, (HPos::Right, VPos::Center))?;
        }
    }
    if head.names_keys {
        let upright = label_font().transform(FontTransform::Rotate270);
        for (column, token) in block.sequence.keys.iter().enumerate().step_by(block.every) {
            let at = (left + column as i32 * cell + cell / 2, lower + TICK as i32);
            text(area, label(token), at, &upright, (HPos::Right, VPos::Center))?;
        }
    }
    Ok(())
}

/// The colour bar, beside the first row of heads.
fn bar<B: DrawingBackend>(area: &DrawingArea<B, Shift>, page: &Page<'_>) -> Drawn<B> {
    let (left, upper) = (page.bar_left as i32, page.blocks[0].heads[0].top as i32);
    let (bar_width, bar_height) = (BAR.0 as i32, BAR.1 as i32);
    let (right, lower) = (left + bar_width, upper + bar_height);
    let plain = label_font();
    text(area, "weight".into(), (left, upper - LINE as i32 - 4), &plain, (HPos::Left, VPos::Top))?;
    for step in 0..bar_height {
        let fill = colour(1.0 - step as f32 / bar_height as f32);
        area.draw(&Rectangle::new([(left, upper + step), (right, upper + step + 1)], fill.filled()))?;
    }
    area.draw(&Rectangle::new([(left, upper), (right, lower)], FRAME))?;
    for quarter in 0..=4 {
        let y = lower - quarter * bar_height / 4;
        let value = page.top * quarter as f32 / 4.0;
        area.draw(&PathElement::new([(right, y), (right + 4, y)], INK))?;
        text(area, format!("{value:.2}"), (right + 4 + TICK as i32, y), &plain, (HPos::Left, VPos::Center))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_darken_from_white_on() {
        assert_eq!(colour(0.0), WHITE);
        let light = |share: f32| -> u32 {
            let c = colour(share);
            [c.0, c.1, c.2].map(u32::from).iter().sum()
        };
        assert!((0..100).all(|n| light(n as f32 / 100.0) > light((n + 1) as f32 / 100.0)));
        assert_eq!(colour(2.0), COLOURS[5]);
    }
}
