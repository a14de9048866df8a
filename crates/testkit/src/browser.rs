//! A real Chromium, driven by `WebDriver` (<https://www.w3.org/TR/webdriver2/>).

use super::child::KillOnDrop;
use super::wait_until;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const INSTALL: &str = "chromedriver is missing. scripts/test brings it; or install the Debian \
    packages: apt-get install chromium chromium-driver";

/// A browser that starts on a busy machine needs some seconds.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The key of an element in an answer of `WebDriver`.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one tab; dropping it ends it.
pub struct Browser {
    agent: ureq::Agent,
    session: String,
    _driver: KillOnDrop,
    /// Goes with the browser.
    profile: TempDir,
}

impl Browser {
    /// A browser with an empty profile.
    #[track_caller]
    pub fn start() -> Browser {
        Browser::start_with(&json!({}))
    }

    /// A browser that runs no script of a page.
    #[track_caller]
    pub fn start_without_scripts() -> Browser {
        Browser::start_with(&json!({"profile.managed_default_content_settings.javascript": 2}))
    }

    #[track_caller]
    fn start_with(preferences: &Value) -> Browser {
        let version = Command::new("chromedriver")
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if let Err(error) = version {
            assert!(error.kind() != ErrorKind::NotFound, "{INSTALL}");
            panic!("chromedriver: {error}");
        }
        let mut command = KillOnDrop::command("chromedriver");
        command.arg("--port=0").stdout(Stdio::piped());
        let mut driver = KillOnDrop::spawn(command);
        let port = BufReader::new(driver.take_stdout())
            .lines()
            .map_while(Result::ok)
            .find_map(|line| {
                let (_, port) = line.split_once("started successfully on port ")?;
                port.trim_end_matches('.').parse::<u16>().ok()
            });
        let port = port.expect("chromedriver names its port");
        let profile = tempfile::tempdir().expect("the temporary directory is writable");
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
            .build()
            .new_agent();
        let mut browser = Browser {
            agent,
            session: format!("http://127.0.0.1:{port}/session"),
            _driver: driver,
            profile,
        };
        browser.open_session(preferences);
        browser
    }

    fn open_session(&mut self, preferences: &Value) {
        let profile = self.profile.path().display();
        let options = json!({
            "prefs": preferences,
            "args": [
                "--headless=new",
                // Its sandbox needs what a container may not have.
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--force-device-scale-factor=1",
                "--lang=en-US",
                format!("--user-data-dir={profile}"),
            ],
        });
        let capabilities = json!({
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
        });
        let answer = self.send("", &json!({"capabilities": {"alwaysMatch": capabilities}}));
        let id = answer["sessionId"].as_str().expect("a session has an id");
        self.session = format!("{}/{id}", self.session);
    }

    /// Sends a command of `WebDriver`; its error is a failure of the test.
    #[track_caller]
    fn send(&self, path: &str, body: &Value) -> Value {
        self.try_send(path, body)
            .unwrap_or_else(|error| panic!("WebDriver {path}: {error}"))
    }

    fn try_send(&self, path: &str, body: &Value) -> Result<Value, String> {
        let url = format!("{}{path}", self.session);
        let request = self.agent.post(&url);
        let request = request.header("Content-Type", "application/json");
        let answer = request.send(body.to_string());
        let mut answer = answer.map_err(|error| error.to_string())?;
        let text = answer.body_mut().read_to_string();
        let text = text.map_err(|error| error.to_string())?;
        let mut json: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let value = json["value"].take();
        match value["error"].as_str() {
            Some(_) => Err(value["message"].to_string()),
            None => Ok(value),
        }
    }

    /// Opens an address, and waits until it is loaded.
    #[track_caller]
    pub fn open(&self, url: &str) {
        self.send("/url", &json!({"url": url}));
    }

    /// Loads the page again.
    #[track_caller]
    pub fn reload(&self) {
        self.send("/refresh", &json!({}));
    }

