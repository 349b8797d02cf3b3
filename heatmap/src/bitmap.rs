//! PNG: bitmaps of cells, and whole pictures.

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::prelude::*;
use plotters::style::register_font as register;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use png::EncodingError;

use crate::error::{Error, Result};
use crate::layout::{Anchor, Page, Panel};
use crate::style::palette;

const INK: RGBColor = RGBColor(40, 40, 40);
const FRAME: RGBColor = RGBColor(190, 190, 190);

pub fn register_font() -> Result<()> {
    register("sans-serif", FontStyle::Normal, UBUNTU_LIGHT).map_err(|_| Error::Font)
}

/// A font of so many pixels to the em, which is what an SVG calls its size. plotters counts from ascent to descent.
pub fn font(size: usize) -> FontDesc<'static> {
    ("sans-serif", size as f64 * 1.12).into_font()
}

/// A PNG with a pixel for each cell.
pub fn cells(panel: &Panel) -> Result<Vec<u8>, EncodingError> {
    let (width, height) = (panel.columns, panel.cells.len() / panel.columns);
    encode((width, height), png::ColorType::Indexed, Some(palette()), &panel.cells)
}

/// A PNG of a whole page, or why it could not be made.
pub fn page(page: &Page) -> Result<Vec<u8>, String> {
    let mut pixels = vec![255; 3 * page.width * page.height];
    let colours = palette();
    for panel in &page.panels {
        fill(&mut pixels, page.width, panel, &colours);
    }
    let size = (page.width as u32, page.height as u32);
    write(&BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area(), page)
        .map_err(|error| error.to_string())?;
    encode((page.width, page.height), png::ColorType::Rgb, None, &pixels).map_err(|error| error.to_string())
}

/// Colours the cells of a panel.
fn fill(pixels: &mut [u8], page_width: usize, panel: &Panel, colours: &[u8]) {
    let cell = (panel.width / panel.columns, panel.height * panel.columns / panel.cells.len());
    for y in 0..panel.height {
        let cells = &panel.cells[y / cell.1 * panel.columns..][..panel.columns];
        let line = &mut pixels[3 * ((panel.y + y) * page_width + panel.x)..][..3 * panel.width];
        for (x, pixel) in line.chunks_mut(3).enumerate() {
            pixel.copy_from_slice(&colours[3 * usize::from(cells[x / cell.0])..][..3]);
        }
    }
}

/// Draws frames and text.
fn write<B: DrawingBackend>(
    area: &DrawingArea<B, plotters::coord::Shift>,
    page: &Page,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    for panel in &page.panels {
        let [left, top, right, bottom] =
            [panel.x - 1, panel.y - 1, panel.x + panel.width, panel.y + panel.height].map(|at| at as i32);
        area.draw(&Rectangle::new([(left, top), (right, bottom)], FRAME))?;
    }
    for text in &page.texts {
        let anchor = match text.anchor {
            Anchor::Start => HPos::Left,
            Anchor::Middle => HPos::Center,
            Anchor::End => HPos::Right,
        };
        let style = font(text.size).color(&INK).pos(Pos::new(anchor, VPos::Center));
        let style = if text.upright { style.transform(FontTransform::Rotate270) } else { style };
        // plotters has the baseline just below the middle; in an SVG it is 0.35 em below, so that capitals are in the middle.
        let lower = (text.size / 4) as i32;
        let (x, y) = (text.x as i32, text.y as i32);
        let place = if text.upright { (x + lower, y) } else { (x, y + lower) };
        area.draw(&Text::new(text.text.as_str(), place, style))?;
    }
    area.present()
}

fn encode(
    (width, height): (usize, usize),
    colour: png::ColorType,
    palette: Option<Vec<u8>>,
    pixels: &[u8],
) -> Result<Vec<u8>, EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(colour);
    encoder.set_compression(png::Compression::Best);
    if let Some(palette) = palette {
        encoder.set_palette(palette);
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Style;
    use crate::tests::sequence;

    fn decoded(bytes: &[u8]) -> (png::OutputInfo, Vec<u8>) {
        let mut decoder = png::Decoder::new(bytes);
        decoder.set_transformations(png::Transformations::EXPAND);
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size()];
        let info = reader.next_frame(&mut pixels).unwrap();
        (info, pixels)
    }

    #[test]
    fn a_picture_has_the_colour_of_each_cell_at_its_place() {
        let drawn = Page::new(&[sequence()], &Style::default()).unwrap();
        let (info, pixels) = decoded(&page(&drawn).unwrap());
        assert_eq!((info.width as usize, info.height as usize), (drawn.width, drawn.height));
        let at = |x: usize, y: usize| &pixels[3 * (y * drawn.width + x)..][..3];
        let colours = palette();
        let (panel, cell) = (&drawn.panels[1], drawn.panels[1].width / 2);
        for (index, &colour) in panel.cells.iter().enumerate() {
            let (left, top) = (panel.x + index % 2 * cell, panel.y + index / 2 * cell);
            for (x, y) in [(left, top), (left + cell - 1, top + cell - 1)] {
                assert_eq!(at(x, y), &colours[3 * usize::from(colour)..][..3], "cell {index}");
            }
        }
        // The frame is around the cells, and the page is white.
        assert_eq!((at(panel.x - 1, panel.y), at(0, 0)), (&[190, 190, 190][..], &[255, 255, 255][..]));
    }

    #[test]
    fn cells_have_a_pixel_each() {
        let drawn = Page::new(&[sequence()], &Style::default()).unwrap();
        let (info, pixels) = decoded(&cells(&drawn.panels[0]).unwrap());
        assert_eq!((info.width, info.height), (2, 2));
        let (white, dark) = (palette()[..3].to_vec(), palette()[3 * 255..].to_vec());
        assert_eq!((&pixels[3..6], &pixels[..3]), (&white[..], &dark[..]));
    }
}
