//! The architecture as a test: which module may name a library, and what no code does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

mod density;
mod layout;
mod plain_words;
mod sentences;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Every folder with code of ours.
const ROOTS: [&str; 4] = ["src", "tests", "benches", "crates"];

/// Every source file below a folder, by its path from the root.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(ROOT).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path
                    .strip_prefix(ROOT)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// The code of a file, without comments and without its unit tests, which are at its end.
fn code(text: &str) -> String {
    let body = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default();
    body.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Every path, such as `tokio::time::Instant`, and every word.
fn paths(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
}

/// Each library that reaches the outside world is named in its own place only.
#[test]
fn each_library_is_named_in_its_own_folder() {
    let http = ["src/http/"].as_slice();
    let kafka = ["src/kafka/"].as_slice();
    let both = [http, kafka].concat();
    let allowed = [
        ("hyper", http),
        ("hyper_util", http),
        ("http_body_util", http),
        ("krafka", kafka),
        ("tokio", &both),
        ("sha2", &["src/http/", "src/domain/token.rs"]),
        (
            "rustls",
            &[
                "src/kafka/tls.rs",
                "src/slack/webhook.rs",
                "src/cli/remote_client.rs",
            ],
        ),
        ("tokio_io_timeout", http),
        ("socket2", http),
        ("subtle", &["src/http/", "src/domain/token.rs"]),
        ("getrandom", &["src/domain/token.rs"]),
        ("ureq", &["src/slack/", "src/cli/remote_client.rs"]),
        ("rusqlite", &["src/store/"]),
        ("r2d2", &["src/store/"]),
        ("r2d2_sqlite", &["src/store/"]),
        ("toml", &["src/config/"]),
        ("clap", &["src/cli/"]),
        ("env_logger", &["src/cli/"]),
        ("signal_hook", &["src/cli/serve.rs"]),
        (
            "rustix",
            &[
                "src/cli/",
                "src/store/engine/disk_space.rs",
                "src/store/backup.rs",
                "src/runtime/metrics/process.rs",
            ],
        ),
    ];
    for (file, text) in sources("src") {
        let code = code(&text);
        for (library, places) in &allowed {
            let prefix = format!("{library}::");
            let named = paths(&code).any(|path| path.starts_with(&prefix))
                || code.contains(&format!("use {library};"));
            assert!(
                !named || places.iter().any(|place| file.starts_with(place)),
                "{file} names {library}, which belongs in {places:?}"
            );
        }
    }
}

/// Each runtime is current-thread, and is made by the thread that owns it.
#[test]
fn runtimes_are_current_thread() {
    let mut made = Vec::new();
    for (file, text) in sources("src") {
        let code = code(&text);
        for forbidden in [
            "new_multi_thread",
            "Runtime::new",
            "tokio::main",
            "spawn_blocking",
            "Handle::current",
        ] {
            let suffix = format!("::{forbidden}");
            let named = paths(&code).any(|path| path == forbidden || path.ends_with(&suffix));
            assert!(!named, "{file} has {forbidden}");
        }
        if code.contains("new_current_thread") {
            made.push(file);
        }
    }
    made.sort();
    assert_eq!(made, ["src/http/server.rs", "src/kafka/cluster.rs"]);
}

#[test]
fn no_code_sleeps_and_only_one_place_exits_or_prints() {
    // In two parts: this file is looked at as well.
    let sleep = ["thread::", "sleep"].concat();
    for (file, text) in sources("src") {
        let code = code(&text);
        assert!(
            !code.contains(&sleep) && !code.contains("park_timeout"),
            "{file} sleeps"
        );
        for (word, place) in [
            ("process::exit", "src/cli/serve.rs"),
            ("io::stdout", "src/cli/output.rs"),
            ("println!", ""),
            ("eprintln!", ""),
            ("print!(", ""),
        ] {
            assert!(file == place || !code.contains(word), "{file} has {word}");
        }
        for todo in ["todo!", "unimplemented!", "dbg!", "#[allow"] {
            assert!(!code.contains(todo), "{file} has {todo}");
        }
    }
    for (file, text) in sources("tests").into_iter().chain(sources("crates")) {
        // The load of a benchmark has a pace.
        let paces = file.starts_with("crates/testkit/src/bench/");
        assert!(paces || !code(&text).contains(&sleep), "{file} sleeps");
    }
}

/// A test that measures time waits until no other one does.
#[test]
fn timed_tests_run_alone() {
    for (file, text) in sources("tests/timed") {
        let tests = text.matches("#[test]\n").count();
        let alone = text.matches("() {\n    let _alone = alone();\n").count();
        assert_eq!(tests, alone, "{file}: a test does not begin with alone()");
    }
}

/// SQL is in the store only.
#[test]
fn sql_is_in_the_store() {
    for (file, text) in sources("src") {
        let code = code(&text);
        for verb in [
            "SELECT ",
            "INSERT INTO",
            "UPDATE ",
            "DELETE FROM",
            "PRAGMA ",
        ] {
            assert!(
                file.starts_with("src/store/") || !code.contains(verb),
                "{file} has {verb}"
            );
        }
    }
}

#[test]
fn every_file_opens_with_its_purpose() {
    for (file, text) in ROOTS.into_iter().flat_map(sources) {
        assert!(text.starts_with("//! "), "{file} does not open with //!");
    }
}

/// The README's table of keys, the shipped file and the licence texts are there.
#[test]
fn the_top_level_is_complete() {
    let files = [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "schema.sql",
        "config.toml",
        "deny.toml",
        ".ci/run",
        "scripts/test",
        "scripts/test-release",
        "justfile",
        "CONTRIBUTING.md",
        "SECURITY.md",
    ];
    for file in files {
        assert!(Path::new(ROOT).join(file).exists(), "{file} is missing");
    }
}

/// Each fault that was once found has a row in the table, and each test that the row names is
/// there.
#[test]
fn every_fault_names_its_tests() {
    let text = fs::read_to_string(Path::new(ROOT).join("docs/development/testing.md")).unwrap();
    let numbers =
        |letter: char, last: u32| (1..=last).map(move |number| format!("{letter}{number}"));
    // E9 is about speed: the benchmarks show it.
    let faults: Vec<_> = numbers('A', 13)
        .chain(numbers('B', 10))
        .chain(numbers('C', 11))
        .chain(numbers('D', 10))
        .chain(numbers('E', 15).filter(|fault| fault != "E9"))
        .collect();
    let code: String = sources("src")
        .into_iter()
        .chain(sources("tests"))
        .chain(sources("crates"))
        .map(|(_, text)| text)
        .collect();
    for fault in &faults {
        let row = text
            .lines()
            .find(|line| line.starts_with(&format!("| {fault} |")));
        let row =
            row.unwrap_or_else(|| panic!("{fault} has no row in docs/development/testing.md"));
        let tests = row.split('|').nth(2).unwrap_or_default();
        let names: Vec<_> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{row}");
        for name in names {
            let function = name.rsplit("::").next().unwrap_or(name);
            assert!(
                code.contains(&format!("fn {function}(")) || code.contains(&format!("{function},")),
                "{fault}: {name}"
            );
        }
    }
}

/// What each folder or top-level file of src/ may import; each line names lower layers only.
/// Everything may be imported by `service`, `cli` and `main`.
const LAYERS: [(&str, &[&str]); 11] = [
    ("domain", &[]),
    ("runtime", &["domain"]),
    ("config", &["domain", "runtime"]),
    ("store", &["config", "domain", "runtime"]),
    ("sampler", &["config", "domain", "runtime", "store"]),
    (
        "scheduler",
        &["config", "domain", "runtime", "sampler", "store"],
    ),
    ("http", &["config", "domain", "runtime", "sampler", "store"]),
    ("slack", &["config", "domain", "runtime", "store"]),
    ("relay", &["config", "domain", "runtime", "store"]),
    // Its publisher implements the relay's trait.
    ("kafka", &["config", "domain", "relay", "runtime", "store"]),
    ("audit", &["config", "domain", "kafka", "runtime", "store"]),
];

/// The module paths that a file of src/ imports or names, from the crate's root.
fn imports(module: &[&str], code: &str) -> BTreeSet<Vec<String>> {
    let code = code.replace("pub(in crate::store)", "pub");
    let mut found = BTreeSet::new();
    for part in code.split(';') {
        let Some((_, tree)) = part.rsplit_once("use ") else {
            continue;
        };
        for path in leaves(tree.trim()) {
            found.extend(absolute(module, &path));
        }
    }
    for path in paths(&code) {
        found.extend(absolute(module, path.trim_end_matches(':')));
    }
    found
}

/// `a::{b, c::d}` as `a::b` and `a::c::d`.
fn leaves(tree: &str) -> Vec<String> {
    let Some((prefix, rest)) = tree.split_once('{') else {
        return vec![tree.trim().to_owned()];
    };
    let Some(inner) = rest.trim_end().strip_suffix('}') else {
        return Vec::new();
    };
    let mut depth = 0;
    let mut start = 0;
    let mut found = Vec::new();
    for (at, sign) in inner.char_indices().chain([(inner.len(), ',')]) {
        match sign {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                found.extend(
                    leaves(inner[start..at].trim())
                        .iter()
                        .map(|leaf| format!("{prefix}{leaf}")),
                );
                start = at + 1;
            }
            _ => {}
        }
    }
    found
}

