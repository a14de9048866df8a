//! A metric for each value of its labels, all of them made at the start.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// The series of a metric, in the order in which they were added. Cloning shares them. Only a
/// scrape looks one up: the code that counts keeps its own.
#[derive(Debug)]
pub struct LabeledMetrics<M>(Arc<Mutex<Vec<(SeriesLabels, M)>>>);

type SeriesLabels = Vec<(&'static str, String)>;

impl<M> Clone for LabeledMetrics<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M> Default for LabeledMetrics<M> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<M: Clone> LabeledMetrics<M> {
    /// Adds a series, and returns its metric.
    pub fn add(&self, labels: &[(&'static str, &str)], metric: M) -> M {
        let labels = labels
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect();
        let mut series = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        series.push((labels, metric.clone()));
        metric
    }
}

impl<M: Clone> LabeledMetrics<M> {
    /// The series whose first label has this value.
    pub fn find(&self, value: &str) -> Option<M> {
        let series = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut series = series.iter();
        series
            .find(|(labels, _)| labels.first().is_some_and(|(_, known)| known == value))
            .map(|(_, metric)| metric.clone())
    }
}

impl<M: EncodeMetric + TypedMetric> EncodeMetric for LabeledMetrics<M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let series = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (labels, metric) in series.iter() {
            metric.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }
}
