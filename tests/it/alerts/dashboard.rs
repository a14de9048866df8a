//! The names in the rules and in the Grafana dashboard. Each metric, label and value is in a scrape
//! of a running payrelay, and promtool accepts each expression.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;
use testkit::kafka::Broker;
use testkit::pipeline::Pipeline;
use testkit::promtool;
use testkit::scrape::Scrape;

use super::{ROOT, pay, rules};

/// Labels that Prometheus adds to each series.
const OF_THE_TARGET: [&str; 2] = ["instance", "job"];

/// An expression, and the labels that its legend or its texts show.
#[derive(Debug)]
struct Expression {
    place: String,
    text: String,
    shown: BTreeSet<String>,
}

fn dashboard() -> Value {
    let file = Path::new(ROOT).join("packaging/grafana/payrelay.json");
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// The names after a prefix, such as `{{ $labels.`.
fn names_after<'a>(text: &'a str, prefix: &str) -> impl Iterator<Item = String> {
    let name = |rest: &'a str| {
        let name = rest.split(|sign: char| !is_of_a_name(sign)).next();
        name.unwrap_or_default().to_owned()
    };
    text.split(prefix).skip(1).map(name)
}

fn is_of_a_name(sign: char) -> bool {
    sign.is_ascii_alphanumeric() || sign == '_'
}

fn expressions() -> Vec<Expression> {
    let of_rule = |rule: rules::Rule| {
        let texts: Vec<_> = rule.annotations.values().map(String::as_str).collect();
        Expression {
            shown: names_after(&texts.concat(), "$labels.").collect(),
            place: rule.name,
            text: rule.expr,
        }
    };
    let mut found: Vec<_> = rules::rules().into_iter().map(of_rule).collect();
    for panel in dashboard()["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let legend = target["legendFormat"].as_str().unwrap();
            found.push(Expression {
                place: panel["title"].as_str().unwrap().to_owned(),
                text: target["expr"].as_str().unwrap().to_owned(),
                shown: names_after(legend, "{{").collect(),
            });
        }
    }
    found
}

/// An expression as Prometheus gets it from Grafana.
fn with_variables(text: &str) -> String {
    text.replace("$__rate_interval", "5m")
        .replace("$job", "payrelay")
        .replace("$instance", "till-1:8080")
}

/// A selector of an expression: the metric, and its labels with the values that they must have.
#[derive(Debug, PartialEq, Eq)]
struct Selector {
    metric: String,
    labels: Vec<(String, Option<String>)>,
}

/// The selectors of an expression, and the labels of its aggregations.
fn parse(text: &str) -> (Vec<Selector>, BTreeSet<String>) {
    let mut selectors = Vec::new();
    let mut grouped = BTreeSet::new();
    let mut rest = text;
    while let Some(start) = rest.find(|sign: char| sign.is_ascii_alphabetic()) {
        let end = rest[start..].find(|sign: char| !is_of_a_name(sign));
        let end = end.map_or(rest.len(), |end| start + end);
        let word = &rest[start..end];
        rest = &rest[end..];
        if ["by", "without", "on", "ignoring"].contains(&word) {
            let (list, after) = rest.split_once(')').unwrap();
            let names = list.trim_start().trim_start_matches('(').split(',');
            grouped.extend(names.map(|name| name.trim().to_owned()));
            rest = after;
        } else if word == "up" || word.starts_with("payrelay_") || word.starts_with("process_") {
            let mut labels = Vec::new();
            if let Some(inner) = rest.strip_prefix('{') {
                let (inner, after) = inner.split_once('}').unwrap();
                rest = after;
                for matcher in inner.split(',') {
                    let (name, value) = matcher.split_once('=').unwrap();
                    let exact = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
                    labels.push((name.trim().to_owned(), exact.map(str::to_owned)));
                }
            }
            selectors.push(Selector {
                metric: word.to_owned(),
                labels,
            });
        }
        // A range such as `[5m]` has letters that are no names.
        if let Some(inner) = rest.strip_prefix('[') {
            rest = inner.split_once(']').unwrap().1;
        }
    }
    (selectors, grouped)
}

/// The labels of each metric of a scrape, with their values.
fn labels_of_metrics(scrape: &Scrape) -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let mut found: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (metric, labels) in scrape.series() {
        let known = found.entry(metric.to_owned()).or_default();
        for (label, value) in labels {
            known.entry(label).or_default().insert(value);
        }
    }
    found
}

