//! The taint that keeps pods off a node of Kubernetes until the driver works there. A new node gets
//! it from its kubelet (`--register-with-taints`); the plugin removes it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use sheave_core::printable;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

/// Where a pod has its account of the API server.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Of a request, with its connection.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Between tries: the first, and the longest.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// A Node lists the images that it has.
const ANSWER_LEN_MAX: usize = 4 << 20;
/// <https://www.rfc-editor.org/rfc/rfc7386>
const MERGE_PATCH: &str = "application/merge-patch+json";

/// Removes the taints of this key from the node once the plugin is ready. Tries until that is done.
pub(crate) async fn remove_when(ready: oneshot::Receiver<()>, key: String, node: String) {
    if ready.await.is_err() {
        return;
    }
    let mut pause = RETRY_MIN;
    while let Err(error) = remove(&key, &node).await {
        tracing::warn!(key, node, "the taint is not removed, and pods wait for it: {error:#}");
        sleep(pause).await;
        pause = RETRY_MAX.min(pause * 2);
    }
}

/// # Errors
/// When the API server does not answer or refuses.
async fn remove(key: &str, node: &str) -> Result<()> {
    let api = Api::of_pod()?;
    let path = format!("/api/v1/nodes/{node}");
    let object = api.call(Method::GET, &path, None).await?;
    if object["metadata"]["name"] != node {
        bail!("API server: GET {path}: the answer is not this Node");
    }
    let all = object["spec"]["taints"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rest: Vec<_> = all.iter().filter(|taint| taint["key"] != key).collect();
    if rest.len() == all.len() {
        tracing::info!(key, node, "there is no such taint");
        return Ok(());
    }
    // Refused if the node has changed since it was read.
    let version = &object["metadata"]["resourceVersion"];
    let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": rest}});
    api.call(Method::PATCH, &path, Some(patch)).await?;
    tracing::info!(key, node, "the taint is removed");
    Ok(())
}

/// The API server, as a pod finds it.
struct Api {
    host: String,
    port: u16,
    token: String,
    tls: Arc<ClientConfig>,
}

impl Api {
    /// # Errors
    /// When this is no pod, or one without an account.
    fn of_pod() -> Result<Self> {
        let variable = |name: &str| {
            std::env::var(name).with_context(|| format!("{name}: this is no pod of Kubernetes"))
        };
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?.parse();
        let port = port.context("KUBERNETES_SERVICE_PORT")?;
        // It changes every hour.
        let token = Path::new(ACCOUNT).join("token");
        let read = std::fs::read_to_string(&token);
        let token = read.with_context(|| printable(&token).to_string())?.trim().to_owned();
        let authority = Path::new(ACCOUNT).join("ca.crt");
        let tls = trusting(&authority).with_context(|| printable(&authority).to_string())?;
        Ok(Self { host, port, token, tls })
    }

    /// # Errors
    /// When it does not answer in time, or with another status than 200.
    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let what = format!("API server {}:{}: {method} {path}", self.host, self.port);
        let called = timeout(TIMEOUT, self.exchange(method, path, body));
        let (status, answer) = called.await.context("no answer").flatten().context(what.clone())?;
        if status != StatusCode::OK {
            bail!("{what}: {status}: {}", answer["message"].as_str().unwrap_or_default());
        }
        Ok(answer)
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<(StatusCode, Value)> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        let name = ServerName::try_from(self.host.clone())?;
        let stream = TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let host =
            if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, format!("{host}:{}", self.port))
            .header(AUTHORIZATION, format!("Bearer {}", self.token))
            .header(CONTENT_TYPE, MERGE_PATCH)
            .body(Full::new(Bytes::from(body.map(|of| of.to_string()).unwrap_or_default())))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), ANSWER_LEN_MAX).collect().await;
        connection.abort();
        let answer = answer.map_err(anyhow::Error::from_boxed)?.to_bytes();
        Ok((status, serde_json::from_slice(&answer).unwrap_or_default()))
    }
}

/// # Errors
/// When the file holds no certificates.
fn trusting(authority: &Path) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(authority)? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}