    /// Runs a function body in the page, and returns what it returns.
    #[track_caller]
    pub fn run(&self, script: &str) -> Value {
        self.send("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Runs a function body whose last argument is a callback for its result.
    #[track_caller]
    pub fn run_async(&self, script: &str) -> Value {
        self.send("/execute/async", &json!({"script": script, "args": []}))
    }

    /// The visible text of the first element of a CSS selector; empty without one.
    #[track_caller]
    pub fn text(&self, selector: &str) -> String {
        let script = format!("return document.querySelector({selector:?})?.innerText ?? ''");
        let text = self.run(&script);
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until the visible text of an element has this part.
    #[track_caller]
    pub fn wait_for_text(&self, selector: &str, part: &str, limit: Duration) {
        let mut last = String::new();
        let found = super::try_wait(limit, || {
            last = self.text(selector);
            last.contains(part).then_some(())
        });
        assert!(
            found.is_some(),
            "{selector} has {last:?}, not {part:?}; the log: {:?}",
            self.log("browser")
        );
    }

    /// The element of a CSS selector, once it can be clicked.
    #[track_caller]
    fn act(&self, selector: &str, action: &str, body: &Value) {
        let what = format!("{action} on {selector}");
        wait_until(&what, Duration::from_secs(20), || {
            self.try_act(selector, action, body)
        });
    }

    fn try_act(&self, selector: &str, action: &str, body: &Value) -> bool {
        let find = json!({"using": "css selector", "value": selector});
        let found = self.try_send("/element", &find).unwrap_or_default();
        let id = found[ELEMENT].as_str().unwrap_or_default();
        self.try_send(&format!("/element/{id}/{action}"), body)
            .is_ok()
    }

    /// Clicks an element if it is there, visible and not covered.
    pub fn try_click(&self, selector: &str) -> bool {
        self.try_act(selector, "click", &json!({}))
    }

    /// Clicks an element as a mouse does: it must be visible and not covered.
    #[track_caller]
    pub fn click(&self, selector: &str) {
        self.act(selector, "click", &json!({}));
    }

    /// Types into an element as a keyboard does.
    #[track_caller]
    pub fn type_into(&self, selector: &str, text: &str) {
        self.act(selector, "value", &json!({"text": text}));
    }

    /// Sends keys to the element that has the focus.
    #[track_caller]
    pub fn press(&self, keys: &str) {
        let keys = keys.chars().flat_map(|key| {
            let key = key.to_string();
            [
                json!({"type": "keyDown", "value": key}),
                json!({"type": "keyUp", "value": key}),
            ]
        });
        let keyboard = json!({"type": "key", "id": "k", "actions": keys.collect::<Vec<_>>()});
        self.send("/actions", &json!({"actions": [keyboard]}));
    }

    /// Sends a command of the Chrome `DevTools` protocol.
    #[track_caller]
    pub fn devtools(&self, command: &str, parameters: &Value) -> Value {
        let body = json!({"cmd": command, "params": parameters});
        self.send("/goog/cdp/execute", &body)
    }

    /// Sets the size of the view.
    #[track_caller]
    pub fn resize(&self, width: u32, height: u32) {
        let metrics =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.devtools("Emulation.setDeviceMetricsOverride", &metrics);
    }

    /// Sets what the person prefers: `light` or `dark`.
    #[track_caller]
    pub fn prefer(&self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.devtools("Emulation.setEmulatedMedia", &json!({"features": features}));
    }

    /// What a log of the browser got since the last call: `browser` or `performance`.
    #[track_caller]
    pub fn log(&self, kind: &str) -> Vec<Value> {
        let entries = self.send("/se/log", &json!({"type": kind}));
        entries.as_array().cloned().unwrap_or_default()
    }

    /// Keeps a picture of the whole page in the target directory, and returns its path.
    #[track_caller]
    pub fn screenshot(&self, name: &str) -> PathBuf {
        let options = json!({"format": "png", "captureBeyondViewport": true});
        let answer = self.devtools("Page.captureScreenshot", &options);
        let data = answer["data"].as_str().expect("a picture is a text");
        let picture = BASE64_STANDARD.decode(data).expect("the text is base64");
        let folder = crate::paths::target().join("screenshots");
        fs::create_dir_all(&folder).expect("the target directory is writable");
        let path = folder.join(format!("{name}.png"));
        fs::write(&path, picture).expect("the target directory is writable");
        path
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends its browser with the session.
        let _ = self.agent.delete(&self.session).call();
    }
}
