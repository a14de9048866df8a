//! The text of messages: a line for each payment, alone or in a digest. Pure.
//!
//! A message has Block Kit for people, and `text` for notifications and machines. `text` has a line
//! for each payment, after a heading if there are several
//! (<https://docs.slack.dev/reference/block-kit/>). A summary counts payments. Amounts have
//! separators and the currency's decimals wherever people read them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::domain::payment::{Payment, Status};
use crate::domain::template::{Field, Segment, Template};
use crate::domain::timestamp::TimeZone;

/// A section's text may have 3,000 characters
/// (<https://docs.slack.dev/reference/block-kit/blocks/section-block/>).
const SECTION_MAX: usize = 3000;

/// A message may have 50 blocks (<https://docs.slack.dev/reference/block-kit/blocks/>); some are
/// for the heading.
const SECTIONS_MAX: usize = 40;

/// The maximum number of characters of all blocks of a message. Slack documents no limit; users
/// report that it rejects messages from about 13,200 on.
const BLOCKS_MAX: usize = 12_000;

/// The maximum number of characters of the heading, the words and the times, without the totals and
/// the ids of FAILED payments.
const HEADING_MAX: usize = 500;

/// A message's text is cut at 40,000 characters
/// (<https://docs.slack.dev/changelog/2018-truncating-really-long-messages/>).
const TEXT_MAX: usize = 36_000;

/// A longer line is cut: it has to fit a section with its link and its mark.
const LINE_MAX: usize = 2000;

/// A longer reason is cut.
const FAILURE_MAX: usize = 300;

/// The maximum number of ids in a line of the list of FAILED payments.
const IDS_A_LINE: usize = 20;

/// The look of messages.
#[derive(Debug, Clone)]
pub struct MessageStyle {
    /// The line of a COMPLETED payment.
    pub completed: Template,
    /// The line of a FAILED payment.
    pub failed: Template,
    /// The time zone of times.
    pub zone: TimeZone,
    /// The URL of a payment's page, before `/payments/`.
    pub public_url: Option<String>,
}

/// A message, and how many payments it covers.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The JSON to post.
    pub json: Value,
    /// It covers this number of the first payments.
    pub payments: usize,
}

/// The lines of a payment in a message.
struct PaymentLines {
    plain: String,
    mrkdwn: String,
}

/// The reader of a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Nothing escaped, no links.
    Plain,
    /// For a section of Block Kit.
    Mrkdwn,
}

impl MessageStyle {
    /// A payment in one line of plain text.
    pub fn line(&self, payment: &Payment) -> String {
        self.render(payment, Format::Plain)
    }

    /// A message without blocks, for a channel that does not accept them.
    pub fn plain(&self, payment: &Payment) -> Value {
        json!({ "text": escape_message_text(&self.line(payment)) })
    }

    /// One message for all payments of a summary: totals, and a line for each FAILED payment while
    /// there is space.
    pub fn summary(&self, summary: &MessageSummary) -> Value {
        let MessageSummary {
            count,
            first,
            last,
            totals,
            failed,
            ..
        } = summary;
        let (Some(first), Some(last)) = (first, last) else {
            return json!({ "text": "" });
        };
        let span = format!("{count} payments, {} to {}", first.id, last.id);
        let total_lines = totals.lines();
        let from = self.zone.format_time(first.executed_at);
        let to = self.zone.format_time(last.executed_at);
        let mut lines = total_lines.clone();
        // Two links may be long.
        let linked = self
            .public_url
            .as_ref()
            .map_or(0, |url| 2 * url.chars().count() + 200);
        let totals_length: usize = total_lines
            .iter()
            .map(|line| line.chars().count() + 1)
            .sum();
        let mut space = BLOCKS_MAX.saturating_sub(HEADING_MAX + linked + totals_length);
        let mut shown = 0;
        for payment in failed {
            let line = self.mrkdwn_line(payment);
            let Some(left) = space.checked_sub(line.chars().count() + 1) else {
                break;
            };
            space = left;
            shown += 1;
            lines.push(line);
        }
        let more = totals.failed() - shown;
        if more > 0 {
            lines.push(format!(":x: {more} more FAILED"));
        }
        if let Some(url) = &self.public_url {
            let url = escape_message_text(url.trim_end_matches('/'));
            lines.push(format!(
                "first: <{url}/payments/{}|{}>, last: <{url}/payments/{}|{}>",
                first.id, first.id, last.id, last.id
            ));
        }
        let text = format!("{span}: {}; {from} to {to}", total_lines.join(", "));
        let mut blocks =
            vec![json!({"type": "header", "text": {"type": "plain_text", "text": span}})];
        blocks.extend(message_sections(lines.iter().map(String::as_str)));
        blocks.push(message_context(&format!("{from} to {to}")));
        json!({ "text": escape_message_text(&text), "blocks": blocks })
    }

