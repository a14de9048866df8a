//! `/metrics`: the counters of the process, and its state at this moment. Everything comes from
//! memory, so a scrape is also answered while the database hangs.

mod state;
mod writer;

use hyper::Response;
use hyper::header::{ACCEPT, HeaderMap};
use prometheus_client::registry::Registry;

use self::state::ScrapedState;
use super::app::App;
use super::response::{Body, text_response};
use crate::domain::timestamp::Timestamp;
use crate::runtime::metrics::ScrapeFormat;

/// Prometheus asks for `OpenMetrics` by its name
/// (<https://prometheus.io/docs/instrumenting/content_negotiation/>).
fn negotiate_scrape_format(headers: &HeaderMap) -> ScrapeFormat {
    let accepts = headers.get_all(ACCEPT).iter().any(|value| {
        value
            .to_str()
            .is_ok_and(|text| text.contains("application/openmetrics-text"))
    });
    if accepts {
        ScrapeFormat::OpenMetrics
    } else {
        ScrapeFormat::Text
    }
}

impl App {
    pub(super) fn metrics_scrape(&self, headers: &HeaderMap) -> Response<Body> {
        let format = negotiate_scrape_format(headers);
        let mut state = Registry::with_prefix("payrelay");
        state.register_collector(Box::new(self.scraped_state()));
        let text = self.context.store.metrics().encode(format, &state);
        let content_type = match format {
            ScrapeFormat::Text => "text/plain; version=0.0.4; charset=utf-8",
            ScrapeFormat::OpenMetrics => {
                "application/openmetrics-text; version=1.0.0; charset=utf-8"
            }
        };
        text_response(content_type, text)
    }

    fn scraped_state(&self) -> ScrapedState {
        let context = &self.context;
        let store = &context.store;
        let now = Timestamp::now();
        let sample = context.snapshots.last();
        let mut components = vec![
            ("database".to_owned(), store.database_state()),
            ("disk".to_owned(), store.disk_state()),
        ];
        let remote = context.components.iter();
        // A channel has more states than up and down.
        let remote = remote.filter(|(name, _)| name == "publisher" || name == "consumer");
        components.extend(remote.map(|(name, health)| (name.clone(), health.get())));
        let channels = context.channels.iter();
        ScrapedState {
            now,
            node: store.node().to_string(),
            publisher: context.publisher.name(),
            components,
            channels: channels
                .map(|channel| (channel.name.clone(), channel.health.get().state))
                .collect(),
            threads: context.workers.heartbeats(),
            queued_payments: store.queued_payments(),
            queue_max: context.database.queue_max.get(),
            queued_reads: store.queued_reads(),
            body_bytes: self.limits.body_bytes(),
            disk_min_free_bytes: context.database.min_free_bytes,
            keys_max: context.keys_max,
            sample,
        }
    }
}
