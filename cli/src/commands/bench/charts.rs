//! The charts of the page. Each has a title, and a description for people who cannot see it.

use plotters::prelude::{Color, Rectangle};
use plotters::style::text_anchor::{HPos, VPos};
use serde::Serialize;
use wgpu_attention_bench::Ceilings;

use super::canvas::{
    Area, Axis, CEILING, Drawn, GRID, INK, KERNELS, MUTED, Margins, Plot, WIDTH, colour, font, marker, path, series,
    svg, write,
};
use super::record::{Case, Record};
use crate::engine::Label;
use crate::error::Result;
use crate::report::short;

/// A chart as the page embeds it.
#[derive(Debug, Serialize)]
pub struct Chart {
    pub title: String,
    pub description: String,
    pub width: u32,
    pub height: u32,
    /// The inside of the SVG element.
    pub svg: String,
}

impl Chart {
    fn new(title: String, description: String, height: u32, draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<Chart> {
        Ok(Chart { title, description, width: WIDTH, height, svg: svg((WIDTH, height), draw)? })
    }
}

/// The marker of each kernel that some record has, with its name.
pub fn legend(records: &[Record]) -> Result<Vec<Chart>> {
    let used = |index: &usize| records.iter().any(|record| series(&record.choice) == *index);
    let chart = |index: usize| {
        let draw = |area: &Area<'_>| marker(area, (8, 8), index);
        let svg = svg((16, 16), draw)?;
        Ok(Chart { title: KERNELS[index].into(), description: String::new(), width: 16, height: 16, svg })
    };
    (0..KERNELS.len()).filter(used).map(chart).collect()
}

/// Height of a row of bars, and of the name of an adapter above its rows.
const ROW: f64 = 26.0;
const NAME: f64 = 26.0;

/// The rates of all kernels on all adapters for one problem.
pub fn rates(number: usize, case: &Case, records: &[&Record], adapters: &[&Label]) -> Result<Chart> {
    let of = |label: &Label| -> Vec<&Record> { records.iter().copied().filter(|r| r.label == *label).collect() };
    let groups: Vec<(&Label, Vec<&Record>)> =
        adapters.iter().map(|label| (*label, of(label))).filter(|(_, records)| !records.is_empty()).collect();
    let values = records.iter().flat_map(|record| [record.gflops(), record.ceiling_gflops]);
    let high = values.clone().fold(0.0, f64::max);
    let best = |records: &Vec<&Record>| records.iter().map(|record| record.gflops()).fold(0.0, f64::max);
    // Where the longest bar of an adapter would be too short to see, the axis is logarithmic.
    let log = groups.iter().any(|(_, records)| 20.0 * best(records) < high);
    let x = if log { Axis::log(values) } else { Axis::linear(high * 1.02) };
    let total = NAME * groups.len() as f64 + ROW * records.len() as f64;
    let axis = if log { "GFLOP/s (logarithmic)" } else { "GFLOP/s" };
    let told = records.iter().map(|record| {
        let (kernel, label, share) = (&record.choice, &record.label, 100.0 * record.of_ceiling());
        format!("{kernel} on {label}: {} GFLOP/s, {share:.0} % of the ceiling", short(record.gflops()))
    });
    let description = format!("Bars: {}.", told.collect::<Vec<_>>().join("; "));
    Chart::new(format!("{number}: {case}"), description, total as u32 + 46, |area| {
        let plot = Plot::new(area, x, Axis::rows(total), axis, Margins { left: 72, right: 88, top: 2 })?;
        let mut y = total;
        for (label, records) in groups {
            let (_, top) = plot.pixel(0.0, y - NAME / 2.0);
            let ceiling = records[0].ceiling_gflops;
            let name = cut(&format!("{} · {}", label.backend, label.adapter), 34);
            write(area, name, (0, top), font(INK, HPos::Left, VPos::Center))?;
            let right = (WIDTH as i32, top);
            write(area, format!("ceiling {}", short(ceiling)), right, font(CEILING, HPos::Right, VPos::Center))?;
            y -= NAME;
            let bottom = y - ROW * records.len() as f64;
            path(area, vec![plot.pixel(ceiling, y), plot.pixel(ceiling, bottom + 2.0)], CEILING, 2)?;
            for record in records {
                bar(area, &plot, record, y)?;
                y -= ROW;
            }
        }
        Ok(())
    })
}

/// A bar below `y`, with the quartiles as a line, its kernel left and its rate right.
fn bar(area: &Area<'_>, plot: &Plot<'_>, record: &Record, y: f64) -> Drawn {
    let (rate, times) = (record.gflops(), record.times_ms.quantiles());
    let (left, top) = plot.pixel(plot.x().low(), y - 4.0);
    let (right, bottom) = plot.pixel(rate, y - ROW + 4.0);
    let middle = (top + bottom) / 2;
    let fill = colour(series(&record.choice));
    area.draw(&Rectangle::new([(left, top), (right.max(left + 1), bottom)], fill.filled()))?;
    let whisker = [times.p75, times.p25].map(|ms| (plot.pixel(record.rate(ms), y).0, middle));
    path(area, whisker.to_vec(), INK, 2)?;
    let name = format!("{}{}", record.choice, if record.planned { " ★" } else { "" });
    write(area, name, (0, middle), font(INK, HPos::Left, VPos::Center))?;
    let text = format!("{} · {:.0} %", short(rate), 100.0 * record.of_ceiling());
    write(area, text, (WIDTH as i32, middle), font(INK, HPos::Right, VPos::Center))
}

/// The first characters of a text, with an ellipsis where some are missing.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_string();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// The rates on one adapter over the operations per byte, below the two ceilings.
pub fn roofline(label: &Label, cases: &[Case], records: &[&Record]) -> Result<Chart> {
    let ceilings = Ceilings { gflops: records[0].ceiling_gflops, gbs: records[0].ceiling_gbs };
    let intensity = |record: &Record| record.flops / record.bytes as f64;
    let ridge = ceilings.gflops / ceilings.gbs;
    let x = Axis::log(records.iter().map(|record| intensity(record)).chain([ridge]));
    let rates = records.iter().map(|record| record.gflops());
    let y = Axis::log(rates.chain([ceilings.gflops, ceilings.attainable(x.low())]));
    let told = records.iter().map(|record| {
        let (kernel, case, roof) = (&record.choice, &record.case, ceilings.attainable(intensity(record)));
        format!("{kernel} on {case}: {:.0} % of the roof", 100.0 * record.gflops() / roof)
    });
    let description = format!(
        "A roof of {} GB/s that becomes flat at {} GFLOP/s, and below it a point for each kernel and problem. {}.",
        short(ceilings.gbs),
        short(ceilings.gflops),
        told.collect::<Vec<_>>().join("; ")
    );
    Chart::new(format!("{label}"), description, 300, |area| {
        let plot = Plot::new(area, x, y, "FLOP per byte", Margins { left: 52, right: 12, top: 44 })?;
        write(area, "GFLOP/s", (0, 0), font(INK, HPos::Left, VPos::Top))?;
        let (low, high) = (plot.x().low(), plot.x().high());
        let roof = [low, ridge, high].map(|x| plot.pixel(x, ceilings.attainable(x)));
        // The number of the problem stands above the plot; problems of about the same intensity share a line.
        let mut columns: Vec<(i32, Vec<String>)> = Vec::new();
        for record in records {
            let (at, number) =
                (plot.pixel(intensity(record), plot.y().low()).0, number(cases, &record.case).to_string());
            match columns.iter_mut().find(|(other, _)| (at - other).abs() < 12) {
                Some((_, numbers)) if numbers.contains(&number) => (),
                Some((_, numbers)) => numbers.push(number),
                None => columns.push((at, vec![number])),
            }
        }
        let bottom = plot.pixel(low, plot.y().low()).1;
        for (at, numbers) in columns {
            path(area, vec![(at, 42), (at, bottom)], MUTED, 1)?;
            write(area, numbers.join(","), (at, 40), font(INK, HPos::Center, VPos::Bottom))?;
        }
        path(area, roof.to_vec(), CEILING, 3)?;
        for record in records {
            marker(area, plot.pixel(intensity(record), record.gflops()), series(&record.choice))?;
        }
        Ok(())
    })
}

/// The number of a problem on the page, from 1.
fn number(cases: &[Case], case: &Case) -> usize {
    1 + cases.iter().position(|other| other == case).expect("every problem is listed")
}

/// Records of one adapter whose problems differ in their length only.
#[derive(Debug)]
pub struct Sweep<'a> {
    name: String,
    records: Vec<&'a Record>,
}

