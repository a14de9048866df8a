//! Tests of the whole configuration: keys, variables, problems, the shipped file.

use std::path::{Path, PathBuf};

use toml::Value;

use super::*;
use crate::domain::access::Access;
use crate::domain::event::RecordKey;
use crate::domain::payment::Status;
use crate::domain::token::TokenHash;

const SHIPPED: &str = include_str!("../../config.toml");

fn load_config(file: &str, variables: &[(&str, &str)]) -> Result<LoadedConfig, Problems> {
    let environment = variables
        .iter()
        .map(|(name, value)| ((*name).into(), (*value).into()))
        .collect();
    Config::load(file, &environment)
}

fn config_values(effective: &str) -> String {
    let lines = effective
        .lines()
        .map(|line| line.split(" # ").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_shipped_configuration_has_every_key_at_its_default() {
    let shipped = load_config(SHIPPED, &[]).unwrap().effective().to_owned();
    assert!(
        !shipped.contains("# default"),
        "config.toml lacks a key:\n{shipped}"
    );
    assert_eq!(
        config_values(&shipped),
        config_values(load_config("", &[]).unwrap().effective())
    );
}

#[test]
fn the_shipped_configuration_comments_every_key() {
    let lines: Vec<_> = SHIPPED.lines().collect();
    for pair in lines
        .windows(2)
        .filter(|pair| pair[1].contains(" = ") && !pair[1].starts_with('#'))
    {
        assert!(pair[0].starts_with('#'), "no comment above {:?}", pair[1]);
    }
}

#[test]
fn the_environment_wins_over_the_configuration_file() {
    let variables = [
        ("PAYRELAY_HTTP_LISTEN", "127.0.0.1:9999"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "a:1, b:2"),
        ("PAYRELAY_KAFKA_PARTITIONS", "7"),
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_LOG", "debug"),
        (
            "PAYRELAY_PORT_80_TCP",
            "a container runtime sets such names",
        ),
    ];
    let loaded = load_config("[http]\nlisten = '127.0.0.1:1'\n", &variables).unwrap();
    assert_eq!(loaded.config.http.listen.port(), 9999);
    assert_eq!(loaded.config.kafka.bootstrap_servers, ["a:1", "b:2"]);
    assert_eq!(loaded.config.kafka.partitions, 7);
    assert_eq!(loaded.config.publisher.kind, PublisherKind::Kafka);
    assert_eq!(loaded.ignored_variables(), ["PAYRELAY_PORT_80_TCP"]);
}

#[test]
fn every_problem_of_the_configuration_is_reported_at_once() {
    let file = "listen = 1\n[http]\nlisten = 'here'\nbody_bytes_max = '1'\nmax_body = \
        3\n[nonsense]\nx = 1\n[scheduler]\ninterval = '60'\nretention = \
        '99999999999999999d'\n[kafka]\nbootstrap_servers = []\ntopic = 'a b'\n";
    let problems = load_config(
        file,
        &[
            ("PAYRELAY_HTTP_CONNECTIONS_MAX", "many"),
            ("PAYRELAY_KAFKA_TOPICS", "x"),
        ],
    )
    .unwrap_err()
    .to_string();
    let expected = [
        "the configuration has 11 problems:",
        "PAYRELAY_KAFKA_TOPICS: there is no such key",
        "http.listen = \"here\" (file): allowed is \"address:port\"",
        "http.body_bytes_max = \"1\" (file): allowed is an integer from 1024 to 67108864",
        "http.connections_max = \"many\" (environment): allowed is an integer from 1 to 100000",
        "scheduler.interval = \"60\" (file): allowed is a number and a unit (ms, s, m, h, d), \
            from 10ms to 3650d",
        "scheduler.retention",
        "kafka.bootstrap_servers = [] (file): allowed is a list of one or more \"host:port\"",
        "kafka.topic = \"a b\"",
        "listen: there is no such key",
        "http.max_body: there is no such key",
        "[nonsense]: there is no such section; the sections are [database], [fleet], [http], \
            [idempotency], [kafka], [log], [node], [payment], [publisher], [scheduler], [slack]",
    ];
    for part in expected {
        assert!(
            problems.contains(part),
            "{part:?} is missing from:\n{problems}"
        );
    }
}

#[test]
fn a_secret_of_the_configuration_is_never_shown() {
    let url = "https://hooks.example/T0/B0/hush";
    for (file, variables) in [
        (format!("[slack]\nwebhook_url = '{url}'"), vec![]),
        (String::new(), vec![("PAYRELAY_SLACK_WEBHOOK_URL", url)]),
    ] {
        let loaded = load_config(&file, &variables).unwrap();
        assert_eq!(
            loaded.config.slack.webhook_url.as_ref().unwrap().expose(),
            url
        );
        assert!(!loaded.effective().contains("hush"));
        assert!(!format!("{:?}", loaded.config).contains("hush"));
    }
    let problems = load_config("[slack]\nwebhook_url = 'ftp://hush'", &[])
        .unwrap_err()
        .to_string();
    assert!(
        problems.contains("slack.webhook_url = \"***\"") && !problems.contains("hush"),
        "{problems}"
    );
    let unclosed = load_config(&format!("[slack]\nwebhook_url = \"{url}\n"), &[])
        .unwrap_err()
        .to_string();
    assert!(
        unclosed.contains("not TOML: line 2: ") && !unclosed.contains("hush"),
        "{unclosed}"
    );
}

const ROUTES: &str = "[[slack.route]]\nname = 'failures'\nwebhook_url = \
    'https://hooks.example/hush'\nstatus = 'FAILED'\n[[slack.route]]\nname = \
    'large'\namount_min = 5\nuser_max = 9\nmessages_per_second = 0.5\n";

#[test]
fn slack_routes_are_read_in_their_order_and_their_secrets_are_masked() {
    let variables = [(
        "PAYRELAY_SLACK_ROUTE_1_WEBHOOK_URL",
        "https://hooks.example/hush-2",
    )];
    let loaded = load_config(ROUTES, &variables).unwrap();
    let [failures, large] = loaded.config.slack.routes.as_slice() else {
        panic!("two routes")
    };
    assert_eq!(
        (failures.name.as_str(), failures.status),
        ("failures", Some(Status::Failed))
    );
    assert_eq!(
        (&failures.amount, failures.messages_per_second),
        (&(0..=i64::MAX), 1.0)
    );
    assert_eq!((large.name.as_str(), large.status), ("large", None));
    assert_eq!(
        (&large.amount, &large.user, large.messages_per_second),
        (&(5..=i64::MAX), &(0..=9), 0.5)
    );
    assert_eq!(
        large.webhook_url.as_ref().unwrap().expose(),
        "https://hooks.example/hush-2"
    );
    assert_eq!(
        loaded.effective().matches("[[slack.route]]").count(),
        2,
        "{}",
        loaded.effective()
    );
    assert!(
        !loaded.effective().contains("hush"),
        "{}",
        loaded.effective()
    );
    assert!(!format!("{:?}", loaded.config).contains("hush"));
}

#[test]
fn a_configuration_key_of_a_table_is_set_in_one_place() {
    let variables = [
        (
            "PAYRELAY_SLACK_ROUTE_0_WEBHOOK_URL",
            "https://hooks.example/hush",
        ),
        ("PAYRELAY_HTTP_TOKEN_0_ACCESS", "admin"),
    ];
    let file = ROUTES.to_owned() + &config_token("till", "read-only", HASH);
    let problems = load_config(&file, &variables).unwrap_err().to_string();
    for key in ["slack.route[0].webhook_url", "http.token[0].access"] {
        assert!(
            problems.contains(&format!("{key} is set in the file and in the environment")),
            "{problems}"
        );
    }
    assert!(!problems.contains("hush"), "{problems}");
}

#[test]
fn variables_add_configured_tables_after_those_of_the_file() {
    let second = "sha256:".to_owned() + &"cd".repeat(32);
    let variables = [
        ("PAYRELAY_HTTP_TOKEN_1_NAME", "shop"),
        ("PAYRELAY_HTTP_TOKEN_1_ACCESS", "admin"),
        ("PAYRELAY_HTTP_TOKEN_1_HASH", &second),
        ("PAYRELAY_HTTP_TOKEN_2_NAME", ""),
    ];
    let file = config_token("till", "read-only", HASH);
    let loaded = load_config(&file, &variables).unwrap();
    let names = |tokens: &[Token]| -> Vec<String> {
        tokens.iter().map(|token| token.name.clone()).collect()
    };
    assert_eq!(names(&loaded.config.http.tokens), ["till", "shop"]);

    let without_file = [
        ("PAYRELAY_HTTP_TOKEN_0_NAME", "shop"),
        ("PAYRELAY_HTTP_TOKEN_0_ACCESS", "admin"),
        ("PAYRELAY_HTTP_TOKEN_0_HASH", &second),
    ];
    let loaded = load_config("", &without_file).unwrap();
    assert_eq!(names(&loaded.config.http.tokens), ["shop"]);
    let problems = load_config("", &without_file[..2]).unwrap_err().to_string();
    assert!(problems.contains("http.token[0].hash"), "{problems}");
    // A number that leaves a gap belongs to no table.
    let problems = load_config(&file, &[("PAYRELAY_HTTP_TOKEN_2_NAME", "shop")]);
    let problems = problems.unwrap_err().to_string();
    assert!(
        problems.contains("PAYRELAY_HTTP_TOKEN_2_NAME: there is no such key"),
        "{problems}"
    );
}

#[test]
fn every_problem_of_a_slack_route_is_reported() {
    let file = "[[slack.route]]\nname = 'default'\nwebhook = 'x'\namount_min = 9\namount_max \
        = 3\n[[slack.route]]\nname = 'a'\nwebhook_url = 'https://x'\n[[slack.route]]\nname = \
        'a'\nwebhook_url = 'https://x'\n";
    let problems = load_config(file, &[("PAYRELAY_SLACK_ROUTE_7_NAME", "b")])
        .unwrap_err()
        .to_string();
    let expected = [
        "slack.route[0].name = \"default\" (file): allowed is",
        "slack.route[0].webhook_url is missing: a route needs a webhook of its own",
        "slack.route[0].webhook: there is no such key",
        "slack.route[0].amount_min is larger than amount_max",
        "slack.route[2].name = \"a\": slack.route[1].name has this name already",
        "PAYRELAY_SLACK_ROUTE_7_NAME: there is no such key",
    ];
    for part in expected {
        assert!(
            problems.contains(part),
            "{part:?} is missing from:\n{problems}"
        );
    }
    assert!(
        load_config("[slack]\nroute = 1\n", &[])
            .unwrap_err()
            .to_string()
            .contains("slack.route: there is no such key")
    );
}

#[test]
fn kafka_over_tls_and_sasl_is_read_and_its_password_masked() {
    let file = "[kafka]\nsecurity = 'tls'\nca_file = 'ca.pem'\ncertificate_file = \
        'me.pem'\nkey_file = 'me.key'\nsasl_mechanism = 'SCRAM-SHA-512'\nsasl_username = \
        'payrelay'\n";
    let loaded = load_config(file, &[("PAYRELAY_KAFKA_SASL_PASSWORD", "pass-word")]).unwrap();
    let security = &loaded.config.kafka.security;
    let tls = security.tls.as_ref().unwrap();
    assert_eq!(tls.ca_file, Some(PathBuf::from("ca.pem")));
    assert_eq!(
        tls.identity.as_ref().unwrap().key_file,
        PathBuf::from("me.key")
    );
    let sasl = security.sasl.as_ref().unwrap();
    assert_eq!(
        (sasl.mechanism, sasl.username.as_str()),
        (SaslMechanism::ScramSha512, "payrelay")
    );
    assert_eq!(sasl.password.expose(), "pass-word");
    assert!(
        !loaded.effective().contains("pass-word")
            && !format!("{:?}", loaded.config).contains("pass-word")
    );
    assert!(!security.sends_password_in_clear());
    let plain = "[kafka]\nsasl_mechanism = 'PLAIN'\nsasl_username = 'u'\nsasl_password = 'p'\n";
    assert!(
        load_config(plain, &[])
            .unwrap()
            .config
            .kafka
            .security
            .sends_password_in_clear()
    );
    let default = load_config("", &[]).unwrap().config.kafka.security;
    assert!(default.tls.is_none() && default.sasl.is_none() && !default.sends_password_in_clear());
}

#[test]
fn an_incomplete_kafka_security_is_reported() {
    let cases = [
        ("certificate_file = 'a'", "kafka.key_file is missing"),
        ("key_file = 'a'", "kafka.certificate_file is missing"),
        (
            "ca_file = 'a'",
            "kafka.ca_file is set, and is only used with kafka.security = \"tls\"",
        ),
        (
            "security = 'ssl'",
            "kafka.security = \"ssl\" (file): allowed is \"plaintext\" or \"tls\"",
        ),
        (
            "sasl_mechanism = 'GSSAPI'",
            "kafka.sasl_mechanism = \"GSSAPI\" (file): allowed is",
        ),
        ("sasl_mechanism = 'PLAIN'", "kafka.sasl_username is missing"),
        ("sasl_mechanism = 'PLAIN'", "kafka.sasl_password is missing"),
        (
            "sasl_username = 'a'",
            "kafka.sasl_username is set, and is only used with a kafka.sasl_mechanism",
        ),
        (
            "sasl_password = 'pass-word'",
            "kafka.sasl_password is set, and is only used with",
        ),
        (
            "sasl_password = \"pass-word\\u0000\"",
            "kafka.sasl_password = \"***\" (file): allowed is",
        ),
    ];
    for (line, expected) in cases {
        let problems = load_config(&format!("[kafka]\n{line}\n"), &[])
            .unwrap_err()
            .to_string();
        assert!(
            problems.contains(expected) && !problems.contains("pass-word"),
            "{line}: {problems}"
        );
    }
    let all = "[kafka]\nca_file = 'a'\ncertificate_file = 'b'\nsasl_mechanism = 'PLAIN'\n";
    let problems = load_config(all, &[]).unwrap_err().to_string();
    assert!(problems.contains("5 problems"), "{problems}");
}

#[test]
fn container_runtime_variables_are_ignored_and_misspelt_keys_are_refused() {
    let set = [
        ("PAYRELAY_KAFKA_SERVICE_HOST", "10.0.0.1"),
        ("PAYRELAY_KAFKA_SERVICE_PORT", "9092"),
        ("PAYRELAY_KAFKA_SERVICE_PORT_CLIENT", "9092"),
        ("PAYRELAY_HTTP_PORT", "tcp://10.0.0.1:80"),
        ("PAYRELAY_HTTP_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("PAYRELAY_HTTP_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("PAYRELAY_SLACK_NAME", "/app/payrelay-slack"),
        ("PAYRELAY_DATABASE_ENV_POSTGRES_USER", "x"),
    ];
    let loaded = load_config("", &set).unwrap();
    assert_eq!(
        loaded.ignored_variables().len(),
        set.len(),
        "{:?}",
        loaded.ignored_variables()
    );
    for (name, value) in [
        ("PAYRELAY_HTTP_PORT", "8080"),
        ("PAYRELAY_KAFKA_HOST", "10.0.0.1"),
        ("PAYRELAY_SLACK_NAME", "general"),
        ("PAYRELAY_HTTP_PORT_X_TCP", "1"),
    ] {
        assert!(
            load_config("", &[(name, value)])
                .unwrap_err()
                .to_string()
                .contains("there is no such key"),
            "{name}"
        );
    }
}

#[test]
fn an_empty_configuration_variable_is_unset() {
    let file = "[slack]\nwebhook_url = 'https://a/b'\n[http]\nlisten = '127.0.0.1:1'\n";
    let empty = [
        "PAYRELAY_SLACK_WEBHOOK_URL",
        "PAYRELAY_SLACK_WEBHOOK_URL_FILE",
        "PAYRELAY_HTTP_LISTEN",
        "PAYRELAY_KAFKA_BOOTSTRAP_SERVERS",
        "PAYRELAY_KAFKA_PARTITIONS",
        "PAYRELAY_HTTP_LISTENN",
    ];
    let loaded = load_config(file, &empty.map(|name| (name, ""))).unwrap();
    assert_eq!(
        loaded.config.slack.webhook_url.unwrap().expose(),
        "https://a/b"
    );
    assert_eq!(loaded.config.http.listen.port(), 1);
    assert_eq!(loaded.config.kafka.partitions, 1);
}

#[test]
fn two_configured_channels_need_two_webhooks() {
    let route = |name: &str, url: &str| {
        format!("[[slack.route]]\nname = '{name}'\nwebhook_url = '{url}'\n")
    };
    let slack = "[slack]\nwebhook_url = 'https://a/1'\n";
    for routes in [
        route("x", "https://a/1"),
        route("x", "https://a/2") + &route("y", "https://a/2"),
    ] {
        let problem = load_config(&format!("{slack}{routes}"), &[])
            .unwrap_err()
            .to_string();
        assert!(
            problem.contains("each channel needs a webhook of its own")
                && !problem.contains("https"),
            "{problem}"
        );
    }
    load_config(&format!("{slack}{}", route("x", "https://a/2")), &[]).unwrap();
}

#[test]
fn a_configured_bootstrap_server_is_a_host_and_a_port() {
    let server = |text: &str| load_config(&format!("[kafka]\nbootstrap_servers = ['{text}']"), &[]);
    for good in [
        "kafka:9092",
        "10.0.0.1:9092",
        "[::1]:9092",
        "kafka-1.shop.example:1",
        "my_kafka:9092",
    ] {
        assert!(server(good).is_ok(), "{good}");
    }
    let bad = [
        "http://kafka:9092",
        "PLAINTEXT://h:9092",
        "a:1 b:2",
        "kafka",
        "kafka:",
        ":9092",
        "kafka:0",
        "kafka:65536",
        "kafka:+1",
        "::1:9092",
        "[x]:9092",
        "",
    ];
    for text in bad {
        let problem = server(text).unwrap_err().to_string();
        assert!(
            problem.contains("kafka.bootstrap_servers"),
            "{text}: {problem}"
        );
    }
}

#[test]
fn a_misspelt_section_of_the_configuration_is_named_with_the_probable_one() {
    let cases = [
        (
            "[slak]\n",
            "[slak]: there is no such section; did you mean [slack]?",
        ),
        ("[Kafka]\ntopic = 'a'\n", "did you mean [kafka]?"),
        ("[[databse]]\npath = 'a'\n", "did you mean [database]?"),
    ];
    for (file, expected) in cases {
        let problems = load_config(file, &[]).unwrap_err().to_string();
        assert!(problems.contains(expected), "{problems}");
        assert!(problems.contains("has 1 problem:"), "{problems}");
    }
}

#[test]
fn a_misspelt_key_is_answered_with_the_one_that_was_meant() {
    let problems = load_config("[http]\nlisen = 'a'\n[kafka]\nnonsense = 1\n", &[]);
    let problems = problems.unwrap_err().to_string();
    for expected in [
        "http.lisen: there is no such key; did you mean http.listen?",
        "kafka.nonsense: there is no such key; config.toml in the source lists them all",
    ] {
        assert!(problems.contains(expected), "{problems}");
    }
    let problems = load_config("", &[("PAYRELAY_HTTP_LISTN", "a")]);
    let problems = problems.unwrap_err().to_string();
    let expected = "PAYRELAY_HTTP_LISTN: there is no such key; did you mean PAYRELAY_HTTP_LISTEN?";
    assert!(problems.contains(expected), "{problems}");
}

#[test]
fn bootstrap_servers_configured_as_a_string_are_reported_with_an_example() {
    let file = "[kafka]\nbootstrap_servers = 'kafka:9092'\n";
    let problems = load_config(file, &[]).unwrap_err().to_string();
    let expected = "kafka.bootstrap_servers = \"kafka:9092\" (file): allowed is a list of one or \
        more \"host:port\", such as [\"127.0.0.1:9092\"]";
    assert!(problems.contains(expected), "{problems}");
}

#[test]
fn problems_of_the_configuration_name_its_file() {
    let problems = load_config("[http]\nlisten = 1\n", &[]).unwrap_err();
    let text = problems.in_file(Some(Path::new("/etc/x.toml"))).to_string();
    assert!(
        text.starts_with("the configuration (/etc/x.toml) has 1 problem:"),
        "{text}"
    );
}

#[test]
fn configured_kafka_keys_without_effect_are_warned_of() {
    let kafka = "[kafka]\ntopic = 'other'\npartitions = 1\n";
    let warnings = load_config(kafka, &[("PAYRELAY_KAFKA_GROUP", "g")])
        .unwrap()
        .warnings();
    assert_eq!(
        warnings,
        [
            "publisher.kind is \"application\", so these keys have no effect: kafka.group, \
            kafka.topic; set publisher.kind = \"kafka\" to publish to Kafka"
        ]
    );
    let used = format!("[publisher]\nkind = 'kafka'\n{kafka}");
    for file in ["", SHIPPED, used.as_str()] {
        let loaded = load_config(file, &[]).unwrap();
        assert_eq!(loaded.warnings(), Vec::<String>::new());
    }
}

#[test]
fn a_configured_database_is_a_file() {
    for path in ["", ":memory:", "file:payrelay.db?mode=memory"] {
        let problem = load_config(&format!("[database]\npath = '{path}'"), &[])
            .unwrap_err()
            .to_string();
        assert!(
            problem.contains("allowed is the path of a file on the disk"),
            "{problem}"
        );
    }
}

#[test]
fn only_one_line_end_of_a_secret_file_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("password");
    for (content, secret) in [
        ("s", "s"),
        ("s\n", "s"),
        ("s\r\n", "s"),
        (" s \n", " s "),
        ("s\n\n", "s\n"),
    ] {
        std::fs::write(&path, content).unwrap();
        let variables = [
            ("PAYRELAY_KAFKA_SASL_PASSWORD_FILE", path.to_str().unwrap()),
            ("PAYRELAY_KAFKA_SASL_MECHANISM", "SCRAM-SHA-256"),
            ("PAYRELAY_KAFKA_SASL_USERNAME", "u"),
        ];
        let environment: BTreeMap<_, _> = variables
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        let mut source = Source::parse("", &environment).unwrap();
        assert_eq!(
            source
                .variable("kafka.sasl_password", source::Display::Masked)
                .as_deref(),
            Some(secret),
            "{content:?}"
        );
    }
}

#[test]
fn a_configured_secret_can_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("webhook");
    std::fs::write(&path, "https://hooks.example/T0\n").unwrap();
    let name = path.to_str().unwrap();
    let loaded = load_config("", &[("PAYRELAY_SLACK_WEBHOOK_URL_FILE", name)]).unwrap();
    assert_eq!(
        loaded.config.slack.webhook_url.unwrap().expose(),
        "https://hooks.example/T0"
    );
    let both = [
        ("PAYRELAY_SLACK_WEBHOOK_URL_FILE", name),
        ("PAYRELAY_SLACK_WEBHOOK_URL", "https://x"),
    ];
    assert!(
        load_config("", &both)
            .unwrap_err()
            .to_string()
            .contains("both set")
    );
    let missing = load_config("", &[("PAYRELAY_SLACK_WEBHOOK_URL_FILE", "/nowhere")])
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("PAYRELAY_SLACK_WEBHOOK_URL_FILE: the file cannot be read"),
        "{missing}"
    );
    std::fs::write(&path, " \n").unwrap();
    let empty = load_config("", &[("PAYRELAY_SLACK_WEBHOOK_URL_FILE", name)])
        .unwrap_err()
        .to_string();
    assert!(
        empty.contains("PAYRELAY_SLACK_WEBHOOK_URL_FILE: the file is empty"),
        "{empty}"
    );
}

