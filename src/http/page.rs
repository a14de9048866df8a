//! `/ui/`: a page for browsers, which shows `/overview`. Its files hold no data and need no token:
//! its script asks for the token, and sends it as every other client does.

use std::fmt::Write as _;
use std::sync::LazyLock;

use http_body_util::Full;
use hyper::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue,
    IF_NONE_MATCH, LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};
use sha2::{Digest as _, Sha256};

use super::response::Body;

/// Nothing but its own files, and no markup from a text
/// (<https://www.w3.org/TR/CSP3/>, <https://w3c.github.io/trusted-types/dist/spec/>).
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
        connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
        require-trusted-types-for 'script'",
);

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const ICON: &str = "image/svg+xml";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file of the page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PageFile {
    /// Below `/ui/`.
    name: &'static str,
    content_type: &'static str,
    text: &'static str,
}

static FILES: [PageFile; 9] = [
    page_file("", HTML, include_str!("page/page.html")),
    page_file("page.css", CSS, include_str!("page/page.css")),
    page_file("icon.svg", ICON, include_str!("page/icon.svg")),
    page_file("api.js", SCRIPT, include_str!("page/api.js")),
    page_file("dom.js", SCRIPT, include_str!("page/dom.js")),
    page_file("format.js", SCRIPT, include_str!("page/format.js")),
    page_file("page.js", SCRIPT, include_str!("page/page.js")),
    page_file("payments.js", SCRIPT, include_str!("page/payments.js")),
    page_file("stage.js", SCRIPT, include_str!("page/stage.js")),
];

const fn page_file(name: &'static str, content_type: &'static str, text: &'static str) -> PageFile {
    PageFile {
        name,
        content_type,
        text,
    }
}

/// All files change together, with the program.
static VERSION: LazyLock<HeaderValue> = LazyLock::new(|| {
    let mut hash = Sha256::new();
    for file in &FILES {
        hash.update(file.text);
    }
    let mut tag = String::from("\"");
    for byte in hash.finalize().iter().take(12) {
        // Writing into memory cannot fail.
        let _ = write!(tag, "{byte:02x}");
    }
    tag.push('"');
    HeaderValue::from_str(&tag).unwrap_or(HeaderValue::from_static("\"\""))
});

impl PageFile {
    /// The file with this name below `/ui/`.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        FILES.iter().find(|file| file.name == name)
    }

    /// 304 if the browser has it.
    pub(super) fn respond(&self, headers: &HeaderMap) -> Response<Body> {
        let is_known = headers.get_all(IF_NONE_MATCH).iter().any(|tags| {
            let tags = tags.to_str().unwrap_or_default().split(',');
            tags.map(|tag| tag.trim().trim_start_matches("W/"))
                .any(|tag| tag == *VERSION)
        });
        let (status, text) = if is_known {
            (StatusCode::NOT_MODIFIED, "")
        } else {
            (StatusCode::OK, self.text)
        };
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response.headers_mut().extend([
            (CONTENT_TYPE, HeaderValue::from_static(self.content_type)),
            (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (ETAG, VERSION.clone()),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        ]);
        response
    }
}

/// Whether a request for `/` is of a person who opens the address in a browser.
pub(super) fn is_browser(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(ACCEPT).iter();
    accepts.filter_map(|value| value.to_str().ok()).any(|text| {
        text.split(',')
            .any(|kind| kind.trim().starts_with("text/html"))
    })
}

/// To the page. The address is relative: a proxy may put a prefix before it.
pub(super) fn redirect_to_page() -> Response<Body> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SEE_OTHER;
    response
        .headers_mut()
        .insert(LOCATION, HeaderValue::from_static("ui/"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    #[test]
    fn every_file_of_the_page_is_served() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http/page");
        let on_disk: BTreeSet<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let served = FILES.iter().map(|file| match file.name {
            "" => "page.html".to_owned(),
            name => name.to_owned(),
        });
        assert_eq!(served.collect::<BTreeSet<_>>(), on_disk);
    }

    #[test]
    fn a_browser_that_has_a_file_gets_304() {
        let file = PageFile::find("page.css").unwrap();
        let mut headers = HeaderMap::new();
        let first = file.respond(&headers);
        assert_eq!(first.status(), StatusCode::OK);
        let tag = first.headers()[ETAG].clone();
        headers.insert(IF_NONE_MATCH, tag.clone());
        assert_eq!(file.respond(&headers).status(), StatusCode::NOT_MODIFIED);
        let weak = format!("\"other\", W/{}", tag.to_str().unwrap());
        headers.insert(IF_NONE_MATCH, HeaderValue::from_str(&weak).unwrap());
        assert_eq!(file.respond(&headers).status(), StatusCode::NOT_MODIFIED);
        headers.insert(IF_NONE_MATCH, HeaderValue::from_static("\"other\""));
        assert_eq!(file.respond(&headers).status(), StatusCode::OK);
    }

    #[test]
    fn a_browser_is_known_by_what_it_accepts() {
        let accepts = |text: &'static str| {
            is_browser(&HeaderMap::from_iter([(
                ACCEPT,
                HeaderValue::from_static(text),
            )]))
        };
        assert!(accepts("text/html,application/xhtml+xml,*/*;q=0.8"));
        assert!(!accepts("*/*") && !accepts("application/json"));
        assert!(!is_browser(&HeaderMap::new()));
    }
}
