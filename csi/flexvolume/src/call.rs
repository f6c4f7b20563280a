//! The calls, with their arguments in the order of Kubernetes.

use std::ffi::OsString;
use std::path::PathBuf;

use sheave_core::{parse_digits, printable};

/// A call. Options are the JSON text that [`crate::Driver`] parses. They may have secrets, so a
/// call is not shown.
#[derive(Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the arguments are named as in the call's form")]
pub enum Call {
    /// `init`
    Init,
    /// `attach OPTIONS NODE`, by controller-manager.
    Attach { options: String, node: String },
    /// `detach CLAIM NODE`, by controller-manager: the name of the PersistentVolume, or of the
    /// volume in its pod.
    Detach { claim: String, node: String },
    /// `isattached OPTIONS NODE`, by controller-manager.
    IsAttached { options: String, node: String },
    /// `waitforattach DEVICE OPTIONS`, by kubelet.
    WaitForAttach { device: String, options: String },
    /// `mountdevice DIR DEVICE OPTIONS`, by kubelet.
    MountDevice { dir: PathBuf, device: String, options: String },
    /// `unmountdevice DIR`, by kubelet.
    UnmountDevice { dir: PathBuf },
    /// `mount DIR OPTIONS`, by kubelet.
    Mount { dir: PathBuf, options: String },
    /// `unmount DIR`, by kubelet.
    Unmount { dir: PathBuf },
    /// `expandvolume OPTIONS DIR NEW_BYTES OLD_BYTES`, by controller-manager.
    ExpandVolume { options: String, bytes: u64 },
    /// `expandfs OPTIONS DEVICE DIR NEW_BYTES OLD_BYTES`, by kubelet.
    ExpandFs { options: String, bytes: u64 },
    /// `tidy`, by other calls of this driver.
    Tidy,
}

/// Arguments that are no call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotACall {
    /// An operation that is not known here.
    Unknown,
    /// Wrong arguments of one that is.
    Wrong(String),
}

