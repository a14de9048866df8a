//! The page, in a real Chromium.

use std::fs;
use std::path::Path;
use std::time::Duration;

use payrelay::slack::message::message_amount;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use testkit::axe;
use testkit::browser::Browser;
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::pipeline::{Pipeline, TOPIC};
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

/// The largest id.
const LARGEST: i64 = i64::MAX;

fn start(dir: &Path, slack: Option<&FakeSlack>, config: &str) -> Payrelay {
    fs::write(dir.join("config.toml"), config).unwrap();
    let url = slack.map(FakeSlack::url).unwrap_or_default();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str()),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
    ];
    Payrelay::start(Options::new(dir, if slack.is_some() { &env } else { &[] }))
}

fn open(payrelay: &Payrelay) -> Browser {
    let browser = Browser::start();
    browser.resize(1280, 900);
    browser.open(&format!("http://{}/ui/", payrelay.addr()));
    browser
}

fn pay(payrelay: &Payrelay, user_id: i64, reservations: &[i64]) {
    let reservations: Vec<Value> = reservations
        .iter()
        .map(|id| json!({"reservation_id": id, "seat_price": 150_000}))
        .collect();
    let body = json!({"user_id": user_id, "reservations": reservations});
    let answer = Client::connect(payrelay.addr()).post_json("/payments", &body);
    assert_eq!(answer.status, 201);
}

/// What no page may do: ask another server, break its own policy, or fail.
fn check_manners(browser: &Browser, payrelay: &Payrelay) {
    let origin = format!("http://{}/", payrelay.addr());
    for (url, _) in requests(browser) {
        assert!(url.starts_with(&origin), "{url}");
    }
    for entry in browser.log("browser") {
        // The browser names each response that is an error.
        assert_eq!(entry["source"], "network", "{entry}");
    }
}

/// The addresses that the page asked for since the last call, and when, in seconds.
fn requests(browser: &Browser) -> Vec<(String, f64)> {
    let events = browser.log("performance").into_iter();
    let events = events.map(|entry| -> Value {
        serde_json::from_str(entry["message"].as_str().unwrap()).unwrap()
    });
    events
        .filter(|event| event["message"]["method"] == "Network.requestWillBeSent")
        .filter_map(|event| {
            let parameters = &event["message"]["params"];
            // The tab of a new browser has a page of its own.
            let page = parameters["documentURL"].as_str()?;
            let url = parameters["request"]["url"].as_str()?.to_owned();
            let at = parameters["timestamp"].as_f64()?;
            (!page.starts_with("chrome")).then_some((url, at))
        })
        .collect()
}

#[test]
fn the_page_shows_the_way_of_a_payment_with_one_request_every_two_seconds() {
    let slack = FakeSlack::start();
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), Some(&slack), "");
    let browser = Browser::start();
    browser.open(&format!("http://{}/", payrelay.addr()));
    let address = browser.run("return location.pathname");
    assert_eq!(address, "/ui/", "a browser that opens / comes to the page");
    browser.wait_for_text("#state", "Ready", LIMIT);
    browser.wait_for_text("#delivered", "nothing waits", LIMIT);

    requests(&browser);
    pay(&payrelay, LARGEST, &[LARGEST, 1]);
    browser.wait_for_text("#stored", "2 payments in the last minute", LIMIT);
    wait_until("another look", LIMIT, || {
        browser.run("return performance.getEntriesByType('resource').length") != json!(0)
    });
    let mut asked = Vec::new();
    wait_until("four looks", LIMIT, || {
        asked.extend(requests(&browser));
        asked.len() >= 4
    });
    let overview = format!("http://{}/overview", payrelay.addr());
    assert!(asked.iter().all(|(url, _)| *url == overview), "{asked:?}");
    for pair in asked.windows(2) {
        assert!(pair[1].1 - pair[0].1 > 1.9, "{asked:?}");
    }

    // A payment, its user, its reservation; every digit of an id.
    browser.type_into("#term", "1");
    browser.click("#search button");
    browser.wait_for_text("#payment-title", "Payment 1", LIMIT);
    browser.wait_for_text("#timeline", "Delivered", LIMIT);
    let facts = browser.text("#payment-facts");
    assert!(facts.contains("150,000 KRW"), "{facts}");
    assert!(facts.contains(&LARGEST.to_string()), "{facts}");
    let timeline = browser.text("#timeline");
    for stage in ["Stored", "Published", "Consumed", "Delivered"] {
        assert!(timeline.contains(stage), "{timeline}");
    }
    browser.click("#payment-facts a[href^='#user']");
    let title = format!("Payments of user {LARGEST}");
    browser.wait_for_text("#payments-title", &title, LIMIT);
    browser.wait_for_text("#payments-rows", &LARGEST.to_string(), LIMIT);
    browser.run("location.hash = 'payment=999'");
    browser.wait_for_text("#payment-problem", "999", LIMIT);
    browser.run("location.hash = ''");
    browser.wait_for_text("#overview", "Machine", LIMIT);
    check_manners(&browser, &payrelay);
}