#[test]
fn each_metric_and_label_of_rules_and_dashboard_is_in_a_live_scrape() {
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start();
    pay(&payrelay, 1);
    pipeline.wait_for_messages(1);
    let scrape = Scrape::until(payrelay.addr(), "the partition", |scrape| {
        scrape
            .series()
            .any(|(name, _)| name == "payrelay_topic_lag_records")
    });
    let live = labels_of_metrics(&scrape);
    let mut unknown = Vec::new();
    for Expression { place, text, shown } in expressions() {
        let (selectors, grouped) = parse(&text);
        assert!(!selectors.is_empty(), "{place}: {text}");
        let mut labels: BTreeSet<&str> = OF_THE_TARGET.into_iter().collect();
        for Selector {
            metric,
            labels: named,
        } in selectors.iter().filter(|s| s.metric != "up")
        {
            let Some(known) = live.get(metric) else {
                unknown.push(format!("{place}: {metric}"));
                continue;
            };
            labels.extend(known.keys().map(String::as_str));
            let others = named.iter().filter(|(n, _)| !OF_THE_TARGET.contains(&&**n));
            for (name, value) in others {
                let values = known.get(name);
                let is_known = values.is_some_and(|values| {
                    value.as_ref().is_none_or(|value| values.contains(value))
                });
                if !is_known {
                    unknown.push(format!("{place}: {metric}{{{name}={value:?}}}"));
                }
            }
        }
        let names = grouped.iter().chain(&shown);
        let names = names.filter(|name| !labels.contains(name.as_str()));
        unknown.extend(names.map(|name| format!("{place}: label {name}")));
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
}

#[test]
fn promtool_accepts_each_expression_of_the_dashboard() {
    let mut text = String::from("groups:\n  - name: dashboard\n    rules:\n");
    let expressions = expressions();
    for (number, expression) in expressions.iter().enumerate() {
        let expr = with_variables(&expression.text);
        assert!(!expr.contains('$') && !expr.contains('\''), "{expr}");
        let _ = write!(
            text,
            "      - record: expression_{number}\n        expr: '{expr}'\n"
        );
    }
    let checked = promtool::run_with_file(&["check", "rules"], &text);
    let count = format!("{} rules found", expressions.len());
    assert!(checked.contains(&count), "{checked}");
}

#[test]
fn the_dashboard_has_its_rows_panels_and_variables() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let text = |panel: &Value, key: &str| panel[key].as_str().unwrap_or_default().to_owned();
    let (rows, others): (Vec<_>, Vec<_>) = panels.iter().partition(|panel| panel["type"] == "row");
    let titles: Vec<_> = rows.iter().map(|row| text(row, "title")).collect();
    assert_eq!(titles, ["Now", "Flow", "Delay", "Outside", "Machine"]);
    assert_eq!(others.len(), 18);
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len());
    for panel in others {
        assert!(text(panel, "description").ends_with('.'), "{panel}");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{target}");
            let expr = text(target, "expr");
            // Each series is of the chosen payrelays.
            let (selectors, _) = parse(&expr);
            let chosen = r#"{job="$job", instance=~"$instance""#;
            assert_eq!(expr.matches(chosen).count(), selectors.len(), "{expr}");
        }
    }
    let variables: Vec<_> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| text(variable, "name"))
        .collect();
    assert_eq!(variables, ["datasource", "job", "instance"]);
    let overlap = panels.iter().enumerate().find(|(at, panel)| {
        let place =
            |panel: &Value| ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        let [x, y, w, h] = place(panel);
        panels[at + 1..].iter().any(|other| {
            let [x2, y2, w2, h2] = place(other);
            x < x2 + w2 && x2 < x + w && y < y2 + h2 && y2 < y + h
        })
    });
    assert!(overlap.is_none(), "{overlap:?}");
}

#[test]
fn selectors_and_groups_of_expressions_are_found() {
    let (selectors, grouped) =
        parse("sum by (le, a) (rate(payrelay_x_bucket{b=\"1\", c=~\"2\"}[5m])) > 2 * up");
    let labels = [("b", Some("1")), ("c", None)];
    let owned = labels.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
    let expected = [
        Selector {
            metric: "payrelay_x_bucket".to_owned(),
            labels: owned.to_vec(),
        },
        Selector {
            metric: "up".to_owned(),
            labels: Vec::new(),
        },
    ];
    assert_eq!(selectors, expected);
    assert_eq!(grouped, ["a", "le"].map(str::to_owned).into());
    assert_eq!(
        names_after("{{ $labels.channel }} {{ $value }}", "$labels.").collect::<Vec<_>>(),
        ["channel"]
    );
}
