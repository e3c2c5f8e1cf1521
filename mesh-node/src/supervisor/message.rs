//! What supervisor, proxy and the next supervisor say to each other: one verb a message, a descriptor beside `put`.

use std::fmt;

/// Longest name of a kept descriptor, in bytes: a SPIFFE ID can have three segments of 253.
pub const MAX_NAME_BYTES: usize = 1024;

/// A message of the descriptor store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreMessage {
    /// Keep the descriptor that comes along under this name; one that was there goes.
    Put(String),
    /// Forget it.
    Del(String),
    /// All that was kept has been sent (towards a starting proxy or supervisor).
    Loaded,
    /// The proxy serves what it adopted and has a configuration.
    Ready,
    /// A new supervisor asks the running one for everything.
    TakeOver,
    /// The new supervisor's proxy is ready: drain and exit.
    TakenOver,
}

/// Why a message of the descriptor store is ignored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a message of the descriptor store: {0}")]
pub struct InvalidStoreMessage(&'static str);

impl StoreMessage {
    /// Reads a message.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidStoreMessage> {
        let text = std::str::from_utf8(bytes).map_err(|_| InvalidStoreMessage("not UTF-8"))?;
        match text.split_once(' ') {
            Some(("put", name)) => Ok(Self::Put(valid_name(name)?)),
            Some(("del", name)) => Ok(Self::Del(valid_name(name)?)),
            Some(_) => Err(InvalidStoreMessage("unknown verb")),
            None => match text {
                "loaded" => Ok(Self::Loaded),
                "ready" => Ok(Self::Ready),
                "take-over" => Ok(Self::TakeOver),
                "taken-over" => Ok(Self::TakenOver),
                // Text from outside the process: any other word is an error.
                _ => Err(InvalidStoreMessage("unknown verb")),
            },
        }
    }
}

fn valid_name(name: &str) -> Result<String, InvalidStoreMessage> {
    match name {
        "" => Err(InvalidStoreMessage("empty name")),
        long if long.len() > MAX_NAME_BYTES => Err(InvalidStoreMessage("name too long")),
        odd if !odd.bytes().all(|b| b.is_ascii_graphic()) => Err(InvalidStoreMessage("name is not printable ASCII")),
        good => Ok(good.to_owned()),
    }
}

impl fmt::Display for StoreMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put(name) => write!(f, "put {name}"),
            Self::Del(name) => write!(f, "del {name}"),
            Self::Loaded => f.write_str("loaded"),
            Self::Ready => f.write_str("ready"),
            Self::TakeOver => f.write_str("take-over"),
            Self::TakenOver => f.write_str("taken-over"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_reads_back() {
        let put = StoreMessage::Put("listen/uid-1/hbone4".into());
        for message in [
            put,
            StoreMessage::Del("cert/spiffe://a/ns/b/sa/c".into()),
            StoreMessage::Loaded,
            StoreMessage::Ready,
            StoreMessage::TakeOver,
            StoreMessage::TakenOver,
        ] {
            assert_eq!(StoreMessage::parse(message.to_string().as_bytes()), Ok(message));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let long = format!("put {}", "x".repeat(MAX_NAME_BYTES + 1));
        for bad in ["", "put", "put ", "put a b", "put a\n", "PUT a", "ready now", "\u{0}", "del \u{7f}", &long] {
            assert!(StoreMessage::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(StoreMessage::parse(&[0xff, 0xfe]).is_err());
    }
}
