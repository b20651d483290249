//! The protocol, in both directions.

use std::collections::HashMap;
use std::fmt::Debug;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::engine::Roster;
use crate::model::{Change, Listener};
use crate::render::{self, Clock, View, table::Detail};
use crate::wire::{Request, Response, Selection};

use super::{assert_lines, assert_one_line};

/// What is read is written as one line, which means the same.
fn read_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) -> Option<T> {
    let read: T = serde_json::from_slice(data).ok()?;
    let line = serde_json::to_string(&read).expect("what was read can be written");
    assert!(!line.contains('\n'));
    assert_eq!(serde_json::from_str::<T>(&line).expect("what was written can be read"), read);
    Some(read)
}

/// What a client may send.
pub fn request(data: &[u8]) {
    let Some(request) = read_back::<Request>(data) else { return };
    let (Request::List { selection }
    | Request::Who { selection }
    | Request::Watch { selection, .. }
    | Request::History { selection, .. }) = request
    else {
        return;
    };
    match selection.selector(Some(1)) {
        Ok(selector) => {
            let sent = Selection::of(&selector);
            let again = sent.selector(None).expect("what a selector says means something");
            assert_eq!(Selection::of(&again), sent);
        }
        Err(why) => assert_one_line(&why),
    }
}

/// What an agent may answer, and how it is shown.
pub fn response(data: &[u8]) {
    match read_back::<Response>(data) {
        Some(Response::Listener { listener, .. }) => show(&listener),
        Some(Response::Change { change }) => {
            assert_one_line(&render::text::change(&change, &view()));
            assert_one_line(&render::json::line(&render::json::change(&change, &view())));
            if let Change::Opened { listener, .. } | Change::Closed { listener, .. } = &change {
                show(listener);
            }
        }
        Some(Response::Life(life)) => {
            assert_lines(&render::history::table(std::slice::from_ref(&life), &view()));
            assert_one_line(&render::json::line(&render::history::json(&life, &view())));
        }
        _ => {}
    }
}

fn show(listener: &Listener) {
    for width in [None, Some(40)] {
        let view = View { width, ..view() };
        assert_lines(&render::table::table(std::slice::from_ref(listener), Detail::Holders, &view));
        assert_lines(&render::text::who(listener, &HashMap::new(), &Roster::default(), &view));
    }
    assert_one_line(&render::json::line(&render::json::listener(listener, &view())));
}

fn view() -> View<'static> {
    let clock = Clock { now_boot_ns: 1 << 50, now_wall: Timestamp::UNIX_EPOCH, tz: TimeZone::UTC };
    View { clock, users: &|uid| (uid == 0).then(|| "ro\u{1b}ot".to_owned()), euid: 0, width: None, colours: false }
}
