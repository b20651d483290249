//! `[access]`: whom the agent tells what, and for whom it kills. Narrows what everybody may by default; never widens it.
//!
//! ```toml
//! [access]
//! list = "own"      # or "all": who is not root is told of listeners of its own uid only
//! kill = "wheel"    # or "all", or a gid: nobody but root and the members of this group may ask for a kill
//! ```

use std::io;
use std::ops::Range;

use toml::de::DeValue;

use super::{Bad, known, parse, table};

/// What the agent tells and does for whom. Root is never narrowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    pub told: Told,
    pub killers: Killers,
}

/// Of which listeners an ordinary user is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Told {
    #[default]
    All,
    /// Those that a process of its uid holds, or whose socket belongs to its uid.
    Own,
}

/// Who may ask for a kill at all; whether it may have this very process killed is another question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Killers {
    #[default]
    All,
    Group {
        gid: u32,
        /// As written.
        name: String,
    },
}

impl Access {
    /// The uid whose listeners are all that the caller is told of; `None`: it is told of all.
    pub fn only(&self, uid: u32) -> Option<u32> {
        (self.told == Told::Own && uid != 0).then_some(uid)
    }

    /// Whether the caller may ask for kills. `groups` are those that the kernel says it is in; asked only where they
    /// matter.
    ///
    /// # Errors
    /// A sentence for the caller.
    pub fn may_kill(&self, uid: u32, groups: impl FnOnce() -> io::Result<Vec<u32>>) -> Result<(), String> {
        let Killers::Group { gid, name } = &self.killers else { return Ok(()) };
        if uid == 0 {
            return Ok(());
        }
        match groups() {
            Ok(groups) if groups.contains(gid) => Ok(()),
            Ok(_) => {
                Err(format!("the agent kills for root and the group {name} only, and you are not in it; use sudo"))
            }
            Err(error) => {
                Err(format!("the agent kills for the group {name} only, and cannot read your groups: {error}"))
            }
        }
    }
}

