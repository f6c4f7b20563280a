//! The Helm chart: its manifests are valid, what is rendered in `deploy/kubernetes` is what it
//! renders, and the programs take the arguments and the configuration that it gives them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use sheave_tests::{FakeKernel, Node, Output, PATIENCE, Run, Scratch, go_module, go_tool, sheave};

/// Of the API whose schemas are used: the one that `tests/k8s` runs.
const KUBERNETES: &str = "k8s.io/kubernetes";
const KUBE_VERSION: &str = "1.36.0";
/// The definitions of the API that are more than their schema says.
const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";
const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
/// As a user would set them, in each form of the chart.
const SETTINGS: &[&str] = &[
    "",
    "daemon.host=true,node.nodeSelector.disk=fast,imagePullSecrets[0].name=key",
    "daemon.loadModules=false,daemon.shards=2,pools.big.url=nbd://server:10809",
    "pools.fast.capacity=100G,pools.fast.create=false,storageClasses[0].name=a,\
     storageClasses[0].pool=fast,storageClasses[0].isDefault=true,storageClasses[0].fsType=xfs,\
     storageClasses[0].parameters.limit-iops=500,storageClasses[0].mountOptions[0]=noatime",
    "monitoring.serviceMonitor.enabled=true,monitoring.dashboard.enabled=true",
    "node.startupTaint=csi.sheave.dev/agent-not-ready",
    "flexvolume.enabled=true,flexvolume.attach=true,flexvolume.driver=example.org/disk",
    "pools.own.trust_attacher=true,pools.own.volumes.db=nbd://server/db",
    "mode=controller,pools.fast.shared=true,node.startupTaint=csi.sheave.dev/agent-not-ready",
    "mode=controller,pools.fast.shared=true,pools.own.volumes.db=nbd://server/db",
    "mode=controller,pools.fast.url=nbd://server:10809,sidecars.healthMonitor.enabled=true",
    "mode=controller,pools.fast.shared=true,volumeAttributesClasses[0].name=slow,\
     volumeAttributesClasses[0].parameters.limit-iops=500,createNamespace=true",
];
/// What is refused, and a word of why.
const WRONG: &[(&str, &str)] = &[
    ("mode=both", "mode"),
    ("node.helthPort=1", "helthPort"),
    ("node.startupTaint=a=b:NoExecute", "startupTaint"),
    ("pools.Fast.url=file:///x", "Fast"),
    ("pools.fast.url=/var/lib/images", "url"),
    ("pools.fast.max-size=1G", "max-size"),
    ("pools.own.trust_attacher=true", "url"),
    ("pools.fast.volumes.db=nbd://server/db", "oneOf"),
    ("pools.own.volumes.db=5", "db"),
    ("storageClasses[0].name=a,storageClasses[0].pool=slow", "no pool slow"),
    ("storageClasses[0].fsType=ntfs", "fsType"),
    ("flexvolume.driver=sheave", "driver"),
    ("daemon.resources.limits.memory=1Gi", "memory"),
    ("mode=controller", "shared: true"),
    ("volumeAttributesClasses[0].name=a,volumeAttributesClasses[0].parameters.b=c", "controller"),
    ("sidecars.healthMonitor.enabled=true", "controller"),
];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn tool(test: &str, package: &str) -> Option<PathBuf> {
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/chart");
    go_tool(test, &module, package)
}

fn helm(test: &str) -> Option<PathBuf> {
    tool(test, "helm.sh/helm/v3/cmd/helm")
}

/// `helm template` with these settings.
fn template(helm: &Path, settings: &str) -> Run {
    let run = Run::new(helm).args("template sheave").arg(deploy().join("chart"));
    let run = run.args("--namespace sheave --kube-version").arg(KUBE_VERSION);
    if settings.is_empty() { run } else { run.arg("--set").arg(settings) }
}

/// The image is called by the version of the program (`deploy/image/build`).
#[test]
fn the_chart_runs_the_image_of_this_version() {
    let chart = fs::read_to_string(deploy().join("chart/Chart.yaml")).expect("a chart");
    let wanted = format!("appVersion: {}", env!("CARGO_PKG_VERSION"));
    assert!(chart.lines().any(|line| line == wanted), "no {wanted}: {chart}");
}

#[test]
fn the_manifests_are_what_the_chart_renders() {
    let Some(helm) = helm("the_manifests_are_what_the_chart_renders") else { return };
    for form in ["node", "controller"] {
        let dir = deploy().join("kubernetes");
        let values = dir.join(format!("{form}-values.yaml"));
        let rendered = template(&helm, "").arg("--values").arg(values).ok();
        let path = dir.join(format!("{form}.yaml"));
        let kept = fs::read_to_string(&path).expect("a manifest");
        let advice = "the chart has changed; run: deploy/kubernetes/render";
        assert!(kept == rendered, "{}: {advice}", path.display());
    }
}

