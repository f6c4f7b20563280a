//! Describes an NBD server.

use anyhow::{Result, bail};
use indicatif::HumanBytes;
use sheave_core::{BlockSizes, printable};
use sheave_proto::uri::{NbdUri, Transport};
use sheave_proto::wire::transmission_flag as flag;
use sheave_proto::{ClientNegotiated, ExportEntry, ReplyStyle};
use sheave_remote::{Offered, probe};
use sheave_volumes::VolumeSpec;

use super::Finding;

/// The most exports that are named.
const NAMES_MAX: usize = 20;

/// Commands and flags that a server may have, as they are called in proto.md.
const ABILITIES: [(u16, &str); 6] = [
    (flag::SEND_FLUSH, "flush"),
    (flag::SEND_FUA, "FUA"),
    (flag::SEND_TRIM, "trim"),
    (flag::SEND_WRITE_ZEROES, "write-zeroes"),
    (flag::SEND_FAST_ZERO, "fast zero"),
    (flag::SEND_CACHE, "cache"),
];

/// Queries a server.
///
/// # Errors
/// When it cannot be reached, or has no such export.
pub(super) fn findings(volume: &str) -> Result<Vec<Finding>> {
    let Some(server) = VolumeSpec::of_operator(volume)?.nbd_server()? else {
        bail!("{volume}: this is no NBD server; write for example nbd://server/export");
    };
    let offered = probe(&server.uri, &server.name).map_err(|error| server.explain(error))?;
    Ok(describe(&server.uri, &offered))
}

fn describe(uri: &NbdUri, offered: &Offered) -> Vec<Finding> {
    let export = &offered.export;
    vec![
        encryption(uri, offered),
        exports(&offered.exports),
        Finding::ok("export", this_export(uri, export)),
        replies(export.style),
        blocks(export),
        commands(export),
        connections(export),
        contexts(export),
    ]
}

fn encryption(uri: &NbdUri, offered: &Offered) -> Finding {
    let name = "encryption";
    let is_local = matches!(uri.transport, Transport::Unix { .. });
    match &offered.tls {
        Some(tls) => Finding::ok(name, tls),
        None if is_local => Finding::unused(name, "a unix socket, which needs none"),
        None if offered.starts_tls => {
            let advice = "write nbds:// and tls-certificates=DIR with ca-cert.pem in it";
            Finding::limited(name, "none, though the server has TLS", advice)
        }
        None => {
            let advice = "use it only in a network that all may listen to";
            Finding::limited(name, "none: the server has no TLS", advice)
        }
    }
}

fn exports(exports: &Result<Vec<ExportEntry>, String>) -> Finding {
    let name = "exports";
    let exports = match exports {
        Ok(exports) => exports,
        Err(why) => return Finding::unused(name, format!("not named: {why}")),
    };
    let names = exports.iter().take(NAMES_MAX);
    let names = names.map(|export| format!("\"{}\"", printable(&export.name)));
    let names = names.collect::<Vec<_>>().join(", ");
    let more = match exports.len().checked_sub(NAMES_MAX) {
        None | Some(0) => String::new(),
        Some(more) => format!(", and {more} more"),
    };
    Finding::ok(name, format!("{}: {names}{more}", exports.len()))
}

fn this_export(uri: &NbdUri, export: &ClientNegotiated) -> String {
    let name = export.name.as_ref().unwrap_or(&uri.export);
    let access = if export.has(flag::READ_ONLY) { "read-only" } else { "read and write" };
    let media = if export.has(flag::ROTATIONAL) { ", rotating" } else { "" };
    let description = export.description.iter().filter(|text| !text.is_empty());
    let description: String =
        description.map(|text| format!(", \"{}\"", printable(text))).collect();
    let (size, name) = (export.size, printable(name));
    format!("\"{name}\", {size} bytes ({}), {access}{media}{description}", HumanBytes(size))
}

fn replies(style: ReplyStyle) -> Finding {
    let name = "replies";
    match style {
        ReplyStyle::Extended => Finding::ok(name, "extended: ops of any length"),
        ReplyStyle::Structured => Finding::ok(name, "structured: holes cross the wire as such"),
        ReplyStyle::Simple => {
            let advice = "holes are read as zeroes, and errors have no text; a newer server has \
                          structured replies";
            Finding::limited(name, "simple", advice)
        }
    }
}

fn blocks(export: &ClientNegotiated) -> Finding {
    let BlockSizes { minimum, preferred, maximum_payload, .. } = export.block;
    let source = if export.block_sizes_told { "" } else { ", as assumed: the server tells none" };
    Finding::ok(
        "blocks",
        format!(
            "minimum {minimum}, preferred {preferred}, longest read or write {maximum_payload} \
             bytes{source}"
        ),
    )
}

fn commands(export: &ClientNegotiated) -> Finding {
    let listed = |is_there: bool| {
        let listed = ABILITIES.iter().filter(|(bit, _)| export.has(*bit) == is_there);
        listed.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    };
    let detail = match (listed(true), listed(false)) {
        (all, none) if none.is_empty() => all,
        (none, all) if none.is_empty() => format!("none of {all}"),
        (some, missing) => format!("{some}; not {missing}"),
    };
    match export.has(flag::SEND_FLUSH) || export.has(flag::READ_ONLY) {
        true => Finding::ok("commands", detail),
        false => {
            let advice = "without flush it is not known when data is on stable storage";
            Finding::limited("commands", detail, advice)
        }
    }
}

fn connections(export: &ClientNegotiated) -> Finding {
    let name = "connections";
    match export.has(flag::CAN_MULTI_CONN) {
        true => Finding::ok(name, "several at a time (multi-conn)"),
        false => Finding::ok(name, "one at a time: what one writes, another may not see"),
    }
}

fn contexts(export: &ClientNegotiated) -> Finding {
    let names = export.contexts.iter().map(|(_, name)| printable(name).to_string());
    let names = names.collect::<Vec<_>>().join(", ");
    match names.is_empty() {
        true => Finding::unused("contexts", "none: holes cannot be asked for"),
        false => Finding::ok("contexts", names),
    }
}
