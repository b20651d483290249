//! Rules of the packet filter that answer on a port in place of a listener: DNAT and redirect, by nftables and by
//! iptables, and virtual services of IPVS. Reads what the tools print; the parsers are pure.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use crate::model::Protocol;
use crate::supervisor::quote;

/// A rule that sends what comes to some ports elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `None`: of both.
    pub proto: Option<Protocol>,
    pub ports: Vec<RangeInclusive<u16>>,
    /// Where it sends them: `10.0.0.2:80`, `port 8080 of this host`.
    pub to: String,
    /// Where the rule stands, as the tool that printed it says.
    pub place: String,
    /// The command that removes it, or shows it where the rule holds what a shell would obey.
    pub next: String,
}

impl Rule {
    pub(crate) fn answers(&self, port: u16, proto: Protocol) -> bool {
        self.proto.is_none_or(|own| own == proto) && self.ports.iter().any(|ports| ports.contains(&port))
    }
}

/// Directories of the tools: fixed, for root runs them.
const PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin";
/// How long a tool may take.
const TIME_OUT: Duration = Duration::from_secs(5);
/// More output than this is not read.
const MAX_OUTPUT: usize = 32 * 1024 * 1024;

/// The rules of the calling thread's network namespace; and what could not be read, as sentences.
pub(super) fn read(euid: u32) -> (Vec<Rule>, Vec<String>) {
    let mut rules = fs::read_to_string("/proc/thread-self/net/ip_vs").map(|text| parse_ipvs(&text)).unwrap_or_default();
    let mut unseen = Vec::new();
    if euid != 0 {
        unseen.push("firewall rules were not looked at: that takes root; try sudo".to_owned());
        return (rules, unseen);
    }
    let mut add = |found: Vec<Rule>| {
        // iptables shows what nft shows, where it is the newer iptables.
        let is_known = |rule: &Rule, rules: &[Rule]| {
            rules.iter().any(|known| (known.proto, &known.ports, &known.to) == (rule.proto, &rule.ports, &rule.to))
        };
        for rule in found {
            if !is_known(&rule, &rules) {
                rules.push(rule);
            }
        }
    };
    let mut is_installed = false;
    for (tool, arguments) in [
        ("nft", &["-j", "-s", "list", "ruleset"][..]),
        ("iptables-save", &["-t", "nat"]),
        ("ip6tables-save", &["-t", "nat"]),
        ("iptables-legacy-save", &["-t", "nat"]),
        ("ip6tables-legacy-save", &["-t", "nat"]),
    ] {
        let Some(program) = find(tool) else { continue };
        // The legacy tools load a kernel module just by looking: only where it is loaded are there rules to show.
        let loaded = if tool.starts_with("ip6") { "ip6_tables_names" } else { "ip_tables_names" };
        if tool.contains("legacy") && !Path::new("/proc/thread-self/net").join(loaded).exists() {
            continue;
        }
        is_installed = true;
        match run(&program, arguments) {
            Ok(output) if tool == "nft" => match serde_json::from_slice(&output) {
                Ok(ruleset) => add(parse_nft(&ruleset)),
                // With no rule at all some versions print nothing.
                Err(_) if output.is_empty() => {}
                Err(error) => unseen.push(format!("the rules of nft are not understood: {error}")),
            },
            Ok(output) => add(parse_iptables(&String::from_utf8_lossy(&output), tool.trim_end_matches("-save"))),
            Err(error) => unseen.push(format!("cannot run {}: {error}", program.display())),
        }
    }
    if !is_installed {
        unseen.push("firewall rules were not looked at: neither nft nor iptables-save is installed".to_owned());
    }
    (rules, unseen)
}

fn find(tool: &str) -> Option<std::path::PathBuf> {
    PATH.split(':').map(|directory| Path::new(directory).join(tool)).find(|path| path.is_file())
}

