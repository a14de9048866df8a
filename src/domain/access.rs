//! The access of a client.

/// The access of a client; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Reads payments, histories and the state of payrelay.
    ReadOnly,
    /// Also posts payments.
    Full,
    /// Also administers: everything below /admin.
    Admin,
}

impl Access {
    /// By name, as configured.
    pub const BY_NAME: [(&str, Self); 3] = [
        ("read-only", Self::ReadOnly),
        ("full", Self::Full),
        ("admin", Self::Admin),
    ];

    /// Its name in the configuration.
    pub fn name(self) -> &'static str {
        Self::BY_NAME[self as usize].0
    }
}
