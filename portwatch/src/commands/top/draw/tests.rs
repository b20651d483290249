use std::sync::Arc;

use portwatch::model::{Change, Listener};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::super::row::Sort;
use super::super::state::tests::{NOW, asked, press, server, three, view};
use super::*;

/// Escape, a line end, a carriage return and a right-to-left override.
const HOSTILE: &str = "a\u{1b}[2Jb\nc\rd\u{202e}e";

fn screen(state: &mut State, columns: u16, rows: u16, seconds: u64) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    terminal.draw(|frame| draw(frame, state, "agent", &View { colours: true, ..view(seconds) })).unwrap();
    terminal.backend().buffer().clone()
}

/// The lines of the screen, without what is blank at their ends.
fn text(state: &mut State, columns: u16, rows: u16) -> String {
    let screen = screen(state, columns, rows, 0);
    let line = |y| {
        let mut line = String::new();
        let mut x = 0;
        while x < columns {
            let symbol = screen[(x, y)].symbol();
            line += symbol;
            x += (width(symbol) as u16).max(1);
        }
        line.trim_end().to_owned() + "\n"
    };
    (0..rows).map(line).collect()
}

#[track_caller]
fn check(state: &mut State, columns: u16, rows: u16, want: &str) {
    let got = text(state, columns, rows);
    assert_eq!(got, want, "\n--- got:\n{got}\n--- want:\n{want}");
}

#[test]
fn a_table_with_a_line_about_the_host_and_one_about_keys() {
    check(
        &mut three(),
        80,
        7,
        "\
portwatch top  tcp 3  udp 0  by port  agent
PROTO  ADDRESS    PORT  PID    USER  NAME     AGE  COMMAND
tcp    127.0.0.1    80  160    root  nginx     2d  nginx
tcp    127.0.0.1  3000  6000   al    node     30s  node app.js
tcp    127.0.0.1  8000  16000  al    Python3   5m  Python3 -m http

q quit  / filter  s sort  r reverse  ⏎ details  x end  ? help
",
    );
    let mut filtered = three();
    press(&mut filtered, "/00⏎sr");
    check(
        &mut filtered,
        60,
        5,
        "\
portwatch top  tcp 3  udp 0  2 shown  by age reversed  agent
PROTO  ADDRESS    PORT  PID    USER  NAME     AGE  COMMAND
tcp    127.0.0.1  8000  16000  al    Python3   5m  Python3 …
tcp    127.0.0.1  3000  6000   al    node     30s  node app…
/00  (Esc clears)  q quit  / filter  s sort  r reverse  ⏎ d…
",
    );
}

#[test]
fn a_plan_is_shown_below_the_table_with_the_question_last() {
    check(
        &mut asked(true),
        70,
        16,
        "\
portwatch top  tcp 3  udp 0  by port  agent
PROTO  ADDRESS    PORT  PID    USER  NAME     AGE  COMMAND
tcp    127.0.0.1    80  160    root  nginx     2d  nginx
tcp    127.0.0.1  3000  6000   al    node     30s  node app.js
tcp    127.0.0.1  8000  16000  al    Python3   5m  Python3 -m http







── to be freed: 127.0.0.1:80/tcp ─────────────────────────────────────
PID  NAME   USER  ADDRESS           AGE  COMMAND
160  nginx  root  127.0.0.1:80/tcp   0s  nginx
end nginx (160)? [y/N]
",
    );
    // However small the screen, the question is on it.
    for (columns, rows) in [(80, 3), (30, 2), (22, 1), (10, 6)] {
        let text = text(&mut asked(true), columns, rows).replace('\n', "");
        assert!(text.ends_with("[y/N]"), "{columns}x{rows}: {text}");
    }
}

#[test]
fn details_are_what_who_says() {
    let mut state = three();
    press(&mut state, "ji");
    let text = text(&mut state, 60, 30);
    let expected = "── tcp 127.0.0.1:3000 ────";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("\n  node (6000) binder\n") && text.contains("\n    command    node app.js\n"), "{text}");
    // On a small screen they are shown alone, and scrolled.
    press(&mut state, "⇲");
    let text = self::text(&mut state, 60, 6);
    assert!(text.contains(" of ") && !text.contains("PROTO"), "{text}");
}