/// Finds problems that differ in their length only: in the number of keys, or in that of queries and keys where these are equal.
pub fn sweeps<'a>(records: &[&'a Record]) -> Vec<Sweep<'a>> {
    let mut sweeps: Vec<Sweep<'_>> = Vec::new();
    for record in records {
        let [b, h, hkv, sq, skv, d] = record.case.shape.0;
        let queries = if sq == skv { "N".into() } else { sq.to_string() };
        let mut name = format!("{b},{h},{hkv},{queries},N,{d}");
        let case = record.case.to_string();
        name += &case[case.find(' ').unwrap_or(case.len())..];
        match sweeps.iter_mut().find(|sweep| sweep.name == name) {
            Some(sweep) => sweep.records.push(record),
            None => sweeps.push(Sweep { name, records: vec![record] }),
        }
    }
    let several = |sweep: &Sweep<'_>| sweep.records.iter().any(|r| r.case.shape != sweep.records[0].case.shape);
    sweeps.retain(several);
    sweeps
}

/// Times over the length, a line for each kernel.
pub fn lengths(label: &Label, sweep: &Sweep<'_>) -> Result<Chart> {
    let length = |record: &Record| record.case.shape.0[4];
    let mut all: Vec<u32> = sweep.records.iter().map(|record| length(record)).collect();
    all.sort_unstable();
    all.dedup();
    let x = Axis::log(all.iter().map(|n| f64::from(*n))).with_ticks(all.iter().map(|n| f64::from(*n)).collect());
    let quantiles = sweep.records.iter().map(|record| record.times_ms.quantiles());
    let y = Axis::log(quantiles.flat_map(|q| [q.p5, q.p95]));
    let mut lines: Vec<Vec<&Record>> = Vec::new();
    for record in &sweep.records {
        match lines.iter_mut().find(|line| line[0].choice == record.choice) {
            Some(line) => line.push(record),
            None => lines.push(vec![record]),
        }
    }
    lines.iter_mut().for_each(|line| line.sort_by_key(|record| length(record)));
    let told = lines.iter().map(|line| {
        let times = line.iter().map(|r| format!("{} ms at {}", short(r.times_ms.median()), length(r)));
        format!("{}: {}", line[0].choice, times.collect::<Vec<_>>().join(", "))
    });
    let description = format!("Lines of the median time over N. {}.", told.collect::<Vec<_>>().join("; "));
    Chart::new(format!("{} on {label}", sweep.name), description, 300, |area| {
        let plot = Plot::new(area, x, y, "N, keys of a head", Margins { left: 52, right: 16, top: 26 })?;
        write(area, "ms", (0, 0), font(INK, HPos::Left, VPos::Top))?;
        for line in &lines {
            let index = series(&line[0].choice);
            let points: Vec<_> = line.iter().map(|r| plot.pixel(f64::from(length(r)), r.times_ms.median())).collect();
            path(area, points.clone(), colour(index), 2)?;
            for (record, point) in line.iter().zip(points) {
                let q = record.times_ms.quantiles();
                let ends = [q.p5, q.p95].map(|ms| plot.pixel(f64::from(length(record)), ms));
                path(area, ends.to_vec(), colour(index), 2)?;
                marker(area, point, index)?;
            }
        }
        Ok(())
    })
}

