//! Every command that README and the book show is one that there is. Those of this program go through its parser, and those that
//! take no time run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pulldown_cmark::{CodeBlockKind, Event, Parser, Tag, TagEnd};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn documents() -> Vec<PathBuf> {
    let chapters = std::fs::read_dir(root().join("docs/book/src")).unwrap().map(|entry| entry.unwrap().path());
    std::iter::once(root().join("README.md")).chain(chapters).collect()
}

/// The commands of a document, in words: the lines of blocks of `sh`, and those of `console` that begin with `$`. A line that ends in a
/// backslash goes on in the next.
fn commands(text: &str) -> Vec<Vec<String>> {
    let (mut language, mut found) = (None, Vec::new());
    for event in Parser::new(text) {
        match event {
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(name))) => language = Some(name.to_string()),
            Event::End(TagEnd::CodeBlock) => language = None,
            Event::Text(block) if matches!(language.as_deref(), Some("sh" | "console")) => {
                for line in block.replace("\\\n", " ").lines() {
                    let command = if language.as_deref() == Some("sh") { Some(line) } else { line.strip_prefix("$ ") };
                    found.extend(command.map(words).filter(|words| !words.is_empty()));
                }
            }
            _ => (),
        }
    }
    found
}

/// The words of a line up to a comment, a pipe or the file that the output goes to.
fn words(line: &str) -> Vec<String> {
    let line = line.split(" #").next().unwrap();
    let words = shlex::split(line).unwrap_or_else(|| panic!("not a command: {line}"));
    // Variables of the environment may come before the command.
    let command = words.into_iter().skip_while(|word| word.contains('='));
    command.take_while(|word| !matches!(word.as_str(), ">" | "|")).collect()
}

fn run(arguments: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wgpu-attention")).current_dir(root()).args(arguments).output().unwrap()
}

/// What follows the word `--`, and what stands before it.
fn halves(words: &[String]) -> (&[String], &[String]) {
    let dashes = words.iter().position(|word| word == "--").unwrap_or(words.len());
    (&words[..dashes], words.get(dashes + 1..).unwrap_or(&[]))
}

/// The word that follows another one.
fn after<'a>(words: &'a [String], option: &str) -> Option<&'a str> {
    let place = words.iter().position(|word| word == option)?;
    words.get(place + 1).map(String::as_str)
}

/// A command of this program.
fn check_arguments(arguments: &[String]) {
    let quick = matches!(arguments.first().map(String::as_str), Some("help" | "adapters" | "plan"));
    // With --help at the end, all options before it are parsed, and nothing else happens.
    let help = [arguments, &["--help".to_owned()]].concat();
    let output = run(if quick { arguments } else { &help });
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Fails where there is no such command. What it is about, by one word.
fn check(words: &[String]) -> &'static str {
    let (cargo, arguments) = halves(words);
    let is = |name: &str| cargo.get(1).is_some_and(|word| word == name);
    let file = |path: String| assert!(root().join(&path).is_file(), "{words:?}: there is no {path}");
    match cargo[0].as_str() {
        "cargo" if is("run") => {
            if let Some(example) = after(cargo, "--example") {
                file(format!("examples/{example}.rs"));
                return "example";
            }
            if let Some(package) = after(cargo, "-p") {
                assert_eq!(package, "wgpu-attention-models", "{words:?}");
                file(format!("models/src/bin/{}.rs", after(cargo, "--bin").expect("which program")));
                return "model";
            }
            check_arguments(arguments);
            "program"
        }
        "cargo" if is("doc") => "documentation",
        "cargo" if is("install") => {
            file(format!("{}/Cargo.toml", after(cargo, "--path").expect("which package")));
            "installation"
        }
        "cargo" if is("test") => {
            file(format!("tests/{}.rs", after(cargo, "--test").expect("which test")));
            "test"
        }
        script => {
            file(script.to_owned());
            "script"
        }
    }
}

#[test]
fn every_command_of_readme_and_book_is_one_that_there_is() {
    let mut kinds = BTreeSet::new();
    for document in documents() {
        for words in commands(&std::fs::read_to_string(&document).unwrap()) {
            kinds.insert(check(&words));
        }
    }
    // Each kind was found, so that none is passed over.
    assert_eq!(kinds, ["documentation", "example", "installation", "model", "program", "script", "test"].into());
}

#[test]
fn commands_that_there_are_not_fail() {
    for wrong in ["bench --no-such-option", "plan --shape 1,2", "no-such-command", "bench --format no-such-format"] {
        let line = format!("cargo run --release -- {wrong}");
        assert!(std::panic::catch_unwind(|| check(&words(&line))).is_err(), "{wrong}");
    }
    for wrong in ["cargo run --release --example no_such_example", "scripts/no_such_script"] {
        assert!(std::panic::catch_unwind(|| check(&words(wrong))).is_err(), "{wrong}");
    }
    assert_eq!(words("RUST_LOG=debug cargo doc"), ["cargo", "doc"]);
    assert_eq!(words(r#"cargo run -- "two words" > file  # why"#), ["cargo", "run", "--", "two words"]);
}
