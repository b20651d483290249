//! What `diagnose` says to people.

use super::{BOLD, DIM, GREEN, RED, View, YELLOW, escape};
use crate::diagnose::{Diagnosis, Finding, Trial};

/// One port: a heading with what bind() said, and a block for each finding.
pub fn diagnosis(diagnosis: &Diagnosis, view: &View<'_>) -> String {
    let port = format!("{}/{}", diagnosis.port, diagnosis.proto);
    let style = if diagnosis.is_free() { GREEN } else { RED };
    let mut out = format!("{}\n", view.paint(style, &heading(diagnosis, &port)));
    for finding in &diagnosis.findings {
        out.push_str(&block(finding, view));
    }
    out
}

/// One finding, indented.
pub fn block(finding: &Finding, view: &View<'_>) -> String {
    let style = if finding.kind.is_obstacle() { BOLD } else { YELLOW };
    let mut out = format!("  {}: {}\n", view.paint(style, finding.kind.name()), escape(&finding.message));
    out.push_str(&format!("    {}\n", view.paint(DIM, &escape(&finding.evidence))));
    if let Some(next) = &finding.next {
        out.push_str(&format!("    → {}\n", escape(next)));
    }
    out
}

fn heading(diagnosis: &Diagnosis, port: &str) -> String {
    let bind = &diagnosis.bind;
    let list = |wanted: &dyn Fn(&Trial) -> bool| {
        let addresses = bind.iter().filter(|trial| wanted(trial)).map(|trial| match trial.address {
            std::net::IpAddr::V4(address) => address.to_string(),
            std::net::IpAddr::V6(address) => format!("[{address}]"),
        });
        addresses.collect::<Vec<_>>().join(", ")
    };
    let Some(refused) = bind.iter().find(|trial| trial.plain.is_some()) else {
        let said = if bind.is_empty() {
            "no bind() was tried".to_owned()
        } else {
            format!("bind() to {} succeeds", list(&|_| true))
        };
        return match diagnosis.is_free() {
            true => format!("nothing stands in the way of {port}: {said}"),
            false => format!("{port} is answered elsewhere: {said}"),
        };
    };
    let errno = refused.plain.map_or_else(String::new, |errno| format!("{errno:?}"));
    let mut heading = format!("{port} cannot be bound: bind() to {} fails with {errno}", list(&|t| t.plain.is_some()));
    if bind.iter().any(|trial| trial.plain.is_none()) {
        heading += &format!(", to {} it succeeds", list(&|trial| trial.plain.is_none()));
    }
    if bind.iter().all(|trial| trial.reuse.is_none()) {
        heading += "; with SO_REUSEADDR it succeeds";
    }
    heading
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::diagnose::Kind;
    use crate::model::Protocol;
    use crate::render::tests::view;

    fn check(bind: &[(&str, Option<Errno>, Option<Errno>)], findings: &[Finding], expected: &str) {
        let bind: Vec<Trial> = bind
            .iter()
            .map(|&(address, plain, reuse)| Trial { address: address.parse().unwrap(), plain, reuse })
            .collect();
        let bindable = (!bind.is_empty()).then(|| bind.iter().all(|trial| trial.plain.is_none()));
        let subject = Diagnosis { port: 8000, proto: Protocol::Tcp, bindable, bind, findings: findings.to_vec() };
        assert_eq!(diagnosis(&subject, &view()), expected);
    }

    fn finding(kind: Kind, next: Option<&str>) -> Finding {
        Finding {
            kind,
            message: "e\u{1b}[31mvil\n (7) listens".to_owned(),
            evidence: "uid 0\r".to_owned(),
            next: next.map(str::to_owned),
        }
    }

    #[test]
    fn a_port_is_a_heading_and_its_findings() {
        let taken = Some(Errno::EADDRINUSE);
        check(
            &[("0.0.0.0", None, None), ("::", None, None)],
            &[],
            "nothing stands in the way of 8000/tcp: bind() to 0.0.0.0, [::] succeeds\n",
        );
        check(&[], &[], "nothing stands in the way of 8000/tcp: no bind() was tried\n");
        check(
            &[("0.0.0.0", taken, taken), ("127.0.0.1", None, None)],
            &[finding(Kind::Held, Some("kill 7"))],
            "8000/tcp cannot be bound: bind() to 0.0.0.0 fails with EADDRINUSE, to 127.0.0.1 it succeeds\n  \
             held: e\\x1b[31mvil\\n (7) listens\n    uid 0\\r\n    → kill 7\n",
        );
        check(
            &[("0.0.0.0", taken, None)],
            &[finding(Kind::TimeWait, None)],
            "8000/tcp cannot be bound: bind() to 0.0.0.0 fails with EADDRINUSE; with SO_REUSEADDR it succeeds\n  \
             time_wait: e\\x1b[31mvil\\n (7) listens\n    uid 0\\r\n",
        );
        check(
            &[("0.0.0.0", None, None)],
            &[finding(Kind::Dnat, None)],
            "8000/tcp is answered elsewhere: bind() to 0.0.0.0 succeeds\n  \
             dnat: e\\x1b[31mvil\\n (7) listens\n    uid 0\\r\n",
        );
    }
}
