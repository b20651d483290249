//! `[[rule]]`: which servers the agent ends by itself, and when.
//!
//! ```toml
//! [[rule]]
//! name = "web"
//! ports = "8080-9500"            # or 8080, or [8080, "9000-9500/tcp"]; a set of [sets] as @name
//! cwd = "/tmp/web_*"             # as --cwd; addr, cgroup, command, env, unit and user likewise, each one or a list
//! except = 8443                  # as ports
//! proto = "tcp"                  # or "udp"
//! orphans = true                 # as --orphans
//! netns = "all"                  # "self", else; or a number
//! older_than = "24h"
//! action = "kill"                # or "report": tell the log
//! grace = "5s"
//! remove_cwd = "/tmp/web_*"      # as kill --remove-cwd
//! ```

use std::net::IpAddr;
use std::time::Duration;

use globset::GlobMatcher;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Bad, duration, known, parse, sets_in, targets_of};
use crate::model::{NetnsId, Protocol};
use crate::rules::{Action, Rule};
use crate::select::{
    Filters, Selector, Sets, Target, builtin_sets, cgroup_path, cwd_glob, glob, parse_targets, unit_glob,
};
use crate::sweep::directory_glob;

/// What the host knows and a text does not.
pub struct LookUp<'a> {
    pub uid_of: &'a dyn Fn(&str) -> Option<u32>,
    /// Our own network namespace.
    pub netns: NetnsId,
}

impl std::fmt::Debug for LookUp<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LookUp").field("netns", &self.netns).finish_non_exhaustive()
    }
}

const KEYS: &str = "name, ports, except, proto, addr, command, cwd, env, cgroup, unit, user, orphans, netns, older_than, \
                    action, grace and remove_cwd";

const EMPTY: &str = "it would meet every server; give it ports, addr, command, cwd, env, cgroup, unit, user or orphans";

/// How long SIGTERM may take, as for `kill`.
const GRACE: Duration = Duration::from_secs(5);

/// The rules that the text of a configuration defines, in their order.
///
/// # Errors
/// Where the text is not TOML, has a table that no configuration has, or a rule says what no rule can, or names nothing in
/// particular. What the other tables say is not looked at, but sets that rules name.
pub fn rules_in(text: &str, look_up: &LookUp<'_>) -> Result<Vec<Rule>, Bad> {
    let document = parse(text)?;
    known(text, &document)?;
    let Some(value) = document.get_ref().get("rule") else { return Ok(Vec::new()) };
    let bad = |what: &str| Bad::new(text, &value.span(), what.to_owned());
    let DeValue::Array(entries) = value.get_ref() else {
        return Err(bad("'rule' is not a list; write [[rule]] on a line of its own"));
    };
    let mut sets = builtin_sets();
    sets.extend(sets_in(text)?);
    let mut rules: Vec<Rule> = Vec::new();
    for entry in entries {
        let DeValue::Table(table) = entry.get_ref() else {
            return Err(bad("'rule' is not a list of tables; write [[rule]] on a line of its own"));
        };
        let rule = rule(text, table, entry, &sets, look_up)?;
        if rules.iter().any(|other| other.name == rule.name) {
            let what = format!("two rules are called '{}'; give each its own name", rule.name.escape_debug());
            return Err(Bad::new(text, &entry.span(), what));
        }
        rules.push(rule);
    }
    Ok(rules)
}

