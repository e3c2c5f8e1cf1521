//! Finds fields that a message's schema does not have.
//!
//! prost skips them, which for a policy is wrong: a match with one more condition than we understand would match more
//! than its author wrote. This walks the wire format (protobuf encoding, fields and groups) beside a table of what is
//! known.

use super::WireError;

/// Known fields of a message.
pub(super) struct Schema {
    /// Scalars: numbers and strings.
    pub(super) scalars: &'static [u32],
    /// Messages, with their name for the error.
    pub(super) messages: &'static [(u32, &'static str, &'static Schema)],
}

/// Nesting of the deepest schema is 4; the walk follows schemas only, so input cannot make it deeper.
const LENGTH_DELIMITED: u64 = 2;

/// Refuses a message with a field that its schema does not have.
pub(super) fn refuse_unknown(schema: &Schema, bytes: &[u8], path: &str) -> Result<(), WireError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        let (number, wire_type) = (u32::try_from(tag >> 3).unwrap_or(u32::MAX), tag & 7);
        let body = value(&mut rest, wire_type)?;
        if schema.scalars.contains(&number) {
            continue;
        }
        match schema.messages.iter().find(|(n, _, _)| *n == number) {
            Some((_, name, inner)) if wire_type == LENGTH_DELIMITED => {
                let path = if path.is_empty() { (*name).to_owned() } else { format!("{path}.{name}") };
                refuse_unknown(inner, body, &path)?;
            }
            Some(_) | None => {
                let path = if path.is_empty() { "message" } else { path };
                return Err(WireError::Unknown { path: path.to_owned(), what: format!("field {number}") });
            }
        }
    }
    Ok(())
}

/// Takes one value and returns its bytes (without the length).
fn value<'a>(rest: &mut &'a [u8], wire_type: u64) -> Result<&'a [u8], WireError> {
    let length = match wire_type {
        0 => {
            let before = *rest;
            varint(rest)?;
            return Ok(&before[..before.len() - rest.len()]);
        }
        1 => 8,
        LENGTH_DELIMITED => usize::try_from(varint(rest)?).unwrap_or(usize::MAX),
        5 => 4,
        // Groups (3, 4) are not used by proto3.
        other => return Err(WireError::Malformed(format!("wire type {other}"))),
    };
    let Some((body, after)) = rest.split_at_checked(length) else { return Err(truncated()) };
    *rest = after;
    Ok(body)
}

fn varint(rest: &mut &[u8]) -> Result<u64, WireError> {
    const MAX_BYTES: u32 = 10;
    let mut number = 0u64;
    for i in 0..MAX_BYTES {
        let Some((byte, after)) = rest.split_first() else { return Err(truncated()) };
        *rest = after;
        number |= u64::from(byte & 0x7f).checked_shl(7 * i).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(WireError::Malformed("number of more than 10 bytes".into()))
}

fn truncated() -> WireError {
    WireError::Malformed("ends in the middle of a field".into())
}
