//! `payrelay health`: whether payrelay accepts payments, for a supervisor or a container.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use clap::Args;

use super::api::NoResponse;
use super::client::Target;
use super::local_client::exchange_json;
use super::output::{Output, print_config_error, print_error};
use super::{configuration, exit_code};

#[derive(Args)]
pub(super) struct HealthCommand {
    /// Asks only whether it serves, not whether it accepts payments
    #[arg(long)]
    live: bool,
}

/// A payrelay that needs longer is not healthy.
const TIMEOUT: Duration = Duration::from_secs(5);

impl HealthCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        self.ask(target).unwrap_or_else(|code| code)
    }

    fn ask(&self, target: &Target) -> Result<u8, u8> {
        let path = if self.live {
            "/health/live"
        } else {
            "/health/ready"
        };
        let answer = if let Some(client) = target.connect()? {
            client.get(path).map(|response| response.status)
        } else {
            let address =
                configuration::load_listen_address(target.file()).map_err(print_config_error)?;
            let address = own_address(address);
            ask_address(address, path).map_err(NoResponse::temporary)
        };
        match answer {
            Ok(200) => {
                let mut output = Output::default();
                output.line(if self.live { "live" } else { "ready" });
                Ok(output.exit_code(exit_code::OK))
            }
            Ok(status) => {
                print_error(format_args!("{path} answered {status}"));
                Ok(exit_code::PARTIAL)
            }
            Err(error) => {
                print_error(error.reason);
                Ok(exit_code::PARTIAL)
            }
        }
    }
}

/// The address that reaches this machine, where payrelay listens on all of its addresses.
fn own_address(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// The status of a GET without a token: that is enough for both paths.
fn ask_address(address: SocketAddr, path: &str) -> io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    exchange_json(&mut stream, "GET", path, "").map(|response| response.status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_health_check_asks_this_machine() {
        let own = |address: &str| own_address(address.parse().unwrap()).to_string();
        assert_eq!(own("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(own("[::]:80"), "[::1]:80");
        assert_eq!(own("192.0.2.1:80"), "192.0.2.1:80");
    }
}
