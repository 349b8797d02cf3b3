//! One line for each problem: what most people want to know of a check.

use super::{NOT_RUN, OK, Row};
use crate::report::short;

/// What the words of the table mean.
pub const WORDS: &str = "
budget  how far f32 arithmetic may be from exact arithmetic on these numbers
used    the largest error as a share of its budget; above 100 % is wrong
stage   a step of attention (scores, softmax, values); --stages shows them all
f16     rounding an output to 16 bits once uses most of its budget by nature
";

/// The same for the table of all stages.
pub const ALL_WORDS: &str = "
budget  how far f32 arithmetic may be from exact arithmetic on these numbers
used    the largest error as a share of its budget; above 100 % is wrong
stage   a step of attention, the whole of it, or a kernel that computes the whole
f16     rounding an output to 16 bits once uses most of its budget by nature
";

pub const HEADER: [&str; 8] = ["problem", "B,H,HKV,SQ,SKV,D", "type", "kernel", "used", "ms", "GFLOP/s", "verdict"];

/// The cells of a line for each problem: all of its results, and the time of the whole.
pub fn cells(rows: &[&Row]) -> Vec<Vec<String>> {
    rows.chunk_by(|a, b| a.problem == b.problem).map(line).collect()
}

fn line(rows: &[&Row]) -> Vec<String> {
    let whole = rows.iter().find(|row| row.stage == "whole").expect("each problem has a row for the whole");
    let used = rows.iter().filter_map(|row| row.of_budget).reduce(f64::max);
    let number = |x: Option<f64>| x.map_or(String::new(), short);
    vec![
        whole.problem.into(),
        whole.shape.clone(),
        whole.dtype.clone(),
        whole.kernel.clone().unwrap_or_default(),
        used.map_or(String::new(), |used| format!("{:.0} %", 100.0 * used)),
        number(whole.ms),
        number(whole.gflops),
        verdict(rows),
    ]
}

/// `ok`, or what is wrong in which stages.
fn verdict(rows: &[&Row]) -> String {
    let wrong: Vec<&&Row> = rows.iter().filter(|row| row.verdict != OK && !row.verdict.starts_with(NOT_RUN)).collect();
    match wrong[..] {
        [] => OK.into(),
        [row] if row.stage == "whole" => row.verdict.clone(),
        _ => {
            let name = |row: &&&Row| match row.verdict.as_str() {
                "DIFFERS" => row.stage.to_string(),
                other => format!("{} ({other})", row.stage),
            };
            format!("DIFFERS: {}", wrong.iter().map(name).collect::<Vec<_>>().join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Label;

    fn row(problem: &'static str, stage: &'static str, of_budget: Option<f64>, verdict: &str) -> Row {
        let label = Label { adapter: "a".into(), backend: "b".into(), driver: "c".into() };
        Row {
            label,
            problem,
            shape: "1,1,1,1,1,1".into(),
            dtype: "f32".into(),
            stage,
            kernel: (stage == "whole").then(|| "flash".into()),
            max_error: None,
            budget: None,
            of_budget,
            ms: Some(2.0),
            gflops: Some(3.0),
            verdict: verdict.into(),
        }
    }

    #[test]
    fn a_line_tells_the_worst_of_all_results_of_a_problem() {
        let rows = [
            row("a", "scores", Some(0.4), OK),
            row("a", "whole", Some(0.1), OK),
            row("a", "matrix", None, "not run: no matrices"),
            row("b", "scores", Some(1.5), "DIFFERS"),
            row("b", "whole", Some(0.2), OK),
            row("b", "split", None, "error: lost"),
            row("c", "whole", None, "error: too large"),
            row("d", "whole", Some(f64::INFINITY), "DIFFERS"),
        ];
        let lines = cells(&rows.each_ref());
        let short: Vec<[&str; 4]> = lines.iter().map(|line| [&*line[0], &*line[3], &*line[4], &*line[7]]).collect();
        assert_eq!(
            short,
            [
                ["a", "flash", "40 %", "ok"],
                ["b", "flash", "150 %", "DIFFERS: scores, split (error: lost)"],
                ["c", "flash", "", "error: too large"],
                ["d", "flash", "inf %", "DIFFERS"],
            ]
        );
    }
}
