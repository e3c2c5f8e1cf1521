//! Node tokens: ES256 JWTs (RFC 7519) that say which node a connection comes from.
//!
//! A token is bound to a node by `sub`, to this controller by `iss` and its key, and to its use by `aud` (Istio's
//! `istio-ca`). Nothing else of a token is believed; the algorithm is fixed, whatever the header says (RFC 8725, 3.1).

use std::fmt;
use std::path::Path;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};

use crate::state_dir::{PRIVATE_MODE, StateDir, StateError, create_exclusively, read_text};

/// Audience of node tokens; the value that ztunnel's projected tokens carry.
pub const AUDIENCE: &str = "istio-ca";
/// Issuer of node tokens.
pub const ISSUER: &str = "mesh-controller";
/// Longest life of a token, seconds (one year): a node is meant to be given a new one.
pub const MAX_TTL_SECS: u64 = 365 * 24 * 3600;
/// Clock difference between machines that is forgiven, seconds.
const LEEWAY_SECS: u64 = 60;
/// Bytes of a token that are looked at; ours have about 300.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// Who a verified token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeToken {
    /// Node name.
    pub node: String,
    /// Unix seconds at which it stops being valid, clock leeway included.
    pub valid_until: u64,
}

/// Why a token is refused. The same words go to the log, the metrics and the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum TokenRefusal {
    /// No `authorization: Bearer` metadata.
    #[error("no bearer token")]
    Missing,
    /// Not a JWT, or larger than a token can be.
    #[error("the token is malformed")]
    Malformed,
    /// Another algorithm than ES256.
    #[error("the token is not signed with ES256")]
    Algorithm,
    /// Signed by somebody else, or changed.
    #[error("the token was not signed by this controller")]
    Signature,
    /// Another issuer.
    #[error("the token has another issuer")]
    Issuer,
    /// Another audience.
    #[error("the token is meant for another audience")]
    Audience,
    /// Past its time.
    #[error("the token has expired; issue a new one with `mesh-controller token NODE`")]
    Expired,
    /// Before its time.
    #[error("the token is not valid yet; compare the clocks")]
    NotYetValid,
    /// `sub` is not a node name.
    #[error("the token names no node")]
    Subject,
    /// The API server does not know it, or it is not meant for us.
    #[error("the API server does not let the token in (audience istio-ca)")]
    NotAuthenticated,
    /// The API server could not be asked.
    #[error("the API server cannot be asked about the token; try again")]
    NotReviewed,
    /// Another service account than a node proxy's.
    #[error("the token is not of a node proxy's service account (--node-account)")]
    Account,
    /// Not of a pod on a node.
    #[error("the token is not bound to a pod on a node")]
    Unbound,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: String,
    iat: u64,
    exp: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbf: Option<u64>,
}

/// Issues and verifies node tokens.
pub struct TokenKey {
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(..)")
    }
}

/// Why there is no signing key.
#[derive(Debug, thiserror::Error)]
pub enum TokenKeyError {
    /// The file cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// It is not a P-256 key.
    #[error("{0} is not a PKCS#8 P-256 private key; move it away to have a new one made (all tokens become invalid)")]
    NotAKey(String),
    /// No key could be generated.
    #[error("generate a token key: {0}")]
    Generate(rcgen::Error),
    /// No token could be made.
    #[error("sign a token: {0}")]
    Sign(jsonwebtoken::errors::Error),
    /// Not a node name.
    #[error("`{0}` is not a node name (lower case letters, digits, `-` and `.`, at most 253)")]
    Node(String),
    /// A life of no length, or beyond [`MAX_TTL_SECS`].
    #[error("a token lives between one second and 365 days")]
    Ttl,
}

/// Name of the signing key's file.
const KEY: &str = "key.pem";

impl TokenKey {
    /// Reads the key of the state directory; makes one at first use.
    pub fn open(dir: &StateDir) -> Result<Self, TokenKeyError> {
        let path = dir.token().join(KEY);
        if !path.exists() {
            let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(TokenKeyError::Generate)?;
            create_exclusively(&path, key.serialize_pem().as_bytes(), PRIVATE_MODE)?;
        }
        Self::from_pem(&read_text(&path)?, &path)
    }

