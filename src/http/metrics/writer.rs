//! Writes the metrics of a scrape, one after the other.

use std::fmt;
use std::time::Duration;

use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// As a number of Prometheus, which has 53 bits of precision.
pub(super) fn scraped_number(number: impl TryInto<u64>) -> f64 {
    // A negative number is a fault of an estimate.
    Duration::from_secs(number.try_into().unwrap_or(0)).as_secs_f64()
}

pub(super) fn scraped_flag(is_set: bool) -> f64 {
    f64::from(u8::from(is_set))
}

/// Writes metrics one after the other.
pub(super) struct ScrapeWriter<'a>(pub(super) DescriptorEncoder<'a>);

/// The result of writing; writing into memory cannot fail.
pub(super) type Written = Result<(), fmt::Error>;

impl ScrapeWriter<'_> {
    pub(super) fn gauge(&mut self, name: &str, help: &str, value: f64) -> Written {
        let encoder = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge);
        encoder?.encode_gauge(&value)
    }

    /// A series for each set of labels.
    pub(super) fn gauges<'v, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        labels: [&'static str; N],
        series: impl IntoIterator<Item = ([&'v str; N], f64)>,
    ) -> Written {
        let kind = MetricType::Gauge;
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        for (values, value) in series {
            let labels = pair_labels(labels, values);
            encoder.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    pub(super) fn counters<'v>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        series: impl IntoIterator<Item = (&'v str, u64)>,
    ) -> Written {
        let kind = MetricType::Counter;
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        for (value, count) in series {
            let labels = pair_labels([label], [value]);
            let mut encoder = encoder.encode_family(&labels)?;
            encoder.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }

    pub(super) fn info(&mut self, name: &str, help: &str, labels: &[(&str, &str)]) -> Written {
        let kind = MetricType::Gauge;
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        encoder.encode_family(&labels)?.encode_gauge(&1.0_f64)
    }
}

fn pair_labels<'v, const N: usize>(
    names: [&'static str; N],
    values: [&'v str; N],
) -> [(&'static str, &'v str); N] {
    let mut values = values.into_iter();
    names.map(|name| (name, values.next().unwrap_or_default()))
}
