//! docs/reference/alerts.md against the rules and against the tests that fire them.

use std::fs;
use std::path::Path;

use testkit::promtool;

use super::{ROOT, rules};

const TESTS: [&str; 3] = ["kafka.rs", "machine.rs", "slack.rs"];

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).unwrap()
}

/// The rows of a table of a page: those with this number of cells whose first cell is an alert.
fn rows(page: &str, cells: usize) -> Vec<Vec<&str>> {
    page.lines()
        .filter(|line| line.starts_with("| `Payrelay"))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .filter(|row: &Vec<&str>| row.len() == cells)
        .collect()
}

fn in_code(cell: &str) -> &str {
    cell.trim_matches('`')
}

#[test]
fn the_reference_of_alerts_has_each_rule_with_its_numbers() {
    let page = read("docs/reference/alerts.md");
    let shown: Vec<_> = rows(&page, 5)
        .into_iter()
        .map(|row| {
            assert!(row[4].len() > 20 || row[4] == "it must never be", "{row:?}");
            [in_code(row[0]), row[1], in_code(row[2]), row[3]].map(str::to_owned)
        })
        .collect();
    let expected: Vec<_> = rules::rules()
        .into_iter()
        .map(|rule| [rule.name, rule.severity, rule.expr, rule.hold])
        .collect();
    assert_eq!(shown, expected);
}

/// The body of a test, without white space.
fn code_of_test(name: &str) -> String {
    let folder = Path::new("tests/it/alerts");
    for file in TESTS {
        let text = read(folder.join(file).to_str().unwrap());
        let start = format!("#[test]\nfn {name}() {{\n");
        let Some((_, after)) = text.split_once(&start) else {
            continue;
        };
        let (body, _) = after.split_once("\n}\n").unwrap();
        return body.split_whitespace().collect();
    }
    panic!("tests/it/alerts/ has no test {name}");
}

#[test]
fn each_alert_is_fired_by_the_test_that_the_reference_names() {
    let page = read("docs/reference/alerts.md");
    let rows = rows(&page, 4);
    let names: Vec<_> = rows.iter().map(|row| in_code(row[0]).to_owned()).collect();
    let expected: Vec<_> = rules::rules().into_iter().map(|rule| rule.name).collect();
    assert_eq!(names, expected);
    for row in rows {
        let name = in_code(row[0]);
        let code = code_of_test(in_code(row[3]));
        let is_expected = [format!("\"{name}\""), format!("\"{name}{{")];
        assert!(
            is_expected.iter().any(|alert| code.contains(alert)),
            "{name} is not in {}",
            row[3]
        );
        let changes = [
            format!("shift_times(\"{name}\""),
            format!("simulate(\"{name}\""),
        ];
        let is_simulated = changes.iter().any(|change| code.contains(change));
        assert_eq!(is_simulated, row[2] != "nothing", "{name}: {row:?}");
    }
}

/// The example of the how-to page is a configuration of Prometheus.
#[test]
fn promtool_accepts_the_configuration_of_the_how_to_page() {
    let page = read("docs/how-to/monitor-with-prometheus.md");
    let (_, block) = page.split_once("```yaml\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    fs::write(&token, "secret").unwrap();
    let rules = Path::new(ROOT).join(rules::FILE);
    let lines: Vec<_> = block
        .lines()
        .map(|line| line.strip_prefix("   ").unwrap_or(line))
        .collect();
    let config = lines
        .join("\n")
        .replace(
            "/etc/prometheus/payrelay/alerts.yml",
            rules.to_str().unwrap(),
        )
        .replace("/etc/prometheus/payrelay/token", token.to_str().unwrap());
    let checked = promtool::run_with_file(&["check", "config"], &config);
    assert!(checked.contains("18 rules found"), "{checked}");
    assert!(config.contains("job_name: payrelay\n"), "{config}");
}
