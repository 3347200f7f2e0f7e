//! What the payload says on the console.

use std::fmt;

/// The result of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It passed.
    Passed,
    /// It failed, and why.
    Failed(String),
    /// The machine lacks something.
    Ignored(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("ok"),
            Self::Failed(why) => write!(f, "FAILED: {why}"),
            Self::Ignored(why) => write!(f, "ignored: {why}"),
        }
    }
}

/// Something that the payload said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A test has begun.
    Begun(String),
    /// The test that has begun is over.
    Ended(Verdict),
    /// Somebody shall look at a page of physical memory and answer.
    Inspect { page: u64, seed: u64 },
    /// All tests are over.
    Done,
}

/// Makes events of the console's bytes.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    line: String,
    /// The beginning of the current line has been reported as [`Event::Begun`].
    begun: bool,
}

impl Parser {
    /// Takes what the console said next.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Event> {
        let mut events = Vec::new();
        for character in text.chars() {
            if character == '\n' {
                events.extend(self.end_line());
            } else if character != '\r' {
                self.line.push(character);
                events.extend(self.beginning());
            }
        }
        events
    }

    /// A test shows its name before it runs: the line begins long before it ends.
    fn beginning(&mut self) -> Option<Event> {
        if self.begun {
            return None; // a reason may look the same
        }
        let name = self.line.strip_prefix("test ")?.strip_suffix(" ... ")?;
        self.begun = true;
        Some(Event::Begun(name.to_owned()))
    }

    fn end_line(&mut self) -> Option<Event> {
        let line = std::mem::take(&mut self.line);
        let begun = std::mem::take(&mut self.begun);
        // What a test prints itself stands between its name and its verdict.
        let text = if begun { line.split_once(" ... ")?.1 } else { &line };
        if let Some(verdict) = verdict(text) {
            return Some(Event::Ended(verdict));
        }
        if let Some((page, seed)) = line.strip_prefix("inspect 0x").and_then(|rest| rest.split_once(' ')) {
            return Some(Event::Inspect { page: u64::from_str_radix(page, 16).ok()?, seed: seed.parse().ok()? });
        }
        (line.starts_with("payload: ") && line.contains(" passed; ")).then_some(Event::Done)
    }
}

fn verdict(text: &str) -> Option<Verdict> {
    if text == "ok" {
        return Some(Verdict::Passed);
    }
    let failed = text.strip_prefix("FAILED: ").map(|why| Verdict::Failed(why.to_owned()));
    failed.or_else(|| Some(Verdict::Ignored(text.strip_prefix("ignored: ")?.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(text: &str) -> Vec<Event> {
        Parser::default().push(text)
    }

    fn begun(name: &str) -> Event {
        Event::Begun(name.to_owned())
    }

    #[test]
    fn verdicts() {
        assert_eq!(events("test a.b ... ok\r\n"), [begun("a.b"), Event::Ended(Verdict::Passed)]);
        assert_eq!(
            events("test a ... FAILED: x ... y\n"),
            [begun("a"), Event::Ended(Verdict::Failed("x ... y".to_owned()))]
        );
        assert_eq!(
            events("test a ... ignored: needs 2 CPUs\n"),
            [begun("a"), Event::Ended(Verdict::Ignored("needs 2 CPUs".to_owned()))]
        );
        assert_eq!(events("payload: 3 passed; 0 failed; 1 ignored\n"), [Event::Done]);
    }

    #[test]
    fn a_test_is_known_before_it_ends() {
        let mut parser = Parser::default();
        assert_eq!(parser.push("test a.b ... "), [begun("a.b")]);
        assert_eq!(parser.push("o"), []);
        assert_eq!(parser.push("k\n"), [Event::Ended(Verdict::Passed)]);
    }

    #[test]
    fn what_a_test_prints_is_no_verdict() {
        let text = "test a ... \nbench SHARE 1 0\nok\n";
        assert_eq!(events(text), [begun("a"), Event::Ended(Verdict::Passed)]);
        assert_eq!(events("ravelin: ok\npayload: 2 CPUs\n\n"), []);
    }

    #[test]
    fn inspections() {
        let text = "test a ... \ninspect 0x4000f000 30\ntest a ... ok\n";
        let inspect = Event::Inspect { page: 0x4000_f000, seed: 30 };
        assert_eq!(events(text), [begun("a"), inspect, begun("a"), Event::Ended(Verdict::Passed)]);
    }
}
