//! `payrelay fleet`: the edges of a topic, and the topics that they need.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use payrelay::config::{Config, LoadedConfig};
use payrelay::domain::timestamp::Timestamp;
use payrelay::fleet::{self, FleetNode, NodeState};
use payrelay::kafka::fleet_topics::{CreatedTopic, create_fleet_topics, fleet_topics};

use super::exit_code;
use super::output::{Output, print_config_error, print_note, print_temporary_error};
use super::table::{Align, Table, color_state, show_age, show_bytes};
use super::watch::Watch;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct FleetCommand {
    #[command(subcommand)]
    action: Option<FleetAction>,
    /// Shows only nodes in this state
    #[arg(long, value_parser = state_parser())]
    state: Option<NodeState>,
    /// Prints one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    watch: Watch,
}

#[derive(Subcommand)]
enum FleetAction {
    /// Creates the topics of a fleet; existing ones stay as they are
    Init(InitCommand),
}

#[derive(Args)]
struct InitCommand {
    /// The number of copies of each record; -1: the cluster's default
    #[arg(
        long,
        value_name = "N",
        default_value_t = 3,
        allow_negative_numbers = true
    )]
    #[arg(value_parser = clap::value_parser!(i16).range(-1..=32))]
    replication: i16,
    /// Prints the topics, and creates none
    #[arg(long)]
    dry_run: bool,
}

/// The states as arguments.
fn state_parser() -> impl TypedValueParser<Value = NodeState> {
    let names = NodeState::ALL.iter().map(|state| state.as_str());
    PossibleValuesParser::new(names).try_map(|name| NodeState::parse(&name).ok_or("no state"))
}

impl FleetCommand {
    pub(super) fn run(&self, loaded: &LoadedConfig) -> u8 {
        let config = &loaded.config;
        if !config.publishes_to_kafka() {
            return print_config_error(
                "a fleet needs Kafka: set publisher.kind = \"kafka\" and kafka.bootstrap_servers, \
                    or name the configuration of an edge with --config",
            );
        }
        match &self.action {
            Some(FleetAction::Init(init)) => init.run(config),
            None => self
                .watch
                .repeat(self.json, |output| self.show(config, output)),
        }
    }

    /// 0: nothing is remarkable. 1: something is. 75: Kafka does not answer.
    fn show(&self, config: &Config, output: &mut Output) -> Result<u8, u8> {
        let now = Timestamp::now();
        let nodes = fleet::read_fleet(config, now).map_err(print_temporary_error)?;
        let is_fine = !nodes.is_empty() && nodes.iter().all(|node| node.state == NodeState::Ok);
        let shown: Vec<&FleetNode> = nodes
            .iter()
            .filter(|node| self.state.is_none_or(|state| node.state == state))
            .collect();
        if self.json {
            for node in shown {
                output.json(node);
            }
        } else {
            show_nodes(&shown, now, output);
            print_note(&summary(&nodes));
        }
        Ok(if is_fine {
            exit_code::OK
        } else {
            exit_code::PARTIAL
        })
    }
}

/// How many nodes there are in each state.
fn summary(nodes: &[FleetNode]) -> String {
    let count = |state: &NodeState| nodes.iter().filter(|node| node.state == *state).count();
    let counts: Vec<String> = NodeState::ALL
        .iter()
        .filter(|state| count(state) > 0)
        .map(|state| format!("{} {}", count(state), state.as_str()))
        .collect();
    if counts.is_empty() {
        return "no node has reported".to_owned();
    }
    format!("{} nodes: {}", nodes.len(), counts.join(", "))
}

fn show_nodes(nodes: &[&FleetNode], now: Timestamp, output: &mut Output) {
    let mut table = Table::new(&[
        ("node", Align::Left),
        ("seen", Align::Right),
        ("version", Align::Left),
        ("pending", Align::Right),
        ("oldest", Align::Right),
        ("stored", Align::Right),
        ("on topic", Align::Right),
        ("clock", Align::Right),
        ("disk free", Align::Right),
        ("state", Align::Left),
    ]);
    for node in nodes {
        table.row(cells(node, now));
    }
    table.print(output);
}

fn cells(node: &FleetNode, now: Timestamp) -> [String; 10] {
    let mut cells: [String; 10] = std::array::from_fn(|_| "-".to_owned());
    cells[0].clone_from(&node.node);
    cells[1] = show_age(now.since(node.seen_at));
    cells[9] = color_state(node.state.as_str());
    let Some(status) = &node.status else {
        return cells;
    };
    cells[2].clone_from(&status.version);
    cells[3] = status.pending.count.to_string();
    if let Some(oldest) = status.pending.oldest_at {
        cells[4] = show_age(status.at.since(oldest));
    }
    cells[5] = status.events.stored.to_string();
    cells[6] = status.events.published.to_string();
    if let Some(skew) = node.clock_skew_ms {
        // Whole seconds: a report travels for some milliseconds.
        cells[7] = format!("{:+} s", (skew + skew.signum() * 500) / 1000);
    }
    if let Some(free) = status.disk_free {
        cells[8] = show_bytes(free);
    }
    cells
}

impl InitCommand {
    fn run(&self, config: &Config) -> u8 {
        let topics = fleet_topics(&config.kafka, self.replication);
        if config.kafka.partitions == 1 {
            print_note("kafka.partitions is 1: 1,000 nodes need 48, and the number is chosen once");
        }
        let mut output = Output::default();
        let done = if self.dry_run {
            vec![None; topics.len()]
        } else {
            match create_fleet_topics(&config.kafka, &topics, self.replication) {
                Ok(done) => done.into_iter().map(Some).collect(),
                Err(error) => return print_temporary_error(error),
            }
        };
        for (topic, done) in topics.iter().zip(done) {
            let settings: Vec<String> = topic
                .settings
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            let done = match done {
                None => "would be created unless it exists",
                Some(CreatedTopic::Created) => "created",
                Some(CreatedTopic::Existed) => "exists, and was not changed",
            };
            output.line(format_args!(
                "{}: {done}; {} partitions, {}",
                topic.name,
                topic.partitions,
                settings.join(" ")
            ));
        }
        output.exit_code(exit_code::OK)
    }
}
