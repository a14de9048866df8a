//! The line for a payment that an operator configures. Pure.

/// A line for a payment, with fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Segment>);

/// A segment of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Literal text.
    Text(String),
    /// A field of the payment.
    Field(Field),
}

/// The fields of a payment that a template may show.
#[expect(missing_docs, reason = "the names say it")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Id,
    Status,
    User,
    Reservation,
    Amount,
    Currency,
    Failure,
    Time,
}

const FIELDS: [(&str, Field); 8] = [
    ("id", Field::Id),
    ("status", Field::Status),
    ("user_id", Field::User),
    ("reservation_id", Field::Reservation),
    ("amount", Field::Amount),
    ("currency", Field::Currency),
    ("failure", Field::Failure),
    ("time", Field::Time),
];

impl Template {
    /// The allowed values, in words.
    pub const EXPECTED: &str = "one line of 1 to 500 characters, with {id}, {status}, {user_id}, \
        {reservation_id}, {amount}, {currency}, {failure} and {time} for what is known of the \
        payment";

    /// Reads a template.
    pub fn parse(text: &str) -> Option<Self> {
        if text.is_empty() || text.chars().count() > 500 || text.chars().any(char::is_control) {
            return None;
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}')?;
            let (_, field) = FIELDS.iter().find(|(known, _)| *known == name)?;
            pieces.push(Segment::Text(before.to_owned()));
            pieces.push(Segment::Field(*field));
            rest = after;
        }
        pieces.push(Segment::Text(rest.to_owned()));
        (!rest.contains('}')).then_some(Self(pieces))
    }

    /// Its segments, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.0
    }
}
