//! The n-th input of a target: a pure function of samples, seed and number.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::{protobuf, text};

/// How a target's input is built, so that most mutations get past the outermost parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A protobuf message: fields are changed, dropped, repeated, nested; lengths stay right.
    Protobuf,
    /// Lines of words.
    Text,
}

/// Longest input, in bytes: beyond this only the transport's own limits would be tested.
pub const MAX_INPUT: usize = 64 * 1024;
/// Most changes made to one sample.
const MAX_CHANGES: u32 = 6;
/// One input in this many gets changes of its bytes after those of its structure.
const BYTES_EVERY: u32 = 4;
/// Numbers at which code tends to break.
const EDGES: [u8; 9] = [0x00, 0x01, 0x0a, 0x20, 0x2f, 0x3a, 0x7f, 0x80, 0xff];

/// The input of this number.
pub fn nth(samples: &[Vec<u8>], format: Format, seed: u64, number: u64) -> Vec<u8> {
    // The samples themselves come first: they must be accepted without harm too.
    if let Some(sample) = usize::try_from(number).ok().and_then(|number| samples.get(number)) {
        return sample.clone();
    }
    // Odd, so that neighbouring numbers and seeds give unrelated streams.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut rng = SmallRng::seed_from_u64(seed ^ number.wrapping_mul(SPREAD));
    let mut input = pick(samples, &mut rng).to_vec();
    for _ in 0..rng.random_range(1..=MAX_CHANGES) {
        let other = pick(samples, &mut rng);
        input = match format {
            Format::Protobuf => protobuf::change(&input, other, &mut rng),
            Format::Text => text::change(&input, other, &mut rng),
        };
        input.truncate(MAX_INPUT);
    }
    if rng.random_ratio(1, BYTES_EVERY) {
        change_bytes(&mut input, pick(samples, &mut rng), &mut rng);
    }
    input.truncate(MAX_INPUT);
    input
}

fn pick<'a>(samples: &'a [Vec<u8>], rng: &mut SmallRng) -> &'a [u8] {
    if samples.is_empty() { &[] } else { &samples[rng.random_range(0..samples.len())] }
}

/// Changes that know nothing of the format.
fn change_bytes(input: &mut Vec<u8>, other: &[u8], rng: &mut SmallRng) {
    if input.is_empty() {
        input.push(rng.random());
        return;
    }
    let at = rng.random_range(0..input.len());
    let end = rng.random_range(at..=input.len());
    match rng.random_range(0..7_u8) {
        0 => input[at] ^= 1 << rng.random_range(0..8_u8),
        1 => input[at] = EDGES[rng.random_range(0..EDGES.len())],
        2 => input.truncate(at),
        3 => drop(input.drain(at..end)),
        4 => {
            let again = input[at..end].to_vec();
            input.splice(at..at, again);
        }
        5 => {
            let foreign = other.get(other.len() / 2..).unwrap_or_default();
            input.truncate(at);
            input.extend_from_slice(foreign);
        }
        _ => input.insert(at, rng.random()), // The seventh of seven.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Vec<u8>> {
        vec![b"\x0a\x03abc\x10\x05".to_vec(), b"kind: Pod\nname: a\n".to_vec()]
    }

    #[test]
    fn an_input_can_be_made_again_from_its_number() {
        for number in 0..500 {
            for format in [Format::Protobuf, Format::Text] {
                assert_eq!(nth(&samples(), format, 7, number), nth(&samples(), format, 7, number));
            }
        }
    }

    #[test]
    fn samples_come_first_and_then_inputs_differ() {
        assert_eq!(nth(&samples(), Format::Text, 1, 1), samples()[1]);
        let inputs: std::collections::BTreeSet<_> = (0..200).map(|n| nth(&samples(), Format::Protobuf, 1, n)).collect();
        assert!(inputs.len() > 100, "only {} different inputs", inputs.len());
    }

    #[test]
    fn inputs_stay_bounded() {
        let large = vec![vec![b'x'; MAX_INPUT]];
        assert!((0..200).all(|number| nth(&large, Format::Text, 3, number).len() <= MAX_INPUT));
    }
}