/// What the text of a configuration says of access; `gid_of` looks up a group by its name.
///
/// # Errors
/// Where the text is not TOML, has a table that no configuration has, or `[access]` has what it cannot have. What the other
/// tables say is not looked at.
pub fn access_in(text: &str, gid_of: &dyn Fn(&str) -> Option<u32>) -> Result<Access, Bad> {
    let document = parse(text)?;
    known(text, &document)?;
    let mut access = Access::default();
    let Some(entries) = table(text, &document, "access")? else { return Ok(access) };
    for (key, value) in entries {
        let bad = |span: Range<usize>, what: String| Err(Bad::new(text, &span, what));
        match (&**key.get_ref(), value.get_ref()) {
            ("list", DeValue::String(word)) if word == "all" => access.told = Told::All,
            ("list", DeValue::String(word)) if word == "own" => access.told = Told::Own,
            ("list", _) => return bad(value.span(), "list is neither \"all\" nor \"own\"".to_owned()),
            ("kill", DeValue::String(word)) if word == "all" => access.killers = Killers::All,
            ("kill", DeValue::String(group)) => match gid_of(group).or_else(|| group.parse().ok()) {
                Some(gid) => access.killers = Killers::Group { gid, name: group.to_string() },
                None => {
                    let shown = group.escape_debug();
                    let what = format!("no group is called '{shown}'; use a group of this host, a gid or \"all\"");
                    return bad(value.span(), what);
                }
            },
            ("kill", DeValue::Integer(number)) => match u32::from_str_radix(number.as_str(), number.radix()) {
                Ok(gid) => access.killers = Killers::Group { gid, name: gid.to_string() },
                Err(_) => return bad(value.span(), format!("'{}' is not a gid", number.as_str())),
            },
            ("kill", _) => return bad(value.span(), "kill is neither \"all\" nor a group".to_owned()),
            (other, _) => {
                let what = format!("[access] has no '{}'; it has list and kill", other.escape_debug());
                return bad(key.span(), what);
            }
        }
    }
    Ok(access)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Access, Bad> {
        access_in(text, &|name| (name == "wheel").then_some(10))
    }

    #[test]
    fn access_is_read_as_it_was_meant() {
        let wheel = || Killers::Group { gid: 10, name: "wheel".to_owned() };
        for (text, told, killers) in [
            ("", Told::All, Killers::All),
            ("[sets]\nx = \"nonsense\"\n", Told::All, Killers::All),
            ("[access]\n", Told::All, Killers::All),
            ("[access]\nlist = \"all\"\nkill = \"all\"\n", Told::All, Killers::All),
            ("[access]\nlist = \"own\"\n", Told::Own, Killers::All),
            ("[access]\nkill = \"wheel\"\n", Told::All, wheel()),
            ("access.kill = \"wheel\"\n", Told::All, wheel()),
            ("[access]\nkill = \"27\"\n", Told::All, Killers::Group { gid: 27, name: "27".to_owned() }),
            ("[access]\nkill = 27\n", Told::All, Killers::Group { gid: 27, name: "27".to_owned() }),
        ] {
            assert_eq!(read(text), Ok(Access { told, killers }), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, line, want) in [
            ("[access]\nlist = \"some\"", 2, "list is neither \"all\" nor \"own\""),
            ("[access]\n\nlist = true", 3, "list is neither \"all\" nor \"own\""),
            ("[access]\nkill = \"whell\"", 2, "no group is called 'whell'; use a group of this host, a gid or \"all\""),
            ("[access]\nkill = \"\"", 2, "no group is called ''; use a group of this host, a gid or \"all\""),
            ("[access]\nkill = -1", 2, "'-1' is not a gid"),
            ("[access]\nkill = [10]", 2, "kill is neither \"all\" nor a group"),
            ("[access]\nlist = \"own\"\nkil = \"wheel\"", 3, "[access] has no 'kil'; it has list and kill"),
            ("[access]\n\"a\\nb\" = 1", 2, "[access] has no 'a\\nb'; it has list and kill"),
            ("\naccess = 1", 2, "'access' is not a table; write [access] on a line of its own"),
            ("[[access]]\nlist = \"own\"", 1, "'access' is not a table; write [access] on a line of its own"),
            (
                "[sets]\na = 1\n[acces]\nlist = \"own\"",
                3,
                "there is no table [acces]; a configuration has [sets], [access] and [[rule]]",
            ),
            (
                "Access.list = \"own\"",
                1,
                "there is no table [Access]; a configuration has [sets], [access] and [[rule]]",
            ),
            (
                "\n[[rules]]\nname = \"x\"",
                2,
                "there is no table [[rules]]; a configuration has [sets], [access] and [[rule]]",
            ),
            ("list = \"own\"", 1, "'list' is in no table; a configuration has [sets], [access] and [[rule]]"),
            ("zeta = []\nalpha = 1", 1, "'zeta' is in no table; a configuration has [sets], [access] and [[rule]]"),
            ("[\"a\\u001b\"]", 1, "there is no table [a\\u{1b}]; a configuration has [sets], [access] and [[rule]]"),
        ] {
            assert_eq!(read(text), Err(Bad { line, what: want.to_owned() }), "{text}");
        }
        assert_eq!(read("\n[access").unwrap_err().line, 2);
    }

    #[test]
    fn root_is_never_narrowed_and_others_are() {
        let access = Access { told: Told::Own, killers: Killers::Group { gid: 10, name: "wheel".to_owned() } };
        assert_eq!((access.only(0), access.only(1000)), (None, Some(1000)));
        assert_eq!(Access::default().only(1000), None);
        let unasked = || panic!("nobody needs to know");
        assert_eq!(access.may_kill(0, unasked), Ok(()));
        assert_eq!(Access::default().may_kill(1000, unasked), Ok(()));
        assert_eq!(access.may_kill(1000, || Ok(vec![1000, 10])), Ok(()));
        let refused = access.may_kill(1000, || Ok(vec![1000])).unwrap_err();
        assert_eq!(refused, "the agent kills for root and the group wheel only, and you are not in it; use sudo");
        assert!(access.may_kill(1000, || Err(io::ErrorKind::Other.into())).is_err(), "not known is not permitted");
    }
}
