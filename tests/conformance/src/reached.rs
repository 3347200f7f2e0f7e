//! What tests and the checking build say that they have reached, summed up over all machines.
//!
//! Random tests count each call and how it ended, and the checking build each state, call and result, in lines such as
//!
//! ```text
//! random: SHARE SUCCESS 41
//! random: 5483 hypercalls
//! ravelin: model: reached Host SHARE SUCCESS 41
//! ravelin: model: calls 9120
//! ```

use std::collections::BTreeMap;

/// What a run with `--full` must reach: calls and results, and states, calls and results.
const REACHABLE: &str = include_str!("../reachable.txt");

/// Counts.
#[derive(Debug, Default)]
pub(crate) struct Reached {
    /// By call and result, or by state, call and result, as words.
    counts: BTreeMap<String, u64>,
    /// Hypercalls of random tests on machines that check.
    random: u64,
    /// Calls that the checking build has compared.
    compared: u64,
}

impl Reached {
    /// Takes what a machine has said on its console.
    pub(crate) fn take(&mut self, console: &str, checked: bool) {
        for line in console.lines() {
            let _ = self.take_line(line.trim_end(), checked);
        }
    }

    fn take_line(&mut self, line: &str, checked: bool) -> Option<()> {
        let (what, count) = if let Some((_, said)) = line.split_once("model: ") {
            if let Some(calls) = said.strip_prefix("calls ") {
                self.compared += calls.parse::<u64>().ok()?;
                return None;
            }
            said.strip_prefix("reached ")?.rsplit_once(' ')?
        } else {
            let said = line.strip_prefix("random: ")?;
            if let Some(hypercalls) = said.strip_suffix(" hypercalls") {
                self.random += if checked { hypercalls.parse().ok()? } else { 0 };
                return None;
            }
            said.rsplit_once(' ')?
        };
        // Calls and results are in upper case, other lines in sentences.
        let words: Vec<_> = what.split(' ').collect();
        let ([call, result] | [_, call, result]) = words[..] else { return None };
        if [call, result].iter().any(|word| word.contains(|c: char| c.is_ascii_lowercase())) {
            return None;
        }
        *self.counts.entry(what.to_owned()).or_default() += count.parse::<u64>().ok()?;
        Some(())
    }

    /// Hypercalls of random tests on machines that check.
    pub(crate) const fn random(&self) -> u64 {
        self.random
    }

    /// Calls that the checking build has compared.
    pub(crate) const fn compared(&self) -> u64 {
        self.compared
    }

    /// What has not been reached of what can be.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        expected(REACHABLE).filter(|what| !self.counts.contains_key(*what)).collect()
    }

    /// Prints a summary, with `full` after all counts, and then what is missing.
    pub(crate) fn print(&self, full: bool) {
        if full {
            self.counts.iter().for_each(|(what, count)| println!("reached {what} {count}"));
        }
        let (pairs, triples): (Vec<_>, Vec<_>) = self.counts.keys().partition(|what| what.split(' ').count() == 2);
        println!("reached: {} calls and results, {} states, calls and results", pairs.len(), triples.len());
        let missing = self.missing();
        println!("not reached of {}: {}", expected(REACHABLE).count(), missing.len());
        if full {
            missing.iter().for_each(|what| println!("not reached {what}"));
        }
        if self.compared != 0 {
            println!("{} calls compared with the model", self.compared);
        }
        if self.random != 0 {
            println!("{} hypercalls on the target without a difference", self.random);
        }
    }
}

/// The lines of a list that are neither empty nor comments.
fn expected(list: &'static str) -> impl Iterator<Item = &'static str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn counts_add_up() {
        let mut reached = Reached::default();
        let console = "test random.everything ... \r\nrandom: 2 rounds of 2000 steps from seed 1\r\n\
                       random: SHARE SUCCESS 41\r\nrandom: SHARE TOO_LARGE 1\r\nrandom: 5483 hypercalls\r\nok\r\n\
                       ravelin: model: reached Host SHARE SUCCESS 40\r\n\
                       ravelin: model: reached - SHARE INVALID 3\r\nravelin: model: calls 9120\r\n";
        reached.take(console, true);
        reached.take(console, false);
        let counts: Vec<_> = reached.counts.iter().map(|(what, &count)| (what.as_str(), count)).collect();
        let expected =
            [("- SHARE INVALID", 6), ("Host SHARE SUCCESS", 80), ("SHARE SUCCESS", 82), ("SHARE TOO_LARGE", 2)];
        assert_eq!(counts, expected);
        assert_eq!((reached.random(), reached.compared()), (5483, 18_240));
    }

    #[test]
    fn other_lines_are_none_of_it() {
        let mut reached = Reached::default();
        reached.take("random: again with 'test=random.everything seed=7 rounds=1'\nravelin: model: nothing\n", true);
        reached.take("random: SHARE\nrandom: SHARE SUCCESS many\nrandom: hypercalls\n", true);
        assert!(reached.counts.is_empty());
        assert_eq!(reached.random(), 0);
    }

    #[test]
    fn what_is_not_reached_is_missing() {
        let mut reached = Reached::default();
        let all: Vec<_> = expected(REACHABLE).collect();
        assert_eq!(reached.missing(), all);
        let (last, others) = all.split_last().unwrap();
        others.iter().for_each(|what| reached.take(&format!("random: {what} 1"), true));
        assert_eq!(reached.missing(), [*last]);
    }

    #[test]
    fn the_list_has_no_line_twice_and_names_calls() {
        let all: Vec<_> = expected(REACHABLE).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        for call in ravelin_abi::CALLS {
            let done = format!("{} SUCCESS", call.name);
            assert!(all.contains(&done.as_str()), "{done}");
        }
    }
}
