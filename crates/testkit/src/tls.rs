//! The listeners of a broker behind TLS and SASL, and an authority that signs certificates for both
//! sides.

use super::listen::free_port;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use std::fs;
use std::net::TcpListener;
use std::path::Path;

/// The user that the secure listeners know, by every mechanism that they accept.
pub const USER: &str = "payrelay";
/// A test can search logs for it.
pub const PASSWORD: &str = "secret-kafka-password";
/// The name in the broker's certificate.
const HOST: &str = "localhost";

/// What a broker has in addition to its usual listeners, as parts of its properties.
#[derive(Default)]
pub struct Listeners {
    pub bound: String,
    pub advertised: String,
    pub protocols: String,
    pub settings: String,
}

/// The secure listeners of a broker, and the authority that has signed its certificate.
pub struct Secure {
    ports: [u16; 4],
    pub authority: Authority,
}

impl Secure {
    const NAMES: [&str; 4] = ["TLS", "MUTUAL", "SASLTLS", "SASL"];
    const PROTOCOLS: [&str; 4] = ["SSL", "SSL", "SASL_SSL", "SASL_PLAINTEXT"];

    /// The ports are held until the second value is dropped.
    pub fn choose() -> (Secure, [TcpListener; 4]) {
        let held = [free_port(), free_port(), free_port(), free_port()];
        let ports = held.each_ref().map(|listener| {
            listener
                .local_addr()
                .expect("a bound listener has an address")
                .port()
        });
        (
            Secure {
                ports,
                authority: Authority::new(),
            },
            held,
        )
    }

    /// TLS, and no more.
    pub fn tls(&self) -> String {
        format!("{HOST}:{}", self.ports[0])
    }

    /// TLS on both sides: the client needs a certificate.
    pub fn mutual(&self) -> String {
        format!("{HOST}:{}", self.ports[1])
    }

    /// SASL over TLS: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512.
    pub fn sasl_tls(&self) -> String {
        format!("{HOST}:{}", self.ports[2])
    }

    /// The same by an address that is not in the broker's certificate.
    pub fn sasl_tls_by_another_name(&self) -> String {
        format!("127.0.0.1:{}", self.ports[2])
    }

    /// SASL in clear, with the same mechanisms.
    pub fn sasl(&self) -> String {
        format!("{HOST}:{}", self.ports[3])
    }

    /// For a broker whose files are in `folder`.
    pub fn listeners(&self, folder: &Path) -> Listeners {
        let each = |show: &dyn Fn(&str, &str, u16) -> String| -> String {
            let listeners = Self::NAMES.into_iter().zip(Self::PROTOCOLS).zip(self.ports);
            listeners
                .map(|((name, protocol), port)| show(name, protocol, port))
                .collect()
        };
        let folder = folder.display();
        let tls = format!(
            "ssl.keystore.type=PEM
ssl.keystore.location={folder}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/ca.pem
listener.name.mutual.ssl.client.auth=required
"
        );
        Listeners {
            bound: each(&|name, _, port| format!(",{name}://127.0.0.1:{port}")),
            advertised: each(&|name, _, port| format!(",{name}://{HOST}:{port}")),
            protocols: each(&|name, protocol, _| format!(",{name}:{protocol}")),
            settings: [&tls, &sasl("sasltls"), &sasl("sasl"), AUTHORIZER].concat(),
        }
    }
}

/// Everything is allowed that no ACL is about, and all that comes without a name: tests, and the
/// broker itself.
const AUTHORIZER: &str =
    "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
super.users=User:ANONYMOUS
";

fn sasl(listener: &str) -> String {
    let module = "org.apache.kafka.common.security";
    format!(
        "listener.name.{listener}.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.{listener}.plain.sasl.jaas.config={module}.plain.PlainLoginModule \
         required user_{USER}=\"{PASSWORD}\";
listener.name.{listener}.scram-sha-256.sasl.jaas.config={module}.scram.ScramLoginModule required;
listener.name.{listener}.scram-sha-512.sasl.jaas.config={module}.scram.ScramLoginModule required;
"
    )
}

/// Signs certificates.
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "payrelay's tests");
        let key = KeyPair::generate().expect("a key can be made");
        let pem = params
            .self_signed(&key)
            .expect("the parameters are right")
            .pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// Its own certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for a name, and its key.
    pub fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().expect("a key can be made");
        let params = CertificateParams::new([name.to_owned()]).expect("the name is one");
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("the parameters are right");
        (certificate.pem(), key.serialize_pem())
    }

    /// What the broker needs.
    pub fn write(&self, folder: &Path) {
        let (certificate, key) = self.sign(HOST);
        fs::write(folder.join("ca.pem"), &self.pem).expect("a fresh directory is writable");
        fs::write(folder.join("broker.pem"), key + &certificate)
            .expect("a fresh directory is writable");
    }
}