/// A path that begins with `crate`, `super` or `self`, from the crate's root.
fn absolute(module: &[&str], path: &str) -> Option<Vec<String>> {
    let mut base: Vec<&str> = module.to_vec();
    let (first, rest) = path.split_once("::")?;
    let mut parts = rest.split("::").peekable();
    match first {
        "crate" => base.clear(),
        "self" => {}
        "super" => {
            base.pop();
            while parts.next_if_eq(&"super").is_some() {
                base.pop();
            }
        }
        _ => return None,
    }
    Some(base.into_iter().chain(parts).map(str::to_owned).collect())
}

/// The modules of src/, each with those that it imports.
fn module_graph() -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let mut files = BTreeMap::new();
    // Unit tests may import any module.
    let is_tests = |file: &str| file.ends_with("/tests.rs");
    for (file, text) in sources("src").into_iter().filter(|(f, _)| !is_tests(f)) {
        let path = file
            .trim_start_matches("src/")
            .trim_end_matches(".rs")
            .trim_end_matches("/mod");
        files.insert(
            path.split('/').map(str::to_owned).collect::<Vec<_>>(),
            code(&text),
        );
    }
    let graph = files.iter().map(|(module, code)| {
        let names: Vec<&str> = module.iter().map(String::as_str).collect();
        let mut targets = BTreeSet::new();
        for mut path in imports(&names, code) {
            while !path.is_empty() && !files.contains_key(&path) {
                path.pop();
            }
            if !path.is_empty() && path != *module {
                targets.insert(path);
            }
        }
        (module.clone(), targets)
    });
    graph.collect()
}

/// No module imports one of a higher layer, and no modules import each other in a circle.
#[test]
fn modules_point_downwards() {
    let mut graph = module_graph();
    assert!(graph.len() > 60, "{}", graph.len());
    for (module, targets) in &graph {
        let Some((_, allowed)) = LAYERS.iter().find(|(layer, _)| *layer == module[0]) else {
            continue;
        };
        for target in targets {
            assert!(
                target[0] == module[0] || allowed.contains(&&*target[0]),
                "{} imports {}, which is not below it",
                module.join("::"),
                target.join("::")
            );
        }
    }
    // Modules that import nothing more are removed, until none is left, or a circle.
    loop {
        let done: Vec<_> = graph
            .iter()
            .filter(|(_, targets)| targets.is_empty())
            .map(|(m, _)| m.clone())
            .collect();
        if done.is_empty() {
            break;
        }
        graph.retain(|module, _| !done.contains(module));
        for targets in graph.values_mut() {
            targets.retain(|target| !done.contains(target));
        }
    }
    assert!(graph.is_empty(), "a circle is among these: {graph:#?}");
}
