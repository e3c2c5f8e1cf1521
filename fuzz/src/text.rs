//! Changes to text that mostly keep its shape: lines move and repeat, indentation shifts, words become other words.

use rand::Rng;
use rand::rngs::SmallRng;

/// What YAML, addresses and names are sensitive to.
const WORDS: [&str; 26] = [
    "",
    "{}",
    "[]",
    "null",
    "~",
    "yes",
    "0644",
    "-1",
    "65536",
    "99999999999999999999",
    "\"",
    "'",
    "&a",
    "*a",
    "<<: *a",
    "---",
    "!!binary",
    "|",
    ">-",
    "\t",
    "[::1]",
    "[fe80::1%eth0]:80",
    "10.0.0.0/33",
    "*",
    "\u{0}",
    "spiffe://td/ns/a/sa/b",
];

/// One change.
pub(crate) fn change(input: &[u8], other: &[u8], rng: &mut SmallRng) -> Vec<u8> {
    let text = String::from_utf8_lossy(input);
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        return other.to_vec();
    }
    let at = rng.random_range(0..lines.len());
    let to = rng.random_range(0..lines.len());
    let word = WORDS[rng.random_range(0..WORDS.len())];
    match rng.random_range(0..8_u8) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(to, lines[at].clone()),
        2 => lines.swap(at, to),
        3 => lines[at].insert_str(0, "  "),
        4 => lines[at] = lines[at].strip_prefix("  ").unwrap_or_default().to_owned(),
        5 => lines[at] = replace_word(&lines[at], word, rng),
        6 => lines[at].push_str(word),
        _ => {
            // The eighth of eight: a stretch of another sample.
            let foreign = String::from_utf8_lossy(other);
            let foreign: Vec<&str> = foreign.lines().collect();
            let from = if foreign.is_empty() { 0 } else { rng.random_range(0..foreign.len()) };
            let stretch = foreign[from..].iter().take(4).map(|line| (*line).to_owned());
            lines.splice(at..at, stretch);
        }
    }
    let mut changed = lines.join("\n");
    if text.ends_with('\n') {
        changed.push('\n');
    }
    changed.into_bytes()
}

/// Replaces one word, where words end at spaces, colons, commas, slashes and brackets.
fn replace_word(line: &str, word: &str, rng: &mut SmallRng) -> String {
    let is_end = |c: char| c.is_whitespace() || ":,/[]{}@".contains(c);
    let words: Vec<&str> = line.split_inclusive(is_end).collect();
    if words.is_empty() {
        return word.to_owned();
    }
    let chosen = rng.random_range(0..words.len());
    let mut replaced = String::new();
    for (index, old) in words.iter().enumerate() {
        if index == chosen {
            replaced.push_str(word);
            replaced.push_str(old.trim_start_matches(|c: char| !is_end(c)));
        } else {
            replaced.push_str(old);
        }
    }
    replaced
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn a_word_is_replaced_and_what_follows_it_stays() {
        let mut rng = SmallRng::seed_from_u64(1);
        let lines: std::collections::BTreeSet<_> = (0..50).map(|_| replace_word("port: 80", "X", &mut rng)).collect();
        assert!(lines.contains("X: 80") && lines.contains("port: X"), "{lines:?}");
    }
}
