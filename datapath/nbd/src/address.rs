//! Addresses to listen on.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};

use rustix::io::Errno;
use sheave_core::Error;

use crate::listener::invalid;

/// Attempts to find a port that is free at all addresses.
const PORT_ATTEMPTS: usize = 16;

/// Binds a TCP socket for each address of `HOST:PORT`. Port 0 picks a free one, the same for all.
/// Addresses that this machine does not have are skipped if another one works, since names may
/// have an IPv6 address where IPv6 is disabled.
///
/// # Errors
/// When `HOST:PORT` is malformed or has no address, or an address is in use.
pub fn bind_tcp(address: &str) -> Result<Vec<TcpListener>, Error> {
    check(address)?;
    let fail = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => " (choose another port, or 0 for a free one)",
            io::ErrorKind::PermissionDenied => {
                " (ports below 1024 are for root; choose another port)"
            }
            io::ErrorKind::AddrNotAvailable => {
                " (no address of this machine; 0.0.0.0 stands for all it has)"
            }
            _ => "",
        };
        Error::from_io("listen", format!("{address}{hint}"), error)
    };
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for resolved in address.to_socket_addrs().map_err(fail)? {
        // The hosts file may contain an address twice.
        if !addresses.contains(&resolved) {
            addresses.push(resolved);
        }
    }
    let mut attempt = 1;
    loop {
        match bind_all(&addresses) {
            // The port that was free at the first address is taken at another one.
            Err(Failure { error, first: false })
                if error.kind() == io::ErrorKind::AddrInUse
                    && addresses.iter().all(|address| address.port() == 0)
                    && attempt < PORT_ATTEMPTS =>
            {
                attempt += 1;
            }
            outcome => return outcome.map_err(|failure| fail(failure.error)),
        }
    }
}

struct Failure {
    error: io::Error,
    /// The first address.
    first: bool,
}

fn bind_all(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, Failure> {
    let mut listeners: Vec<TcpListener> = Vec::with_capacity(addresses.len());
    let mut absent = None;
    let mut port = 0;
    for &(mut address) in addresses {
        if address.port() == 0 {
            address.set_port(port);
        }
        let bound = TcpListener::bind(address)
            .and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
        match bound {
            Ok((bound_port, listener)) => {
                port = bound_port;
                listeners.push(listener);
            }
            Err(error) if is_absent(&error) => absent = absent.or(Some(error)),
            Err(error) => return Err(Failure { error, first: listeners.is_empty() }),
        }
    }
    if listeners.is_empty() {
        let error = absent.unwrap_or_else(|| io::Error::other("the name has no address"));
        return Err(Failure { error, first: true });
    }
    Ok(listeners)
}

/// Whether this machine does not have the address, or its family.
fn is_absent(error: &io::Error) -> bool {
    let known = [Errno::ADDRNOTAVAIL, Errno::AFNOSUPPORT];
    known.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Says what is wrong with a malformed address, which the resolver would not.
fn check(address: &str) -> Result<(), Error> {
    let Some((host, port)) = address.rsplit_once(':') else {
        return Err(invalid(
            address,
            "the port is missing; write HOST:PORT, as in 127.0.0.1:10809",
        ));
    };
    if host.is_empty() {
        let why = format!("the host is missing; write 127.0.0.1:{port}, or 0.0.0.0:{port} for all");
        return Err(invalid(address, &why));
    }
    if host.contains(':') && !host.starts_with('[') {
        let why = "write HOST:PORT with an IPv6 address in brackets, as in [::1]:10809";
        return Err(invalid(address, why));
    }
    match port.parse::<u16>() {
        Ok(_) => Ok(()),
        Err(_) => Err(invalid(address, "the port must be a number from 0 to 65535")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn at(address: [u8; 4], port: u16) -> SocketAddr {
        (Ipv4Addr::from(address), port).into()
    }

    fn ports(listeners: &[TcpListener]) -> Vec<u16> {
        listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
    }

    #[test]
    fn a_free_port_is_the_same_at_all_addresses() {
        let addresses = [at([127, 0, 0, 1], 0), at([127, 0, 0, 2], 0), at([127, 0, 0, 3], 0)];
        let listeners = bind_all(&addresses).ok().unwrap();
        let ports = ports(&listeners);
        assert!(ports[0] != 0 && ports.iter().all(|&port| port == ports[0]), "{ports:?}");
        assert_eq!(listeners.len(), 3);
    }

    #[test]
    fn all_addresses_of_a_name_are_listened_on() {
        let listeners = bind_tcp("localhost:0").unwrap();
        let bound: Vec<_> = listeners.iter().map(|bound| bound.local_addr().unwrap()).collect();
        let usable = |address: &SocketAddr| TcpListener::bind((address.ip(), 0)).is_ok();
        let mut expected: Vec<_> =
            "localhost:0".to_socket_addrs().unwrap().filter(usable).map(|a| a.ip()).collect();
        expected.dedup();
        assert_eq!(bound.iter().map(SocketAddr::ip).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn absent_addresses_are_skipped_only_beside_one_that_works() {
        // 192.0.2.0/24 is for documentation (RFC 5737).
        let (absent, here) = (at([192, 0, 2, 1], 0), at([127, 0, 0, 1], 0));
        assert_eq!(bind_all(&[absent, here]).ok().unwrap().len(), 1);
        let failure = bind_all(&[absent]).err().unwrap();
        assert_eq!(failure.error.kind(), io::ErrorKind::AddrNotAvailable);
    }

    #[test]
    fn an_address_in_use_is_an_error_even_beside_one_that_works() {
        let taken = TcpListener::bind(at([127, 0, 0, 2], 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let both = [at([127, 0, 0, 1], port), at([127, 0, 0, 2], port)];
        let failure = bind_all(&both).err().unwrap();
        assert_eq!(failure.error.kind(), io::ErrorKind::AddrInUse);
    }
}