    fn from_pem(pem: &str, path: &Path) -> Result<Self, TokenKeyError> {
        let refuse = || TokenKeyError::NotAKey(path.display().to_string());
        let key = KeyPair::from_pem(pem).map_err(|_| refuse())?;
        if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(refuse());
        }
        let encoding = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes()).map_err(|_| refuse())?;
        let decoding = DecodingKey::from_ec_pem(key.public_key_pem().as_bytes()).map_err(|_| refuse())?;
        Ok(Self { encoding, decoding })
    }

    /// Whether a state directory has a key already.
    pub fn exists(dir: &StateDir) -> bool {
        dir.token().join(KEY).exists()
    }

    /// A token for a node. `now` in Unix seconds.
    pub fn issue(&self, node: &str, now: u64, ttl_secs: u64) -> Result<String, TokenKeyError> {
        if !is_node_name(node) {
            return Err(TokenKeyError::Node(node.chars().take(64).collect()));
        }
        if ttl_secs == 0 || ttl_secs > MAX_TTL_SECS {
            return Err(TokenKeyError::Ttl);
        }
        let claims = Claims {
            iss: ISSUER.into(),
            sub: node.into(),
            aud: AUDIENCE.into(),
            iat: now,
            exp: now.saturating_add(ttl_secs),
            nbf: None,
        };
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &self.encoding).map_err(TokenKeyError::Sign)
    }

    /// Checks a token. `now` in Unix seconds.
    pub fn verify(&self, token: &str, now: u64) -> Result<NodeToken, TokenRefusal> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenRefusal::Malformed);
        }
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // Time is an argument here, and is checked below.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        let claims =
            jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation).map_err(|e| refusal(&e))?.claims;
        let valid_until = claims.exp.saturating_add(LEEWAY_SECS);
        if now >= valid_until {
            return Err(TokenRefusal::Expired);
        }
        if claims.nbf.unwrap_or(claims.iat).max(claims.iat) > now.saturating_add(LEEWAY_SECS) {
            return Err(TokenRefusal::NotYetValid);
        }
        if !is_node_name(&claims.sub) {
            return Err(TokenRefusal::Subject);
        }
        Ok(NodeToken { node: claims.sub, valid_until })
    }
}

fn refusal(error: &jsonwebtoken::errors::Error) -> TokenRefusal {
    match error.kind() {
        ErrorKind::InvalidSignature => TokenRefusal::Signature,
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => TokenRefusal::Algorithm,
        ErrorKind::InvalidIssuer => TokenRefusal::Issuer,
        ErrorKind::InvalidAudience => TokenRefusal::Audience,
        // The list is not closed; whatever else may be wrong with a token, it is not one of ours.
        _ => TokenRefusal::Malformed,
    }
}