    /// A message with as many of the payments as fit, at least one; several have a heading.
    pub fn message(&self, payments: &[&Payment]) -> Message {
        let lines: Vec<_> = payments.iter().map(|payment| self.lines(payment)).collect();
        let count = Self::count_that_fit(payments, &lines);
        let json = match &payments[..count] {
            [] => json!({ "text": "" }),
            [payment] => self.single(payment, &lines[0]),
            several => self.digest(several, &lines[..count]),
        };
        Message {
            json,
            payments: count,
        }
    }

    /// Rendering costs more than everything else of a digest: it is done once for each payment.
    fn lines(&self, payment: &Payment) -> PaymentLines {
        PaymentLines {
            plain: self.line(payment),
            mrkdwn: self.mrkdwn_line(payment),
        }
    }

    /// How many of the first payments fit one message.
    fn count_that_fit(payments: &[&Payment], lines: &[PaymentLines]) -> usize {
        let mut text = 0;
        let mut blocks = 0;
        let mut sections = 1;
        let mut section = 0;
        let mut totals = MessageTotals::default();
        for (index, (payment, rendered)) in payments.iter().zip(lines).enumerate() {
            // Each FAILED payment is also named in the heading.
            let named = if payment.status == Status::Failed {
                payment.id.to_string().len() + 2
            } else {
                0
            };
            text += escape_message_text(&rendered.plain).chars().count()
                + 1
                + payment.id.to_string().len()
                + 2;
            let line = rendered.mrkdwn.chars().count() + 1;
            if section + line > SECTION_MAX {
                sections += 1;
                section = 0;
            }
            section += line;
            blocks += line + named;
            totals.add(payment);
            let all = blocks + totals.length() + HEADING_MAX;
            if index > 0 && (text > TEXT_MAX || sections > SECTIONS_MAX || all > BLOCKS_MAX) {
                return index;
            }
        }
        payments.len()
    }

    fn single(&self, payment: &Payment, lines: &PaymentLines) -> Value {
        let time = self.zone.format_time(payment.executed_at);
        json!({
            "text": escape_message_text(&lines.plain),
            "blocks": [message_section(&lines.mrkdwn), message_context(&time)],
        })
    }

    fn digest(&self, payments: &[&Payment], lines: &[PaymentLines]) -> Value {
        let first = payments[0];
        let last = payments[payments.len() - 1];
        let span = format!("{} payments, {} to {}", payments.len(), first.id, last.id);
        let failed: Vec<_> = payments
            .iter()
            .filter(|p| p.status == Status::Failed)
            .map(|p| p.id.to_string())
            .collect();
        let mut totals = MessageTotals::default();
        for payment in payments {
            totals.add(payment);
        }
        let mut text = format!("{span}: {}", totals.lines().join(", "));
        if !failed.is_empty() {
            let _ = write!(text, "; not paid: {}", failed.join(", "));
        }
        for line in lines {
            text.push('\n');
            text += &line.plain;
        }

        let mut summary = totals.lines();
        for (index, ids) in failed.chunks(IDS_A_LINE).enumerate() {
            let heading = if index == 0 { ":x: *not paid:* " } else { "" };
            summary.push(format!("{heading}{}", ids.join(", ")));
        }
        let mut blocks =
            vec![json!({"type": "header", "text": {"type": "plain_text", "text": span}})];
        blocks.extend(message_sections(summary.iter().map(String::as_str)));
        blocks.push(json!({"type": "divider"}));
        blocks.extend(message_sections(lines.iter().map(|line| &*line.mrkdwn)));
        let from = self.zone.format_time(first.executed_at);
        let to = self.zone.format_time(last.executed_at);
        blocks.push(message_context(&format!("{from} to {to}")));
        json!({ "text": escape_message_text(&text), "blocks": blocks })
    }