/// What a program prints. It sees nothing of the environment and is ended where it takes too long or prints too much.
fn run(program: &Path, arguments: &[&str]) -> io::Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let output = child.stdout.take().map_or(Ok(Vec::new()), read_until_end);
    if output.is_err() {
        // Gone already is as good.
        let _ = child.kill();
    }
    let status = child.wait()?;
    let output = output?;
    if status.success() { Ok(output) } else { Err(io::Error::other(format!("it failed ({status})"))) }
}

fn read_until_end(mut pipe: std::process::ChildStdout) -> io::Result<Vec<u8>> {
    let until = Instant::now() + TIME_OUT;
    let mut bytes = Vec::new();
    let mut part = vec![0; 64 * 1024];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let limit = Timespec { tv_sec: left.as_secs().try_into().unwrap_or(0), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&pipe.as_fd(), PollFlags::IN)], Some(&limit)) {
            Ok(0) => return Err(io::Error::other(format!("it took more than {} s", TIME_OUT.as_secs()))),
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
        match pipe.read(&mut part)? {
            0 => return Ok(bytes),
            length => bytes.extend_from_slice(&part[..length]),
        }
        if bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("it printed more than {} MiB", MAX_OUTPUT >> 20)));
        }
    }
}

/// The rules of `nft -j list ruleset` that match a destination port and send it elsewhere.
pub(crate) fn parse_nft(ruleset: &Value) -> Vec<Rule> {
    let objects = ruleset["nftables"].as_array().map_or(&[][..], Vec::as_slice);
    let rules = objects.iter().filter_map(|object| object.get("rule")).flat_map(|rule| nft_rule(rule, objects));
    rules.collect()
}

fn nft_rule(rule: &Value, objects: &[Value]) -> Vec<Rule> {
    let text = |key: &str| rule[key].as_str().unwrap_or("?");
    let place = ["family", "table", "chain"].map(text);
    let mut base = Rule {
        proto: None,
        ports: Vec::new(),
        to: String::new(),
        place: format!("nft: table {} {}, chain {}, handle {}", place[0], place[1], place[2], rule["handle"]),
        next: format!("nft delete rule {} handle {}", place.map(quote).join(" "), rule["handle"]),
    };
    let named = |name: &str| {
        let name = name.strip_prefix('@').unwrap_or(name);
        let of = |object: &&Value| {
            object["name"] == name && object["table"] == rule["table"] && object["family"] == rule["family"]
        };
        objects.iter().filter_map(|object| object.get("set").or_else(|| object.get("map"))).find(of)
    };
    let mut found = Vec::new();
    for statement in rule["expr"].as_array().into_iter().flatten() {
        if let Some(condition) = statement.get("match") {
            let negated = condition["op"] == "!=";
            if condition["left"]["meta"]["key"] == "l4proto" && !negated {
                base.proto = nft_protocol(&condition["right"]);
            } else if let Some(proto) = nft_port_key(&condition["left"]) {
                base.proto = proto.or(base.proto);
                let right = match &condition["right"] {
                    Value::String(name) => named(name).map_or(&Value::Null, |set| &set["elem"]),
                    right => right,
                };
                base.ports = if negated { others(nft_ports(right)) } else { nft_ports(right) };
            }
        }
        for (action, is_redirect) in [("dnat", false), ("redirect", true), ("tproxy", true)] {
            let Some(target) = statement.get(action) else { continue };
            // A map from ports to addresses is match and target in one.
            let map = [&target["addr"], &target["port"], target].into_iter().find_map(|value| value.get("map"));
            if let Some(map) = map.filter(|map| nft_port_key(&map["key"]).is_some()) {
                let data = match &map["data"] {
                    Value::String(name) => named(name).map_or(&Value::Null, |map| &map["elem"]),
                    data => &data["set"],
                };
                for pair in data.as_array().into_iter().flatten() {
                    let proto = nft_port_key(&map["key"]).flatten().or(base.proto);
                    found.push(Rule { proto, ports: nft_ports(&pair[0]), to: nft_value(&pair[1]), ..base.clone() });
                }
            } else if !base.ports.is_empty() {
                found.push(Rule { to: nft_target(target, is_redirect), ..base.clone() });
            }
        }
    }
    found
}