const HASH: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

fn config_token(name: &str, access: &str, hash: &str) -> String {
    format!("[[http.token]]\nname = '{name}'\naccess = '{access}'\nhash = '{hash}'\n")
}

#[test]
fn configured_tokens_are_read_and_their_hashes_are_masked() {
    let other = HASH.replace("ba", "ab");
    let file = config_token("till-3", "full", HASH)
        + &config_token("monitoring", "read-only", "").replace("hash = ''\n", "");
    let loaded = load_config(&file, &[("PAYRELAY_HTTP_TOKEN_1_HASH", &other)]).unwrap();
    let [till, monitoring] = loaded.config.http.tokens.as_slice() else {
        panic!("two tokens")
    };
    assert_eq!(
        (till.name.as_str(), till.access, till.hash),
        ("till-3", Access::Full, TokenHash::of_token("abc"))
    );
    assert_eq!(
        (monitoring.name.as_str(), monitoring.access),
        ("monitoring", Access::ReadOnly)
    );
    assert_eq!(monitoring.hash.expose(), other);
    assert_eq!(
        loaded.effective().matches("[[http.token]]\n").count(),
        2,
        "{}",
        loaded.effective()
    );
    for shown in [loaded.effective().to_owned(), format!("{loaded:?}")] {
        assert!(
            !shown.contains("ba7816bf") && !shown.contains("ab7816"),
            "{shown}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hash");
    std::fs::write(&path, format!("{HASH}\n")).unwrap();
    let file = config_token("a", "admin", "").replace("hash = ''\n", "");
    let loaded = load_config(
        &file,
        &[("PAYRELAY_HTTP_TOKEN_0_HASH_FILE", path.to_str().unwrap())],
    )
    .unwrap();
    assert_eq!(
        loaded.config.http.tokens[0].hash,
        TokenHash::of_token("abc")
    );
}

#[test]
fn every_problem_of_a_configured_token_is_reported() {
    let file = "[[http.token]]\ntoken = 'x'\n".to_owned()
        + &config_token("a b", "root", "hush")
        + &config_token("c", "full", HASH)
        + &config_token("c", "full", &HASH.replace("ba", "BA"))
        + "[[slack.route]]\nname = 'c'\nwebhook_url = 'https://x'\n";
    let problems = load_config(&file, &[]).unwrap_err().to_string();
    let expected = [
        "the configuration has 9 problems:",
        "http.token[0].name is missing",
        "http.token[0].access is missing",
        "http.token[0].hash is missing",
        "http.token[0].token: there is no such key",
        "http.token[1].name = \"a b\" (file): allowed is 1 to 32 letters",
        "http.token[1].access = \"root\" (file): allowed is \"read-only\" or \"full\" or \
            \"admin\"",
        "http.token[1].hash = \"***\" (file): allowed is \"sha256:\" and 64 hexadecimal digits",
        "http.token[3].name = \"c\": http.token[2].name has this name already",
        "http.token[3].hash is the same as http.token[2].hash",
    ];
    for part in expected {
        assert!(
            problems.contains(part),
            "{part:?} is missing from:\n{problems}"
        );
    }
    assert!(
        !problems.contains("hush") && !problems.contains("7816bf"),
        "{problems}"
    );
}

#[test]
fn a_configuration_without_tokens_listens_on_loopback_only() {
    for open in ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080"] {
        let file = format!("[http]\nlisten = '{open}'\n");
        let problems = load_config(&file, &[]).unwrap_err().to_string();
        assert!(
            problems.contains(&format!("http.listen = \"{open}\"")),
            "{problems}"
        );
        assert!(
            problems.contains("`payrelay token` makes one"),
            "{problems}"
        );
        load_config(&(file + &config_token("a", "full", HASH)), &[]).unwrap();
    }
    for closed in ["127.0.0.1:0", "127.1.2.3:1", "[::1]:1"] {
        load_config(&format!("[http]\nlisten = '{closed}'\n"), &[]).unwrap();
    }
}

