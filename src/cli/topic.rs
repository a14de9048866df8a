//! `payrelay topic`: how far each partition of the topic is published and consumed.

use clap::Args;
use payrelay::store::topic::topic_partitions_by_name;
use serde_json::{Value, json};

use super::client::Target;
use super::output::{Output, print_config_error, print_note};
use super::state::{State, to_json};
use super::table::{Align, Table, show_cell};
use super::{configuration, exit_code};

#[derive(Args)]
pub(super) struct TopicCommand {
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

impl TopicCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        self.show(target).unwrap_or_else(|code| code)
    }

    fn show(&self, target: &Target) -> Result<u8, u8> {
        let state = State::open(target)?;
        let name = match &state {
            State::Running(_) => String::new(),
            State::Stopped(_) => {
                configuration::load_topic_name(target.file()).map_err(print_config_error)?
            }
        };
        let topic = state.get("/admin/topic", |database| {
            let partitions = database.read(|tx| topic_partitions_by_name(tx, &name))?;
            Ok(Some(
                json!({ "topic": name, "partitions": to_json(&partitions) }),
            ))
        })?;
        let topic = topic.unwrap_or_default();
        let mut output = Output::default();
        if self.json {
            output.json(&topic);
            return Ok(output.exit_code(exit_code::OK));
        }
        let columns = [
            "partition",
            "published_to",
            "consumed_to",
            "lag",
            "duplicates",
            "gaps",
            "inversions",
        ];
        let mut table = Table::new(&columns.map(|name| (name, Align::Right)));
        let partitions = topic["partitions"].as_array();
        for partition in partitions.into_iter().flatten() {
            table.row(columns.map(|name| match name {
                "lag" => show_lag(partition),
                name => show_cell(&partition[name]),
            }));
        }
        if partitions.is_none_or(Vec::is_empty) {
            print_note(&format!(
                "nothing was published to the topic {}",
                show_cell(&topic["topic"])
            ));
        } else {
            output.line(format_args!("topic {}", show_cell(&topic["topic"])));
        }
        table.print(&mut output);
        Ok(output.exit_code(exit_code::OK))
    }
}

/// How many offsets are published and not consumed. Offsets of transactions' markers count.
fn show_lag(partition: &Value) -> String {
    let consumed = partition["consumed_to"].as_i64();
    let published = partition["published_to"].as_i64();
    match (published, consumed) {
        (Some(published), Some(consumed)) => published.saturating_sub(consumed).max(0).to_string(),
        _ => "-".to_owned(),
    }
}
