//! Opens the requested volumes, at the start and at each reload.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use sheave_core::Volume;
use sheave_layers::{Limits, RateLimits};
use sheave_local::OpenBatch;
use sheave_nbd::{Access, Export, TlsConfig};
use sheave_tls::{TlsFiles, server_tls};
use sheave_volumes::{OpenOptions, VolumeSpec, check_memory};

use super::tls_watch::{Stamps, stamps};
use crate::config::BadConfig;

/// An export that the command line or the file requests.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The position in the file, for messages; empty for the command line.
    pub(crate) place: String,
    pub(crate) name: String,
    /// The volume as it was written.
    pub(crate) volume: String,
    pub(crate) spec: VolumeSpec,
    pub(crate) description: String,
    pub(crate) read_only: bool,
    /// Whether an object volume is taken from another node.
    pub(crate) take_over: bool,
    /// The limits of the file, which may change; those of the volume's text do not.
    pub(crate) limits: Option<RateLimits>,
    pub(crate) access: Access,
    pub(crate) connections_max: Option<usize>,
}

/// The requested exports and TLS files.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub(crate) exports: Vec<Wanted>,
    pub(crate) tls: Option<TlsFiles>,
}

/// A volume that is open under a name.
#[derive(Clone)]
pub(crate) struct Held {
    name: String,
    volume: String,
    spec: VolumeSpec,
    read_only: bool,
    open: Open,
    /// The limits that are requested now.
    wanted: RateLimits,
    /// Whether it was open before.
    is_kept: bool,
}

/// An open volume, and its limits if they can change.
#[derive(Clone)]
struct Open {
    volume: Arc<dyn Volume>,
    limits: Option<Arc<Limits>>,
}

/// Exports that can be served: everything is open and read.
pub(crate) struct Prepared {
    pub(crate) held: Vec<Held>,
    pub(crate) exports: Vec<Export>,
    pub(crate) tls: Option<Arc<TlsConfig>>,
    /// The certificate's files, and their stamps before they were read.
    pub(crate) tls_files: Option<(TlsFiles, Stamps)>,
}

impl Request {
    /// Opens the volumes that are not open. Nothing in use is changed. May wait for disks.
    ///
    /// # Errors
    /// Names what cannot be opened or read, and why.
    pub(crate) fn prepare(self, open: &[Held]) -> Result<Prepared> {
        let Self { exports: wanted, tls } = self;
        check_clients(&wanted, tls.as_ref())?;
        let (tls_config, tls_files) = match tls {
            None => (None, None),
            Some(files) => {
                let before = stamps(&files);
                (Some(server_tls(&files)?), Some((files, before)))
            }
        };
        let mut kept = keep(&wanted, open)?;
        let batch = OpenBatch::begin();
        let mut held = Vec::with_capacity(wanted.len());
        for (want, kept) in wanted.iter().zip(&mut kept) {
            let is_kept = kept.is_some();
            let open = match kept.take() {
                Some(open) => open,
                None => want.open()?,
            };
            let Wanted { name, volume, spec, read_only, limits, .. } = want.clone();
            let wanted = limits.unwrap_or_default();
            held.push(Held { name, volume, spec, read_only, open, wanted, is_kept });
        }
        batch.check()?;
        let exports =
            wanted.into_iter().zip(&held).map(|(want, held)| want.export(&held.open.volume));
        Ok(Prepared { exports: exports.collect(), held, tls: tls_config, tls_files })
    }
}

impl Wanted {
    fn open(&self) -> Result<Open> {
        let limits = self.limits.map(|limits| Arc::new(Limits::new(limits)));
        let options = OpenOptions {
            read_only: self.read_only,
            take_over: self.take_over,
            limits: limits.clone(),
            ..OpenOptions::default()
        };
        if let Err(error) = check_memory(&self.volume, &self.spec) {
            tracing::warn!("{error}");
        }
        let opened = self.spec.open(&options);
        if self.place.is_empty() {
            return Ok(Open { volume: opened?, limits });
        }
        let place = || format!("{}: export {:?}", self.place, self.name);
        Ok(Open { volume: opened.with_context(place)?, limits })
    }

