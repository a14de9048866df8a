//! The socket of the server: bound at the start, so that a wrong address leaves nothing behind, and
//! listening only when requests can be served.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Socket, Type};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 128;

/// A bound socket that does not listen yet: connections are refused.
#[derive(Debug)]
pub struct BoundSocket {
    socket: Socket,
    address: SocketAddr,
}

impl BoundSocket {
    /// Binds an address. A port of 0 becomes a free one.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        // A restart does not wait for the connections of the process before.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        let address = socket
            .local_addr()?
            .as_socket()
            .ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { socket, address })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on the kernel accepts connections.
    pub fn listen(self) -> io::Result<TcpListener> {
        self.socket.listen(BACKLOG)?;
        Ok(self.socket.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn a_bound_socket_refuses_connections_until_it_listens() {
        let socket = BoundSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.address();
        let refused = TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let listener = socket.listen().unwrap();
        assert!(TcpStream::connect(address).is_ok());
        let second = BoundSocket::bind(address).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
    }
}
