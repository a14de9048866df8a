//! Settings of the topic that lose records: read when the publisher connects, if it is allowed to.

use krafka::Kafka;
use krafka::admin::{ConfigResource, DescribeConfigsOptions};

/// The risks of the topic's settings, each with the command that changes it. None if they may not
/// be read.
pub(crate) async fn topic_config_risks(
    kafka: &Kafka,
    topic: &str,
    bootstrap: &[String],
) -> Vec<String> {
    let resource = ConfigResource::topic(topic);
    let described = kafka
        .admin()
        .describe_configs([resource.clone()], DescribeConfigsOptions::default())
        .await;
    let entries = match described.map(|mut described| described.remove(&resource)) {
        Ok(Some(Ok(entries))) => entries,
        Ok(None) => return Vec::new(),
        Ok(Some(Err(error))) | Err(error) => {
            log::debug!("the settings of the topic {topic} cannot be read: {error}");
            return Vec::new();
        }
    };
    let value = |name: &str| {
        let entry = entries.iter().find(|entry| entry.name == name);
        entry
            .and_then(|entry| entry.value.as_deref())
            .unwrap_or_default()
    };
    risks_of_topic_config(
        topic,
        bootstrap,
        value("cleanup.policy"),
        value("message.timestamp.type"),
        value("retention.ms"),
    )
}

fn risks_of_topic_config(
    topic: &str,
    bootstrap: &[String],
    cleanup: &str,
    timestamps: &str,
    retention: &str,
) -> Vec<String> {
    let set = |setting: &str| {
        let server = bootstrap.first().map_or("BROKER", String::as_str);
        format!(
            "kafka-configs.sh --bootstrap-server {server} --alter --entity-type topics \
                --entity-name {topic} --add-config {setting}"
        )
    };
    let mut risks = Vec::new();
    if cleanup.split(',').any(|policy| policy.trim() == "compact") {
        risks.push(format!(
            "the topic {topic} is compacted (cleanup.policy={cleanup}): Kafka keeps one event of \
                each user and deletes the others; change it: {}",
            set("cleanup.policy=delete")
        ));
    }
    if timestamps == "CreateTime" && retention.parse::<i64>().is_ok_and(|ms| ms >= 0) {
        risks.push(format!(
            "the topic {topic} has message.timestamp.type=CreateTime and a retention of \
                {retention} ms: records count from the time that payrelay's clock says; change \
                it: {}",
            set("message.timestamp.type=LogAppendTime")
        ));
    }
    risks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compaction_and_finite_retention_by_our_clock_are_risks() {
        let risks = |cleanup, timestamps, retention| {
            risks_of_topic_config("t", &["k:9092".to_owned()], cleanup, timestamps, retention).len()
        };
        assert_eq!(risks("delete", "LogAppendTime", "604800000"), 0);
        assert_eq!(risks("delete", "CreateTime", "-1"), 0);
        assert_eq!(risks("delete", "CreateTime", "604800000"), 1);
        assert_eq!(risks("compact", "LogAppendTime", "604800000"), 1);
        assert_eq!(risks("compact,delete", "CreateTime", "604800000"), 2);
        assert_eq!(risks("", "", ""), 0, "they may not be read");
        let text = &risks_of_topic_config("t", &["k:9092".to_owned()], "compact", "", "")[0];
        assert!(
            text.contains("kafka-configs.sh --bootstrap-server k:9092")
                && text.contains("cleanup.policy=delete")
        );
    }
}
