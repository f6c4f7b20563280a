//! What a call answers: one JSON object (`DriverStatus` in Kubernetes' driver-call.go).

use serde::Serialize;
use serde_json::Value;
use sheave_core::printable;

/// Bytes of a message, which ends up in events of pods (1 KiB there).
const MESSAGE_LEN_MAX: usize = 1024;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attached: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_new_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capabilities: Option<Capabilities>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Status {
    Success,
    Failure,
    #[serde(rename = "Not supported")]
    NotSupported,
}

/// What kubelet does for the driver, and asks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Capabilities {
    attach: bool,
    /// Files have labels of their own.
    #[serde(rename = "selinuxRelabel")]
    se_linux_relabel: bool,
    /// By statfs(2) of the pod's directory.
    supports_metrics: bool,
    /// Kubelet sets the group of files.
    #[serde(rename = "fsGroup")]
    fs_group: bool,
    /// `expandfs` follows `expandvolume`.
    #[serde(rename = "requiresFSResize")]
    requires_fs_resize: bool,
}

impl Answer {
    fn new(status: Status) -> Self {
        let (message, device, attached) = (None, None, None);
        Self { status, message, device, attached, volume_new_size: None, capabilities: None }
    }

    /// It is done.
    #[must_use]
    pub fn success() -> Self {
        Self::new(Status::Success)
    }

    /// It has failed: one line for a person.
    #[must_use]
    pub fn failure(why: &str) -> Self {
        let mut why = printable(why).to_string();
        let mut end = why.len().min(MESSAGE_LEN_MAX);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        why.truncate(end);
        Self { message: Some(why), ..Self::new(Status::Failure) }
    }

    /// There is no such call here. Kubernetes remembers it, and does what it does by default.
    #[must_use]
    pub fn not_supported() -> Self {
        Self::new(Status::NotSupported)
    }

    /// That of `init`: whether controller-manager attaches volumes for a node.
    #[must_use]
    pub fn initialized(attach: bool) -> Self {
        let capabilities = Capabilities {
            attach,
            se_linux_relabel: true,
            supports_metrics: true,
            fs_group: true,
            requires_fs_resize: true,
        };
        Self { capabilities: Some(capabilities), ..Self::success() }
    }

    pub(crate) fn device(device: String) -> Self {
        Self { device: Some(device), ..Self::success() }
    }

    pub(crate) fn attached(attached: bool) -> Self {
        Self { attached: Some(attached), ..Self::success() }
    }

    pub(crate) fn size(bytes: u64) -> Self {
        Self { volume_new_size: Some(bytes), ..Self::success() }
    }

    /// Whether the process that answers so ends with exit code 0.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.status == Status::Success
    }

    /// The message of an answer that another process has given, if it has failed.
    pub(crate) fn failed(json: &str) -> Option<String> {
        let answer: Value = serde_json::from_str(json).ok()?;
        answer["message"].as_str().map(str::to_owned)
    }

    /// One line of JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("texts, numbers and truth values are JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_43_answers_are_what_kubernetes_reads() {
        let json = |answer: &Answer, want: &str| assert_eq!(answer.to_json(), want);
        json(&Answer::success(), r#"{"status":"Success"}"#);
        json(&Answer::failure("a\nb"), r#"{"status":"Failure","message":"a\\nb"}"#);
        assert_eq!(Answer::failed(&Answer::failure("why").to_json()).as_deref(), Some("why"));
        assert_eq!(Answer::failed(&Answer::success().to_json()), None);
        json(&Answer::not_supported(), r#"{"status":"Not supported"}"#);
        json(&Answer::attached(false), r#"{"status":"Success","attached":false}"#);
        json(&Answer::size(5), r#"{"status":"Success","volumeNewSize":5}"#);
        let capabilities = r#""selinuxRelabel":true,"supportsMetrics":true,"fsGroup":true,"#;
        let last = r#""requiresFSResize":true"#;
        for attach in [false, true] {
            let all = format!(r#"{{"attach":{attach},{capabilities}{last}}}"#);
            let want = format!(r#"{{"status":"Success","capabilities":{all}}}"#);
            json(&Answer::initialized(attach), &want);
        }
    }

    #[test]
    fn a_message_is_short_and_whole() {
        let answer = Answer::failure(&"ü".repeat(2000));
        assert!(answer.message.is_some_and(|message| message.len() <= MESSAGE_LEN_MAX));
    }
}