    fn export(self, volume: &Arc<dyn Volume>) -> Export {
        let Self { name, description, access, connections_max, .. } = self;
        Export { name, description, volume: Arc::clone(volume), access, connections_max }
    }

    fn is_same_volume(&self, held: &Held) -> bool {
        self.volume == held.volume
            && self.read_only == held.read_only
            && self.limits.is_some() == held.open.limits.is_some()
    }
}

impl Held {
    /// Whether it was opened by this request.
    pub(crate) fn is_new(&self) -> bool {
        !self.is_kept
    }

    /// Whether the name of its file is that of another file now.
    fn is_replaced(&self) -> bool {
        let Some(before) = &self.open.volume.info().identity else { return false };
        let now = self.spec.identity().ok().flatten();
        now.is_some_and(|now| now != *before)
    }

    /// Applies changes of a volume that was open before: its limits and its size. May wait for a
    /// disk.
    pub(crate) fn take_up(&self) {
        let Open { volume, limits } = &self.open;
        if let Some(limits) = limits {
            limits.set(self.wanted);
        }
        if self.is_replaced() {
            tracing::warn!(
                export = self.name,
                "another file has the name by now, and the old one is served; to serve the new \
                 one, remove the export, reload, and add it again"
            );
        }
        let before = volume.size();
        match volume.grow() {
            Ok(size) if size == before => {}
            Ok(size) => tracing::info!(export = self.name, before, size, "the volume has grown"),
            Err(error) => tracing::warn!(export = self.name, "keeps its size: {error}"),
        }
    }
}

/// Finds the open volume of each requested export: that of the same name, else one that has been
/// renamed.
///
/// # Errors
/// When it is ambiguous which one has been renamed, and they hold different data: clients must not
/// get the data of others.
fn keep(wanted: &[Wanted], open: &[Held]) -> Result<Vec<Option<Open>>> {
    let mut left: Vec<Option<&Held>> = open.iter().map(Some).collect();
    let mut kept: Vec<Option<Open>> = wanted.iter().map(|_| None).collect();
    for (want, kept) in wanted.iter().zip(&mut kept) {
        let is_it = |held: &Held| want.is_same_volume(held) && want.name == held.name;
        let found = left.iter_mut().find(|held| held.is_some_and(is_it));
        *kept = found.and_then(Option::take).map(|held| held.open.clone());
    }
    let others: Vec<_> =
        wanted.iter().zip(&kept).filter(|(_, kept)| kept.is_none()).map(|(want, _)| want).collect();
    for (want, kept) in wanted.iter().zip(&mut kept).filter(|(_, kept)| kept.is_none()) {
        let matches = |held: &&Held| want.is_same_volume(held);
        let Some(found) = left.iter().flatten().copied().find(matches) else { continue };
        let is_only = others.iter().filter(|other| other.is_same_volume(found)).count() == 1
            && left.iter().flatten().copied().filter(matches).count() == 1;
        if !is_only && found.open.volume.info().volatile {
            bail!(
                "{}: export {:?}: several volumes in memory are written {}, and which of them is \
                 renamed cannot be told; rename, add or remove one and reload, then the next",
                want.place,
                want.name,
                want.volume
            );
        }
        let taken = left.iter_mut().find(|held| held.as_ref().is_some_and(matches));
        *kept = taken.and_then(Option::take).map(|held| held.open.clone());
    }
    Ok(kept)
}

