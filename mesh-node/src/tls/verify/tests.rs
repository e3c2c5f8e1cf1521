//! Certificates that must not be believed, one rule at a time. There are no revocation lists: nobody is asked for one and
//! none is read (RUSTSEC-2026-0049, -0104 concern code that is never reached); certificates live for a day.

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, OtherNameValue, SanType,
};
use time::OffsetDateTime;

use super::*;

const ID: &str = "spiffe://cluster.local/ns/default/sa/client";
/// The time of all cases, seconds since 1970.
const NOW: i64 = 1_800_000_000;
/// Object identifier of name constraints (RFC 5280 4.2.1.10).
const NAME_CONSTRAINTS: [u64; 4] = [2, 5, 29, 30];
/// Object identifier of alternative names (RFC 5280 4.2.1.6).
const ALTERNATIVE_NAMES: [u64; 4] = [2, 5, 29, 17];

fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(NOW + seconds).unwrap()
}

fn key() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

/// A signer, with what is trusted and what is sent behind its leaves.
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    roots: Arc<RootStore>,
    chain: Vec<CertificateDer<'static>>,
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (at(-3600), at(3600));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn leaf_params(names: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (at(-3600), at(3600));
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

impl Signer {
    fn root() -> Self {
        let key = key();
        let certificate = ca_params("root").self_signed(&key).unwrap();
        let roots = Arc::new(RootStore::new(vec![certificate.der().clone()]).unwrap());
        Self { issuer: Issuer::new(ca_params("root"), key), roots, chain: Vec::new() }
    }

    /// A signer below this one.
    fn below(&self, params: CertificateParams) -> Self {
        let key = key();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let chain = std::iter::once(certificate).chain(self.chain.iter().cloned()).collect();
        Self { issuer: Issuer::new(params, key), roots: Arc::clone(&self.roots), chain }
    }

    fn leaf(&self, params: &CertificateParams) -> CertificateDer<'static> {
        params.signed_by(&key(), &self.issuer).unwrap().der().clone()
    }

    fn judge_at(&self, leaf: &CertificateDer<'_>, seconds: i64) -> Result<SpiffeId, PeerRefused> {
        let now = UnixTime::since_unix_epoch(Duration::from_secs((NOW + seconds).try_into().unwrap()));
        verify_chain(&self.roots, leaf, &self.chain, now, webpki::KeyUsage::client_auth())
    }

    fn judge(&self, params: &CertificateParams) -> Result<SpiffeId, PeerRefused> {
        self.judge_at(&self.leaf(params), 0)
    }

    /// The verdict on a leaf: the identity, or the reason.
    #[track_caller]
    fn check(&self, what: &str, params: &CertificateParams, expected: &str) {
        let got = self.judge(params).map_or_else(|refused| refused.to_string(), |id| id.to_string());
        assert!(got.contains(expected), "{what}: {got}, not {expected}");
    }
}

/// DER with one length byte.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let length = u8::try_from(content.len()).unwrap();
    assert!(length < 0x80, "a length of one byte");
    [&[tag, length], &content[..]].concat()
}

/// A URI as a general name (RFC 5280 4.2.1.6).
fn uri_name(text: &[u8]) -> Vec<u8> {
    der(0x86, &[text])
}

/// Alternative names as they stand, whatever they are.
fn named(names: &[Vec<u8>]) -> CertificateParams {
    let names: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
    let mut params = leaf_params(Vec::new());
    let extension = CustomExtension::from_oid_content(&ALTERNATIVE_NAMES, der(0x30, &names));
    params.custom_extensions.push(extension);
    params
}

/// CVE-2020-15104, CVE-2022-21656, CVE-2022-21657, CVE-2025-66220, CVE-2026-47778: names that are nearly the right one, of
/// another kind, or more than one.
#[test]
fn a_leaf_has_one_name_and_it_is_a_plain_spiffe_id() {
    let signer = Signer::root();
    let check = |names: Vec<SanType>, expected| signer.check(&format!("{names:?}"), &leaf_params(names), expected);
    check(vec![uri(ID)], ID);
    check(vec![], "no URI SAN");
    check(vec![uri(ID), uri(ID)], "more than one URI SAN");
    check(vec![uri(ID), uri("spiffe://cluster.local/ns/default/sa/admin")], "more than one URI SAN");
    for other in [
        SanType::DnsName(ID.try_into().unwrap()),
        SanType::Rfc822Name("client@cluster.local".try_into().unwrap()),
        SanType::IpAddress([10, 0, 0, 1].into()),
        SanType::OtherName((vec![1, 3, 6, 1, 4, 1, 311, 20, 2, 3], OtherNameValue::Utf8String(ID.to_owned()))),
    ] {
        check(vec![other.clone()], "no URI SAN");
        check(vec![other, uri(ID)], ID);
    }
    for nearly in [
        "spiffe://cluster.local/ns/default/sa/client\0",
        "spiffe://cluster.local/ns/default/sa/client\0.example.org",
        "spiffe://cluster.local\0/ns/default/sa/client",
        "spiffe://CLUSTER.LOCAL/ns/default/sa/client",
        "SPIFFE://cluster.local/ns/default/sa/client",
        "spiffe://cluster.local/NS/default/sa/client",
        "spiffe://cluster.local/ns/default/sa/*",
        "spiffe://*.local/ns/default/sa/client",
        "spiffe://cluster.local/ns/default/sa/client/",
        "spiffe://cluster.local/ns/default/sa/client?x",
        "spiffe://cluster.local/ns/default/sa/client#x",
        "spiffe://cluster.local/ns/default/sa/%63lient",
        "spiffe://cluster.local:443/ns/default/sa/client",
        "spiffe://user@cluster.local/ns/default/sa/client",
        "spiffe://cluster.local/ns/../sa/client",
        "spiffe:///ns/default/sa/client",
        "https://cluster.local/ns/default/sa/client",
        "",
    ] {
        check(vec![uri(nearly)], "is not spiffe://");
    }
}

