//! The signer's files: a plugged `cacerts` directory, or a root of our own below the state directory.
//!
//! Rotation of our own root has three stages, each safe to be seen by a peer in any order, and a running controller takes
//! each up by itself: `prepare` makes a new root and trusts it beside the old one; `activate`, when every node has the
//! new bundle, signs with the new one; `finish`, when the last certificate of the old one has ended, trusts the new one
//! alone.

use std::path::{Path, PathBuf};

use rand::RngCore;
use time::OffsetDateTime;

pub use super::authority::SignerPem;
use super::authority::{Authority, AuthorityError, certificates, make_root, to_pem};
use crate::state_dir::{
    PRIVATE_MODE, PUBLIC_MODE, StateDir, StateError, create_exclusively, read_text, write_atomically,
};

/// Where the signer comes from.
#[derive(Debug, Clone)]
pub enum SignerSource {
    /// Made and kept below the state directory.
    Own(PathBuf),
    /// `--cacerts`: Istio's four files; we never write there.
    Plugged(PathBuf),
}

/// A stage of root rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RotationStage {
    /// Make a new root and trust it beside the old one.
    Prepare,
    /// Sign with the new root; both stay trusted.
    Activate,
    /// Trust the new root alone.
    Finish,
}

/// Why the signer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    /// A file cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The files do not make a signer.
    #[error("{dir}: {source}")]
    Authority {
        /// The directory.
        dir: String,
        /// What is wrong.
        source: AuthorityError,
    },
    /// A stage out of order.
    #[error("{0}")]
    Stage(&'static str),
}

impl SignerSource {
    /// Makes a root at the first use of an own signer. For the start of a controller only: one that runs and misses its
    /// signer's files must not put another root in their place.
    pub fn make_at_first_use(
        &self,
        trust_domain: &str,
        now: OffsetDateTime,
        rng: &mut impl RngCore,
    ) -> Result<(), SignerError> {
        match self {
            Self::Own(dir) => ensure_root(dir, trust_domain, now, rng),
            Self::Plugged(_) => Ok(()),
        }
    }

    /// The files as they are now.
    pub fn read(&self) -> Result<SignerPem, SignerError> {
        Ok(read_signer(self.dir())?)
    }

    /// The signer that these files make.
    pub fn authority(&self, pem: &SignerPem, now: OffsetDateTime) -> Result<Authority, SignerError> {
        Authority::from_pem(pem, now).map_err(|source| in_dir(self.dir(), source))
    }

    fn dir(&self) -> &Path {
        match self {
            Self::Own(dir) | Self::Plugged(dir) => dir,
        }
    }
}

/// Key and certificate share one file, so that a crash cannot separate them.
const SIGNER: &str = "signer.pem";
const NEXT_SIGNER: &str = "next-signer.pem";
const ROOTS: &str = "root-cert.pem";

fn ensure_root(dir: &Path, trust_domain: &str, now: OffsetDateTime, rng: &mut impl RngCore) -> Result<(), SignerError> {
    let signer = dir.join(SIGNER);
    if !signer.exists() {
        let (cert, key) = make_root(trust_domain, now, rng).map_err(|source| in_dir(dir, source))?;
        create_exclusively(&signer, format!("{cert}{key}").as_bytes(), PRIVATE_MODE)?;
    }
    let roots = dir.join(ROOTS);
    if !roots.exists() {
        let cert = certificates(&read_text(&signer)?);
        create_exclusively(&roots, bundle(&cert).as_bytes(), PUBLIC_MODE)?;
    }
    Ok(())
}

fn read_signer(dir: &Path) -> Result<SignerPem, StateError> {
    let roots = read_text(&dir.join(ROOTS))?;
    let own = dir.join(SIGNER);
    if own.exists() {
        let text = read_text(&own)?;
        return Ok(SignerPem { cert: text.clone(), key: key_part(&text).to_owned(), chain: text, roots });
    }
    let chain = dir.join("cert-chain.pem");
    Ok(SignerPem {
        cert: read_text(&dir.join("ca-cert.pem"))?,
        key: read_text(&dir.join("ca-key.pem"))?,
        chain: if chain.exists() { read_text(&chain)? } else { String::new() },
        roots,
    })
}

/// Writes a signer that is kept elsewhere, where [`SignerSource::Own`] finds it; what is there already is left alone.
pub fn write_signer(dir: &Path, pem: &SignerPem) -> Result<(), StateError> {
    let signer = format!("{}\n{}\n{}", pem.cert.trim(), pem.chain.trim(), pem.key.trim());
    // Trust comes first, as in a rotation.
    for (name, text, mode) in [(ROOTS, &pem.roots, PUBLIC_MODE), (SIGNER, &signer, PRIVATE_MODE)] {
        let path = dir.join(name);
        if read_text(&path).ok().as_ref() != Some(text) {
            write_atomically(&path, text.as_bytes(), mode)?;
        }
    }
    Ok(())
}