#[test]
fn the_configured_body_size_fits_the_limits_of_all_bodies() {
    let file = "[http]\nbody_bytes_max = 4096\nclient_body_bytes_max = 4095\nbodies_bytes_max \
        = 2048\n";
    let problems = load_config(file, &[]).unwrap_err().to_string();
    for key in [
        "http.client_body_bytes_max is smaller",
        "http.bodies_bytes_max is smaller",
    ] {
        assert!(problems.contains(key), "{problems}");
    }
}

#[test]
fn one_address_has_half_of_the_configured_connections_by_default() {
    let of_one =
        |file| load_config(file, &[]).map(|loaded| loaded.config.http.client_connections_max.get());
    assert_eq!(of_one("").unwrap(), 2048);
    assert_eq!(of_one("[http]\nconnections_max = 1001\n").unwrap(), 500);
    assert_eq!(of_one("[http]\nconnections_max = 1\n").unwrap(), 1);
    assert_eq!(
        of_one("[http]\nconnections_max = 9\nclient_connections_max = 9\n").unwrap(),
        9
    );
    let problems = of_one("[http]\nconnections_max = 9\nclient_connections_max = 10\n")
        .unwrap_err()
        .to_string();
    assert!(
        problems.contains("http.client_connections_max is larger than http.connections_max"),
        "{problems}"
    );
}