/// # Errors
/// When an export is for clients with certificates, and clients are not asked for certificates.
fn check_clients(wanted: &[Wanted], tls: Option<&TlsFiles>) -> Result<(), BadConfig> {
    let asked: Option<&PathBuf> = tls.and_then(|files| files.client_ca.as_ref());
    match wanted.iter().find(|want| !want.access.names.is_empty()) {
        Some(want) if asked.is_none() => Err(BadConfig::new(format!(
            "{}: export {:?}: clients are named, but no client shows a certificate without \
             tls_client_ca",
            want.place, want.name
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(name: &str, volume: &str) -> Wanted {
        Wanted {
            place: "f.toml:1".to_owned(),
            name: name.to_owned(),
            volume: volume.to_owned(),
            spec: volume.parse().unwrap(),
            description: String::new(),
            read_only: false,
            take_over: false,
            limits: None,
            access: Access::default(),
            connections_max: None,
        }
    }

    fn prepare(wanted: &[(&str, &str)], open: &[Held]) -> Result<Vec<Held>> {
        let exports = wanted.iter().map(|(name, volume)| want(name, volume)).collect();
        Request { exports, tls: None }.prepare(open).map(|prepared| prepared.held)
    }

    fn same(one: &Held, other: &Held) -> bool {
        Arc::ptr_eq(&one.open.volume, &other.open.volume)
    }

    const A: &str = "memory:?size=1M";
    const B: &str = "memory:?size=2M";

    #[test]
    fn volumes_are_kept_by_name_then_by_what_they_are() {
        let before = prepare(&[("a", A), ("b", B), ("c", A)], &[]).unwrap();
        assert!(before.iter().all(|held| !held.is_kept));
        // Two exports of the same text are not confused.
        let now = prepare(&[("c", A), ("d", B), ("a", A), ("e", A)], &before).unwrap();
        assert!(same(&now[0], &before[2]) && same(&now[2], &before[0]), "by name");
        assert!(same(&now[1], &before[1]), "b is called d now");
        assert!(before.iter().all(|held| !same(held, &now[3])), "a new one");
        // It is ambiguous which one is left, and its clients must not see the other's data.
        let removed = prepare(&[("d", A)], &[before[0].clone(), before[2].clone()]);
        let error = removed.err().unwrap().to_string();
        assert!(error.contains("which of them is renamed cannot be told"), "{error}");
        prepare(&[("d", A), ("e", A)], &before[..1]).err().unwrap();
        assert!(same(&prepare(&[("d", A)], &before[..2]).unwrap()[0], &before[0]));
        // Swapped.
        let swapped = prepare(&[("a", B), ("b", A)], &before[..2]).unwrap();
        assert!(same(&swapped[0], &before[1]) && same(&swapped[1], &before[0]));
        // Another volume under the same name.
        let other = prepare(&[("a", B)], &before[..1]).unwrap();
        assert!(!same(&other[0], &before[0]));
        let mut read_only = want("a", A);
        read_only.read_only = true;
        let other = Request { exports: vec![read_only], tls: None }.prepare(&before).unwrap();
        assert!(!same(&other.held[0], &before[0]));
    }

    #[test]
    fn a_file_for_two_exports_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let path = path.to_str().unwrap();
        let held = prepare(&[("a", path)], &[]).unwrap();
        let direct = format!("file://{path}");
        let error = prepare(&[("a", path), ("b", &direct)], &held).err().unwrap();
        let error = format!("{error:#}");
        assert!(error.starts_with("f.toml:1: export \"b\": open: "), "{error}");
        assert!(error.contains("has it open already"), "{error}");
        assert!(same(&prepare(&[("b", path)], &held).unwrap()[0], &held[0]));
    }

    #[test]
    fn client_names_need_client_certificates() {
        let mut named = want("a", A);
        named.access.names.push("backup".parse().unwrap());
        let error = Request { exports: vec![named], tls: None }.prepare(&[]).err().unwrap();
        assert!(error.to_string().contains("without tls_client_ca"), "{error}");
        assert!(error.is::<BadConfig>(), "a usage error: {error}");
    }
}
