//! Licence expressions, as far as crates use them: `A OR B`, `A AND B`, `A WITH exception`, parentheses, and the old `A/B`.

/// Whether the expression can be met with the allowed licences alone; `false` if it does not parse.
pub(crate) fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Parser { words: &words, allowed };
    parser.any().is_some_and(|met| met && parser.words.is_empty())
}

struct Parser<'a> {
    words: &'a [&'a str],
    allowed: &'a [&'a str],
}

impl Parser<'_> {
    fn next_is(&mut self, word: &str) -> bool {
        let matched = self.words.first() == Some(&word);
        if matched {
            self.words = &self.words[1..];
        }
        matched
    }

    fn any(&mut self) -> Option<bool> {
        let mut met = self.every()?;
        while self.next_is("OR") {
            met |= self.every()?;
        }
        Some(met)
    }

    fn every(&mut self) -> Option<bool> {
        let mut met = self.one()?;
        while self.next_is("AND") {
            met &= self.one()?;
        }
        Some(met)
    }

    fn one(&mut self) -> Option<bool> {
        if self.next_is("(") {
            let met = self.any()?;
            return self.next_is(")").then_some(met);
        }
        let (licence, rest) = self.words.split_first()?;
        self.words = rest;
        if self.next_is("WITH") {
            // An exception only adds rights.
            self.words = self.words.split_first()?.1;
        }
        Some(self.allowed.contains(licence))
    }
}

#[cfg(test)]
mod tests {
    use super::is_allowed;

    #[track_caller]
    fn check(expression: &str, expected: bool) {
        assert_eq!(is_allowed(expression, &["MIT", "Apache-2.0", "ISC"]), expected, "{expression}");
    }

    #[test]
    fn one_branch_of_or_is_enough_and_and_needs_all() {
        check("MIT", true);
        check("GPL-3.0", false);
        check("GPL-3.0 OR MIT", true);
        check("MIT/Apache-2.0", true);
        check("MIT AND GPL-3.0", false);
        check("ISC AND (GPL-3.0 OR Apache-2.0)", true);
        check("(MIT OR Apache-2.0) AND GPL-3.0", false);
        check("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true);
    }

    #[test]
    fn what_does_not_parse_is_not_allowed() {
        check("", false);
        check("MIT OR", false);
        check("(MIT", false);
        check("MIT MIT", false);
        check("MIT WITH", false);
    }
}
