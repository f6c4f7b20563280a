//! The interface beside the specification's own file, field by field.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};
use sheave_csi_proto::DESCRIPTORS;
use sheave_tests::{Run, have, skip};

/// Go modules that pin a version of the specification each.
const VERSIONS: [&str; 2] = ["tools", "tools/csi-spec"];

#[test]
fn the_interface_is_that_of_the_specification() {
    let test = "the_interface_is_that_of_the_specification";
    if !have("go") {
        return skip(test, "no Go, which fetches the specification");
    }
    let ours = facts(&FileDescriptorSet::decode(DESCRIPTORS).expect("descriptors"));
    let mut theirs = BTreeSet::new();
    for module in VERSIONS {
        let version = facts(&compiled(&fetched(module)));
        let missing: Vec<_> = version.difference(&ours).collect();
        assert!(missing.is_empty(), "{module} has, and ours has not: {missing:#?}");
        theirs.extend(version);
    }
    assert!(theirs.len() > 400, "{} facts", theirs.len());
    let extra: Vec<_> = ours.difference(&theirs).collect();
    assert!(extra.is_empty(), "in no version: {extra:#?}");
    // Both versions are there: one has the volume condition, the other the health calls.
    for name in ["VolumeCondition", "NodeGetStorageHealth"] {
        assert!(theirs.iter().any(|fact| fact.contains(name)), "{name}");
    }
}

/// The directory of the specification that a Go module pins.
fn fetched(module: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(module);
    let spec = "github.com/container-storage-interface/spec";
    Run::new("go").args("mod download").arg(spec).in_dir(&dir).ok();
    let found = Run::new("go").args("list -m -f {{.Dir}}").arg(spec).in_dir(&dir).ok();
    PathBuf::from(found.trim_end())
}

fn compiled(dir: &Path) -> FileDescriptorSet {
    protox::compile(["csi.proto"], [dir]).expect("the specification compiles")
}

/// What a client and a server must agree on, a line each.
fn facts(set: &FileDescriptorSet) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for file in set.file.iter().filter(|file| file.package() == "csi.v1") {
        for message in &file.message_type {
            message_facts("", message, &mut facts);
        }
        for of in &file.enum_type {
            enum_facts("", of, &mut facts);
        }
        for service in &file.service {
            for method in &service.method {
                facts.insert(format!(
                    "rpc {}.{}: {} to {}, streams {} {}",
                    service.name(),
                    method.name(),
                    method.input_type(),
                    method.output_type(),
                    method.client_streaming(),
                    method.server_streaming()
                ));
            }
        }
    }
    facts
}

fn message_facts(within: &str, message: &DescriptorProto, facts: &mut BTreeSet<String>) {
    let name = format!("{within}{}", message.name());
    facts.insert(format!("message {name}"));
    for field in &message.field {
        facts.insert(field_fact(&name, field, message));
    }
    let within = format!("{name}.");
    message.nested_type.iter().for_each(|nested| message_facts(&within, nested, facts));
    message.enum_type.iter().for_each(|of| enum_facts(&within, of, facts));
}

fn field_fact(name: &str, field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    let one_of = field.oneof_index.and_then(|index| message.oneof_decl.get(index as usize));
    format!(
        "field {name}.{} = {}: {:?} {:?} {} of {}",
        field.name(),
        field.number(),
        field.label(),
        field.r#type(),
        field.type_name(),
        one_of.map_or("none", |one_of| one_of.name())
    )
}

fn enum_facts(within: &str, of: &EnumDescriptorProto, facts: &mut BTreeSet<String>) {
    for value in &of.value {
        facts.insert(format!("enum {within}{}.{} = {}", of.name(), value.name(), value.number()));
    }
}
