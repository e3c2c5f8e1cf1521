//! The wire format by hand: what a sender of another version might write.

/// A field of bytes: a text or a message.
pub(crate) fn bytes(number: u32, content: &[u8]) -> Vec<u8> {
    let mut field = varint(u64::from(number) << 3 | 2);
    field.extend(varint(content.len() as u64));
    field.extend(content);
    field
}

/// A field that is a number.
pub(crate) fn number(field_number: u32, value: u64) -> Vec<u8> {
    let mut field = varint(u64::from(field_number) << 3);
    field.extend(varint(value));
    field
}

/// A field of eight bytes.
pub(crate) fn fixed64(field_number: u32, value: u64) -> Vec<u8> {
    let mut field = varint(u64::from(field_number) << 3 | 1);
    field.extend(value.to_le_bytes());
    field
}

/// A field of four bytes.
pub(crate) fn fixed32(field_number: u32, value: u32) -> Vec<u8> {
    let mut field = varint(u64::from(field_number) << 3 | 5);
    field.extend(value.to_le_bytes());
    field
}

/// Messages one in the other, the outermost number first.
pub(crate) fn nested(path: &[u32], content: &[u8]) -> Vec<u8> {
    path.iter().rev().fold(content.to_vec(), |inner, number| bytes(*number, &inner))
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut encoded = Vec::new();
    loop {
        let [low, ..] = value.to_le_bytes();
        value >>= 7;
        if value == 0 {
            encoded.push(low & 0x7f);
            return encoded;
        }
        encoded.push(low | 0x80);
    }
}
