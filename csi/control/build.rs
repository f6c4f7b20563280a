//! Compiles the control API; protox needs no protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/sheave/control/v1/control.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
