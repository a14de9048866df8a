//! TLS and SASL of the connections to Kafka: the client's settings, the checks before the start,
//! and the report when a broker rejects us. None of it shows a password.

use std::error::Error;
use std::fs;
use std::iter::successors;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem};

use krafka::auth::{AuthConfig, TlsConfig};
use krafka::{KrafkaError, ProtocolErrorKind};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{CertificateError, ClientConfig, RootCertStore};

use crate::config::{KafkaIdentity, KafkaSecurity, KafkaTls, Problems, SaslMechanism};

/// How long payrelay waits after a broker has rejected it. Some brokers lock a name after too many
/// attempts.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// The client's settings. It reads the files at each new connection.
pub(crate) fn kafka_tls_auth(security: &KafkaSecurity) -> AuthConfig {
    let auth = match &security.sasl {
        None => AuthConfig::plaintext(),
        Some(sasl) => {
            let name = sasl.username.as_str();
            let password = sasl.password.expose();
            match sasl.mechanism {
                SaslMechanism::Plain => AuthConfig::sasl_plain(name, password),
                SaslMechanism::ScramSha256 => AuthConfig::sasl_scram_sha256(name, password),
                SaslMechanism::ScramSha512 => AuthConfig::sasl_scram_sha512(name, password),
            }
        }
    };
    let Some(tls) = &security.tls else {
        return auth;
    };
    let mut config = TlsConfig::new();
    // Paths come from text, and stay text.
    if let Some(path) = &tls.ca_file {
        config = config.with_ca_cert(path.to_string_lossy());
    }
    if let Some(KafkaIdentity {
        certificate_file,
        key_file,
    }) = &tls.identity
    {
        config = config.with_client_cert(
            certificate_file.to_string_lossy(),
            key_file.to_string_lossy(),
        );
    }
    auth.with_tls(config)
}

/// Checks the files, without a connection.
pub(crate) fn check(security: &KafkaSecurity) -> Result<(), Problems> {
    let mut problems = Vec::new();
    if let Some(KafkaTls { ca_file, identity }) = &security.tls {
        if let Some(path) = ca_file {
            note_tls_problem(
                &mut problems,
                "kafka.ca_file",
                path,
                trusted_tls_roots(path),
            );
        }
        if let Some(KafkaIdentity {
            certificate_file,
            key_file,
        }) = identity
        {
            let chain = note_tls_problem(
                &mut problems,
                "kafka.certificate_file",
                certificate_file,
                read_tls_certificates(certificate_file),
            );
            let key = note_tls_problem(
                &mut problems,
                "kafka.key_file",
                key_file,
                read_tls_private_key(key_file),
            );
            if let (Some(chain), Some(key)) = (chain, key) {
                note_tls_problem(
                    &mut problems,
                    "kafka.key_file",
                    key_file,
                    check_tls_key_matches(chain, key),
                );
            }
        }
    }
    Problems::into_result(problems)
}

fn note_tls_problem<T>(
    problems: &mut Vec<String>,
    key: &str,
    path: &Path,
    result: Result<T, String>,
) -> Option<T> {
    result
        .map_err(|reason| problems.push(format!("{key} {}: {reason}", path.display())))
        .ok()
}

fn trusted_tls_roots(path: &Path) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for certificate in read_tls_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| format!("has a certificate that cannot be trusted: {error}"))?;
    }
    Ok(())
}

fn read_tls_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read_tls_file(path)?;
    let found = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| format!("is not PEM: {error}"))?;
    if found.is_empty() {
        Err("has no certificate in PEM".to_owned())
    } else {
        Ok(found)
    }
}

/// Without a word of the file's content.
fn read_tls_private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = read_tls_file(path)?;
    let has = |text: &str| {
        pem.windows(text.len())
            .any(|window| window == text.as_bytes())
    };
    if has("BEGIN ENCRYPTED PRIVATE KEY") || has("Proc-Type: 4,ENCRYPTED") {
        return Err(
            "is encrypted, which is not supported: give it without a passphrase, readable by \
                payrelay only"
                .into(),
        );
    }
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| "has no private key in PEM".to_owned())
}

