//! Just enough of Rust's grammar to measure functions and to tell code from comments and strings.

/// A source file: its lines, and the same text with comments and literals blanked out.
pub(super) struct Source {
    /// Comments, strings and characters are spaces here; line breaks are kept, so line numbers agree.
    code: String,
    /// Lines before the first `#[cfg(test)]` at the start of a line.
    pub(super) lines_without_tests: usize,
}

/// A function: its name and where it stands.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Function<'a> {
    pub(super) name: &'a str,
    /// Counted from 1.
    pub(super) first_line: usize,
    pub(super) lines: usize,
}

impl Source {
    pub(super) fn read(text: &str) -> Source {
        let lines_without_tests =
            text.lines().position(|line| line.starts_with("#[cfg(test)]")).unwrap_or_else(|| text.lines().count());
        Source { code: blank(text), lines_without_tests }
    }

    /// Lines of code that are not tests, counted from 1.
    pub(super) fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.code.lines().take(self.lines_without_tests))
    }

    /// Functions with a body, tests left out, in order of their first line.
    pub(super) fn functions(&self) -> Vec<Function<'_>> {
        let end = self.code.split_inclusive('\n').take(self.lines_without_tests).map(str::len).sum();
        let code = &self.code[..end];
        let mut functions = Vec::new();
        let mut from = 0;
        while let Some(at) = find_word(&code[from..], "fn").map(|offset| from + offset) {
            from = at + 2;
            let rest = code[from..].trim_start();
            let name = rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default();
            if name.is_empty() {
                // A function pointer type.
                continue;
            }
            if let Some(body) = body_end(&code[from..]) {
                let first_line = 1 + code[..at].matches('\n').count();
                let lines = 1 + code[at..from + body].matches('\n').count();
                functions.push(Function { name, first_line, lines });
            }
        }
        functions
    }
}

/// Where the word stands alone.
pub(super) fn find_word(code: &str, word: &str) -> Option<usize> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .map(|(at, _)| at)
        .find(|&at| !code[..at].ends_with(is_name) && !code[at + word.len()..].starts_with(is_name))
}

/// End of the body that begins at the first `{` outside brackets; `None` if `;` comes first.
fn body_end(code: &str) -> Option<usize> {
    let mut brackets = 0_u32;
    let mut braces = 0_u32;
    for (at, c) in code.char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets = brackets.saturating_sub(1),
            ';' if brackets == 0 && braces == 0 => return None,
            '{' => braces += 1,
            '}' => {
                braces = braces.saturating_sub(1);
                if braces == 0 {
                    return Some(at + 1);
                }
            }
            _ => {} // All other characters are the function's own business.
        }
    }
    None
}

/// What the scanner is inside of.
enum Inside {
    Code,
    LineComment,
    /// Rust's block comments nest.
    BlockComment(u32),
    /// A string that ends with a quote and this many `#`; `None` means that backslashes escape.
    String(Option<usize>),
}

fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = String::with_capacity(text.len());
    let mut inside = Inside::Code;
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let (next, taken) = match inside {
            Inside::Code => from_code(text, at),
            Inside::LineComment => (if rest[0] == b'\n' { Inside::Code } else { Inside::LineComment }, 1),
            Inside::BlockComment(depth) if rest.starts_with(b"/*") => (Inside::BlockComment(depth + 1), 2),
            Inside::BlockComment(1) if rest.starts_with(b"*/") => (Inside::Code, 2),
            Inside::BlockComment(depth) if rest.starts_with(b"*/") => (Inside::BlockComment(depth - 1), 2),
            Inside::BlockComment(depth) => (Inside::BlockComment(depth), 1),
            Inside::String(None) if rest[0] == b'\\' => (Inside::String(None), 2.min(rest.len())),
            Inside::String(None) => (if rest[0] == b'"' { Inside::Code } else { Inside::String(None) }, 1),
            Inside::String(Some(hashes)) => {
                let closes = rest[0] == b'"' && rest[1..].iter().take_while(|&&byte| byte == b'#').count() >= hashes;
                if closes { (Inside::Code, 1 + hashes) } else { (Inside::String(Some(hashes)), 1) }
            }
        };
        let is_code = matches!((&inside, &next), (Inside::Code, Inside::Code)) && !(taken > 1 && rest[0] == b'\'');
        for &byte in &rest[..taken] {
            code.push(if byte == b'\n' || (is_code && byte.is_ascii()) { char::from(byte) } else { ' ' });
        }
        inside = next;
        at += taken;
    }
    code
}