/// RFC 1123 subdomain, as Kubernetes names nodes.
pub fn is_node_name(name: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;

    const NOW: u64 = 1_700_000_000;

    fn key() -> (TempDir, TokenKey) {
        let temp = TempDir::new();
        let key = TokenKey::open(&StateDir::open(temp.path()).unwrap()).unwrap();
        (temp, key)
    }

    fn sign(key: &TokenKey, claims: &serde_json::Value) -> String {
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key.encoding).unwrap()
    }

    fn claims() -> serde_json::Value {
        serde_json::json!({"iss": ISSUER, "sub": "node-a", "aud": AUDIENCE, "iat": NOW, "exp": NOW + 60})
    }

    fn with(field: &str, value: serde_json::Value) -> serde_json::Value {
        let mut claims = claims();
        claims[field] = value;
        claims
    }

    #[test]
    fn the_key_is_kept() {
        let (temp, key) = key();
        let again = TokenKey::open(&StateDir::open(temp.path()).unwrap()).unwrap();
        let token = key.issue("node-a", NOW, 60).unwrap();
        assert_eq!(again.verify(&token, NOW), Ok(NodeToken { node: "node-a".into(), valid_until: NOW + 120 }));
    }

    #[test]
    fn time_is_checked_with_a_minute_of_leeway() {
        let (_temp, key) = key();
        let token = key.issue("node-a", NOW, 60).unwrap();
        assert!(key.verify(&token, NOW + 119).is_ok());
        assert_eq!(key.verify(&token, NOW + 120), Err(TokenRefusal::Expired));
        assert!(key.verify(&token, NOW - 60).is_ok());
        assert_eq!(key.verify(&token, NOW - 61), Err(TokenRefusal::NotYetValid));
        let later = sign(&key, &with("nbf", (NOW + 61).into()));
        assert_eq!(key.verify(&later, NOW), Err(TokenRefusal::NotYetValid));
    }

    #[test]
    fn claims_are_checked_one_by_one() {
        let (_temp, key) = key();
        let check =
            |claims: serde_json::Value, expected| assert_eq!(key.verify(&sign(&key, &claims), NOW), Err(expected));
        check(with("iss", "kubernetes/serviceaccount".into()), TokenRefusal::Issuer);
        check(with("aud", "vault".into()), TokenRefusal::Audience);
        check(with("sub", "".into()), TokenRefusal::Subject);
        check(with("sub", "Node A".into()), TokenRefusal::Subject);
        check(with("sub", "../node".into()), TokenRefusal::Subject);
        check(with("exp", "soon".into()), TokenRefusal::Malformed);
        check(with("exp", serde_json::Value::Null), TokenRefusal::Malformed);
        check(with("aud", serde_json::Value::Null), TokenRefusal::Malformed);
        for field in ["iss", "sub", "aud", "iat", "exp"] {
            let mut without = claims();
            without.as_object_mut().unwrap().remove(field);
            assert!(key.verify(&sign(&key, &without), NOW).is_err(), "without {field}");
        }
    }

    #[test]
    fn forged_tokens_are_refused() {
        let (_temp, ours) = key();
        let (_temp2, foreign) = key();
        let token = foreign.issue("node-a", NOW, 60).unwrap();
        assert_eq!(ours.verify(&token, NOW), Err(TokenRefusal::Signature));

        // HS256 with the public key, which an attacker may know, as its secret.
        let secret = EncodingKey::from_secret(b"-----BEGIN PUBLIC KEY-----");
        let confused = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims(), &secret).unwrap();
        assert_eq!(ours.verify(&confused, NOW), Err(TokenRefusal::Algorithm));

        // alg none: header and claims of a good token, no signature.
        let good = ours.issue("node-a", NOW, 60).unwrap();
        let body = good.split('.').nth(1).unwrap();
        let none_header = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0";
        for forged in [format!("{none_header}.{body}."), format!("{none_header}.{body}"), format!("{body}.{body}.")] {
            assert!(ours.verify(&forged, NOW).is_err(), "{forged}");
        }
        let (head, signature) = (good.split('.').next().unwrap(), good.split('.').nth(2).unwrap());
        let other = ours.issue("node-b", NOW, 60).unwrap();
        let swapped = format!("{head}.{}.{signature}", other.split('.').nth(1).unwrap());
        assert_eq!(ours.verify(&swapped, NOW), Err(TokenRefusal::Signature));
    }

    #[test]
    fn garbage_is_malformed() {
        let (_temp, key) = key();
        for garbage in ["", ".", "..", "a.b.c", "ey.ey.ey", "\u{0}", "💥.💥.💥"] {
            assert_eq!(key.verify(garbage, NOW), Err(TokenRefusal::Malformed), "{garbage:?}");
        }
        assert_eq!(key.verify(&"a".repeat(1 << 20), NOW), Err(TokenRefusal::Malformed));
    }

    #[test]
    fn only_node_names_and_sane_lives_are_issued() {
        let (_temp, key) = key();
        assert!(key.issue("ip-10-0-0-1.ec2.internal", NOW, 1).is_ok());
        for bad in ["", "A", "a_b", "-a", "a-", "a..b", &"a".repeat(254)] {
            assert!(key.issue(bad, NOW, 60).is_err(), "{bad}");
        }
        assert!(key.issue("a", NOW, 0).is_err() && key.issue("a", NOW, MAX_TTL_SECS + 1).is_err());
    }
}
