//! What several kinds share: which workloads an object is about, and what became of it.

use super::schema::{Bounds, Schema, Shape, list, map, object, open_object, optional, pattern, required, text, word};

/// RFC 1123 subdomain, or nothing for Kubernetes' own group.
const GROUP: &str = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?$";
/// A word that begins with a letter.
const KIND: &str = "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$";

/// Rule of a spec with `selector`, `targetRef` and `targetRefs`.
pub(super) const ONE_AIM: (&str, &str) = (
    "[has(self.selector), has(self.targetRef), has(self.targetRefs)].filter(is_set, is_set).size() < 2",
    "selector, targetRef and targetRefs exclude each other",
);
/// Text of no particular form.
pub(super) const ANY_TEXT: Bounds = Bounds::NONE;

/// `selector` of policies.
pub(super) fn selector() -> Schema {
    let value = text(Bounds::most(63)).rule("!self.contains('*')", "a label's value is matched as it is: no wildcards");
    let labels = map(value, Bounds::most(4096))
        .about("Labels that a workload has to have, all of them.")
        .rule("self.all(key, key != '')", "a label has a key")
        .rule("self.all(key, !key.contains('*'))", "a label's key is matched as it is: no wildcards");
    object(vec![optional("matchLabels", labels)])
}

/// `targetRef`, and each of `targetRefs`.
pub(super) fn target() -> Schema {
    object(vec![
        optional(
            "group",
            pattern(Bounds::most(253), GROUP).about("API group of the target; empty for Kubernetes' own."),
        ),
        required("kind", pattern(Bounds::of(1, 63), KIND).about("Kind of the target, such as Gateway or Service.")),
        required("name", text(Bounds::of(1, 253)).about("Name of the target.")),
        optional(
            "namespace",
            text(ANY_TEXT)
                .about("Left empty: a target lies in the namespace of the object that names it.")
                .rule("self == ''", "a target lies in the object's own namespace"),
        ),
    ])
}

/// Most targets of one object.
pub(super) const MOST_TARGETS: Bounds = Bounds::most(16);

/// `status`. Whatever else a controller writes there is kept.
pub(super) fn status() -> Schema {
    let condition = object(vec![
        optional("type", text(ANY_TEXT).about("What is judged.")),
        optional("status", text(ANY_TEXT).about("True, False or Unknown.")),
        optional("reason", text(ANY_TEXT).about("Why, in one word for programs.")),
        optional("message", text(ANY_TEXT).about("Why, in a sentence for people.")),
        optional("lastTransitionTime", Schema::new(Shape::Time).about("When the status became what it is.")),
        optional("lastProbeTime", Schema::new(Shape::Time).about("When it was last looked at.")),
        optional("observedGeneration", generation().about("The generation that was judged.")),
    ]);
    let cause = object(vec![
        optional("code", text(ANY_TEXT).about("Short code of the kind of message.")),
        optional("name", text(ANY_TEXT).about("Its name for people.")),
    ]);
    let message = open_object(vec![
        optional("type", cause),
        optional("level", word(&["UNKNOWN", "ERROR", "WARNING", "INFO"]).about("How much it matters.")),
        optional("documentationUrl", text(ANY_TEXT).about("Where the kind of message is explained.")),
    ]);
    open_object(vec![
        optional("conditions", list(condition, Bounds::NONE).about("What controllers say of the object.")),
        optional("observedGeneration", generation().about("The last generation that a controller has read.")),
        optional("validationMessages", list(message, Bounds::NONE).about("What analyzers found in the object.")),
    ])
}

/// Istio writes it as text, as its JSON does with all numbers of 64 bits.
fn generation() -> Schema {
    Schema::new(Shape::NumberOrText)
}
