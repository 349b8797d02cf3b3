//! The links of README, CHANGELOG and the book lead somewhere: files, headings, and the parts of files that the book includes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn chapters() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("docs/book/src")).unwrap();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "md")).collect()
}

fn documents() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = ["README.md", "CHANGELOG.md"].iter().map(|name| root().join(name)).collect();
    all.extend(chapters());
    assert!(all.len() > 10, "{all:?}");
    all
}

/// The targets of links and pictures, and the anchors of headings as GitHub and mdBook make them.
fn links_and_anchors(text: &str) -> (Vec<String>, BTreeSet<String>) {
    let (mut links, mut anchors, mut heading) = (Vec::new(), BTreeSet::new(), None::<String>);
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => links.push(dest_url.to_string()),
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(text) | Event::Code(text) => heading.iter_mut().for_each(|heading| heading.push_str(&text)),
            Event::End(TagEnd::Heading(_)) => {
                let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
                let title: String = heading.take().unwrap().to_lowercase().chars().filter(kept).collect();
                anchors.insert(title.replace(' ', "-"));
            }
            _ => (),
        }
    }
    (links, anchors)
}

/// What is wrong with a link of a document.
fn broken(document: &Path, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
    let target = if path.is_empty() { document.to_owned() } else { document.parent().unwrap().join(path) };
    if !target.exists() {
        return Some(format!("there is no {}", target.display()));
    }
    // A page of the book cannot link to what is not part of the book.
    let book = root().join("docs/book/src");
    if document.starts_with(&book) && !target.canonicalize().unwrap().starts_with(book.canonicalize().unwrap()) {
        return Some("it leads out of the book".into());
    }
    if !anchor.is_empty() && !links_and_anchors(&read(&target)).1.contains(anchor) {
        return Some(format!("there is no heading #{anchor} in {}", target.display()));
    }
    None
}

#[test]
fn every_relative_link_leads_to_a_file_and_a_heading() {
    let mut count = 0;
    for document in documents() {
        for link in links_and_anchors(&read(&document)).0 {
            if let Some(why) = broken(&document, &link) {
                panic!("{}: the link {link}: {why}", document.display());
            }
            count += 1;
        }
    }
    assert!(count > 20, "{count} links");
}

#[test]
fn a_broken_link_is_found() {
    let (document, chapter) = (root().join("README.md"), root().join("docs/book/src/kernels.md"));
    for (document, link) in [
        (&document, "no/such/file"),
        (&document, "#no-such-heading"),
        (&document, "CHANGELOG.md#no-such-heading"),
        (&chapter, "../../../README.md"),
    ] {
        assert!(broken(document, link).is_some(), "{link}");
    }
    assert_eq!(broken(&chapter, "own-device.md#long-work"), None);
    assert_eq!(broken(&document, "https://wgpu.rs"), None);
}

/// mdBook leaves a part that is not there empty, without an error.
#[test]
fn what_the_book_includes_is_there() {
    let mut count = 0;
    for chapter in chapters() {
        for include in read(&chapter).split("{{#include ").skip(1) {
            let include = include.split("}}").next().unwrap();
            let (path, anchor) = include.split_once(':').map_or((include, None), |(path, anchor)| (path, Some(anchor)));
            let text = read(&chapter.parent().unwrap().join(path));
            for mark in anchor.iter().flat_map(|anchor| [format!("ANCHOR: {anchor}"), format!("ANCHOR_END: {anchor}")])
            {
                let has = |line: &str| line.trim_end_matches("-->").trim_end().ends_with(&mark);
                assert_eq!(text.lines().filter(|line| has(line)).count(), 1, "{include} in {}", chapter.display());
            }
            count += 1;
        }
    }
    assert!(count > 10, "{count} parts");
}

#[test]
fn every_chapter_is_in_the_summary() {
    let summary = read(&root().join("docs/book/src/SUMMARY.md"));
    let listed: BTreeSet<String> = links_and_anchors(&summary).0.into_iter().collect();
    let names = chapters().into_iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
    assert_eq!(listed, names.filter(|name| name != "SUMMARY.md").collect());
}