#[test]
fn fewer_configured_connections_are_fewer_for_each_address() {
    let after = |connections: i64, of_one: i64, capacity| {
        let file =
            format!("[http]\nconnections_max = {connections}\nclient_connections_max = {of_one}\n");
        let mut http = load_config(&file, &[]).unwrap().config.http;
        http.lower_connections_max(NonZeroUsize::new(capacity).unwrap());
        (
            http.connections_max.get(),
            http.client_connections_max.get(),
        )
    };
    assert_eq!(after(4096, 2048, 924), (924, 462), "half stays half");
    assert_eq!(
        after(4096, 4096, 924),
        (924, 924),
        "a proxy's address keeps them all"
    );
    assert_eq!(
        after(4096, 1000, 924),
        (924, 462),
        "never more than its share, or half"
    );
    assert_eq!(after(4096, 10, 924), (924, 10));
    assert_eq!(after(4096, 2048, 1), (1, 1));
}

#[test]
fn changed_configuration_keys_are_listed_except_tokens() {
    let old = load_config(
        &("[slack]\nwebhook_url = 'https://a/1'\n".to_owned() + &config_token("a", "full", HASH)),
        &[],
    )
    .unwrap();
    let file = "[http]\nbody_timeout = '11s'\n[slack]\nwebhook_url = \
        'https://a/2'\n[[slack.route]]\nname = 'r'\nwebhook_url = 'https://x'\n[kafka]\ntopic \
        = 'payment-event'\n";
    let new = load_config(file, &[]).unwrap();
    let differing: Vec<_> = old
        .changed_keys(&new)
        .into_iter()
        .filter(|key| !key.contains("route"))
        .collect();
    assert_eq!(
        differing,
        ["http.body_timeout", "slack.webhook_url"],
        "a default that is spelt out is no difference"
    );
    assert!(new.changed_keys(&old).contains("slack.route[0].name"));
}