/// As above, for names that no tool writes.
#[test]
fn a_name_that_cannot_be_read_is_not_passed_over() {
    let signer = Signer::root();
    let good = uri_name(ID.as_bytes());
    let check = |what: &str, names: &[Vec<u8>], expected| signer.check(what, &named(names), expected);
    check("as it should be", std::slice::from_ref(&good), ID);
    check("a second URI that is not text", &[good.clone(), uri_name(&[0xff, 0xfe])], "BadDer");
    check("a URI that is not text", &[uri_name(&[0xff, 0xfe])], "BadDer");
    check("a URI beyond ASCII", &[uri_name("spiffe://clüster.local/ns/a/sa/b".as_bytes())], "is not spiffe://");
    check("a kind that there is not", &[good.clone(), der(0x8f, &[b"x"]), uri_name(b"spiffe://x")], "BadDer");
    check("a kind that there is not, last", &[good.clone(), der(0x8f, &[b"x"])], "BadDer");
    check("no names in the list", &[], "no URI SAN");
    let mut twice = named(&[good]);
    twice.custom_extensions.extend(named(&[uri_name(b"spiffe://cluster.local/ns/a/sa/b")]).custom_extensions);
    signer.check("two lists", &twice, "ExtensionValueInvalid");
}

/// CVE-2020-15104 and its kin: what a certificate may be used for.
#[test]
fn a_leaf_is_for_its_use_and_signs_nothing() {
    let signer = Signer::root();
    let with = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = leaf_params(vec![uri(ID)]);
        change(&mut params);
        params
    };
    let usages = |usages: &[ExtendedKeyUsagePurpose]| with(&|params| params.extended_key_usages = usages.to_vec());
    use ExtendedKeyUsagePurpose::{Any, ClientAuth, CodeSigning, ServerAuth};
    signer.check("client", &usages(&[ClientAuth]), ID);
    signer.check("server", &usages(&[ServerAuth]), "RequiredEkuNotFound");
    signer.check("code", &usages(&[CodeSigning]), "RequiredEkuNotFound");
    signer.check("any", &usages(&[Any]), "RequiredEkuNotFound");
    let server = signer.leaf(&usages(&[ClientAuth]));
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW.try_into().unwrap()));
    let as_server = verify_chain(&signer.roots, &server, &[], now, webpki::KeyUsage::server_auth());
    assert!(as_server.is_err(), "a client's certificate for a server: {as_server:?}");

    let ca = with(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    signer.check("a CA", &ca, "CaUsedAsEndEntity");
    for usage in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        let signs = with(&|params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature, usage]);
        signer.check("a leaf that may sign", &signs, "may sign");
    }
    let none = with(&|params| params.key_usages = Vec::new());
    signer.check("a leaf that does not say what its key is for", &none, ID);
}

/// A workload's key must not make another identity.
#[test]
fn what_a_leaf_signs_is_not_believed() {
    let signer = Signer::root();
    let forger = signer.below(leaf_params(vec![uri(ID)]));
    forger.check("signed by a leaf", &leaf_params(vec![uri("spiffe://cluster.local/ns/a/sa/b")]), "EndEntityUsedAsCa");
}

/// RUSTSEC-2026-0098, -0099: an intermediate that may sign some names only. webpki cannot compare URIs, and refuses.
#[test]
fn an_intermediate_with_constraints_on_uris_vouches_for_no_spiffe_id() {
    let constrained = |subtrees: u8, base: Vec<u8>| {
        let subtree = der(0x30, &[&base]);
        let content = der(0x30, &[&der(subtrees, &[&subtree])]);
        let mut params = ca_params("constrained");
        let mut extension = CustomExtension::from_oid_content(&NAME_CONSTRAINTS, content);
        extension.set_criticality(true);
        params.custom_extensions.push(extension);
        Signer::root().below(params)
    };
    const PERMITTED: u8 = 0xa0;
    const EXCLUDED: u8 = 0xa1;
    let leaf = leaf_params(vec![uri(ID)]);
    for base in ["cluster.local", ".local", "other.example", ""] {
        for subtrees in [PERMITTED, EXCLUDED] {
            let signer = constrained(subtrees, uri_name(base.as_bytes()));
            signer.check(&format!("{subtrees:#x} {base:?}"), &leaf, "NameConstraintViolation");
        }
    }
    // Constraints on other kinds of names say nothing about URIs (RFC 5280 4.2.1.10).
    constrained(PERMITTED, der(0x82, &[b"example.org"])).check("constraints on DNS names", &leaf, ID);
}