/// How much of the error budget each kernel uses on one adapter.
pub fn budgets(label: &Label, cases: &[Case], records: &[&Record]) -> Result<Chart> {
    let listed: Vec<usize> =
        (1..=cases.len()).filter(|n| records.iter().any(|r| number(cases, &r.case) == *n)).collect();
    let worst = records.iter().map(|record| 100.0 * record.budget_used).fold(0.0, f64::max);
    // A result that is far off, or not finite, is drawn at the end of the axis.
    let x = Axis::linear((1.1 * worst).clamp(105.0, 400.0));
    let told = records
        .iter()
        .map(|record| format!("{} on {}: {:.0} %", record.choice, record.case, 100.0 * record.budget_used));
    let description = format!(
        "Points of the largest share that an element uses of its error budget, beside a line at 100 %. {}.",
        told.collect::<Vec<_>>().join("; ")
    );
    let used: Vec<usize> =
        (0..KERNELS.len()).filter(|index| records.iter().any(|r| series(&r.choice) == *index)).collect();
    // Markers of different kernels are at different heights, because they often share a place.
    let height = |choice: &str| {
        let at = used.iter().position(|index| *index == series(choice)).expect("every kernel is used");
        9 * at as i32 - 9 * (used.len() as i32 - 1) / 2
    };
    let row = 9.0 * used.len() as f64 + 12.0;
    let total = row * listed.len() as f64;
    Chart::new(format!("{label}"), description, total as u32 + 70, |area| {
        let plot =
            Plot::new(area, x, Axis::rows(total), "% of the error budget", Margins { left: 28, right: 14, top: 26 })?;
        write(area, "problem", (0, 0), font(INK, HPos::Left, VPos::Top))?;
        path(area, vec![plot.pixel(100.0, total), plot.pixel(100.0, 0.0)], CEILING, 2)?;
        for (index, n) in listed.iter().enumerate() {
            let y = total - row * (index as f64 + 0.5);
            let (left, middle) = plot.pixel(0.0, y);
            let end = plot.pixel(plot.x().high(), y - row / 2.0);
            path(area, vec![(left, end.1), end], GRID, 1)?;
            write(area, n.to_string(), (left - 8, middle), font(INK, HPos::Right, VPos::Center))?;
            for record in records.iter().filter(|record| number(cases, &record.case) == *n) {
                let (at, _) = plot.pixel(100.0 * record.budget_used, y);
                marker(area, (at, middle + height(&record.choice)), series(&record.choice))?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::record::sample::record;
    use super::*;

    #[test]
    fn only_problems_that_differ_in_length_make_a_sweep() {
        let mut records: Vec<Record> = [256, 512, 1024].map(|n| record("flash", n, 1.0)).into();
        records.push(record("rows", 512, 2.0));
        // A step of decoding, and another head dimension, which have no second length.
        records.push(record("split", 4096, 1.0));
        records[4].case.shape.0[3] = 1;
        records.push(record("flash", 128, 1.0));
        records[5].case.shape.0[5] = 32;
        let all: Vec<&Record> = records.iter().collect();
        let sweeps = sweeps(&all);
        let [sweep] = &sweeps[..] else { panic!("{sweeps:?}") };
        assert_eq!((sweep.name.as_str(), sweep.records.len()), ("1,8,8,N,N,64 f32", 4));
        let chart = lengths(&records[0].label, sweep).unwrap();
        assert!(chart.description.contains("flash: 1.03 ms at 256, 1.03 ms at 512, 1.03 ms at 1024"), "{chart:?}");
    }

    #[test]
    fn bars_are_as_long_as_rates_and_a_small_one_makes_the_axis_logarithmic() {
        let records = [record("flash", 512, 0.5), record("rows", 512, 1.0)];
        let widths = |records: [&Record; 2]| -> (Vec<f64>, bool) {
            let chart = rates(1, &records[0].case, &records, &[&records[0].label]).unwrap();
            let text = format!("<svg>{}</svg>", chart.svg);
            let document = roxmltree::Document::parse(&text).unwrap();
            let bars = document.descendants().filter(|node| {
                node.tag_name().name() == "rect"
                    && ["var(--flash)", "var(--rows)"].contains(&node.attribute("fill").unwrap())
            });
            let widths = bars.map(|bar| bar.attribute("width").unwrap().parse().unwrap()).collect();
            (widths, chart.svg.contains("logarithmic"))
        };
        let (bars, log) = widths([&records[0], &records[1]]);
        assert!(!log && (bars[0] / bars[1] - 2.0).abs() < 0.1, "{bars:?}");
        let slow = [50.0, 100.0].map(|ms| record("rows", 512, ms));
        let (bars, log) = widths([&slow[0], &slow[1]]);
        assert!(log && bars[1] > 5.0, "{bars:?}");
    }
}
