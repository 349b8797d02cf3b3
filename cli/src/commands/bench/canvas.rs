//! What all charts share: axes, colours that follow the page's style sheet, and markers.

use std::io;

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Drawn<T = ()> = Result<T, DrawingAreaErrorKind<io::Error>>;
type Plane = Cartesian2d<RangedCoordf64, RangedCoordf64>;

/// The width of every chart in pixels: it fits a telephone, and a wide page has several charts side by side.
pub const WIDTH: u32 = 360;

/// The kernels with a colour and a marker of their own. Another kernel has the last ones.
pub const KERNELS: [&str; 6] = ["rows", "flash", "matrix", "split", "unfused", "other"];

/// Stand-ins for the colours of the style sheet, which differ between light and dark: [`svg`] replaces each by its variable.
pub const INK: RGBColor = RGBColor(1, 0, 0);
pub const MUTED: RGBColor = RGBColor(1, 0, 1);
pub const GRID: RGBColor = RGBColor(1, 0, 2);
pub const CEILING: RGBColor = RGBColor(1, 0, 3);
const VARIABLES: [(RGBColor, &str); 4] = [(INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (CEILING, "ceiling")];

/// The index of a kernel in [`KERNELS`].
pub fn series(kernel: &str) -> usize {
    KERNELS.iter().position(|known| *known == kernel).unwrap_or(KERNELS.len() - 1)
}

/// The stand-in for the colour of a kernel.
pub fn colour(series: usize) -> RGBColor {
    RGBColor(2, 0, series as u8)
}

/// Draws, and returns what belongs between the tags of an SVG element.
pub fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    let page = |why: String| Error::Page { why };
    register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT)
        .map_err(|_| page("the built-in font cannot be read".into()))?;
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&area).and_then(|()| area.present()).map_err(|error| page(error.to_string()))?;
    }
    let inner = text.split_once(">\n").and_then(|(_, rest)| rest.rsplit_once("</svg>"));
    let mut inner = inner.expect("plotters writes one SVG element").0.to_string();
    let kernels = (0..KERNELS.len()).map(|series| (colour(series), KERNELS[series]));
    for (stand_in, variable) in VARIABLES.into_iter().chain(kernels) {
        let RGBColor(r, g, b) = stand_in;
        inner = inner.replace(&format!("\"#{r:02X}{g:02X}{b:02X}\""), &format!("\"var(--{variable})\""));
    }
    Ok(inner)
}

/// The style of a text. Plotters divides sizes by 1.24, so that this is 13 pixels.
pub fn font(colour: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    ("sans-serif", 16).into_font().color(&colour).pos(Pos::new(h, v))
}

pub fn write(area: &Area<'_>, text: impl Into<String>, at: (i32, i32), style: TextStyle<'static>) -> Drawn {
    area.draw(&Text::new(text.into(), at, style))
}

/// A marker of a kernel around a point. Shape and colour both tell the kernel.
pub fn marker(area: &Area<'_>, (x, y): (i32, i32), series: usize) -> Drawn {
    let style = colour(series).filled();
    let polygon = |points: &[(i32, i32)]| {
        area.draw(&Polygon::new(points.iter().map(|(dx, dy)| (x + dx, y + dy)).collect::<Vec<_>>(), style))
    };
    match series {
        0 => area.draw(&Circle::new((x, y), 5, style)),
        1 => polygon(&[(0, -6), (6, 5), (-6, 5)]),
        2 => polygon(&[(-5, -5), (5, -5), (5, 5), (-5, 5)]),
        3 => polygon(&[(0, -7), (7, 0), (0, 7), (-7, 0)]),
        4 => polygon(&[(0, 6), (6, -5), (-6, -5)]),
        _ => area.draw(&Circle::new((x, y), 5, colour(series).stroke_width(2))),
    }
}

/// An axis, linear or logarithmic, with its ticks.
#[derive(Debug)]
pub struct Axis {
    log: bool,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// From 0 to at least `high`.
    pub fn linear(high: f64) -> Self {
        let step = nice(high / 5.0);
        Axis {
            log: false,
            low: 0.0,
            high,
            ticks: (0..=5).map(|n| f64::from(n) * step).filter(|x| *x <= high).collect(),
        }
    }

    /// An axis without ticks, for rows of a chart.
    pub fn rows(count: f64) -> Self {
        Axis { log: false, low: 0.0, high: count, ticks: Vec::new() }
    }