/// Files as they are; `#env NAME=value` in a line of its own is a variable.
#[test]
fn the_corpus_of_configurations_is_read_and_shows_no_secret() {
    let words = [
        "[http]\n",
        "[kafka]\n",
        "[slack]\n",
        "[[slack.route]]\n",
        "listen = ",
        "webhook_url = ",
        "sasl_password = ",
        "name = ",
        "\"https://hooks.example/s3cr3t-99\"",
        "\"\"\"",
        "\n",
        " = ",
        "\n#env PAYRELAY_KAFKA_TOPIC=",
        "\n#env PAYRELAY_KAFKA_SASL_PASSWORD=s3cr3t-98\n",
    ];
    crate::fuzz::fuzz_corpus("config", 1500, &words, |bytes| {
        let file = String::from_utf8_lossy(bytes);
        let variables = file
            .lines()
            .filter_map(|line| line.strip_prefix("#env ")?.split_once('='));
        // A variable that names a file has it read.
        let environment: BTreeMap<_, _> = variables
            .filter(|(name, _)| name.starts_with("PAYRELAY_") && !name.ends_with("_FILE"))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let outcome = Config::load(&file, &environment);
        let shown = match &outcome {
            Ok(loaded) => format!("{}{:?}", loaded.effective(), loaded.config),
            Err(problems) => problems.to_string(),
        };
        if !config_contains_a_secret(&file, &environment) {
            assert!(!shown.contains("s3cr3t"), "{shown}");
        }
        match outcome {
            Ok(loaded) => {
                // The output is a configuration, and the same one.
                let mut text = loaded.effective().to_owned();
                for number in 0.. {
                    let masked = format!("\"https://masked.example/{number}\"");
                    let next = text.replacen("\"***\"", &masked, 1);
                    if next == text {
                        break;
                    }
                    text = next;
                }
                let again =
                    load_config(&text, &[]).unwrap_or_else(|problems| panic!("{problems}\n{text}"));
                assert_eq!(
                    format!("{:?}", again.config),
                    format!("{:?}", loaded.config)
                );
                true
            }
            Err(Problems { problems, .. }) => {
                assert!(
                    !problems.is_empty()
                        && problems.iter().all(|problem| problem.contains([':', ' '])),
                    "{shown}"
                );
                false
            }
        }
    });
}