#[test]
fn what_opened_is_green_what_closed_is_struck_and_the_selected_row_reversed() {
    let mut state = three();
    state.apply(&Change::Opened { at: NOW, listener: server(22, 0, 0, "sshd") }, true, &view(0));
    state.apply(&Change::Closed { at: NOW, listener: server(3000, 0, 1, ""), by: None }, true, &view(0));
    let screen = screen(&mut state, 80, 10, 1);
    let style = |y: u16| {
        let cell = &screen[(0, y)];
        (cell.fg, cell.modifier)
    };
    assert_eq!(style(2), (Color::Green, Modifier::BOLD), "22");
    assert_eq!(style(3), (Color::Reset, Modifier::REVERSED), "80");
    assert_eq!(style(4), (Color::Reset, Modifier::DIM | Modifier::CROSSED_OUT), "3000");
    assert_eq!(style(5), (Color::Reset, Modifier::empty()), "8000");
}

#[test]
fn without_colours_there_are_none() {
    let mut state = three();
    state.apply(&Change::Opened { at: NOW, listener: server(22, 0, 0, "sshd") }, true, &view(0));
    let coloured = |colours| {
        let mut terminal = Terminal::new(TestBackend::new(80, 10)).unwrap();
        let view = View { colours, ..view(0) };
        terminal.draw(|frame| draw(frame, &mut three(), "poll: why", &view)).unwrap();
        terminal.backend().buffer().content().iter().any(|cell| cell.fg != Color::Reset)
    };
    assert_eq!((coloured(true), coloured(false)), (true, false));
}

/// Names that a terminal would obey, and some that are wide.
fn hostile() -> [Listener; 2] {
    let mut hostile = server(9000, 5, 1, "x");
    let process = Arc::get_mut(&mut hostile.holders[0].process).unwrap();
    process.name = HOSTILE.to_owned();
    process.command = [HOSTILE.to_owned(), "\u{9b}31m\u{200b}\u{7f}é".to_owned()].into();
    process.cwd = Some(format!("/tmp/{HOSTILE}"));
    [hostile, server(9001, 5, 1, "日本語サーバー --名前")]
}

#[test]
fn a_process_cannot_draw_on_the_screen() {
    for keys in ["", "⏎", "x", "?", "/a\u{202e}\u{1b}[", "/日本"] {
        for (columns, rows) in (0..120).step_by(7).flat_map(|columns| (0..20).map(move |rows| (columns, rows))) {
            let mut state = State::new(Sort::Name, None);
            state.refill(hostile().iter(), &view(0));
            state.arrange(10, NOW);
            press(&mut state, keys);
            let conflict = Change::Resync { at: NOW, lost: 1 };
            state.apply(&conflict, true, &view(0));
            let screen = screen(&mut state, columns, rows, 0);
            let is_hazard = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
            let found = screen.content().iter().find(|cell| cell.symbol().contains(is_hazard));
            assert_eq!(found, None, "{keys} {columns}x{rows}");
        }
    }
    let mut state = State::new(Sort::Port, None);
    state.refill(hostile().iter(), &view(0));
    check(
        &mut state,
        110,
        5,
        "\
portwatch top  tcp 2  udp 0  by port  agent
PROTO  ADDRESS    PORT  PID    USER  NAME                      AGE  COMMAND
tcp    127.0.0.1  9000  18000  al    a\\x1b[2Jb\\nc\\rd\\u{202e}e   5s  a\\x1b[2Jb\\nc\\rd\\u{202e}e \\x9b31m\\u{200b}\\…
tcp    127.0.0.1  9001  18002  al    日本語サーバー             5s  日本語サーバー --名前
q quit  / filter  s sort  r reverse  ⏎ details  x end  ? help
",
    );
}

#[test]
fn lines_break_between_words_where_there_are_any() {
    for (line, columns, pieces) in [
        ("", 5, &[""][..]),
        ("abcde", 5, &["abcde"]),
        ("ab cd", 4, &["ab ", "cd"]),
        ("ab cd e", 5, &["ab cd", "e"]),
        ("  abcdef", 4, &["  ab", "cdef"]),
        ("日本語", 4, &["日本", "語"]),
        ("日本", 1, &["日", "本"]),
        ("ab", 0, &["a", "b"]),
    ] {
        assert_eq!(wrap(line, columns), pieces, "{line}");
    }
}