impl Call {
    /// Reads the arguments behind the driver's name.
    ///
    /// # Errors
    /// When they are no call.
    pub fn parse(args: &[OsString]) -> Result<Self, NotACall> {
        let Some((operation, args)) = args.split_first() else {
            let why = "the operation is missing, such as init; Kubernetes calls this program";
            return Err(NotACall::Wrong(why.to_owned()));
        };
        let operation = operation.to_str().ok_or(NotACall::Unknown)?;
        let names: &[&str] = match operation {
            "init" | "tidy" => &[],
            "attach" | "isattached" => &["OPTIONS", "NODE"],
            "detach" => &["CLAIM", "NODE"],
            "waitforattach" => &["DEVICE", "OPTIONS"],
            "mountdevice" => &["DIR", "DEVICE", "OPTIONS"],
            "unmountdevice" | "unmount" => &["DIR"],
            "mount" => &["DIR", "OPTIONS"],
            "expandvolume" => &["OPTIONS", "DIR", "NEW_BYTES", "OLD_BYTES"],
            "expandfs" => &["OPTIONS", "DEVICE", "DIR", "NEW_BYTES", "OLD_BYTES"],
            _ => return Err(NotACall::Unknown),
        };
        if args.len() != names.len() {
            let why = format!("{} arguments; write {operation} {}", args.len(), names.join(" "));
            return Err(NotACall::Wrong(why));
        }
        // Options may have secrets, so they are not shown, at whatever place they are.
        let wrong = |at: usize| {
            let shown = match args[at].as_encoded_bytes().contains(&b'{') {
                true => String::new(),
                false => format!(" {}", printable(&args[at])),
            };
            NotACall::Wrong(format!("{operation}: {}{shown} is wrong", names[at]))
        };
        let options = |at: usize| {
            let why = || NotACall::Wrong(format!("{operation}: OPTIONS are no UTF-8"));
            args[at].to_str().map(str::to_owned).ok_or_else(why)
        };
        let text = |at: usize| {
            let text = args[at].to_str().filter(|text| !text.is_empty());
            text.map(str::to_owned).ok_or_else(|| wrong(at))
        };
        // Without one, Kubernetes passes an empty text.
        let device = |at: usize| args[at].to_str().map(str::to_owned).ok_or_else(|| wrong(at));
        let dir = |at: usize| {
            let dir = PathBuf::from(&args[at]);
            if dir.is_absolute() { Ok(dir) } else { Err(wrong(at)) }
        };
        let bytes = |at: usize| parse_digits(&text(at)?).ok_or_else(|| wrong(at));
        Ok(match operation {
            "attach" => Self::Attach { options: options(0)?, node: text(1)? },
            "isattached" => Self::IsAttached { options: options(0)?, node: text(1)? },
            "detach" => Self::Detach { claim: text(0)?, node: text(1)? },
            "waitforattach" => Self::WaitForAttach { device: device(0)?, options: options(1)? },
            "mountdevice" => {
                Self::MountDevice { dir: dir(0)?, device: device(1)?, options: options(2)? }
            }
            "unmountdevice" => Self::UnmountDevice { dir: dir(0)? },
            "mount" => Self::Mount { dir: dir(0)?, options: options(1)? },
            "unmount" => Self::Unmount { dir: dir(0)? },
            "expandvolume" => Self::ExpandVolume { options: options(0)?, bytes: bytes(2)? },
            "expandfs" => Self::ExpandFs { options: options(0)?, bytes: bytes(3)? },
            "init" => Self::Init,
            "tidy" => Self::Tidy,
            _ => return Err(NotACall::Unknown),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Call, NotACall> {
        Call::parse(&args.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn arguments_are_in_the_order_of_kubernetes() {
        let (options, node) = ("{}".to_owned(), "n1".to_owned());
        assert!(parse(&["attach", "{}", "n1"]) == Ok(Call::Attach { options, node }));
        let call = Call::MountDevice { dir: "/d".into(), device: "v".into(), options: "{}".into() };
        assert!(parse(&["mountdevice", "/d", "v", "{}"]) == Ok(call));
        let call = Call::ExpandVolume { options: "{}".to_owned(), bytes: 2 };
        assert!(parse(&["expandvolume", "{}", "/d", "2", "1"]) == Ok(call));
        let call = Call::ExpandFs { options: "{}".to_owned(), bytes: 2 };
        assert!(parse(&["expandfs", "{}", "v", "/d", "2", "1"]) == Ok(call));
        assert!(parse(&["init"]) == Ok(Call::Init));
    }

    #[test]
    fn what_is_not_known_is_not_supported_and_wrong_arguments_are_named() {
        for operation in ["getvolumename", "provision", "INIT", ""] {
            assert!(parse(&[operation, "{}"]) == Err(NotACall::Unknown), "{operation}");
        }
        for (args, why) in [
            (&[][..], "operation is missing"),
            (&["mount", "/d"], "write mount DIR OPTIONS"),
            (&["mount", "d", "{}"], "mount: DIR d is wrong"),
            (&["unmount", ""], "unmount: DIR  is wrong"),
            (&["detach", "", "n1"], "detach: CLAIM  is wrong"),
            (&["expandfs", "{}", "v", "/d", "x", "1"], "NEW_BYTES x is wrong"),
        ] {
            match parse(args) {
                Err(NotACall::Wrong(found)) => assert!(found.contains(why), "{found}"),
                _ => panic!("{args:?}"),
            }
        }
    }

    #[test]
    fn rule_14_options_at_a_wrong_place_are_not_quoted() {
        let options = r#"{"kubernetes.io/secret/k":"hunter2"}"#;
        for args in [
            &["mount", options, "/d"][..],
            &["unmount", options],
            &["mountdevice", options, "v", "/d"],
            &["expandvolume", "/d", "x", options, "1"],
        ] {
            match parse(args) {
                Err(NotACall::Wrong(why)) => assert!(!why.contains("hunter2"), "{why}"),
                _ => panic!("{args:?}"),
            }
        }
    }
}
