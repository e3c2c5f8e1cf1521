//! Embeds the kernel programs that `cargo xtask ebpf` built. Without them the crate still compiles, with an empty
//! object, and the loader says so at start.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Path of an object to embed instead.
const OBJECT_VAR: &str = "MESH_EBPF_OBJECT";

fn main() {
    println!("cargo:rerun-if-env-changed={OBJECT_VAR}");
    println!("cargo:rerun-if-env-changed=CARGO_TARGET_DIR");
    let object = env::var_os(OBJECT_VAR).map_or_else(built_object, PathBuf::from);
    // Watching a directory that exists, instead of a file that does not, keeps cargo from building again every time.
    if let Some(dir) = object.parent()
        && fs::create_dir_all(dir).is_ok()
    {
        println!("cargo:rerun-if-changed={}", dir.display());
    }
    let bytes = fs::read(&object).unwrap_or_default();
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("mesh-ebpf.o");
    fs::write(&out, bytes).unwrap_or_else(|e| panic!("write {}: {e}", out.display()));
}

fn built_object() -> PathBuf {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let workspace = manifest.parent().expect("mesh-node lies in the workspace").to_owned();
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |dir| workspace.join(dir));
    target.join("bpf").join("mesh-ebpf.o")
}