    /// A line for a section of Block Kit.
    fn mrkdwn_line(&self, payment: &Payment) -> String {
        let line = self.render(payment, Format::Mrkdwn);
        match payment.status {
            Status::Completed => line,
            Status::Failed => format!(":x: {line}"),
        }
    }

    fn render(&self, payment: &Payment, format: Format) -> String {
        let template = match payment.status {
            Status::Completed => &self.completed,
            Status::Failed => &self.failed,
        };
        let mut line = String::with_capacity(128);
        let mut length = 0;
        for segment in template.segments() {
            let text = match segment {
                Segment::Text(text) => Cow::Borrowed(text.as_str()),
                Segment::Field(field) => Cow::Owned(self.field(payment, *field, format)),
            };
            let linked = *segment == Segment::Field(Field::Id) && self.public_url.is_some();
            let text = if format == Format::Mrkdwn && !linked {
                escape_message_text(&text)
            } else {
                text
            };
            // Whole segments: half a link or half an entity would appear as such.
            length += text.chars().count();
            if length > LINE_MAX {
                line.push('…');
                break;
            }
            line += &text;
        }
        line
    }

    fn field(&self, payment: &Payment, field: Field, format: Format) -> String {
        match field {
            Field::Id => match (&self.public_url, format) {
                (Some(url), Format::Mrkdwn) => {
                    format!(
                        "<{}/payments/{}|{}>",
                        escape_message_text(url.trim_end_matches('/')),
                        payment.id,
                        payment.id
                    )
                }
                _ => payment.id.to_string(),
            },
            Field::Status => match payment.status {
                Status::Completed => "COMPLETED".to_owned(),
                Status::Failed => "FAILED".to_owned(),
            },
            Field::User => payment.user_id.to_string(),
            Field::Reservation => payment.reservation_id.to_string(),
            Field::Amount => message_amount(i128::from(payment.amount), &payment.currency),
            Field::Currency => payment.currency.clone(),
            Field::Failure => {
                let failure = payment.failure.as_deref().unwrap_or_default();
                failure
                    .chars()
                    .take(FAILURE_MAX)
                    .map(|c| if c.is_control() { ' ' } else { c })
                    .collect()
            }
            Field::Time => self.zone.format_time(payment.executed_at),
        }
    }
}

/// For each status and currency: the number of payments, and the total.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MessageTotals(BTreeMap<(bool, String), (usize, i128)>);

impl MessageTotals {
    fn add(&mut self, payment: &Payment) {
        let sum = self
            .0
            .entry((payment.status == Status::Failed, payment.currency.clone()))
            .or_default();
        sum.0 += 1;
        sum.1 += i128::from(payment.amount);
    }

    fn failed(&self) -> usize {
        self.0
            .iter()
            .filter(|((failed, _), _)| *failed)
            .map(|(_, (count, _))| count)
            .sum()
    }

    /// At least the characters of [`MessageTotals::lines`], with their line ends.
    fn length(&self) -> usize {
        /// A count, a status, a sum of payments with separators, and their words.
        const LINE_MAX: usize = 80;
        let currencies = self.0.keys().map(|(_, currency)| currency.chars().count());
        currencies.map(|length| length + LINE_MAX).sum()
    }

