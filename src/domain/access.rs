//! The access of a client.

/// The access of a client; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Reads the metrics and the state of payrelay, and no payment.
    Metrics,
    /// Also reads payments and histories.
    ReadOnly,
    /// Also posts payments.
    Full,
    /// Also administers: everything below /admin.
    Admin,
}

impl Access {
    /// By name, as configured.
    pub const BY_NAME: [(&str, Self); 4] = [
        ("read-only", Self::ReadOnly),
        ("full", Self::Full),
        ("admin", Self::Admin),
        ("metrics", Self::Metrics),
    ];

    /// Its name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Metrics => "metrics",
            Self::ReadOnly => "read-only",
            Self::Full => "full",
            Self::Admin => "admin",
        }
    }
}
