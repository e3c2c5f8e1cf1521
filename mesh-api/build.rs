//! Compiles our `.proto` files without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["authorization.proto", "ca.proto", "workload.proto", "xds.proto", "zds.proto"];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".google.protobuf.Any")
        .bytes(".envoy.service.discovery.v3")
        // Equal values must give equal bytes: versions are hashes of them.
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