#[test]
fn an_operator_acts_on_channels_and_dead_letters() {
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Word(400, "invalid_payload"));
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), Some(&slack), "");
    pay(&payrelay, 42, &[1, 2, 3]);
    let browser = open(&payrelay);
    browser.wait_for_text("#channels", "paused for", LIMIT);
    browser.wait_for_text("#channels", "invalid_payload", LIMIT);
    browser.wait_for_text("#state", "The channel default is paused", LIMIT);

    // A skip needs a reason.
    for dead in 1..=2 {
        click_button(&browser, "#channels", "Skip one…");
        browser.wait_for_text("#dialog", "becomes a dead letter", LIMIT);
        browser.click("#dialog-confirm");
        assert_eq!(
            browser.run("return dialog.open"),
            true,
            "a reason is needed"
        );
        browser.type_into("#reason", "<img src=x> Slack does not like it");
        browser.click("#dialog-confirm");
        browser.wait_for_text("#letters-count", &dead.to_string(), LIMIT);
        browser.wait_for_text("#channels", "paused for", LIMIT);
    }
    browser.wait_for_text("#letters", "payment 1", LIMIT);
    browser.wait_for_text("#letters", "<img src=x> Slack", LIMIT);
    let images = browser.run("return document.querySelectorAll('main img').length");
    assert_eq!(images, 0, "a text from outside is no markup");

    resolve_both_letters(&browser, &payrelay, &slack);
    // A pause lasts until a resume.
    click_button(&browser, "#channels", "Pause…");
    browser.wait_for_text("#dialog", "Pause default?", LIMIT);
    browser.type_into("#reason", "inventory");
    browser.click("#dialog-confirm");
    browser.wait_for_text("#channels", "paused for", LIMIT);
    browser.wait_for_text("#channels", "inventory", LIMIT);
    pay(&payrelay, 42, &[4]);
    browser.wait_for_text("#channels", "1 waits", LIMIT);
    click_button(&browser, "#channels", "Resume");
    browser.wait_for_text("#channels", "nothing waits", LIMIT);
    check_manners(&browser, &payrelay);
}

/// One is replayed, the other discarded.
fn resolve_both_letters(browser: &Browser, payrelay: &Payrelay, slack: &FakeSlack) {
    // The keyboard leaves a dialog without an action.
    click_button(browser, "#letters", "Discard…");
    browser.wait_for_text("#dialog", "Discard dead letter 1?", LIMIT);
    browser.press("\u{e00c}");
    wait_until("the dialog to close", LIMIT, || {
        browser.run("return dialog.open") == false
    });
    assert_eq!(browser.text("#letters-count"), "2");

    // Slack works again. A replay first shows its outcome.
    slack.answer_with(|_, _| Answer::Ok);
    click_button(browser, "#channels", "Resume");
    browser.wait_for_text("#channels", "nothing waits", LIMIT);
    // A second action does not begin before the first one has ended.
    browser.run(
        "document.querySelector('#letters button').click();
         document.querySelector('#replay-all').click()",
    );
    browser.wait_for_text("#dialog", "Replay dead letter 1?", LIMIT);
    browser.wait_for_text("#dialog", "1: ", LIMIT);
    browser.click("#dialog-confirm");
    wait_until("one letter", LIMIT, || {
        browser.run("return document.querySelectorAll('#letters li').length") == 1
    });
    click_button(browser, "#letters", "Discard…");
    browser.wait_for_text("#dialog", "Discard dead letter 2?", LIMIT);
    browser.type_into("#reason", "known by phone");
    browser.click("#dialog-confirm");
    browser.wait_for_text("#letters-note", "There are none", LIMIT);
    let mut client = Client::connect(payrelay.addr());
    let letters = client.get("/admin/dead-letters?all=true").json();
    let states = [0, 1].map(|index| letters["dead_letters"][index]["state"].clone());
    assert_eq!(states, ["REPLAYED", "DISCARDED"], "{letters}");
    let action = &letters["dead_letters"][1]["actions"][0];
    assert_eq!(
        (&action["origin"], &action["reason"]),
        (&json!("http"), &json!("known by phone"))
    );
}

