//! A running server.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sheave_proto::ReplyStyle;

use super::product::{Place, Product, Recipe, Volume};
use super::tls_files;
use crate::children::{Guarded, ScratchDir};
use crate::load::{self, Length, Order, Plan, Target, Workload};
use crate::process::ProcessTree;

/// How long a server may take to listen.
const START_MAX: Duration = Duration::from_secs(20);
/// Bytes per request while a volume is filled.
const FILL_BLOCK_SIZE: usize = 1 << 20;
/// Lines of a server's output that are shown when it does not start.
const LOG_LINES_MAX: usize = 5;

/// Starts servers, all in one directory.
#[derive(Debug)]
pub(crate) struct Launcher {
    program: PathBuf,
    dir: ScratchDir,
    certificates: Option<PathBuf>,
    started_count: usize,
}

/// A running server. It ends when this is dropped, and its image goes with it.
#[derive(Debug)]
pub(crate) struct Server {
    /// Which it is.
    pub(crate) product: Product,
    /// Where it listens.
    pub(crate) target: Target,
    /// The command that started it.
    pub(crate) command: String,
    /// The file that holds its volume, if one does.
    pub(crate) image: Option<Image>,
    process: Guarded,
}

/// A file that holds a volume, gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Image(PathBuf);

impl Image {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Writes back what is dirty of it, so that the next run does not find the kernel at it.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn settle(&self) -> Result<()> {
        let context = || format!("sync {}", self.0.display());
        File::open(&self.0).and_then(|file| file.sync_data()).with_context(context)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Launcher {
    /// One that starts `program` as this program, and keeps its files in a new directory of
    /// `parent`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub(crate) fn new(program: PathBuf, parent: &Path) -> Result<Self> {
        let dir = ScratchDir::new(parent)?;
        Ok(Self { program, dir, certificates: None, started_count: 0 })
    }

    /// Starts a server and waits until it answers; `None` if it has no such volume.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) fn start(
        &mut self,
        product: Product,
        volume: Volume,
        size: u64,
    ) -> Result<Option<Server>> {
        if volume == Volume::Tls && self.certificates.is_none() {
            let dir = self.dir.path().join("tls");
            tls_files::make(&dir)?;
            self.certificates = Some(dir);
        }
        self.started_count += 1;
        // Short names: the path of a unix socket has at most 107 bytes.
        let base = self.dir.path().join(format!("s{}", self.started_count));
        let (socket, image) = (base.with_extension("sock"), base.with_extension("img"));
        let place = Place {
            program: &self.program,
            socket: &socket,
            image: &image,
            size,
            certificates: self.certificates.as_deref().unwrap_or_else(|| self.dir.path()),
        };
        let Some(recipe) = product.recipe(volume, place) else { return Ok(None) };
        let image = product.needs_image(volume).then(|| new_image(&image, size)).transpose()?;
        let log = base.with_extension("log");
        let process = spawn(&recipe, &log)?;
        let tls = (volume == Volume::Tls).then_some(place.certificates);
        let target = target(&socket, recipe.export, tls)?;
        let mut server = Server { product, target, command: recipe.shown(), image, process };
        server.wait_until_it_answers(&log)?;
        Ok(Some(server))
    }
}

impl Server {
    /// Its process.
    pub(crate) fn process(&self) -> ProcessTree {
        ProcessTree::new(self.process.pid())
    }

    /// Writes the whole volume once, so that no measurement meets a page for the first time.
    ///
    /// # Errors
    /// When the server fails.
    pub(crate) fn fill(&self, size: u64) -> Result<()> {
        let workload = Workload {
            read_percent: 0,
            order: Order::Sequential,
            block_size: FILL_BLOCK_SIZE,
            queue_depth: 8,
            rate_per_connection: None,
            flush_every: None,
        };
        let plan = Plan {
            target: self.target.clone(),
            workload,
            connections: 1,
            threads: 1,
            length: Length::Ops(size / FILL_BLOCK_SIZE as u64),
            span: None,
            verify: false,
            seed: 0,
            server: None,
        };
        let outcome = load::run(&plan).with_context(|| format!("fill {}", self.product.name()))?;
        let errors = &outcome.recorder.errors;
        ensure!(errors.is_empty(), "{} refused writes: {errors:?}", self.product.name());
        match &self.image {
            Some(image) => image.settle(),
            None => Ok(()),
        }
    }

    fn wait_until_it_answers(&mut self, log: &Path) -> Result<()> {
        let deadline = Instant::now() + START_MAX;
        loop {
            let Err(error) = self.target.connect() else { return Ok(()) };
            if !self.process.is_alive() || Instant::now() > deadline {
                let text = fs::read_to_string(log).unwrap_or_default();
                let lines: Vec<_> = text.lines().rev().take(LOG_LINES_MAX).collect();
                let lines: Vec<_> = lines.into_iter().rev().collect();
                bail!("{} does not answer: {error:#}\n{}", self.command, lines.join("\n"));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn new_image(path: &Path, size: u64) -> Result<Image> {
    let context = || format!("make {}", path.display());
    let file = File::create_new(path).with_context(context)?;
    file.set_len(size).with_context(context)?;
    Ok(Image(path.to_owned()))
}

fn spawn(recipe: &Recipe, log: &Path) -> Result<Guarded> {
    if let Some((path, text)) = &recipe.config {
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    let (program, arguments) = recipe.command.split_first().context("a command")?;
    let log = File::create(log).with_context(|| format!("make {}", log.display()))?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let Some(pid_file) = &recipe.pid_file else { return Guarded::spawn(&mut command) };
    let shown = recipe.shown();
    let status = command.status().with_context(|| format!("start {shown}"))?;
    ensure!(status.success(), "{shown} ended with {status}");
    let deadline = Instant::now() + START_MAX;
    loop {
        // The file may exist before the number is in it.
        let text = fs::read_to_string(pid_file).unwrap_or_default();
        if let Ok(pid) = text.trim().parse() {
            return Guarded::adopt(pid, &program.to_string_lossy());
        }
        ensure!(Instant::now() < deadline, "{shown} does not tell its process id");
        thread::sleep(Duration::from_millis(10));
    }
}

fn target(socket: &Path, export: &str, certificates: Option<&Path>) -> Result<Target> {
    let (scheme, tls) = match certificates {
        None => ("nbd", String::new()),
        Some(dir) => ("nbds", format!("&tls-certificates={}", dir.display())),
    };
    let url = format!("{scheme}+unix:///{export}?socket={}{tls}", socket.display());
    Target::parse(&url, ReplyStyle::Simple)
}
