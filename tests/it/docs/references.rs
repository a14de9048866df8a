//! Reference pages against what they describe: the help, the schema, the routes, the log lines.

use super::ROOT;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::http::Client;
use testkit::process::{Options, Payrelay};

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).unwrap()
}

/// The sections of a page by their headings.
fn sections<'a>(page: &'a str, level: &str) -> BTreeMap<&'a str, Vec<&'a str>> {
    let mut found = BTreeMap::new();
    let mut current: &mut Vec<&str> = found.entry("").or_default();
    for line in page.lines() {
        if let Some(title) = line.strip_prefix(level) {
            current = found.entry(title.trim_matches('`')).or_default();
        } else {
            current.push(line);
        }
    }
    found
}

/// The code in the first cell of each row of a section's tables.
fn first_cells<'a>(lines: &[&'a str]) -> Vec<&'a str> {
    lines
        .iter()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|rest| rest.split('`').next())
        .collect()
}

fn help(command: &[String]) -> String {
    let output = Command::new(testkit::paths::binary())
        .args(command)
        .arg("--help")
        .output()
        .unwrap();
    assert!(output.status.success(), "{command:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The lines below a heading of the help, such as `Options:`.
fn part<'a>(help: &'a str, heading: &str) -> impl Iterator<Item = &'a str> {
    help.lines()
        .skip_while(move |line| *line != heading)
        .skip(1)
        .take_while(|line| line.starts_with("  "))
}

/// The options of every command.
const COMMON: [&str; 7] = [
    "--config <FILE>",
    "--color <WHEN>",
    "--url <URL>",
    "--token-file <FILE>",
    "--quiet",
    "-h, --help",
    "-V, --version",
];

/// Arguments and options of a command, as its help writes them.
fn parameters(help: &str) -> BTreeSet<String> {
    let names = part(help, "Arguments:").chain(part(help, "Options:"));
    names
        .map(str::trim)
        .filter(|line| line.starts_with(['-', '<', '[']))
        .map(|line| line.split("  ").next().unwrap_or(line).to_owned())
        .filter(|name| !COMMON.contains(&&**name))
        .collect()
}

#[test]
fn the_command_reference_has_every_command_option_and_exit_code() {
    let page = read("docs/reference/cli.md");
    let sections = sections(&page, "## ");
    let mut waiting = vec![Vec::<String>::new()];
    let mut known = BTreeSet::new();
    while let Some(command) = waiting.pop() {
        let help = help(&command);
        let commands: Vec<_> = part(&help, "Commands:")
            .filter(|line| !line.starts_with("   "))
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| *name != "help")
            .collect();
        for name in &commands {
            waiting.push([command.as_slice(), &[(*name).to_owned()]].concat());
        }
        // A command with options answers by itself as well.
        let is_group = !commands.is_empty() && parameters(&help).is_empty();
        if !is_group && !command.is_empty() {
            let title = format!("payrelay {}", command.join(" "));
            let lines = sections
                .get(&*title)
                .unwrap_or_else(|| panic!("docs/reference/cli.md has no section {title}"));
            let shown: BTreeSet<String> =
                first_cells(lines).into_iter().map(str::to_owned).collect();
            assert_eq!(shown, parameters(&help), "{title}");
            known.insert(title);
        }
        if command.is_empty() {
            let codes: Vec<_> = part(&help, "Exit codes:")
                .filter_map(|line| line.split_whitespace().next())
                .filter(|word| word.parse::<u8>().is_ok())
                .collect();
            assert!(codes.len() > 5, "{codes:?}");
            assert_eq!(first_cells(&sections["Exit codes"]), codes);
            for option in COMMON {
                assert!(help.contains(option) && page.contains(&format!("`{option}`")));
            }
        }
    }
    for title in sections
        .keys()
        .filter(|title| title.starts_with("payrelay"))
    {
        assert!(known.contains(*title), "there is no command {title}");
    }
}

