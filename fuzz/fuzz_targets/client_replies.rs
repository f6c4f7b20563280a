#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "each target runs one of the bodies")]
#[path = "../../datapath/proto/tests/it/bodies.rs"]
mod bodies;

fuzz_target!(|data: &[u8]| {
    bodies::client_replies(data);
});