/// What begins at this place of the code, and how many bytes that takes.
fn from_code(text: &str, at: usize) -> (Inside, usize) {
    let rest = &text.as_bytes()[at..];
    match rest[0] {
        b'/' if rest.starts_with(b"//") => (Inside::LineComment, 2),
        b'/' if rest.starts_with(b"/*") => (Inside::BlockComment(1), 2),
        b'"' => (Inside::String(None), 1),
        b'r' if !text[..at].ends_with(|c: char| (c.is_alphanumeric() && c != 'b') || c == '_') => {
            let hashes = rest[1..].iter().take_while(|&&byte| byte == b'#').count();
            if rest.get(1 + hashes) == Some(&b'"') {
                (Inside::String(Some(hashes)), 2 + hashes)
            } else {
                (Inside::Code, 1)
            }
        }
        b'\'' => (Inside::Code, character(&text[at..])),
        _ => (Inside::Code, 1), // Any other byte is code.
    }
}

/// Bytes of the character literal that begins here, or 1 for a lifetime's quote.
fn character(text: &str) -> usize {
    let mut letters = text.char_indices().skip(1);
    match letters.next() {
        Some((_, '\\')) => text[3.min(text.len())..].find('\'').map_or(1, |end| 3 + end + 1),
        Some(_) => letters.next().filter(|&(_, c)| c == '\'').map_or(1, |(end, _)| end + 1),
        None => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn functions(text: &str) -> Vec<(String, usize, usize)> {
        let source = Source::read(text);
        source.functions().into_iter().map(|f| (f.name.to_owned(), f.first_line, f.lines)).collect()
    }

    #[test]
    fn braces_in_strings_comments_and_characters_do_not_count() {
        let text = "fn a() {\n  \"}\"; // }\n  '}'; r#\"\"}\"#; /* } /* } */ */\n}\nfn b<'a>() {}\n";
        assert_eq!(functions(text), [("a".into(), 1, 4), ("b".into(), 5, 1)]);
    }

    #[test]
    fn declarations_and_function_types_have_no_body() {
        let text = "trait T { fn a(&self) -> [u8; 4]; fn b(f: fn(u8) -> u8) { } }\n";
        assert_eq!(functions(text), [("b".into(), 1, 1)]);
    }

    #[test]
    fn escapes_in_literals_are_understood() {
        let text = "fn a() { let q = '\\''; let s = \"\\\"}\"; let u = '\\u{7d}'; let b = b'{'; }\nfn c() {}\n";
        assert_eq!(functions(text), [("a".into(), 1, 1), ("c".into(), 2, 1)]);
    }

    #[test]
    fn tests_are_left_out() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() {}\n}\n";
        assert_eq!(functions(text), [("a".into(), 1, 1)]);
        assert_eq!(Source::read(text).lines_without_tests, 1);
    }

    #[test]
    fn words_stand_alone() {
        assert_eq!(find_word("unsafe_code unsafe {", "unsafe"), Some(12));
        assert_eq!(find_word("is_unsafe", "unsafe"), None);
    }

    #[test]
    fn non_ascii_text_keeps_line_numbers() {
        let text = "// größer\nfn a() { \"ä\"; 'é'; }\n";
        assert_eq!(functions(text), [("a".into(), 2, 1)]);
    }
}