/// The words that a part of the page explains.
fn explained_words(page: &str, part: &str) -> BTreeSet<String> {
    let lines = &sections(page, "## ")[part];
    lines
        .iter()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .map(str::to_owned)
        .collect()
}

/// Each word that an operator may meet is explained: alerts, problem types, exit codes, findings
/// and notes of the audit. No alert is explained that does not exist.
#[test]
fn every_alert_problem_type_exit_code_and_finding_is_explained() {
    let page = read("docs/reference/explanations.md");
    let words: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .collect();
    let mut needed: BTreeSet<String> = BTreeSet::new();
    let source = read("src/http/problem.rs");
    let titles = source.split("const TITLES").nth(1).unwrap();
    let titles = titles.split("];").next().unwrap();
    let slugs = titles
        .split('(')
        .skip(1)
        .filter_map(|part| part.split('"').nth(1));
    needed.extend(slugs.map(str::to_owned));
    let commands = read("docs/reference/cli.md");
    let codes = first_cells(&sections(&commands, "## ")["Exit codes"]);
    needed.extend(codes.into_iter().map(str::to_owned));
    let findings = read("docs/reference/audit-findings.md");
    for line in findings.lines().filter(|line| line.starts_with("| `")) {
        let cell = line.split('|').nth(1).unwrap();
        needed.extend(cell.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    let rules = read("packaging/prometheus/alerts.yml");
    let alerts: BTreeSet<String> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .map(str::to_owned)
        .collect();
    let explained: BTreeSet<String> = explained_words(&page, "Alerts");
    assert_eq!(explained, alerts);
    needed.extend(alerts);
    assert!(needed.len() > 70, "{needed:?}");
    let missing: Vec<_> = needed
        .iter()
        .filter(|word| !words.contains(word.as_str()))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/reference/explanations.md lacks {missing:?}"
    );
}

/// The tables of schema.sql, each with its columns, in order.
fn tables(schema: &str) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    for part in schema.split("CREATE TABLE ").skip(1) {
        let (name, rest) = part.split_once(" (").unwrap();
        let body = rest.split("\n)").next().unwrap_or_default();
        let columns = body
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|word| !["--", "PRIMARY", "UNIQUE", "CHECK"].contains(word))
            .map(|word| word.trim_matches('"').to_owned())
            .collect();
        found.insert(name.to_owned(), columns);
    }
    found
}

#[test]
fn the_schema_reference_has_every_table_column_and_status() {
    let schema = read("schema.sql");
    let page = read("docs/reference/database-schema.md");
    let shown: BTreeMap<String, Vec<String>> = sections(&page, "## ")
        .into_iter()
        .map(|(name, lines)| {
            let columns = first_cells(&lines).into_iter().map(str::to_owned).collect();
            (name.to_owned(), columns)
        })
        .filter(|(_, columns): &(_, Vec<_>)| !columns.is_empty())
        .collect();
    assert_eq!(shown, tables(&schema));
    for values in schema.split(" IN (").skip(1) {
        let values = values.split(')').next().unwrap_or_default();
        for value in values.split(',') {
            let value = value.trim().trim_matches('\'');
            assert!(page.contains(&format!("`{value}`")), "{value} is missing");
        }
    }
}

/// The source files of the program, split at the quotes of texts. A text has no line breaks.
fn texts() -> Vec<String> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![Path::new(ROOT).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = fs::read_to_string(path).unwrap().replace("\\\"", "\u{1}");
            let lines = source.split("\\\n").map(str::trim_start);
            let joined = lines.collect::<Vec<_>>().concat();
            let texts = joined.split('"').map(|text| text.replace('\u{1}', "\""));
            found.extend(texts);
        }
    }
    found
}

/// Whether a text of the program has the parts of a line in their order, the first at its start.
fn is_line(text: &str, line: &str) -> bool {
    let mut rest = text;
    line.split('…').enumerate().all(|(index, part)| {
        let found = rest.find(part);
        rest = found.map_or("", |at| &rest[at + part.len()..]);
        found.is_some_and(|at| index > 0 || at == 0)
    })
}

