//! Compiles the Container Storage Interface; protox needs no protoc on the machine.

use std::fs;
use std::path::PathBuf;

use prost::Message as _;

/// Mount flags may be secret (the specification, `VolumeCapability.MountVolume`).
const MOUNT_FLAGS: &str = "csi.v1.VolumeCapability.MountVolume";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/csi/v1/csi.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    fs::write(out.join("csi.bin"), descriptors.encode_to_vec())?;
    let mut builder = tonic_prost_build::configure().skip_debug([MOUNT_FLAGS]);
    // What has secrets cannot be printed, so they do not get into a log.
    for file in &descriptors.file {
        for message in &file.message_type {
            if message.field.iter().any(|field| field.name() == "secrets") {
                let name = format!("{}.{}", file.package(), message.name());
                builder = builder.skip_debug([name]);
            }
        }
    }
    builder.compile_fds(descriptors)?;
    let file = "proto/pluginregistration/v1/registration.proto";
    println!("cargo:rerun-if-changed={file}");
    tonic_prost_build::configure().compile_fds(protox::compile([file], ["proto"])?)?;
    Ok(())
}
