//! Changes to a protobuf message that keep it one: fields as a list, edited, and written again with right lengths.

use rand::Rng;
use rand::rngs::SmallRng;

/// A field as it lies on the wire.
#[derive(Debug, Clone, PartialEq)]
struct Field {
    number: u64,
    value: Value,
}

#[derive(Debug, Clone, PartialEq)]
enum Value {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(Vec<u8>),
    Fixed32([u8; 4]),
}

/// Numbers at which ports, lengths, enums and counters tend to break.
const EDGES: [u64; 12] =
    [0, 1, 2, 127, 128, 255, 65_535, 65_536, i32::MAX as u64, u32::MAX as u64, i64::MAX as u64, u64::MAX];
/// How deep a change goes into messages inside messages.
const MAX_DEPTH: u32 = 8;

/// One change; input that is no message gets the other's.
pub(crate) fn change(input: &[u8], other: &[u8], rng: &mut SmallRng) -> Vec<u8> {
    let Some(mut fields) = parse(input) else { return other.to_vec() };
    let foreign = parse(other).unwrap_or_default();
    change_fields(&mut fields, &foreign, rng, MAX_DEPTH);
    write(&fields)
}

fn change_fields(fields: &mut Vec<Field>, foreign: &[Field], rng: &mut SmallRng, depth: u32) {
    if fields.is_empty() {
        fields.extend(foreign.iter().take(1).cloned());
        return;
    }
    let at = rng.random_range(0..fields.len());
    if depth > 0
        && let Value::Bytes(bytes) = &mut fields[at].value
        && rng.random_ratio(3, 4)
        && let Some(mut inner) = parse(bytes)
    {
        change_fields(&mut inner, foreign, rng, depth - 1);
        *bytes = write(&inner);
        return;
    }
    match rng.random_range(0..8_u8) {
        0 => drop(fields.remove(at)),
        1 => fields.push(fields[at].clone()),
        2 => fields[at].number = rng.random_range(1..40),
        3 => fields[at].value = Value::Varint(EDGES[rng.random_range(0..EDGES.len())]),
        4 => {
            let inside = write(&fields[at..=at]);
            fields[at].value = Value::Bytes(inside);
        }
        5 if !foreign.is_empty() => fields.push(foreign[rng.random_range(0..foreign.len())].clone()),
        6 => {
            let to = rng.random_range(0..fields.len());
            fields.swap(at, to);
        }
        _ => change_value(&mut fields[at].value, rng), // The rest, and 5 where there is nothing foreign.
    }
}

fn change_value(value: &mut Value, rng: &mut SmallRng) {
    match value {
        Value::Varint(number) => *number = number.wrapping_add(1 << rng.random_range(0..64_u32)),
        Value::Fixed64(bytes) => bytes[rng.random_range(0..8_usize)] = rng.random(),
        Value::Fixed32(bytes) => bytes[rng.random_range(0..4_usize)] = rng.random(),
        Value::Bytes(bytes) => match rng.random_range(0..4_u8) {
            0 => bytes.clear(),
            1 => bytes.push(rng.random()),
            2 => bytes.truncate(bytes.len() / 2),
            _ => bytes.iter_mut().take(1).for_each(|byte| *byte = rng.random()), // The fourth of four.
        },
    }
}

/// All fields of a message, or `None` if the bytes are none.
fn parse(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = take_varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => Value::Varint(take_varint(&mut bytes)?),
            1 => Value::Fixed64(take(&mut bytes, 8)?.try_into().ok()?),
            2 => {
                let length = usize::try_from(take_varint(&mut bytes)?).ok()?;
                Value::Bytes(take(&mut bytes, length)?.to_vec())
            }
            5 => Value::Fixed32(take(&mut bytes, 4)?.try_into().ok()?),
            _ => return None, // Groups, and types that do not exist.
        };
        fields.push(Field { number: tag >> 3, value });
    }
    Some(fields)
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn write(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Field { number, value } in fields {
        let kind = match value {
            Value::Varint(_) => 0,
            Value::Fixed64(_) => 1,
            Value::Bytes(_) => 2,
            Value::Fixed32(_) => 5,
        };
        put_varint(&mut bytes, (number << 3) | kind);
        match value {
            Value::Varint(number) => put_varint(&mut bytes, *number),
            Value::Fixed64(value) => bytes.extend_from_slice(value),
            Value::Bytes(value) => {
                put_varint(&mut bytes, value.len() as u64);
                bytes.extend_from_slice(value);
            }
            Value::Fixed32(value) => bytes.extend_from_slice(value),
        }
    }
    bytes
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push((number & 0x7f) as u8);
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const MESSAGE: &[u8] = b"\x0a\x05\x0a\x03abc\x10\xac\x02\x1d\x01\x02\x03\x04\x21\x01\x02\x03\x04\x05\x06\x07\x08";

    #[test]
    fn a_message_is_written_as_it_was_read() {
        assert_eq!(write(&parse(MESSAGE).unwrap()), MESSAGE);
        assert_eq!(parse(b"\x0a\x05a"), None, "shorter than its length");
        assert_eq!(parse(&[0xff; 11]), None, "a number that does not end");
    }

    #[test]
    fn a_changed_message_is_still_one() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut input = MESSAGE.to_vec();
        for _ in 0..2_000 {
            input = change(&input, MESSAGE, &mut rng);
            input.truncate(if parse(&input).is_some() { 4096 } else { 0 });
            assert!(parse(&input).is_some() || input.len() == 4096);
        }
    }
}