#[test]
fn every_manifest_is_valid() {
    let test = "every_manifest_is_valid";
    let Some(helm) = helm(test) else { return };
    let Some(kubeconform) = tool(test, "github.com/yannh/kubeconform/cmd/kubeconform") else {
        return;
    };
    let scratch = Scratch::new();
    write_schemas(scratch.path());
    let schemas = scratch.file("{{ .ResourceKind }}{{ .KindSuffix }}.json");
    let check = |manifests: &str| -> Output {
        // The definition of a ServiceMonitor is the Prometheus operator's.
        let run = Run::new(&kubeconform).args("-strict -summary -skip ServiceMonitor");
        run.arg("-schema-location").arg(&schemas).stdin(manifests.as_bytes()).output()
    };
    for settings in SETTINGS {
        let rendered = template(&helm, settings).ok();
        let checked = check(&rendered);
        assert!(checked.status.success(), "{settings}: {}", checked.describe());
        assert!(!checked.stdout.contains(" 0 resources found"), "{}", checked.stdout);
    }
    let documented = documented();
    assert_eq!(documented.matches("apiVersion: v1\n").count(), 3, "{documented}");
    let checked = check(&documented);
    assert!(checked.status.success(), "docs/kubernetes.md: {}", checked.describe());
    let rendered = template(&helm, "").ok();
    for (right, wrong) in [("hostNetwork: true", "hostNetwork: 5"), ("hostPID:", "hostPid:")] {
        assert!(rendered.contains(right), "{rendered}");
        let checked = check(&rendered.replace(right, wrong));
        assert!(!checked.status.success(), "{wrong} is found: {}", checked.describe());
    }
}

fn page() -> String {
    fs::read_to_string(deploy().join("../docs/kubernetes.md")).expect("a page")
}

/// The objects that the page has a user make.
fn documented() -> String {
    let page = page();
    let applied = page.split("<<END\n").skip(1).filter_map(|rest| rest.split("END\n").next());
    // A list's item is indented.
    let applied = applied.map(|text| text.trim_start().replace("\n   ", "\n"));
    let shown = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let shown = shown.filter(|text| text.starts_with("apiVersion")).map(str::to_owned);
    applied.chain(shown).collect::<Vec<_>>().join("---\n")
}

#[test]
fn the_values_of_the_documentation_are_taken() {
    let Some(helm) = helm("the_values_of_the_documentation_are_taken") else { return };
    let page = page();
    let values = page.split("# my-values.yaml\n").nth(1).and_then(|rest| rest.split("```").next());
    let scratch = Scratch::new();
    let file = scratch.file("my-values.yaml");
    fs::write(&file, values.expect("values")).expect("written");
    let rendered = template(&helm, "").arg("--values").arg(file).ok();
    let directory = "path: /mnt/nvme/sheave\n          type: Directory\n";
    for part in ["capacity = \"900G\"", directory, "name: sheave-slow", "limit-iops: \"500\""] {
        assert!(rendered.contains(part), "no {part}: {rendered}");
    }
}

/// Writes a schema for each kind of the API, which allows what is named in it only.
fn write_schemas(dir: &Path) {
    let pinned = Path::new(env!("CARGO_MANIFEST_DIR")).join("k8s/kubernetes/go.mod");
    let pinned = fs::read_to_string(pinned).expect("a module");
    let line = pinned.lines().find(|line| line.trim().starts_with(&format!("{KUBERNETES} v")));
    let version = line.and_then(|line| line.split_whitespace().nth(1)).expect("a version");
    let path = go_module(KUBERNETES, version).join("api/openapi-spec/swagger.json");
    let mut api: Value = serde_json::from_slice(&fs::read(path).expect("an API")).expect("JSON");
    let definitions = api["definitions"].as_object_mut().expect("definitions");
    for (_, definition) in definitions.iter_mut() {
        if definition.get("properties").is_some() {
            definition["additionalProperties"] = json!(false);
        }
    }
    definitions.insert(INT_OR_STRING.to_owned(), json!({"type": ["string", "integer"]}));
    definitions.insert(QUANTITY.to_owned(), json!({"type": ["string", "number"]}));
    let all = dir.join("_all.json");
    fs::write(&all, json!({"definitions": definitions}).to_string()).expect("written");
    for (name, definition) in definitions {
        let kinds = definition["x-kubernetes-group-version-kind"].as_array();
        let [kind] = kinds.map(Vec::as_slice).unwrap_or_default() else { continue };
        let text = |key: &str| kind[key].as_str().expect("text").to_lowercase();
        let group = text("group");
        let group = group.split('.').next().filter(|group| !group.is_empty());
        let suffix: Vec<_> =
            group.into_iter().map(str::to_owned).chain([text("version")]).collect();
        let file = dir.join(format!("{}-{}.json", text("kind"), suffix.join("-")));
        let refers = format!("file://{}#/definitions/{name}", all.display());
        fs::write(file, json!({ "$ref": refers }).to_string()).expect("written");
    }
}