/// Clicks the first enabled button with this label; an update may replace it meanwhile.
fn click_button(browser: &Browser, part: &str, label: &str) {
    let find = format!(
        "for (const old of document.querySelectorAll('.wanted')) old.classList.remove('wanted');
         const all = [...document.querySelectorAll('{part} button:enabled')];
         const wanted = all.find((button) => button.textContent === '{label}');
         wanted?.classList.add('wanted');
         return wanted !== undefined"
    );
    wait_until(&format!("the button {label}"), LIMIT, || {
        browser.run(&find) == true && browser.try_click(".wanted")
    });
}

fn token(name: &str, access: &str) -> String {
    let hash = Sha256::digest(name);
    format!("[[http.token]]\nname = '{name}'\naccess = '{access}'\nhash = 'sha256:{hash:x}'\n")
}

fn enter(browser: &Browser, token: &str) {
    browser.type_into("#token", token);
    browser.click("#token-form button");
}

#[test]
fn the_page_shows_amounts_as_slack_messages_do() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), None, "");
    let browser = open(&payrelay);
    browser.wait_for_text("#state", "Ready", LIMIT);
    let currencies = "KRW JPY CLP HUF IDR COP IQD BHD KWD TND CLF UYW USD EUR XXX";
    for currency in currencies.split(' ') {
        for amount in [0, 5, 1_500_000, i64::MAX] {
            let shown = browser.run_async(&format!(
                "const done = arguments[0];
                 import('/ui/format.js').then((f) => done(f.amount('{amount}', '{currency}')))"
            ));
            let expected = format!("{} {currency}", message_amount(amount.into(), currency));
            assert_eq!(shown, expected);
        }
    }
}

#[test]
fn the_page_asks_for_a_token_and_shows_what_it_allows() {
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Word(400, "invalid_payload"));
    let dir = tempfile::tempdir().unwrap();
    let tokens = token("viewer", "read-only") + &token("boss", "admin");
    let payrelay = start(dir.path(), Some(&slack), &tokens);
    let browser = open(&payrelay);
    browser.wait_for_text("#sign-in", "needs a token", LIMIT);
    let hidden = browser.run("return document.getElementById('overview').hidden");
    assert_eq!(hidden, true);
    axe::check(&browser);
    enter(&browser, "wrong");
    browser.wait_for_text("#token-problem", "does not know this token", LIMIT);

    // It sees, and has no button to act.
    enter(&browser, "viewer");
    browser.wait_for_text("#state", "Ready", LIMIT);
    browser.wait_for_text("#channels", "default", LIMIT);
    let buttons = browser.run("return document.querySelectorAll('main button:enabled').length");
    let visible = browser.run(
        "return [...document.querySelectorAll('#overview button')]\
            .filter((button) => button.checkVisibility()).length",
    );
    assert_eq!(visible, 0, "{buttons}");
    // The token lasts as long as the tab.
    browser.reload();
    browser.wait_for_text("#channels", "default", LIMIT);
    browser.click("#forget");
    browser.wait_for_text("#sign-in", "needs a token", LIMIT);

    enter(&browser, "boss");
    browser.wait_for_text("#channels", "Pause…", LIMIT);

    // A token that is removed loses the page.
    fs::write(dir.path().join("config.toml"), token("viewer", "read-only")).unwrap();
    payrelay.signal("HUP");
    browser.wait_for_text("#token-problem", "does not know this token", LIMIT);
    check_manners(&browser, &payrelay);
}

