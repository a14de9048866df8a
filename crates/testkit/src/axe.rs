//! axe-core, which checks a page against the rules for people with disabilities
//! (<https://github.com/dequelabs/axe-core>). It comes with Maven, as Kafka does.

use super::browser::Browser;
use super::maven;
use serde_json::Value;
use std::fs;

/// The version of its package for Selenium, which has the script.
const VERSION: &str = "4.11.1";

fn script() -> String {
    let files = maven::unpacked("com.deque.html.axe-core", "selenium", VERSION);
    fs::read_to_string(files.join("axe.min.js")).expect("Maven has brought axe")
}

/// Checks the page as it is now, and panics with what is wrong.
#[track_caller]
pub fn check(browser: &Browser) {
    browser.run(&format!("{}; return null", script()));
    let run = "const done = arguments[0]; \
        axe.run(document).then((result) => done(result.violations), (e) => done([String(e)]))";
    let violations = browser.run_async(run);
    let found = violations.as_array().map_or(&[][..], Vec::as_slice);
    let shown: Vec<String> = found
        .iter()
        .map(|violation: &Value| {
            let targets = violation["nodes"].as_array().into_iter().flatten();
            let targets: Vec<String> = targets
                .map(|node| format!("{} {}", node["target"], node["failureSummary"]))
                .collect();
            format!("{}: {targets:?}", violation["help"])
        })
        .collect();
    assert!(shown.is_empty(), "{}", shown.join("\n"));
}