#[test]
fn wrong_values_are_refused_with_a_reason() {
    let Some(helm) = helm("wrong_values_are_refused_with_a_reason") else { return };
    for (settings, why) in WRONG {
        let error = template(&helm, settings).fails();
        assert!(error.contains(why), "{settings}: no {why:?}: {error}");
    }
}

#[test]
fn the_programs_take_their_arguments_and_their_configuration() {
    let test = "the_programs_take_their_arguments_and_their_configuration";
    let Some(helm) = helm(test) else { return };
    let mut seen = 0;
    for settings in ["node.startupTaint=a/b", "mode=controller,pools.fast.shared=true"] {
        let rendered = template(&helm, settings).ok();
        for args in arguments(&rendered).into_iter().filter(|args| !args[0].starts_with('-')) {
            seen += 1;
            // An unknown one is found before it helps.
            let run = args.iter().fold(Run::new(sheave()), |run, arg| run.arg(arg));
            assert!(run.arg("--help").ok().contains("Usage: sheave"), "{args:?}");
        }
    }
    assert_eq!(seen, 5, "daemon and plugin of both forms, and the controller");
    let node = Node { kernel: FakeKernel::new(), image: String::new() };
    let pool = node.file("pool");
    fs::create_dir(&pool).expect("a directory");
    let settings = format!(
        "pools.fast.url=file://{},pools.fast.capacity=100G,daemon.shards=1,\
         pools.own.volumes.a b=null:?size=1M,pools.own.trust_attacher=true",
        pool.display()
    );
    let rendered = template(&helm, &settings).args("-s templates/configmap.yaml").ok();
    let (_, text) = rendered.split_once("daemon.toml: |\n").expect("a configuration");
    let text: String = text.lines().map(|line| format!("{}\n", line.trim_start())).collect();
    let config = node.file("daemon.toml");
    fs::write(&config, &text).expect("written");
    let daemon = node.start(&["daemon", "--config", config.to_str().expect("UTF-8")]);
    daemon.wait_for_log(" ready ");
    daemon.sheave("volume create fast/a").ok();
    assert_eq!(daemon.volume("own/a b")["size_bytes"], 1 << 20);
}

/// The arguments of each container.
fn arguments(rendered: &str) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    let mut lines = rendered.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        if let Some(list) = line.strip_prefix("args: [") {
            let list = list.trim_end_matches(']');
            all.push(list.split(", ").map(str::to_owned).collect());
        } else if line == "args:" {
            let mut args = Vec::new();
            while let Some(arg) = lines.peek().and_then(|line| line.strip_prefix("- ")) {
                args.push(arg.to_owned());
                lines.next();
            }
            all.push(args);
        }
    }
    all
}

#[test]
fn the_dashboard_shows_metrics_that_exist() {
    let text =
        fs::read_to_string(deploy().join("chart/files/dashboard.json")).expect("a dashboard");
    let board: Value = serde_json::from_str(&text).expect("JSON");
    let exported = exported();
    let panels = board["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let expressions: Vec<_> = targets.map(|of| of["expr"].as_str().expect("text")).collect();
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let words = expressions.iter().flat_map(|text| text.split(|c| !is_name(c)));
    let own: Vec<_> = words.filter(|word| word.starts_with("sheave_")).collect();
    assert!(own.len() >= 8, "{own:?}");
    for name in own {
        let ends = ["_count", "_bucket", "_total"];
        let family = ends.iter().find_map(|end| name.strip_suffix(end));
        let declared = format!("# TYPE {} ", family.unwrap_or(name));
        assert!(exported.contains(&declared), "{name}: {exported}");
    }
}

/// The metrics of a plugin and of a daemon with a volume.
fn exported() -> String {
    let metrics = sheave_csi::Metrics::default();
    metrics.note("/csi.v1.Node/NodeGetInfo", tonic::Code::Ok, Instant::now());
    let node = Node::new();
    let daemon = node.start(&["daemon", "--metrics", "127.0.0.1:0"]);
    daemon.wait_for_log(" ready ");
    daemon.wait_for_log("metrics at http://");
    daemon.sheave("attach").arg(&node.image).ok();
    let log = daemon.log();
    let (_, rest) = log.split_once("metrics at http://").expect("an address");
    let address = rest.split('/').next().expect("an address");
    let mut stream = TcpStream::connect(address).expect("its metrics");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("sent");
    let mut page = metrics.text();
    stream.read_to_string(&mut page).expect("an answer");
    page
}