/// Whether a secret stands where none belongs: as a key, or as the value of a key that is not
/// secret.
fn config_contains_a_secret(file: &str, environment: &BTreeMap<String, String>) -> bool {
    const SECRET: [&str; 3] = ["webhook_url", "proxy", "sasl_password"];
    fn config_has_a_secret_elsewhere(table: &toml::Table) -> bool {
        table.iter().any(|(key, value)| {
            key.contains("s3cr3t")
                || match value {
                    Value::Array(items) if SECRET.contains(&key.as_str()) => {
                        let tables = items.iter().filter_map(Value::as_table);
                        tables
                            .flat_map(toml::Table::keys)
                            .any(|key| key.contains("s3cr3t"))
                    }
                    _ if SECRET.contains(&key.as_str()) => false,
                    Value::Table(table) => config_has_a_secret_elsewhere(table),
                    Value::Array(items) => items.iter().any(|item| match item {
                        Value::Table(table) => config_has_a_secret_elsewhere(table),
                        item => item.to_string().contains("s3cr3t"),
                    }),
                    value => value.to_string().contains("s3cr3t"),
                }
        })
    }
    let secret = |name: &str| SECRET.iter().any(|key| name.ends_with(&key.to_uppercase()));
    let variable = |(name, value): (&String, &String)| {
        name.contains("s3cr3t") || (!secret(name) && value.contains("s3cr3t"))
    };
    file.parse::<toml::Table>()
        .is_ok_and(|table| config_has_a_secret_elsewhere(&table))
        || environment.iter().any(variable)
}

