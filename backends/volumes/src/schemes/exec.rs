//! `nbd+exec:?command=…`: an export of an NBD server that is started for it.

use std::path::PathBuf;
use std::sync::Arc;

use sheave_core::{Result, Volume};
use sheave_exec::{Program, ProgramOptions};
use sheave_proto::uri::{NbdUri, TlsOptions, Transport};
use sheave_remote::{RemoteOptions, RemoteVolume};

use super::nbd::{self, NbdServer};
use crate::names::{absolute_paths, parameter_value, working_directory};
use crate::parse::{Parameters, percent_decode};
use crate::source::{Scheme, Source, Url};
use crate::spec::OpenOptions;

pub(crate) const SCHEME: Scheme = Scheme { names: &["nbd+exec"], starts_program: true, parse };

#[derive(Debug)]
struct Exec {
    /// The export, but for the socket of the program.
    options: RemoteOptions,
    export: String,
    command: String,
    /// The directory in which the program runs; by default that of this process.
    directory: Option<PathBuf>,
}

fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    // As in an NBD URI: nothing, /export or ///export.
    let path = match url.rest.strip_prefix("//") {
        Some(path) if !path.is_empty() && !path.starts_with('/') => {
            return Err(parameters.wrong("no host belongs here; write nbd+exec:/EXPORT?command=…"));
        }
        Some(path) => path,
        None => url.rest,
    };
    let export = percent_decode(path.strip_prefix('/').unwrap_or(path))?.into_owned();
    let Some(command) = parameters.take("command")?.filter(|command| !command.trim().is_empty())
    else {
        return Err(parameters.wrong("the command is missing; add ?command=qemu-nbd%20…"));
    };
    if command.contains('\0') {
        return Err(parameters.wrong("no command holds a zero byte"));
    }
    let directory = parameters.take_path("directory")?;
    let uri = NbdUri {
        tls: false,
        transport: Transport::Unix { path: PathBuf::new() },
        user: None,
        export: export.clone(),
        tls_options: TlsOptions::default(),
        parameters: Vec::new(),
    };
    let mut options = nbd::options(uri, parameters)?;
    url.text.clone_into(&mut options.name);
    Ok(Arc::new(Exec { options, export, command, directory }))
}

impl Exec {
    fn start(&self) -> Result<NbdServer> {
        let mut options = ProgramOptions::new(&*self.command);
        options.directory.clone_from(&self.directory);
        let program = Program::new(options)?;
        let mut uri = self.options.uri.clone();
        uri.transport = Transport::Unix { path: program.socket_path() };
        Ok(NbdServer { uri, name: self.options.name.clone(), program: Some(Arc::new(program)) })
    }
}

impl Source for Exec {
    fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
        let found = self.start()?;
        let mut remote = nbd::opened_with(&self.options, options);
        remote.uri.clone_from(&found.uri);
        remote.server = found.program.clone().map(|program| program as _);
        let opened = RemoteVolume::open(remote).map_err(|error| found.explain(error));
        Ok(Arc::new(opened?))
    }

    fn server(&self) -> Option<Result<NbdServer>> {
        Some(self.start())
    }

    fn name(&self) -> String {
        let program = self.command.split_whitespace().next().unwrap_or_default();
        match (self.export.as_str(), program.rsplit('/').next()) {
            ("", Some(program)) if !program.is_empty() => program.to_owned(),
            ("", _) => "nbd".to_owned(),
            (export, _) => export.to_owned(),
        }
    }

    /// The same command in the same directory.
    fn place(&self) -> Option<String> {
        let Self { options: _, export, command, directory } = self;
        Some(format!("{export:?} of {command:?} in {directory:?}"))
    }

    /// Adds the working directory, since the command may have relative paths.
    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        if self.directory.is_some() {
            return Ok(location.to_owned() + &absolute_paths(query, &["directory"])?);
        }
        let directory = parameter_value(working_directory()?.as_os_str());
        Ok(format!("{location}{query}&directory={directory}"))
    }
}