/// The lines of the log in the source.
struct LoggedLine {
    event: String,
    message: String,
}

/// Every call of `log::error!`, `log::warn!` and `log::info!`. Each names its event first.
fn logged_lines() -> Vec<LoggedLine> {
    let texts = texts();
    let mut found = Vec::new();
    for (at, code) in texts.iter().enumerate() {
        let Some((_, level)) = code.rsplit_once("log::") else {
            continue;
        };
        let is_call = ["error!(", "warn!(", "info!("].iter().any(|call| {
            level
                .strip_prefix(call)
                .is_some_and(|rest| rest.trim().is_empty() || rest.trim() == "event =")
        });
        if !is_call {
            continue;
        }
        assert!(
            code.ends_with("event = "),
            "names no event: {}",
            texts[at + 1]
        );
        // Code and texts take turns; the values end with a semicolon.
        let mut values = at + 2;
        while !texts[values].contains(';') {
            values += 2;
        }
        found.push(LoggedLine {
            event: texts[at + 1].clone(),
            message: texts[values + 1].clone(),
        });
    }
    found
}

/// The rows of the page: the line, and its event.
fn log_rows(page: &str) -> Vec<(&str, &str)> {
    page.lines()
        .filter_map(|row| row.strip_prefix("| `")?.split_once("` | "))
        .filter_map(|(line, rest)| {
            let (level, rest) = rest.split_once(" | ")?;
            let is_level = ["INFO", "WARN", "ERROR"].contains(&level);
            is_level.then(|| (line, rest.split('`').nth(1).unwrap_or_default()))
        })
        .collect()
}

/// The messages whose words are all values: a text that another function has.
const ONLY_VALUES: [&str; 3] = ["{risk}", "{timeout}", "{warning}"];

