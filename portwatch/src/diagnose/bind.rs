//! What a real bind() says of the addresses that are asked about, with and without `SO_REUSEADDR`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;
use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::Question;
use crate::model::Protocol;
use crate::source::trial::Bind;

/// What bind() said for one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    pub address: IpAddr,
    /// `None`: it succeeded.
    pub plain: Option<Errno>,
    /// The same with SO_REUSEADDR. For UDP that flag means something else (a port that others get, too), and it is not
    /// tried: as `plain`.
    pub reuse: Option<Errno>,
}

impl Serialize for Trial {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let word = |errno: Option<Errno>| errno.map_or_else(|| "ok".to_owned(), |errno| format!("{errno:?}"));
        let mut trial = serializer.serialize_struct("Trial", 3)?;
        trial.serialize_field("address", &self.address)?;
        trial.serialize_field("plain", &word(self.plain))?;
        trial.serialize_field("reuseaddr", &word(self.reuse))?;
        trial.end()
    }
}

/// Binds, and lets go again, in the calling thread's network namespace. Addresses that this host does not have at all
/// (no IPv6) are left out.
pub(super) fn trials(question: Question) -> Vec<Trial> {
    let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv4Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into()];
    let addresses = question.address.map_or_else(|| any.to_vec(), |address| vec![address]);
    let tried = addresses.into_iter().filter_map(|address| {
        let endpoint = SocketAddr::new(address, question.port);
        let v6only = Some(question.v6only);
        let attempt = |reuseaddr| Bind { proto: question.proto, endpoint, reuseaddr, v6only }.refusal();
        let plain = attempt(false);
        let reuse = if question.proto == Protocol::Tcp { attempt(true) } else { plain };
        // Without memory or descriptors nothing is learnt of the port.
        let is_answer = |errno| !matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS));
        let is_absent = question.address.is_none() && matches!(plain, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL));
        (is_answer(plain) && is_answer(reuse) && !is_absent).then_some(Trial { address, plain, reuse })
    });
    tried.collect()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn taken_and_free_ports_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ask = |address: Option<&str>, proto| {
            let address = address.map(|address| address.parse().unwrap());
            trials(Question { port, proto, address, v6only: false })
        };
        let refused = ask(None, Protocol::Tcp);
        assert!(refused.len() >= 2, "{refused:?}");
        assert!(refused.iter().all(|t| (t.plain, t.reuse) == (Some(Errno::EADDRINUSE), Some(Errno::EADDRINUSE))));
        assert_eq!(ask(Some("127.0.0.2"), Protocol::Tcp)[0].plain, None);
        assert_eq!(ask(Some("192.0.2.1"), Protocol::Tcp)[0].plain, Some(Errno::EADDRNOTAVAIL));
        let udp = UdpSocket::bind(("127.0.0.1", port));
        assert_eq!(ask(Some("127.0.0.1"), Protocol::Udp)[0].plain, udp.is_ok().then_some(Errno::EADDRINUSE));
    }
}