#[test]
fn configured_durations_have_a_unit() {
    let ms = |text| duration::parse_duration(text).map(|span| span.as_millis());
    assert_eq!(
        [ms("250ms"), ms("60s"), ms("5m"), ms("2h"), ms("7d")],
        [
            Some(250),
            Some(60_000),
            Some(300_000),
            Some(7_200_000),
            Some(604_800_000)
        ]
    );
    for bad in [
        "",
        "5",
        "s",
        "-1s",
        "1.5s",
        "1 s",
        "5w",
        "18446744073709551615d",
    ] {
        assert_eq!(ms(bad), None, "{bad}");
    }
    assert_eq!(duration::show_duration(Duration::from_secs(90)), "90s");
}

#[test]
fn an_edge_is_configured_by_its_role_and_the_servers() {
    let file = "[node]\nrole = 'edge'\n[kafka]\nbootstrap_servers = ['kafka:9092']\n";
    let loaded = load_config(file, &[]).unwrap();
    let config = &loaded.config;
    assert!(config.publishes_to_kafka());
    assert_eq!(config.record_format(), RecordFormat::Json);
    let kafka = &config.kafka;
    assert_eq!((kafka.key, kafka.role), (RecordKey::Node, NodeRole::Edge));
    assert_eq!(kafka.delivery, DeliveryGuarantee::AtLeastOnce);
    assert_eq!(kafka.compression, Compression::Lz4);
    assert_eq!(kafka.reconnect_max, Duration::from_secs(30));
    assert!(loaded.warnings().is_empty());
    let exactly_once = [("PAYRELAY_KAFKA_DELIVERY", "exactly-once")];
    let warnings = load_config(file, &exactly_once).unwrap().warnings();
    assert!(
        warnings[0].contains("the other nodes of its partition"),
        "{warnings:?}"
    );
}

#[test]
fn values_that_contradict_a_configured_edge_are_refused() {
    let file = "[node]\nrole = 'edge'\n[publisher]\nkind = 'application'\n[kafka]\nformat = 'id'\n\
        key = 'user'\n[slack]\nwebhook_url = 'https://hooks.example/x'\n";
    let problems = load_config(file, &[]).unwrap_err().to_string();
    for key in [
        "publisher.kind",
        "kafka.format",
        "kafka.key",
        "slack.webhook_url",
    ] {
        let expected = format!("{key}: node.role = \"edge\"");
        assert!(
            problems.contains(&expected),
            "{expected} is missing from {problems}"
        );
    }
    assert!(!problems.contains("hooks.example"), "{problems}");
    // The same keys at the defaults of an edge are allowed.
    let file = "[node]\nrole = 'edge'\n[publisher]\nkind = 'kafka'\n[kafka]\nformat = 'json'\n\
        key = 'node'\n[slack]\nwebhook_url = ''\n";
    load_config(file, &[]).unwrap();
}
