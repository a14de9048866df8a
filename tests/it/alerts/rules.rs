//! The rules: read, and checked by promtool.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use testkit::promtool;

use super::ROOT;

pub const FILE: &str = "packaging/prometheus/alerts.yml";

/// An alert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    pub name: String,
    pub expr: String,
    /// `0s` if it fires at once.
    pub hold: String,
    pub severity: String,
    pub annotations: BTreeMap<String, String>,
}

/// The file has one form: a rule a block, and an expression on one line or after `>-`.
pub fn rules() -> Vec<Rule> {
    let text = fs::read_to_string(Path::new(ROOT).join(FILE)).unwrap();
    let mut found: Vec<Rule> = Vec::new();
    let mut is_in_expr = false;
    for line in text.lines().filter(|line| !line.trim().starts_with('#')) {
        let trimmed = line.trim();
        if let Some(name) = trimmed.strip_prefix("- alert: ") {
            found.push(Rule {
                name: name.to_owned(),
                hold: "0s".to_owned(),
                ..Rule::default()
            });
        }
        let Some(rule) = found.last_mut() else {
            continue;
        };
        let (key, value) = trimmed.split_once(": ").unwrap_or_default();
        match key {
            _ if is_in_expr && line.starts_with("          ") => {
                rule.expr
                    .push_str(if rule.expr.is_empty() { "" } else { " " });
                rule.expr.push_str(trimmed);
                continue;
            }
            "expr" if value != ">-" => value.clone_into(&mut rule.expr),
            "for" => value.clone_into(&mut rule.hold),
            "severity" => value.clone_into(&mut rule.severity),
            "summary" | "description" | "runbook" => {
                let value = value.trim_matches('"').to_owned();
                rule.annotations.insert(key.to_owned(), value);
            }
            _ => {}
        }
        is_in_expr = trimmed == "expr: >-";
    }
    found
}

pub fn severities() -> BTreeMap<String, String> {
    let pair = |rule: Rule| (rule.name, rule.severity);
    rules().into_iter().map(pair).collect()
}

#[test]
fn promtool_accepts_the_rules_and_their_tests() {
    let rules = rules();
    let folder = Path::new(ROOT).join("packaging/prometheus");
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let checked = promtool::run(&["check", "rules", &file("alerts.yml")]);
    assert!(
        checked.contains(&format!("{} rules found", rules.len())),
        "{checked}"
    );
    promtool::run(&["test", "rules", &file("alerts.test.yml")]);
    let tests = fs::read_to_string(folder.join("alerts.test.yml")).unwrap();
    for rule in &rules {
        let name = &rule.name;
        let expected = format!("alertname: {name}\n");
        assert!(tests.contains(&expected), "alerts.test.yml has no {name}");
        let keys: Vec<_> = rule.annotations.keys().collect();
        assert_eq!(keys, ["description", "runbook", "summary"], "{name}");
        assert_eq!(
            rule.annotations["runbook"],
            format!("payrelay explain {name}")
        );
        assert!(["critical", "warning"].contains(&&*rule.severity), "{name}");
    }
}
