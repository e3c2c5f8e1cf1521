//! Files of the tree that are written by a program: `crds/`, by an example of mesh-api.

use anyhow::Result;

use crate::process;
use crate::tree::Tree;

/// Writes all of them anew. That they are up to date is a unit test of mesh-api.
pub(crate) fn run(tree: &Tree) -> Result<()> {
    process::run(tree.cargo(&["run", "--locked", "--quiet", "--package=mesh-api", "--example=crds", "--", "crds"]))
}
