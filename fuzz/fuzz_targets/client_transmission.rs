#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "each target runs one of the bodies")]
#[path = "../../datapath/proto/tests/it/bodies.rs"]
mod bodies;
#[path = "../../datapath/proto/tests/it/client_body.rs"]
mod client_body;

fuzz_target!(|data: &[u8]| {
    client_body::client_transmission(data);
});
