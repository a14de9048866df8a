//! The documentation: its links, its length, its commands, its sentences, and its reference pages
//! against the program.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

mod commands;
mod fences;
mod references;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn pages() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    let mut found: Vec<PathBuf> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
    ]
    .iter()
    .map(|name| root.join(name))
    .collect();
    let mut folders = vec![root.join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|kind| kind == "md") {
                found.push(path);
            }
        }
    }
    found
}

/// The targets of the relative links of a page.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', '#', ' ']).next())
        .filter(|link| !link.is_empty() && !link.contains("://"))
}

#[test]
fn every_relative_link_leads_to_a_file() {
    let mut broken = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let folder = page.parent().unwrap();
        for link in links(&text).filter(|link| !folder.join(link).exists()) {
            broken.push(format!("{}: {link}", page.display()));
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_page_of_docs_can_be_reached_from_the_readme() {
    let root = Path::new(ROOT);
    let mut reached = BTreeSet::new();
    let mut waiting = vec![root.join("README.md")];
    while let Some(page) = waiting.pop() {
        let page = page.canonicalize().unwrap();
        if !reached.insert(page.clone()) {
            continue;
        }
        if page.is_dir() {
            waiting.extend(
                fs::read_dir(page)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if page.extension().is_some_and(|extension| extension == "md") {
            let text = fs::read_to_string(&page).unwrap();
            let folder = page.parent().unwrap().to_owned();
            waiting.extend(links(&text).map(|link| folder.join(link)));
        }
    }
    for page in pages() {
        assert!(
            reached.contains(&page.canonicalize().unwrap()),
            "no link leads to {}",
            page.display()
        );
    }
}

#[test]
fn the_readme_is_short() {
    let text = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let lines = text.lines().count();
    let words = text.split_whitespace().count();
    assert!(lines <= 140, "{lines} lines");
    assert!(words <= 1000, "{words} words");
}

/// The reference of the configuration, made from config.toml: a section for each table, a row for
/// each key.
fn configuration_reference(config: &str) -> String {
    let mut text = String::from(
        "# Configuration\n\nThis page is made from [config.toml](../../config.toml). The first \
         file that exists is read: `--config`, `PAYRELAY_CONFIG`,\n`./config.toml`, \
         `/etc/payrelay/config.toml`. Each key has an environment variable, which wins; an empty \
         variable is unset.\nUnknown keys and invalid values are refused, all at once, with exit \
         code 78.\n",
    );
    let mut section = String::new();
    let mut comment = Vec::new();
    let mut is_example = false;
    for line in config.lines() {
        let uncommented = line.trim_start_matches('#').trim();
        if uncommented.starts_with("[[") && uncommented.ends_with("]]") {
            is_example = true;
        }
        is_example &= !line.is_empty();
        let line = if is_example { uncommented } else { line };
        if let Some(rest) = line.strip_prefix('#') {
            comment.push(rest.trim().to_owned());
        } else if line.starts_with('[') {
            line.trim_matches(['[', ']']).clone_into(&mut section);
            let _ = write!(text, "\n## {line}\n\n{}", comment.join(" "));
            text.push_str(if comment.is_empty() { "" } else { "\n\n" });
            text.push_str("| key | default | variable | |\n|---|---|---|---|\n");
            comment.clear();
        } else if let Some((key, value)) = line.split_once('=') {
            let (value, remark) = value.split_once(" # ").unwrap_or((value, ""));
            comment.extend((!remark.is_empty()).then(|| remark.trim().to_owned()));
            let index = if is_example { "_0" } else { "" };
            let variable = format!("PAYRELAY_{section}{index}_{}", key.trim());
            let _ = writeln!(
                text,
                "| `{}` | `{}` | `{}` | {} |",
                key.trim(),
                value.trim(),
                variable.replace('.', "_").to_uppercase(),
                comment.join(" ").replace('|', "\\|")
            );
            comment.clear();
        } else {
            comment.clear();
        }
    }
    text
}

/// `PAYRELAY_REWRITE_DOCS=1 cargo test --test it docs::` writes the page again.
#[test]
fn the_configuration_reference_is_made_from_config_toml() {
    let root = Path::new(ROOT);
    let page = root.join("docs/reference/configuration.md");
    let expected = configuration_reference(&fs::read_to_string(root.join("config.toml")).unwrap());
    if env::var_os("PAYRELAY_REWRITE_DOCS").is_some() {
        fs::write(&page, &expected).unwrap();
    }
    let found = fs::read_to_string(&page).unwrap_or_default();
    assert!(
        found == expected,
        "docs/reference/configuration.md differs from config.toml: run \
            PAYRELAY_REWRITE_DOCS=1 cargo test --test it docs::"
    );
}

/// `PAYRELAY_REWRITE_DOCS=1 cargo test --test it docs::` writes the file again.
#[test]
fn the_configuration_schema_is_the_one_of_the_program() {
    let root = Path::new(ROOT);
    let output = Command::new(testkit::paths::binary())
        .args(["config", "schema"])
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let file = root.join("config.schema.json");
    if env::var_os("PAYRELAY_REWRITE_DOCS").is_some() {
        fs::write(&file, &printed).unwrap();
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), printed);
    // Each key of config.toml is in it, with its default.
    let schema: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let config = fs::read_to_string(root.join("config.toml")).unwrap();
    let mut section = String::new();
    let mut keys = 0;
    for line in config.lines() {
        if let Some(name) = line.strip_prefix('[') {
            name.trim_end_matches(']').clone_into(&mut section);
        } else if let Some((key, _)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            let property = &schema["properties"][&section]["properties"][key];
            let description = property["description"].as_str().unwrap_or_default();
            assert!(
                description.contains("Allowed: "),
                "{section}.{key}: {property}"
            );
            keys += 1;
        }
    }
    assert!(keys > 50, "{keys}");
    let access =
        &schema["properties"]["http"]["properties"]["token"]["items"]["properties"]["access"];
    assert_eq!(access["enum"][0], "read-only", "{access}");
}