fn rule(
    text: &str,
    table: &DeTable<'_>,
    entry: &Spanned<DeValue<'_>>,
    sets: &Sets,
    look_up: &LookUp<'_>,
) -> Result<Rule, Bad> {
    let name = match table.get("name").map(|name| (name.get_ref(), name.span())) {
        Some((DeValue::String(name), _)) if !name.is_empty() => name.to_string(),
        Some((_, span)) => return Err(Bad::new(text, &span, "name is a word in quotes".to_owned())),
        None => return Err(Bad::new(text, &entry.span(), "the rule has no name; give it one".to_owned())),
    };
    let in_rule = |what: String| format!("rule '{}': {what}", name.escape_debug());
    let (mut targets, mut filters) = (Vec::new(), Filters { netns: Some(look_up.netns), ..Filters::default() });
    let (mut older_than, mut action, mut grace, mut remove_cwd) = (None, Action::Kill, GRACE, None);
    for (key, value) in table {
        let result = match &**key.get_ref() {
            "name" => Ok(()),
            "ports" => each(value, &|item| ports(item, sets)).map(|found| targets = found.concat()),
            "except" => each(value, &|item| ports(item, sets)).map(|found| filters.except = found.concat()),
            "proto" => proto(value).map(|found| match found {
                Protocol::Tcp => filters.tcp = true,
                Protocol::Udp => filters.udp = true,
            }),
            "addr" => each(value, &address).map(|found| filters.addresses = found),
            "env" => each(value, &|item| word(item)?.parse()).map(|found| filters.variables = found),
            "cgroup" => each(value, &|item| cgroup_path(word(item)?)).map(|found| filters.cgroups = found),
            "orphans" => truth(value).map(|found| filters.orphans = found),
            "command" => globs(value, glob).map(|found| filters.commands = found),
            "cwd" => globs(value, cwd).map(|found| filters.cwds = found),
            "unit" => globs(value, unit_glob).map(|found| filters.units = found),
            "user" => each(value, &|item| user(item, look_up)).map(|found| filters.uids = found),
            "netns" => netns(value, look_up.netns).map(|found| filters.netns = found),
            "older_than" => word(value).and_then(duration).map(|found| older_than = Some(found)),
            "grace" => word(value).and_then(duration).map(|found| grace = found),
            "remove_cwd" => word(value).and_then(directory_glob).map(|found| remove_cwd = Some(found)),
            "action" => match value.get_ref() {
                DeValue::String(word) if word == "kill" => Ok(()),
                DeValue::String(word) if word == "report" => {
                    action = Action::Report;
                    Ok(())
                }
                _ => Err("it is neither \"kill\" nor \"report\"".to_owned()),
            },
            other => {
                let what = in_rule(format!("there is no '{}'; a rule has {KEYS}", other.escape_debug()));
                return Err(Bad::new(text, &key.span(), what));
            }
        };
        result.map_err(|what| Bad::new(text, &value.span(), in_rule(format!("{}: {what}", key.get_ref()))))?;
    }
    let missing = |what: &str| Bad::new(text, &entry.span(), in_rule(what.to_owned()));
    let selector = Selector::new(targets, filters);
    if selector.is_empty() {
        return Err(missing(EMPTY));
    }
    let older_than = older_than.ok_or_else(|| missing("it says no age; give it older_than = \"24h\""))?;
    if action == Action::Report && remove_cwd.is_some() {
        return Err(missing("what is only reported leaves its directory; leave out remove_cwd"));
    }
    Ok(Rule { name, selector, older_than, action, grace, remove_cwd })
}

fn word<'a>(value: &'a Spanned<DeValue<'_>>) -> Result<&'a str, String> {
    match value.get_ref() {
        DeValue::String(word) => Ok(word),
        other => Err(format!("a value of type {} is no text in quotes", other.type_str())),
    }
}

/// One, or a list of at least one.
fn each<T>(
    value: &Spanned<DeValue<'_>>,
    read: &dyn Fn(&Spanned<DeValue<'_>>) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    match value.get_ref() {
        // Else it would let everything pass.
        DeValue::Array(items) if items.is_empty() => Err("the list is empty; leave it out, or fill it".to_owned()),
        DeValue::Array(items) => items.iter().map(read).collect(),
        _ => Ok(vec![read(value)?]),
    }
}

fn globs(
    value: &Spanned<DeValue<'_>>,
    compile: fn(&str) -> Result<GlobMatcher, String>,
) -> Result<Vec<GlobMatcher>, String> {
    each(value, &|item| compile(word(item)?))
}

/// The agent is in no directory that a path could begin in.
fn cwd(text: &str) -> Result<GlobMatcher, String> {
    cwd_glob(text, &|| Err("a directory begins with / or with a glob, such as /tmp/web_*".to_owned()))
}

fn address(value: &Spanned<DeValue<'_>>) -> Result<IpAddr, String> {
    let text = word(value)?;
    text.parse().map_err(|_| format!("'{}' is no IP address", text.escape_debug()))
}

fn proto(value: &Spanned<DeValue<'_>>) -> Result<Protocol, String> {
    match value.get_ref() {
        DeValue::String(word) if word == "tcp" => Ok(Protocol::Tcp),
        DeValue::String(word) if word == "udp" => Ok(Protocol::Udp),
        _ => Err("it is neither \"tcp\" nor \"udp\"".to_owned()),
    }
}

