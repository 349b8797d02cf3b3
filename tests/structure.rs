//! How the source is laid out: which folder may import which, and how long a file or a function may be.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The folders of `src`, from the ground up. Each imports only what stands before it.
const FOLDERS: [&str; 10] =
    ["trace", "contract", "kernel", "dispatch", "ops", "plan", "layer", "load", "reference", "device"];

const FILE_LINES: usize = 450;
const FUNCTION_LINES: usize = 70;

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

/// The path of each file of `src` from the root of the repository, and its text.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    files(&root.join("src"), &mut found);
    found.sort();
    assert!(found.len() > 50, "{found:?}");
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/"), text)
    };
    found.into_iter().map(read).collect()
}

/// The folder of a file; a file beside folders is the folder of its name.
fn folder(path: &str) -> &str {
    let inside = path.strip_prefix("src/").unwrap();
    inside.split(['/', '.']).next().unwrap()
}

/// What follows each `crate::` in a text without comments.
fn imports(text: &str) -> BTreeSet<&str> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let paths = code.flat_map(|line| line.split("crate::").skip(1));
    paths.map(|path| path.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap()).collect()
}

#[test]
fn folders_import_only_those_below_them() {
    let mut edges = 0;
    for (path, text) in sources() {
        let from = folder(&path);
        if from == "lib" {
            continue;
        }
        let level = FOLDERS.iter().position(|name| *name == from);
        let level = level.unwrap_or_else(|| panic!("{path} is in no known folder"));
        for to in imports(&text) {
            let below = FOLDERS.iter().position(|name| *name == to);
            let below = below.unwrap_or_else(|| panic!("{path} imports crate::{to} rather than its folder"));
            assert!(below <= level, "{path} imports {to}, which stands above {from}");
            edges += usize::from(below < level);
        }
    }
    assert!(edges > 50, "{edges} imports from folder to folder");
}

/// The first line and the length of each function: from `fn` to the brace that closes at the same depth.
fn functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let depth = |line: &str| line.len() - line.trim_start().len();
    let begins = |line: &str| {
        let words = line.trim_start().trim_start_matches("pub(crate) ").trim_start_matches("pub(super) ");
        let words = words.trim_start_matches("pub ").trim_start_matches("const ").trim_start_matches("async ");
        words.starts_with("fn ")
    };
    let starts = (0..lines.len()).filter(|&n| begins(lines[n]));
    let length = |n: usize| {
        let end = (n..lines.len()).find(|&end| {
            depth(lines[end]) == depth(lines[n])
                && (lines[end].trim_start().starts_with('}') || lines[end].ends_with(';'))
        });
        (n + 1, end.map_or(1, |end| end - n + 1))
    };
    starts.map(length).collect()
}

#[test]
fn files_and_functions_are_short() {
    let mut longest = 0;
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= FILE_LINES, "{path} has {lines} lines");
        for (first, lines) in functions(&text) {
            assert!(lines <= FUNCTION_LINES, "{path}:{first}: a function of {lines} lines");
            longest = longest.max(lines);
        }
    }
    assert!(longest > FUNCTION_LINES / 2, "the longest function has {longest} lines");
}