#[test]
fn every_line_of_the_log_is_in_the_log_reference_with_its_event() {
    let page = read("docs/reference/logs.md");
    let rows = log_rows(&page);
    let logged = logged_lines();
    assert!(logged.len() > 80, "{}", logged.len());
    let mut wrong = Vec::new();
    for LoggedLine { event, message } in &logged {
        let is_word = |word: &str| {
            word.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        };
        assert!(is_word(event), "{event}");
        let is_shown = rows.iter().any(|(line, shown)| {
            shown == event && (ONLY_VALUES.contains(&&**message) || is_line(message, line))
        });
        if !is_shown {
            wrong.push(format!("{event}: {message}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "docs/reference/logs.md has no row for {wrong:#?}"
    );
    let events: BTreeSet<_> = logged.iter().map(|line| line.event.as_str()).collect();
    let unknown: Vec<_> = rows
        .iter()
        .filter(|(_, event)| !events.contains(event))
        .collect();
    assert!(unknown.is_empty(), "no line has these events: {unknown:#?}");
}

/// A `…` in a line of the page is a value.
#[test]
fn every_line_of_the_log_reference_is_in_the_program() {
    let page = read("docs/reference/logs.md");
    let rows = log_rows(&page);
    assert!(rows.len() > 80, "{}", rows.len());
    let texts = texts();
    let unknown: Vec<_> = rows
        .iter()
        .filter(|(line, _)| !texts.iter().any(|text| is_line(text, line)))
        .collect();
    assert!(unknown.is_empty(), "these are not in src/: {unknown:#?}");
}

/// The method and the path of each request that a text names.
fn requests(text: &str) -> BTreeSet<(&str, &str)> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|code| code.split_once(' '))
        .filter(|(method, path)| ["GET", "POST"].contains(method) && path.starts_with('/'))
        .map(|(method, path)| (method, path.split('?').next().unwrap_or(path)))
        .collect()
}

#[test]
fn the_named_requests_are_the_ones_that_the_server_knows() {
    let api = read("docs/reference/http-api.md");
    let readme = read("README.md");
    let named = requests(&api);
    assert!(named.len() >= 15, "{named:?}");
    let missing: Vec<_> = named.difference(&requests(&readme)).copied().collect();
    assert!(missing.is_empty(), "README.md does not name {missing:?}");
    let unknown: Vec<_> = requests(&readme).difference(&named).copied().collect();
    assert!(unknown.is_empty(), "http-api.md does not name {unknown:?}");
    let folder = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(folder.path(), &[]));
    let mut client = Client::connect(payrelay.addr());
    for (method, path) in &named {
        let path = path.replace("{id}", "7").replace("{name}", "default");
        let response = if *method == "GET" {
            client.get(&path)
        } else {
            client.post_json(&path, &serde_json::json!({}))
        };
        let body = String::from_utf8_lossy(&response.body);
        assert!(
            response.status != 405 && !body.contains("there is no resource at"),
            "{method} {path}: {} {body}",
            response.status
        );
    }
    let routes = client.get("/").json();
    for route in routes["routes"].as_array().unwrap() {
        let (method, path) = route.as_str().unwrap().split_once(' ').unwrap();
        let path = path.split('?').next().unwrap_or(path);
        assert!(named.contains(&(method, path)), "{route} is not documented");
    }
}

/// Names in code that look like keys of the configuration, and are not.
const NOT_KEYS: [&str; 3] = [
    "node.consumed_through",
    "payment.completed",
    "payment.failed",
];

/// The keys of config.toml, such as `http.listen`. Those of a table are `slack.route.name`.
fn keys() -> BTreeSet<String> {
    let config = read("config.toml");
    let mut section = String::new();
    let mut found = BTreeSet::new();
    for line in config.lines() {
        let line = line.trim_start_matches("# ");
        if line.starts_with('[') && line.ends_with(']') {
            line.trim_matches(['[', ']']).clone_into(&mut section);
            found.insert(section.clone());
        } else if let Some((key, _)) = line.split_once(" = ") {
            found.insert(format!("{section}.{}", key.trim()));
        }
    }
    found
}

#[test]
fn every_key_and_variable_that_a_page_names_exists() {
    let keys = keys();
    assert!(keys.len() > 60, "{keys:?}");
    let sections: BTreeSet<_> = keys
        .iter()
        .filter_map(|key| key.split('.').next())
        .collect();
    let variable = |key: &String| format!("PAYRELAY_{}", key.replace('.', "_").to_uppercase());
    let variables: BTreeSet<String> = keys.iter().map(variable).collect();
    let mut unknown = Vec::new();
    for page in super::pages() {
        let text = super::fences::prose(&fs::read_to_string(&page).unwrap());
        for code in text.split('`').skip(1).step_by(2) {
            let name = code.split([' ', '=']).next().unwrap_or_default();
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
            let is_key = name.contains('.')
                && name.chars().all(is_name)
                && name
                    .split('.')
                    .next()
                    .is_some_and(|first| sections.contains(first));
            if is_key && !keys.contains(name) && !NOT_KEYS.contains(&name) {
                unknown.push(format!("{}: {name}", page.display()));
            }
            // A number in the name of a variable counts the tables.
            let of_a_key = name.replace("_0_", "_");
            let in_a_file = of_a_key.strip_suffix("_FILE").unwrap_or_default();
            let is_other = [
                "PAYRELAY_CONFIG",
                "PAYRELAY_LOG",
                "PAYRELAY_TEST_SEED",
                "PAYRELAY_TOKEN",
            ]
            .contains(&name);
            // Tests have variables of their own.
            let is_variable =
                name.starts_with("PAYRELAY_") && !page.to_string_lossy().contains("/development/");
            if is_variable
                && !is_other
                && !variables.contains(&of_a_key)
                && !variables.contains(in_a_file)
            {
                unknown.push(format!("{}: {name}", page.display()));
            }
        }
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
}
