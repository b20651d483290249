//! What other programs tell: packet filters, container engines.

use bollard::models::ContainerSummary;
use serde_json::Value;

use crate::diagnose::firewall::{Rule, parse_iptables, parse_ipvs, parse_nft};
use crate::engine::{self, is_id};

use super::assert_shell;

/// A JSON text is a ruleset of nft, any other one of iptables or IPVS.
pub fn firewall(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let rules = match serde_json::from_str::<Value>(&text) {
        Ok(ruleset) => parse_nft(&ruleset),
        Err(_) => {
            let mut rules = parse_iptables(&text, "iptables");
            assert!(rules.len() <= text.lines().count());
            rules.extend(parse_ipvs(&text));
            rules
        }
    };
    rules.iter().for_each(assert_rule);
}

fn assert_rule(rule: &Rule) {
    assert_shell(&rule.next);
    for ports in &rule.ports {
        assert!(!ports.is_empty() && rule.proto.is_none_or(|proto| rule.answers(*ports.start(), proto)), "{rule:?}");
    }
}

/// One container as the engine's API tells it.
pub fn engine(data: &[u8]) {
    let Ok(told) = serde_json::from_slice::<ContainerSummary>(data) else { return };
    let Some(container) = engine::container(told) else { return };
    assert!(is_id(&container.id) && container.id.starts_with(container.short_id()));
    assert!(container.is_called(&container.name) && container.is_called(container.short_id()));
    assert_shell(&container.name);
    let line = serde_json::to_string(&container).expect("plain data");
    assert_eq!(serde_json::from_str::<engine::Container>(&line).ok(), Some(container));
}
