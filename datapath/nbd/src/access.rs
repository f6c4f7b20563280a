//! Which clients may use an export.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// Which clients may use an export: all, unless one of the lists has an entry. With both, a client
/// must be in both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// The client's certificate must have one of these names.
    pub names: Vec<CertificateName>,
    /// Its address must be in one of these.
    pub peers: Vec<PeerFilter>,
}

/// A name in a certificate, whatever its letters' case: exact (`backup`, `host1.example.com`), or
/// any single label behind a star (`*.example.com`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateName(String);

/// A set of peers that clients may connect from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerFilter {
    /// These addresses: `10.0.0.0/8`, `::1`.
    Network(IpNet),
    /// A unix socket: `unix`.
    Unix,
    /// A process of this user at a unix socket: `unix:uid=1000`.
    UnixUser(u32),
}

/// The address and the names of a client.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) address: PeerAddress,
    /// The names in its certificate; empty without one.
    pub(crate) names: Vec<String>,
}

/// The address of a client.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PeerAddress {
    Address(IpAddr),
    /// Its user.
    Unix(u32),
    /// It has left already.
    Unknown,
}

impl Access {
    pub(crate) fn permits(&self, client: &Client) -> bool {
        let is_named =
            || client.names.iter().any(|name| self.names.iter().any(|own| own.matches(name)));
        let is_there = || self.peers.iter().any(|peer| peer.contains(client.address));
        (self.names.is_empty() || is_named()) && (self.peers.is_empty() || is_there())
    }
}

impl CertificateName {
    fn matches(&self, name: &str) -> bool {
        let Some(parent) = self.0.strip_prefix("*.") else {
            return self.0.eq_ignore_ascii_case(name);
        };
        name.split_once('.').is_some_and(|(label, rest)| {
            !matches!(label, "" | "*") && rest.eq_ignore_ascii_case(parent)
        })
    }
}

impl FromStr for CertificateName {
    type Err = &'static str;

    /// # Errors
    /// Describes the valid form.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = text.strip_prefix("*.").unwrap_or(text);
        if name.is_empty() || name.contains('*') {
            return Err("expected a name of a certificate, such as backup or *.example.com");
        }
        Ok(Self(text.to_owned()))
    }
}

impl PeerFilter {
    fn contains(&self, address: PeerAddress) -> bool {
        match (self, address) {
            // A socket of IPv6 maps addresses of IPv4 clients (RFC 4291, 2.5.5.2).
            (Self::Network(network), PeerAddress::Address(address)) => {
                network.contains(&address.to_canonical())
            }
            (Self::Unix, PeerAddress::Unix(_)) => true,
            (Self::UnixUser(wanted), PeerAddress::Unix(user)) => *wanted == user,
            _ => false,
        }
    }
}

impl FromStr for PeerFilter {
    type Err = &'static str;

    /// # Errors
    /// Describes the valid form.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let user = text.strip_prefix("unix:uid=").and_then(|uid| uid.parse().ok());
        let network = || text.parse().ok().map(Self::Network);
        let address = || text.parse().ok().map(|address: IpAddr| Self::Network(address.into()));
        user.map(Self::UnixUser).or_else(network).or_else(address).ok_or(
            "expected an address such as 10.0.0.7 or ::1, a network such as 10.0.0.0/8, unix, or \
             unix:uid=1000",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(names: &[&str], peers: &[&str]) -> Access {
        Access {
            names: names.iter().map(|name| name.parse().unwrap()).collect(),
            peers: peers.iter().map(|peer| peer.parse().unwrap()).collect(),
        }
    }

    fn client(address: PeerAddress, names: &[&str]) -> Client {
        Client { address, names: names.iter().map(|&name| name.to_owned()).collect() }
    }

    fn at(address: &str) -> PeerAddress {
        PeerAddress::Address(address.parse().unwrap())
    }

    #[test]
    fn names_are_exact_or_one_label_behind_a_star() {
        let both = access(&["Backup", "*.example.com"], &[]);
        let permits = |names: &[&str]| both.permits(&client(at("10.0.0.1"), names));
        for good in ["backup", "BACKUP", "a.example.com", "A.Example.COM"] {
            assert!(permits(&[good]) && permits(&["other", good]), "{good}");
        }
        for bad in [
            "",
            "backup2",
            "backu",
            "example.com",
            ".example.com",
            "a.b.example.com",
            "*.example.com",
            "a.example.com.evil",
        ] {
            assert!(!permits(&[bad]), "{bad}");
        }
        assert!(!permits(&[]), "a client without a certificate");
        for bad in ["", "*", "*.", "a.*.b", "**.b", "*b"] {
            assert!(bad.parse::<CertificateName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn places_are_networks_addresses_and_users() {
        let some = access(&[], &["10.0.0.0/8", "::1", "192.0.2.7", "unix:uid=5"]);
        let permits = |address| some.permits(&client(address, &[]));
        for good in ["10.255.0.1", "::1", "192.0.2.7", "::ffff:10.1.1.1"] {
            assert!(permits(at(good)), "{good}");
        }
        for bad in ["11.0.0.1", "::2", "192.0.2.8", "::ffff:11.1.1.1", "::10.1.1.1"] {
            assert!(!permits(at(bad)), "{bad}");
        }
        assert!(permits(PeerAddress::Unix(5)));
        assert!(!permits(PeerAddress::Unix(6)));
        assert!(!permits(PeerAddress::Unknown));
        assert!(access(&[], &["unix"]).permits(&client(PeerAddress::Unix(0), &[])));
        assert!(!access(&[], &["0.0.0.0/0", "::/0"]).permits(&client(PeerAddress::Unix(0), &[])));
        for bad in ["", "10.0.0.0/33", "10.0.0", "host", "unix:", "unix:uid=x", "::1/129", "10/8"] {
            assert!(bad.parse::<PeerFilter>().is_err(), "{bad}");
        }
    }

    #[test]
    fn no_list_permits_all_and_two_must_both_permit() {
        assert!(Access::default().permits(&client(PeerAddress::Unknown, &[])));
        let both = access(&["a"], &["10.0.0.0/8"]);
        assert!(both.permits(&client(at("10.0.0.1"), &["a"])));
        assert!(!both.permits(&client(at("10.0.0.1"), &["b"])));
        assert!(!both.permits(&client(at("11.0.0.1"), &["a"])));
    }
}