    fn lines(&self) -> Vec<String> {
        /// A database has one currency, or a few if it was changed.
        const LINES_MAX: usize = 40;
        let show = |((failed, currency), (count, sum)): (&(bool, String), &(usize, i128))| {
            let status = if *failed { "FAILED" } else { "COMPLETED" };
            format!(
                "{count} {status} ({} {currency})",
                message_amount(*sum, currency)
            )
        };
        let mut lines: Vec<_> = self.0.iter().take(LINES_MAX).map(show).collect();
        if let Some(more) = self.0.len().checked_sub(LINES_MAX).filter(|more| *more > 0) {
            lines.push(format!("and {more} more totals"));
        }
        lines
    }
}

/// Payments that one message counts, without a line for each.
#[derive(Debug, Clone, Default)]
pub struct MessageSummary {
    /// The number of payments.
    pub count: usize,
    first: Option<Payment>,
    last: Option<Payment>,
    totals: MessageTotals,
    /// The first FAILED ones: as many as may have a line.
    failed: Vec<Payment>,
}

impl MessageSummary {
    /// Adds a payment, in commit order.
    pub fn add(&mut self, payment: Payment) {
        /// A line has at least some 60 characters.
        const LINES_MAX: usize = BLOCKS_MAX / 50;
        self.count += 1;
        self.totals.add(&payment);
        if payment.status == Status::Failed && self.failed.len() < LINES_MAX {
            self.failed.push(payment.clone());
        }
        self.first.get_or_insert_with(|| payment.clone());
        self.last = Some(payment);
    }

    /// The ids of the first and the last payment.
    pub fn span(&self) -> Option<(i64, i64)> {
        Some((self.first.as_ref()?.id, self.last.as_ref()?.id))
    }
}

/// In the currency's main unit, with thousands separators.
pub fn message_amount(amount: i128, currency: &str) -> String {
    let decimals = message_currency_decimals(currency);
    let digits = format!("{amount:0>width$}", width = decimals + 1);
    let (whole, part) = digits.split_at(digits.len() - decimals);
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if part.is_empty() {
        grouped
    } else {
        format!("{grouped}.{part}")
    }
}

/// Decimals of a currency (ISO 4217, list one).
fn message_currency_decimals(currency: &str) -> usize {
    match currency {
        "BIF" | "CLP" | "DJF" | "GNF" | "ISK" | "JPY" | "KMF" | "KRW" | "PYG" | "RWF" | "UGX"
        | "UYI" | "VND" | "VUV" | "XAF" | "XOF" | "XPF" => 0,
        "BHD" | "IQD" | "JOD" | "KWD" | "LYD" | "OMR" | "TND" => 3,
        "CLF" | "UYW" => 4,
        _ => 2,
    }
}

/// Escapes the three characters that are markup to Slack
/// (<https://docs.slack.dev/messaging/formatting-message-text/>).
fn escape_message_text(text: &str) -> Cow<'_, str> {
    if !text.contains(['&', '<', '>']) {
        return Cow::Borrowed(text);
    }
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;");
    Cow::Owned(escaped.replace('>', "&gt;"))
}

/// The lines in as few sections as possible.
fn message_sections<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<Value> {
    let mut texts = vec![String::new()];
    let mut length = 0;
    for line in lines {
        let more = line.chars().count() + 1;
        if length + more > SECTION_MAX {
            texts.push(String::new());
            length = 0;
        }
        length += more;
        if let Some(text) = texts.last_mut() {
            if !text.is_empty() {
                text.push('\n');
            }
            *text += line;
        }
    }
    texts.iter().map(|text| message_section(text)).collect()
}

fn message_section(text: &str) -> Value {
    json!({"type": "section", "text": {"type": "mrkdwn", "text": text}})
}