/// Whether the expression is the destination port, and of which protocol (`th`: of any).
fn nft_port_key(key: &Value) -> Option<Option<Protocol>> {
    let payload = key.get("payload").filter(|payload| payload["field"] == "dport")?;
    Some(nft_protocol(&payload["protocol"]))
}

fn nft_protocol(value: &Value) -> Option<Protocol> {
    match value.as_str()? {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        _ => None,
    }
}

fn nft_ports(value: &Value) -> Vec<RangeInclusive<u16>> {
    let port = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    match value {
        Value::Array(values) => values.iter().flat_map(nft_ports).collect(),
        Value::Object(object) => match (object.get("set"), object.get("range"), object.get("elem")) {
            (Some(set), _, _) => nft_ports(set),
            (_, Some(range), _) => port(&range[0]).zip(port(&range[1])).and_then(forwards).into_iter().collect(),
            (_, _, Some(element)) => nft_ports(&element["val"]),
            _ => Vec::new(),
        },
        value => port(value).map(|port| port..=port).into_iter().collect(),
    }
}

/// A range that runs backwards holds no port, and [`others`] would count what is around it twice.
fn forwards((first, last): (u16, u16)) -> Option<RangeInclusive<u16>> {
    (first <= last).then_some(first..=last)
}

fn others(ports: Vec<RangeInclusive<u16>>) -> Vec<RangeInclusive<u16>> {
    let mut rest = vec![1..=u16::MAX];
    for out in ports {
        rest = rest
            .into_iter()
            .flat_map(|range| {
                let below =
                    (*range.start() < *out.start()).then(|| *range.start()..=(*range.end()).min(out.start() - 1));
                let above = (*range.end() > *out.end()).then(|| (*range.start()).max(out.end() + 1)..=*range.end());
                below.into_iter().chain(above)
            })
            .collect();
    }
    rest
}

fn nft_target(target: &Value, is_redirect: bool) -> String {
    let port = target.get("port").map(nft_value);
    match (target.get("addr").map(nft_value), port) {
        (Some(address), Some(port)) if address.contains(':') => format!("[{address}]:{port}"),
        (Some(address), Some(port)) => format!("{address}:{port}"),
        (Some(address), None) => address,
        (None, Some(port)) => format!("port {port} of this host"),
        (None, None) if is_redirect => "this host".to_owned(),
        (None, None) => "another address".to_owned(),
    }
}

fn nft_value(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        value if value.get("concat").is_some() => {
            value["concat"].as_array().into_iter().flatten().map(nft_value).collect::<Vec<_>>().join(":")
        }
        value if value.get("range").is_some() => {
            format!("{}-{}", nft_value(&value["range"][0]), nft_value(&value["range"][1]))
        }
        _ => "several".to_owned(),
    }
}

/// The rules of `iptables-save -t nat` that match a destination port and send it elsewhere, by themselves or by a chain
/// that they jump to (as those of Kubernetes do); `tool` is `iptables` or the like.
pub(crate) fn parse_iptables(saved: &str, tool: &str) -> Vec<Rule> {
    let rules: Vec<IptablesRule<'_>> = saved
        .lines()
        .filter_map(|line| line.strip_prefix("-A "))
        .map(|text| IptablesRule { words: text.split_ascii_whitespace().collect(), text })
        .collect();
    let mut chains: Chains<'_> = HashMap::new();
    for rule in &rules {
        chains.entry(rule.words.first().copied().unwrap_or_default()).or_default().push(rule);
    }
    rules.iter().filter_map(|rule| iptables_rule(rule, &chains, tool)).collect()
}

/// Chains that are looked at for where a rule leads. Kubernetes takes five or six.
const MAX_JUMPS: usize = 64;