#[test]
fn an_intermediate_signs_as_far_as_it_may() {
    let mut short = ca_params("short");
    short.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let leaf = leaf_params(vec![uri(ID)]);
    Signer::root().below(short.clone()).check("directly below", &leaf, ID);
    Signer::root().below(short).below(ca_params("next")).check("one too many", &leaf, "PathLenConstraintViolated");
    let mut expired = ca_params("expired");
    expired.not_after = at(-120);
    Signer::root().below(expired).check("an expired one", &leaf, "CertExpired");
}

/// A chain bomb takes longer than this only if its work is not bounded. RUSTSEC-2023-0053.
const BOMB_WITHIN: Duration = Duration::from_secs(5);

/// RUSTSEC-2023-0053: certificates that all look like the issuer of each other, so that there are more paths than anybody
/// can try.
#[test]
fn a_chain_of_look_alikes_is_bounded_work() {
    let root = Signer::root();
    let leaf = leaf_params(vec![uri(ID)]);
    // Named as the root is: each path leads to a trusted name, and the signature has to be looked at.
    for name in ["root", "nobody"] {
        let forger = Issuer::new(ca_params(name), key());
        for count in [MAX_INTERMEDIATES, MAX_INTERMEDIATES + 1, 100] {
            let look_alike = || ca_params(name).signed_by(&key(), &forger).unwrap().der().clone();
            let bomb = Signer {
                issuer: Issuer::new(ca_params(name), key()),
                roots: Arc::clone(&root.roots),
                chain: (0..count).map(|_| look_alike()).collect(),
            };
            let started = std::time::Instant::now();
            let refused = bomb.judge(&leaf).expect_err("nobody signed it");
            assert!(started.elapsed() < BOMB_WITHIN, "{count} called {name}: {:?}", started.elapsed());
            let is_too_long = matches!(refused, PeerRefused::ChainTooLong(_));
            assert_eq!(is_too_long, count > MAX_INTERMEDIATES, "{count} called {name}: {refused}");
        }
    }
}

/// Two nodes' clocks may differ by [`CLOCK_SKEW`], at both ends of a certificate's life.
#[test]
fn a_clock_that_is_a_minute_off_does_no_harm() {
    let signer = Signer::root();
    let mut params = leaf_params(vec![uri(ID)]);
    (params.not_before, params.not_after) = (at(0), at(600));
    let leaf = signer.leaf(&params);
    for (seconds, expected) in
        [(-61, "CertNotValidYet"), (-60, ID), (-30, ID), (0, ID), (600, ID), (630, ID), (660, ID), (661, "CertExpired")]
    {
        let got = signer.judge_at(&leaf, seconds).map_or_else(|refused| refused.to_string(), |id| id.to_string());
        assert!(got.contains(expected), "at {seconds}: {got}, not {expected}");
    }
}

/// Whatever is changed in a certificate: it is refused, or says the same.
#[test]
fn no_changed_certificate_is_believed_to_be_another() {
    let signer = Signer::root();
    let leaf = signer.leaf(&leaf_params(vec![uri(ID)]));
    for length in 0..leaf.len() {
        assert!(signer.judge_at(&CertificateDer::from(leaf[..length].to_vec()), 0).is_err(), "cut at {length}");
    }
    for byte in 0..leaf.len() {
        for bit in 0..8 {
            let mut changed = leaf.to_vec();
            changed[byte] ^= 1 << bit;
            let got = signer.judge_at(&CertificateDer::from(changed), 0).map(|id| id.to_string());
            assert!(got.as_ref().is_err() || got.as_deref() == Ok(ID), "byte {byte}, bit {bit}: {got:?}");
        }
    }
}

/// What operators read says who was met and who was expected.
#[test]
fn a_refusal_is_shown_in_its_own_words() {
    let actual: SpiffeId = ID.parse().unwrap();
    let expected = ExpectedServer::exactly("spiffe://cluster.local/ns/default/sa/server".parse().unwrap());
    let refused = PeerRefused::WrongIdentity { actual, expected };
    let words = refused.to_string();
    let error = std::io::Error::new(std::io::ErrorKind::InvalidData, rustls::Error::from(refused));
    assert!(error.to_string().contains("WrongIdentity {"), "rustls has no words for it: {error}");
    assert_eq!(crate::tls::plainly(error).to_string(), words);
    let other = std::io::Error::other(rustls::Error::DecryptError);
    assert_eq!(crate::tls::plainly(other).to_string(), rustls::Error::DecryptError.to_string());
}