fn message_context(text: &str) -> Value {
    json!({"type": "context", "elements": [{"type": "mrkdwn", "text": text}]})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::payment::example_payment;
    use crate::domain::timestamp::Timestamp;
    use proptest::prelude::*;

    fn message_style() -> MessageStyle {
        let config = crate::config::Config::load("", &BTreeMap::new())
            .unwrap()
            .config;
        MessageStyle {
            completed: config.slack.line_completed,
            failed: config.slack.line_failed,
            zone: config.slack.time_zone,
            public_url: None,
        }
    }

    fn completed_payment() -> Payment {
        Payment {
            id: 1,
            ..example_payment()
        }
    }

    fn failed_payment() -> Payment {
        Payment {
            id: 2,
            status: Status::Failed,
            failure: Some("already paid".into()),
            ..completed_payment()
        }
    }

    #[test]
    fn a_message_line_is_as_the_contract_shows() {
        let style = message_style();
        assert_eq!(
            style.line(&completed_payment()),
            "Payment 1 COMPLETED: user 42 paid 150,000 KRW for reservation 1001"
        );
        assert_eq!(
            style.line(&failed_payment()),
            "Payment 2 FAILED: user 42, reservation 1001: already paid"
        );
    }

    #[test]
    fn the_message_of_a_single_payment_has_blocks_and_a_link() {
        let style = MessageStyle {
            public_url: Some("https://pay.shop/".into()),
            zone: TimeZone::parse("Asia/Seoul").unwrap(),
            ..message_style()
        };
        let message = style.message(&[&completed_payment()]).json;
        assert_eq!(
            message["text"],
            "Payment 1 COMPLETED: user 42 paid 150,000 KRW for reservation 1001"
        );
        let shown = &message["blocks"][0]["text"]["text"];
        assert_eq!(
            shown,
            "Payment <https://pay.shop/payments/1|1> COMPLETED: user 42 paid 150,000 KRW for \
                reservation 1001"
        );
        assert_eq!(
            message["blocks"][1]["elements"][0]["text"],
            "2026-11-22 19:00:00 KST"
        );
        let failed = style.message(&[&failed_payment()]).json;
        assert!(
            failed["blocks"][0]["text"]["text"]
                .as_str()
                .unwrap()
                .starts_with(":x: Payment <"),
            "{failed}"
        );
    }

    #[test]
    fn a_digest_message_has_a_heading_and_lists_failed_payments() {
        let dollars = Payment {
            id: 3,
            currency: "USD".into(),
            amount: 5,
            ..completed_payment()
        };
        let message = message_style().message(&[&completed_payment(), &failed_payment(), &dollars]);
        assert_eq!(message.payments, 3);
        let text = message.json["text"].as_str().unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "3 payments, 1 to 3: 1 COMPLETED (150,000 KRW), 1 COMPLETED (0.05 USD), 1 FAILED \
                (150,000 KRW); not paid: 2"
        );
        assert_eq!(
            lines[2],
            "Payment 2 FAILED: user 42, reservation 1001: already paid"
        );
        assert_eq!(lines.len(), 4);
        let blocks = message.json["blocks"].as_array().unwrap();
        assert_eq!(blocks[0]["text"]["text"], "3 payments, 1 to 3");
        let summary = blocks[1]["text"]["text"].as_str().unwrap();
        assert_eq!(
            summary,
            "1 COMPLETED (150,000 KRW)\n1 COMPLETED (0.05 USD)\n1 FAILED (150,000 KRW)\n:x: *not \
                paid:* 2"
        );
    }

    #[test]
    fn amounts_in_messages_have_the_currencys_decimals() {
        let show = |value, currency| message_amount(value, currency);
        assert_eq!(show(1_234_567, "KRW"), "1,234,567");
        assert_eq!(show(1_234_567, "EUR"), "12,345.67");
        assert_eq!(show(7, "EUR"), "0.07");
        assert_eq!(show(1_234_567, "KWD"), "1,234.567");
        assert_eq!(show(0, "KRW"), "0");
    }

    #[test]
    fn slack_markup_is_escaped_in_messages() {
        let tricky = Payment {
            failure: Some("a < b && <!channel>\nc".into()),
            ..failed_payment()
        };
        let message = message_style().message(&[&tricky]).json;
        let escaped = "a &lt; b &amp;&amp; &lt;!channel&gt; c";
        assert!(
            message["text"].as_str().unwrap().ends_with(escaped),
            "{message}"
        );
        assert!(
            message["blocks"][0]["text"]["text"]
                .as_str()
                .unwrap()
                .ends_with(escaped),
            "{message}"
        );
    }

    #[test]
    fn a_message_template_names_only_known_fields() {
        for bad in ["", "{", "}", "{id", "{user}", "a\nb", &"x".repeat(501)] {
            assert_eq!(Template::parse(bad), None, "{bad:?}");
        }
        let style = MessageStyle {
            completed: Template::parse("{time} {id}/{status} {amount}").unwrap(),
            ..message_style()
        };
        assert_eq!(
            style.line(&completed_payment()),
            "2026-11-22 10:00:00 UTC 1/COMPLETED 150,000"
        );
    }

    fn any_message_payment() -> impl Strategy<Value = Payment> {
        let numbers = (0..=i64::MAX, 0..=i64::MAX, 0..=i64::MAX, 0..=i64::MAX);
        (numbers, proptest::option::of(".{0,3000}"), "[A-Z]{3}").prop_map(
            |((id, user, reservation, amount), failure, c)| Payment {
                paid_by: None,
                id,
                user_id: user,
                reservation_id: reservation,
                amount,
                currency: c,
                status: if failure.is_some() {
                    Status::Failed
                } else {
                    Status::Completed
                },
                failure,
                executed_at: Timestamp::from_micros(0),
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn every_summary_message_is_within_slacks_limits(
            payments in proptest::collection::vec(any_message_payment(), 1..500),
            link in any::<bool>(),
        ) {
            let mut style = message_style();
            style.public_url = link.then(|| "https://pay.example/".repeat(10));
            let mut summary = MessageSummary::default();
            for payment in &payments {
                summary.add(payment.clone());
            }
            let message = style.summary(&summary);
            let blocks = message["blocks"].as_array().unwrap();
            let length = |block: &Value| {
                let text = block["text"]["text"].as_str().unwrap_or_default();
                text.chars().count()
            };
            prop_assert!(blocks.len() <= 50 && blocks.iter().all(|block| length(block) <= 3000));
            prop_assert!(blocks.iter().map(length).sum::<usize>() <= 12_000);
            let text = message["text"].as_str().unwrap();
            prop_assert!(text.starts_with(&format!("{} payments, ", payments.len())), "{}", text);
        }

        #[test]
        fn every_message_is_within_slacks_limits(
            payments in proptest::collection::vec(any_message_payment(), 1..500),
            link in any::<bool>(),
        ) {
            let mut style = message_style();
            style.public_url = link.then(|| "https://pay.example/".repeat(10));
            let all: Vec<_> = payments.iter().collect();
            let mut rest = all.as_slice();
            while !rest.is_empty() {
                let message = style.message(rest);
                prop_assert!((1..=rest.len()).contains(&message.payments));
                let covered = &rest[..message.payments];
                let text = message.json["text"].as_str().unwrap();
                let lines = covered.iter().map(|payment| style.line(payment));
                let escape = |line: String| escape_message_text(&line).into_owned();
                let expected: Vec<_> = lines.map(escape).collect();
                let skip = usize::from(covered.len() > 1);
                prop_assert_eq!(text.split('\n').skip(skip).collect::<Vec<_>>(), expected);
                let blocks = message.json["blocks"].as_array().unwrap();
                prop_assert!(blocks.len() <= 50);
                let characters = |block: &Value| {
                    let text = block["text"]["text"].as_str().unwrap_or_default();
                    let context = block["elements"][0]["text"].as_str().unwrap_or_default();
                    text.chars().count() + context.chars().count()
                };
                let all: usize = blocks.iter().map(characters).sum();
                prop_assert!(covered.len() == 1 || all <= 12_000, "{}", all);
                prop_assert!(text.chars().count() <= 40_000);
                let header = blocks[0]["text"]["text"].as_str().unwrap();
                prop_assert!(covered.len() == 1 || header.chars().count() <= 150);
                let too_long = |block: &Value| {
                    let text = block["text"]["text"].as_str().unwrap_or_default();
                    text.chars().count() > 3000
                };
                prop_assert!(!blocks.iter().any(too_long));
                rest = &rest[message.payments..];
            }
        }
    }
}