fn read_tls_file(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("cannot be read: {error}"))
}

fn check_tls_key_matches(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<(), String> {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_root_certificates(RootCertStore::empty())
                .with_client_auth_cert(chain, key)
        })
        .map(drop)
        .map_err(|error| format!("does not fit kafka.certificate_file: {error}"))
}

/// Slows down connecting to a broker that rejects us: logged once at error level, then retried
/// slowly.
#[derive(Default)]
pub(crate) enum AuthBackoff {
    /// Not rejected since the last success.
    #[default]
    None,
    /// Rejected.
    Since {
        error: KrafkaError,
        ask_again: Instant,
    },
}

impl AuthBackoff {
    /// Connects, unless the next attempt is not due: then returns the last error.
    pub(crate) async fn connect<T>(
        &mut self,
        connecting: impl Future<Output = Result<T, KrafkaError>>,
    ) -> Result<T, KrafkaError> {
        if let Self::Since { error, ask_again } = self
            && Instant::now() < *ask_again
        {
            return Err(error.clone());
        }
        let connected = connecting.await;
        match &connected {
            Ok(_) => *self = Self::None,
            Err(error) => self.note(error),
        }
        connected
    }

    fn note(&mut self, error: &KrafkaError) {
        let Some(keys) = tls_keys_to_check(error) else {
            return;
        };
        let since = Self::Since {
            error: error.clone(),
            ask_again: Instant::now() + REFUSED_PAUSE,
        };
        if matches!(mem::replace(self, since), Self::None) {
            log::error!(
                event = "kafka_refused";
                "Kafka and payrelay do not accept each other: {error}; look at {keys}. It is \
                    tried again every {} s, nothing is lost",
                REFUSED_PAUSE.as_secs()
            );
        }
    }
}

/// The configuration keys that an error concerns, if an operator has to act.
fn tls_keys_to_check(error: &KrafkaError) -> Option<&'static str> {
    use rustls::Error as Tls;
    match (
        tls_error_chain(error).find_map(<dyn Error>::downcast_ref::<Tls>),
        error,
    ) {
        (
            Some(Tls::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )),
            _,
        ) => Some(
            "kafka.bootstrap_servers, and the names in the broker's certificate and in its \
                advertised.listeners",
        ),
        (Some(Tls::InvalidCertificate(_)), _) => Some("kafka.ca_file"),
        (Some(Tls::AlertReceived(_)), _) => Some("kafka.certificate_file and kafka.key_file"),
        (Some(_), _) => Some("kafka.security, and which TLS this listener of the broker speaks"),
        (None, KrafkaError::Auth { .. }) => {
            Some("kafka.sasl_mechanism, kafka.sasl_username and kafka.sasl_password")
        }
        (None, KrafkaError::Config { .. }) => Some("the keys of [kafka]"),
        // A broker that expects TLS answers with an alert, which is no valid length of a message.
        (None, _) if tls_error_chain(error).any(is_not_kafka) => {
            Some("kafka.security, and whether this listener speaks TLS")
        }
        (None, _) => None,
    }
}

fn is_not_kafka(error: &(dyn Error + 'static)) -> bool {
    matches!(
        error.downcast_ref(),
        Some(KrafkaError::Protocol {
            kind: ProtocolErrorKind::InvalidLength,
            ..
        })
    )
}

/// An error and all errors that it wraps.
fn tls_error_chain<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    successors(Some(error), |&error| {
        // The source of an I/O error is below the error that it wraps.
        let io = error
            .downcast_ref::<io::Error>()
            .or(error.downcast_ref::<Arc<io::Error>>().map(Arc::as_ref));
        match io.and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        }
    })
}