fn key_part(text: &str) -> &str {
    // Also `BEGIN EC PRIVATE KEY` and `BEGIN RSA PRIVATE KEY` of a Secret.
    let begin = text.find("PRIVATE KEY-----").and_then(|at| text[..at].rfind("-----BEGIN "));
    begin.map_or("", |at| &text[at..])
}

/// Carries out one stage on the own root of a state directory. Says what was done and what comes next.
pub fn rotate(
    dir: &StateDir,
    stage: RotationStage,
    trust_domain: &str,
    now: OffsetDateTime,
    rng: &mut impl RngCore,
) -> Result<&'static str, SignerError> {
    let ca = dir.ca();
    let (signer, next, roots) = (ca.join(SIGNER), ca.join(NEXT_SIGNER), ca.join(ROOTS));
    if !signer.exists() {
        return Err(SignerError::Stage(
            "there is no root of our own to rotate; with --cacerts, change root-cert.pem there",
        ));
    }
    let mut trusted = certificates(&read_text(&roots)?);
    match stage {
        RotationStage::Prepare => {
            if next.exists() {
                return Err(SignerError::Stage("a new root is prepared already; go on with `activate`"));
            }
            if trusted.len() > 1 {
                return Err(SignerError::Stage("the last rotation is not finished; end it with `finish`"));
            }
            let (cert, key) = make_root(trust_domain, now, rng).map_err(|source| in_dir(&ca, source))?;
            trusted.extend(certificates(&cert));
            // Trust comes first: a key nobody trusts yet must not be found by `activate`.
            write_atomically(&roots, bundle(&trusted).as_bytes(), PUBLIC_MODE)?;
            create_exclusively(&next, format!("{cert}{key}").as_bytes(), PRIVATE_MODE)?;
            Ok(
                "a new root is trusted beside the old one; when every node has it (node-config certificate), run `activate`",
            )
        }
        RotationStage::Activate => {
            if !next.exists() {
                return Err(SignerError::Stage("no new root is prepared; begin with `prepare`"));
            }
            std::fs::rename(&next, &signer).map_err(|e| crate::state_dir::io_error("replace", &signer, e))?;
            Ok("the new root signs; when the last certificate of the old one has ended (--leaf-ttl), run `finish`")
        }
        RotationStage::Finish => {
            if next.exists() {
                return Err(SignerError::Stage("the new root does not sign yet; run `activate` first"));
            }
            let current = certificates(&read_text(&signer)?);
            write_atomically(&roots, bundle(&current).as_bytes(), PUBLIC_MODE)?;
            Ok("only the new root is trusted")
        }
    }
}

fn bundle(certs: &[rustls_pki_types::CertificateDer<'static>]) -> String {
    certs.iter().map(|cert| to_pem(cert)).collect()
}

fn in_dir(dir: &Path, source: AuthorityError) -> SignerError {
    SignerError::Authority { dir: dir.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::testing::TempDir;

    fn load(dir: &StateDir) -> Authority {
        let source = SignerSource::Own(dir.ca());
        let now = OffsetDateTime::now_utc();
        source.make_at_first_use("cluster.local", now, &mut StdRng::seed_from_u64(1)).unwrap();
        source.authority(&source.read().unwrap(), now).unwrap()
    }

    #[test]
    fn the_own_root_is_kept() {
        let temp = TempDir::new();
        let dir = StateDir::open(temp.path()).unwrap();
        assert_eq!(load(&dir).bundle_pem(), load(&dir).bundle_pem());
    }

    #[test]
    fn rotation_goes_by_its_stages_only() {
        let temp = TempDir::new();
        let dir = StateDir::open(temp.path()).unwrap();
        let step =
            |stage| rotate(&dir, stage, "cluster.local", OffsetDateTime::now_utc(), &mut StdRng::seed_from_u64(7));
        assert!(step(RotationStage::Prepare).is_err(), "no root yet");
        let old = load(&dir).roots()[0].clone();
        assert!(step(RotationStage::Activate).is_err());

        step(RotationStage::Prepare).unwrap();
        assert!(step(RotationStage::Prepare).is_err() && step(RotationStage::Finish).is_err());
        let both = load(&dir);
        assert_eq!((both.roots().len(), &both.roots()[0]), (2, &old));

        step(RotationStage::Activate).unwrap();
        assert_eq!(load(&dir).roots().len(), 2);
        assert!(step(RotationStage::Prepare).is_err(), "not before the end of this one");

        step(RotationStage::Finish).unwrap();
        let new = load(&dir);
        assert!(new.roots().len() == 1 && new.roots()[0] != old);
    }
}
