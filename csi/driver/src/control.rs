//! Calls of the control API by the services.

use std::time::Duration;

use sheave_client::reached;
use sheave_control::VolumesClient;
use sheave_control::v1::ListPoolsRequest;
use tokio::time::timeout;
use tonic::{Code, Response, Status};

/// How soon the server of the volumes must answer a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits for a call, and turns its error into one of CSI: without details (the specification,
/// "Error Scheme"), and UNAVAILABLE where the transport failed, since the outcome is unknown then.
/// The deadline is that of the call of CSI (`calls.rs`).
pub(crate) async fn call<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    call.await.map(Response::into_inner).map_err(|status| {
        let status = reached(status);
        let code = match status.code() {
            Code::Unknown | Code::Cancelled => Code::Unavailable,
            code => code,
        };
        Status::new(code, status.message())
    })
}

/// Checks that the server of the volumes answers: the daemon, or the pools of this process. Their
/// storage takes no part, since a restart of the plugin would not mend it.
///
/// # Errors
/// With the cause.
pub(crate) async fn probe(volumes: &VolumesClient) -> Result<(), String> {
    let mut volumes = volumes.clone();
    match timeout(PROBE_TIMEOUT, volumes.list_pools(ListPoolsRequest {})).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err("it does not answer".to_owned()),
    }
}
