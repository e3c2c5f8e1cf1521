//! Which roots are trusted: those that came with the CA's answer to the latest request.
//!
//! The file that the controller's own certificate is checked with is not one of them: it may hold a CA that has nothing
//! to say about workloads.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;

use crate::runtime::RootStore;

/// Number of a request to the CA; later ones have higher numbers.
pub(super) type RequestNumber = u64;

/// What is trusted, and since which request.
#[derive(Debug, Default)]
pub(super) struct Roots {
    in_force: Arc<RootStore>,
    answered: RequestNumber,
}

impl Roots {
    /// What chains are built to.
    pub(super) fn in_force(&self) -> &Arc<RootStore> {
        &self.in_force
    }

    /// Hears of the roots that came with the answer to a request; true when something else is trusted than before.
    ///
    /// Answers cross: that of an earlier request may come later and does not bring back what has been replaced.
    pub(super) fn learn(&mut self, request: RequestNumber, roots: Vec<CertificateDer<'static>>) -> bool {
        if request < self.answered {
            return false;
        }
        self.answered = request;
        if roots == self.in_force.certificates {
            return false;
        }
        match RootStore::new(roots) {
            Ok(store) => {
                self.in_force = Arc::new(store);
                true
            }
            Err(error) => {
                tracing::error!(%error, "a root certificate cannot be used; the last roots stay in force");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn root() -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().expect("key")).expect("sign").der().clone()
    }

    #[test]
    fn the_answer_to_an_earlier_request_brings_no_root_back() {
        let (old, new) = (root(), root());
        let mut roots = Roots::default();
        assert!(roots.learn(1, vec![old.clone()]));
        assert!(roots.learn(3, vec![new.clone()]));
        assert!(!roots.learn(2, vec![old.clone(), new.clone()]));
        assert_eq!(roots.in_force().certificates, std::slice::from_ref(&new));
        assert!(!roots.learn(4, vec![new.clone()]), "the same");
        assert!(roots.learn(5, vec![old.clone()]), "a later answer counts");
    }

    #[test]
    fn a_set_with_a_root_that_does_not_parse_changes_nothing() {
        let mut roots = Roots::default();
        let good = root();
        assert!(roots.learn(1, vec![good.clone()]));
        assert!(!roots.learn(2, vec![root(), CertificateDer::from(vec![0x30, 0x00])]));
        assert_eq!(roots.in_force().certificates, [good]);
    }
}