#[test]
fn the_page_is_accessible_on_every_screen() {
    let slack = FakeSlack::start();
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), Some(&slack), "");
    pay(&payrelay, 42, &[1]);
    wait_until("the first message", LIMIT, || slack.count() == 1);
    slack.answer_with(|_, _| Answer::Word(404, "channel_is_archived"));
    pay(&payrelay, 42, &[2, 3]);
    let browser = open(&payrelay);
    browser.wait_for_text("#channels", "paused for", LIMIT);
    click_button(&browser, "#channels", "Skip one…");
    browser.type_into("#reason", "shown at the till");
    axe::check(&browser);
    browser.click("#dialog-confirm");
    browser.wait_for_text("#letters", "payment 2", LIMIT);
    for (name, width, height) in [("wide", 1280, 900), ("phone", 360, 740)] {
        browser.resize(width, height);
        for scheme in ["light", "dark"] {
            browser.prefer(scheme);
            axe::check(&browser);
            browser.screenshot(&format!("overview-{name}-{scheme}"));
        }
        let overflow = browser.run("return document.documentElement.scrollWidth - innerWidth");
        assert!(
            overflow.as_i64() <= Some(0),
            "{name}: nothing is wider than the screen, {overflow}"
        );
    }
    for (view, selector) in [("payment=3", "#timeline"), ("user=42", "#payments-rows")] {
        browser.run(&format!("location.hash = '{view}'"));
        browser.wait_for_text(selector, "", LIMIT);
        wait_until("the view", LIMIT, || !browser.text(selector).is_empty());
        axe::check(&browser);
        browser.screenshot(&view.replace('=', "-"));
    }
    check_manners(&browser, &payrelay);

    let without = Browser::start_without_scripts();
    without.open(&format!("http://{}/ui/", payrelay.addr()));
    without.wait_for_text("noscript", "payrelay status", LIMIT);
}

#[test]
fn the_page_shows_the_topic_and_an_outage_of_kafka() {
    let mut broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start();
    let browser = open(&payrelay);
    browser.wait_for_text("#published", "to Kafka", LIMIT);
    for reservation in 1..=20 {
        pay(&payrelay, 42, &[reservation]);
    }
    pipeline.wait_for_messages(20);
    // The events, and the markers of their transactions.
    browser.wait_for_text("#topic-name", TOPIC, LIMIT);
    let published = wait_for("the offsets", LIMIT, || {
        let cell = "return document.querySelector('#partitions td')?.textContent";
        let offset = browser.run(cell).as_str()?.parse::<u64>().ok()?;
        (offset >= 20).then_some(offset)
    });
    let lag = "return document.querySelectorAll('#partitions td')[2].textContent";
    wait_until("no lag", LIMIT, || browser.run(lag) == "0");
    browser.screenshot("overview-kafka");

    broker.kill();
    pay(&payrelay, 42, &[21, 22]);
    browser.wait_for_text("#state", "Publishing is unavailable", LIMIT);
    browser.wait_for_text("#published", "2 wait", LIMIT);
    click_button(&browser, "#causes", "Try now");
    browser.wait_for_text("#outcome", "The relay tries now", LIMIT);
    broker.restart();
    browser.wait_for_text("#state", "Ready", LIMIT * 2);
    wait_until("the events of the outage", LIMIT, || {
        let cell = "return document.querySelector('#partitions td').textContent";
        let offset = browser.run(cell);
        offset.as_str().and_then(|text| text.parse::<u64>().ok()) > Some(published)
    });
    check_manners(&browser, &payrelay);
}

#[test]
fn the_page_says_that_payrelay_does_not_respond() {
    let dir = tempfile::tempdir().unwrap();
    let mut payrelay = start(dir.path(), None, "");
    let browser = open(&payrelay);
    browser.wait_for_text("#state", "Ready", LIMIT);
    let address = payrelay.addr().to_string();
    payrelay.kill9();
    browser.wait_for_text("#state", "No connection", LIMIT);
    let env = [("PAYRELAY_HTTP_LISTEN", address.as_str())];
    let _again = Payrelay::start(Options::new(dir.path(), &env));
    browser.wait_for_text("#state", "Ready", LIMIT);
}