    /// A logarithmic axis that holds all values, from a power of ten, or twice or five times one, to another.
    pub fn log(values: impl Iterator<Item = f64> + Clone) -> Self {
        let (low, high) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(0.0, f64::max));
        let marks = |of: &[f64]| -> Vec<f64> {
            (-12..=12).flat_map(|power| of.iter().map(move |n| power_of_ten(*n, power))).collect()
        };
        let fine = marks(&[1.0, 2.0, 5.0]);
        let low = fine.iter().copied().rfind(|mark| *mark < 0.9 * low).unwrap_or(low);
        let high = fine.iter().copied().find(|mark| *mark > 1.1 * high).unwrap_or(high);
        let within = |marks: Vec<f64>| marks.into_iter().filter(|x| (low..=high).contains(x)).collect::<Vec<_>>();
        let coarse = within(marks(&[1.0]));
        let ticks = match coarse.len() {
            0..3 => within(fine),
            3..5 => coarse,
            _ => coarse.into_iter().step_by(2).collect(),
        };
        Axis { log: true, low, high, ticks }
    }

    /// The same axis with these ticks.
    pub fn with_ticks(self, ticks: Vec<f64>) -> Self {
        Axis { ticks, ..self }
    }

    pub fn low(&self) -> f64 {
        self.low
    }

    pub fn high(&self) -> f64 {
        self.high
    }

    /// The place of a value on the axis.
    fn at(&self, x: f64) -> f64 {
        let x = x.clamp(self.low, self.high);
        if self.log { x.log10() } else { x }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.at(self.low)..self.at(self.high)
    }
}

/// `n` times a power of ten, as near as a number can be to its decimal digits.
fn power_of_ten(n: f64, power: i32) -> f64 {
    if power < 0 { n / 10f64.powi(-power) } else { n * 10f64.powi(power) }
}

/// The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `step`.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|n| n * power).find(|n| *n >= step * 0.999).unwrap_or(10.0 * power)
}

/// A plane between axes, whose points become pixels.
pub struct Plot<'a> {
    chart: ChartContext<'a, SVGBackend<'a>, Plane>,
    x: Axis,
    y: Axis,
}

/// Pixels left, right and above of a plot.
pub struct Margins {
    pub left: u32,
    pub right: u32,
    pub top: u32,
}

impl<'a> Plot<'a> {
    /// Draws the grid, with the ticks and the name of the x axis below and the ticks of the y axis left.
    pub fn new(area: &Area<'a>, x: Axis, y: Axis, name: &str, margins: Margins) -> Drawn<Self> {
        let chart = ChartBuilder::on(area)
            .margin_top(margins.top)
            .margin_right(margins.right)
            .x_label_area_size(42)
            .y_label_area_size(margins.left)
            .build_cartesian_2d(x.range(), y.range())?;
        let plot = Plot { chart, x, y };
        let [(left, bottom), (right, top)] = [plot.pixel(plot.x.low, plot.y.low), plot.pixel(plot.x.high, plot.y.high)];
        path(area, vec![(left, top), (left, bottom), (right, bottom)], GRID, 1)?;
        for tick in &plot.x.ticks {
            let (at, _) = plot.pixel(*tick, plot.y.low);
            path(area, vec![(at, top), (at, bottom)], GRID, 1)?;
            write(area, tick.to_string(), (at, bottom + 4), font(MUTED, HPos::Center, VPos::Top))?;
        }
        for tick in &plot.y.ticks {
            let (_, at) = plot.pixel(plot.x.low, *tick);
            path(area, vec![(left, at), (right, at)], GRID, 1)?;
            write(area, tick.to_string(), (left - 6, at), font(MUTED, HPos::Right, VPos::Center))?;
        }
        write(area, name, ((left + right) / 2, bottom + 22), font(INK, HPos::Center, VPos::Top))?;
        Ok(plot)
    }

    /// The pixel of a point; a point beyond the axes is at their end.
    pub fn pixel(&self, x: f64, y: f64) -> (i32, i32) {
        self.chart.backend_coord(&(self.x.at(x), self.y.at(y)))
    }

    pub fn x(&self) -> &Axis {
        &self.x
    }

    pub fn y(&self) -> &Axis {
        &self.y
    }
}

/// A line through pixels.
pub fn path(area: &Area<'_>, pixels: Vec<(i32, i32)>, colour: RGBColor, width: u32) -> Drawn {
    area.draw(&PathElement::new(pixels, colour.stroke_width(width)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_all_values_and_have_round_ticks() {
        let axis = Axis::log([3.0, 40.0].into_iter());
        assert_eq!((axis.low, axis.high, &axis.ticks[..]), (2.0, 50.0, &[2.0, 5.0, 10.0, 20.0, 50.0][..]));
        let axis = Axis::log([0.3, 4000.0].into_iter());
        assert_eq!((axis.low, axis.high), (0.2, 5000.0));
        assert_eq!(axis.ticks, [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(Axis::linear(180.0).ticks, [0.0, 50.0, 100.0, 150.0]);
        assert_eq!(Axis::linear(1.0).ticks.len(), 6);
        let axis = Axis::log([1.2e-3, 1e3].into_iter());
        assert_eq!(axis.ticks.iter().map(f64::to_string).collect::<Vec<_>>().join(" "), "0.001 0.1 10 1000");
    }

    #[test]
    fn colours_follow_the_style_sheet() {
        let text = svg((10, 10), |area| {
            write(area, "a < b", (0, 0), font(INK, HPos::Left, VPos::Top))?;
            (0..KERNELS.len()).try_for_each(|series| marker(area, (5, 5), series))
        });
        let text = text.unwrap();
        assert!(!text.contains('#') && text.contains("a &lt; b"), "{text}");
        for variable in ["ink", "rows", "flash", "matrix", "split", "unfused", "other"] {
            assert!(text.contains(&format!("\"var(--{variable})\"")), "{variable}: {text}");
        }
    }
}