fn truth(value: &Spanned<DeValue<'_>>) -> Result<bool, String> {
    match value.get_ref() {
        DeValue::Boolean(truth) => Ok(*truth),
        _ => Err("it is neither true nor false".to_owned()),
    }
}

fn ports(value: &Spanned<DeValue<'_>>, sets: &Sets) -> Result<Vec<Target>, String> {
    match value.get_ref() {
        DeValue::String(text) if text.contains('@') => {
            let words: Vec<&str> = text.split(',').map(str::trim).collect();
            parse_targets(&words, sets).map_err(|bad| bad.to_string())
        }
        other => targets_of(other),
    }
}

fn user(value: &Spanned<DeValue<'_>>, look_up: &LookUp<'_>) -> Result<u32, String> {
    let text = match value.get_ref() {
        DeValue::Integer(number) => number.as_str(),
        _ => word(value)?,
    };
    let uid = (look_up.uid_of)(text).or_else(|| text.parse().ok());
    uid.ok_or_else(|| format!("no user is called '{}'; use a name of this host or a uid", text.escape_debug()))
}

fn netns(value: &Spanned<DeValue<'_>>, own: NetnsId) -> Result<Option<NetnsId>, String> {
    let text = match value.get_ref() {
        DeValue::Integer(number) => number.as_str(),
        _ => word(value)?,
    };
    match text {
        "self" => Ok(Some(own)),
        "all" => Ok(None),
        _ => text
            .parse()
            .map(Some)
            .map_err(|_| "use \"self\", \"all\", or the number that `readlink /proc/PID/ns/net` shows".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Selection;

    fn rules(text: &str) -> Result<Vec<Rule>, Bad> {
        rules_in(text, &LookUp { uid_of: &|name| (name == "al").then_some(1000), netns: 7 })
    }

    #[test]
    fn a_rule_is_read_as_it_was_meant() {
        let text = r#"
            [sets]
            web = [8000, "9000-9500/tcp"]
            [[rule]]
            name = "web"
            ports = ["8080-8090", "@web"]
            command = "python*"
            cwd = ["/tmp/web_*", "/srv/../tmp/x/"]
            user = ["al", 5]
            unit = "my.service"
            except = [8085, "@dev"]
            proto = "tcp"
            addr = "127.0.0.1"
            env = ["JOB", "CI=1"]
            cgroup = "/sys/fs/cgroup/ci"
            orphans = true
            netns = "all"
            older_than = "24h"
            grace = "10s"
            remove_cwd = "/tmp/web_*"
            [[rule]]
            name = "tell"
            ports = 3000
            older_than = "90s"
            action = "report"
        "#;
        let [web, tell] = &rules(text).unwrap()[..] else { panic!("two rules") };
        let expected = serde_json::json!({"targets": ["8080-8090", "8000", "9000-9500/tcp"], "uids": [1000, 5],
            "commands": ["python*"], "cwds": ["/tmp/web_*", "/tmp/x"], "units": ["my.service"], "except": ["8085", "3000", "8000", "8080"], "tcp": true, "addresses": ["127.0.0.1"],
            "env": ["JOB", "CI=1"], "cgroups": ["/ci"], "orphans": true, "netns": "all"});
        assert_eq!(serde_json::to_value(Selection::of(&web.selector)).unwrap(), expected);
        assert_eq!((web.older_than, web.grace), (Duration::from_hours(24), Duration::from_secs(10)));
        assert_eq!(
            (web.action, web.remove_cwd.as_ref().map(|glob| glob.glob().glob())),
            (Action::Kill, Some("/tmp/web_*"))
        );
        assert_eq!(
            (&*tell.name, tell.action, tell.grace, tell.older_than.as_secs()),
            ("tell", Action::Report, GRACE, 90)
        );
        assert_eq!(tell.selector.filters().netns, Some(7));
        assert_eq!(rules("[sets]\nx = 1\n").unwrap().len(), 0);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, line, want) in [
            (
                "[[Rule]]\nname = 'x'",
                1,
                "there is no table [[Rule]]; a configuration has [sets], [access] and [[rule]]",
            ),
            ("[rule]\nname = 'x'", 1, "'rule' is not a list; write [[rule]] on a line of its own"),
            ("rule = 1", 1, "'rule' is not a list; write [[rule]] on a line of its own"),
            ("rule = [1]", 1, "'rule' is not a list of tables; write [[rule]] on a line of its own"),
            ("\n[[rule]]\nports = 1", 2, "the rule has no name; give it one"),
            ("[[rule]]\nname = 1", 2, "name is a word in quotes"),
            (
                "[[rule]]\nname = 'x'\nolder_than = '1h'",
                1,
                "rule 'x': it would meet every server; give it ports, addr, command, cwd, env, cgroup, unit, user or orphans",
            ),
            (
                "[[rule]]\nname = 'x'\nnetns = 'all'\nolder_than = '1h'",
                1,
                "rule 'x': it would meet every server; give it ports, addr, command, cwd, env, cgroup, unit, user or orphans",
            ),
            ("[[rule]]\nname = 'x'\nports = 1", 1, "rule 'x': it says no age; give it older_than = \"24h\""),
            (
                "[[rule]]\nname = 'x'\nport = 1",
                3,
                "rule 'x': there is no 'port'; a rule has name, ports, except, proto, addr, command, cwd, env, cgroup, unit, user, orphans, netns, older_than, action, grace and remove_cwd",
            ),
            ("[[rule]]\nname = 'x'\nports = 0", 3, "rule 'x': ports: '0' is out of range; ports go from 1 to 65535"),
            ("[[rule]]\nname = 'x'\nports = []", 3, "rule 'x': ports: the list is empty; leave it out, or fill it"),
            ("[[rule]]\nname = 'x'\nports = '@no'", 3, "rule 'x': ports: no set of ports is named '@no'; known: @dev"),
            (
                "[[rule]]\nname = 'x'\ncwd = './web'",
                3,
                "rule 'x': cwd: a directory begins with / or with a glob, such as /tmp/web_*",
            ),
            ("[[rule]]\nname = 'x'\ncwd = 5", 3, "rule 'x': cwd: a value of type integer is no text in quotes"),
            (
                "[[rule]]\nname = 'x'\nuser = 'eve'",
                3,
                "rule 'x': user: no user is called 'eve'; use a name of this host or a uid",
            ),
            ("[[rule]]\nname = 'x'\nproto = 'icmp'", 3, "rule 'x': proto: it is neither \"tcp\" nor \"udp\""),
            ("[[rule]]\nname = 'x'\naddr = 'home'", 3, "rule 'x': addr: 'home' is no IP address"),
            ("[[rule]]\nname = 'x'\nenv = '=1'", 3, "rule 'x': env: use NAME or NAME=VALUE"),
            ("[[rule]]\nname = 'x'\norphans = 1", 3, "rule 'x': orphans: it is neither true nor false"),
            (
                "[[rule]]\nname = 'x'\nolder_than = 5",
                3,
                "rule 'x': older_than: a value of type integer is no text in quotes",
            ),
            (
                "[[rule]]\nname = 'x'\nolder_than = 'soon'",
                3,
                "rule 'x': older_than: use a duration such as 250ms, 90s or 24h",
            ),
            ("[[rule]]\nname = 'x'\naction = 'maim'", 3, "rule 'x': action: it is neither \"kill\" nor \"report\""),
            (
                "[[rule]]\nname = 'x'\nremove_cwd = 'tmp'",
                3,
                "rule 'x': remove_cwd: a directory to remove begins with /, such as /tmp/web_*",
            ),
            (
                "[[rule]]\nname = 'x'\nnetns = 'blue'",
                3,
                "rule 'x': netns: use \"self\", \"all\", or the number that `readlink /proc/PID/ns/net` shows",
            ),
            (
                "[[rule]]\nname='x'\nports=1\nolder_than='1s'\n[[rule]]\nname='x'\nports=1\nolder_than='1s'",
                5,
                "two rules are called 'x'; give each its own name",
            ),
            (
                "[[rule]]\nname='x'\nports=1\nolder_than='1s'\naction='report'\nremove_cwd='/a/b'",
                1,
                "rule 'x': what is only reported leaves its directory; leave out remove_cwd",
            ),
        ] {
            assert_eq!(rules(text).unwrap_err(), Bad { line, what: want.to_owned() }, "{text}");
        }
    }
}