type Chains<'a> = HashMap<&'a str, Vec<&'a IptablesRule<'a>>>;

struct IptablesRule<'a> {
    words: Vec<&'a str>,
    text: &'a str,
}

impl<'a> IptablesRule<'a> {
    /// What follows a flag, and whether it is negated.
    fn value(&self, flag: &str) -> Option<(&'a str, bool)> {
        let place = self.words.iter().position(|word| *word == flag)?;
        Some((self.words.get(place + 1).copied()?, place > 0 && self.words[place - 1] == "!"))
    }

    fn ports(&self) -> Option<(&'a str, bool)> {
        ["--dport", "--dports"].iter().find_map(|flag| self.value(flag))
    }

    /// Where it sends what it matches. `passed` are the chains on the way: the kernel has no loops, a text might.
    fn to(&self, chains: &Chains<'a>, passed: &mut Vec<&'a str>) -> Option<String> {
        let this_host = || "this host".to_owned();
        let (target, _) = self.value("-j").or_else(|| self.value("-g"))?;
        match target {
            "DNAT" => Some(self.value("--to-destination")?.0.to_owned()),
            "REDIRECT" => {
                Some(self.value("--to-ports").map_or_else(this_host, |(port, _)| format!("port {port} of this host")))
            }
            chain if passed.contains(&chain) || passed.len() == MAX_JUMPS => None,
            chain => {
                passed.push(chain);
                // Those that match a port of their own speak for themselves.
                let rules = chains.get(chain)?.iter().filter(|rule| rule.ports().is_none());
                rules.into_iter().find_map(|rule| rule.to(chains, passed))
            }
        }
    }
}

fn iptables_rule<'a>(rule: &IptablesRule<'a>, chains: &Chains<'a>, tool: &str) -> Option<Rule> {
    let (ports, negated) = rule.ports()?;
    let to = rule.to(chains, &mut Vec::new())?;
    let ports = ports
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once(':').unwrap_or((part, part));
            forwards((first.parse().ok()?, last.parse().ok()?))
        })
        .collect();
    let chain = quote(rule.words.first()?);
    let text = rule.text;
    // Comments are other people's text; and an interactive shell obeys a `!` that has something behind it.
    let is_plain = text.replace("! ", "").chars().all(|c| c.is_ascii_alphanumeric() || "-_.,:/ ".contains(c));
    Some(Rule {
        proto: match rule.value("-p") {
            Some(("tcp", false)) => Some(Protocol::Tcp),
            Some(("udp", false)) => Some(Protocol::Udp),
            _ => None,
        },
        ports: if negated { others(ports) } else { ports },
        to,
        place: format!("{tool} -t nat: -A {text}"),
        next: if is_plain { format!("{tool} -t nat -D {text}") } else { format!("{tool} -t nat -S {chain}") },
    })
}

/// The virtual services of `/proc/net/ip_vs`: `TCP  C0A80001:1F40 rr`, an IPv6 address in brackets.
pub(crate) fn parse_ipvs(table: &str) -> Vec<Rule> {
    let rules = table.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (proto, flag) = match words.next()? {
            "TCP" => (Protocol::Tcp, "-t"),
            "UDP" => (Protocol::Udp, "-u"),
            _ => return None,
        };
        let (address, port) = words.next()?.rsplit_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        let address = match u32::from_str_radix(address, 16) {
            Ok(address) => std::net::Ipv4Addr::from(address).to_string(),
            Err(_) => address.to_owned(),
        };
        Some(Rule {
            proto: Some(proto),
            ports: vec![port..=port],
            to: "the servers behind it".to_owned(),
            place: format!("/proc/net/ip_vs: virtual service {address}:{port}"),
            next: format!("ipvsadm -D {flag} {}", quote(&format!("{address}:{port}"))),
        })
    });
    rules.collect()
}

#[cfg(test)]
mod tests;
