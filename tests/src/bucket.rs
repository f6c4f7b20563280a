//! A bucket of an S3 store, and commands that use it.

use sheave_emulator::{Access, Emulator};

use crate::{Run, Scratch, Serve, sheave};

/// A bucket, with what nodes keep of its volumes.
#[derive(Debug)]
pub struct Bucket {
    name: String,
    endpoint: String,
    region: String,
    access: Access,
    is_probed: bool,
    scratch: Scratch,
}

impl Bucket {
    /// A bucket of the store at this URL. It is there already.
    #[must_use]
    pub fn new(endpoint: &str, name: &str, access: Access) -> Self {
        let (name, endpoint, region) = (name.to_owned(), endpoint.to_owned(), "us-east-1".into());
        Self { name, endpoint, region, access, is_probed: true, scratch: Scratch::on_disk() }
    }

    /// A bucket of an emulated store.
    ///
    /// # Panics
    /// When that store takes requests without a signature.
    #[must_use]
    pub fn emulated(store: &Emulator, name: &str) -> Self {
        let settings = store.settings();
        store.make_bucket(name);
        let access = settings.access.expect("a store that checks signatures");
        Self { region: settings.region, ..Self::new(&store.endpoint(), name, access) }
    }

    /// The same with another client.
    #[must_use]
    pub fn used_by(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// The same, taken for one of another region.
    #[must_use]
    pub fn in_region(self, region: &str) -> Self {
        Self { region: region.to_owned(), ..self }
    }

    /// The same, whose volumes have no fencing, since its store races conditions.
    #[must_use]
    pub fn without_fencing(self) -> Self {
        Self { is_probed: false, ..self }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Files of the test and of its nodes.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// A volume.
    #[must_use]
    pub fn volume(&self, name: &str) -> String {
        let Self { name: bucket, endpoint, region, .. } = self;
        let fencing = if self.is_probed { "" } else { "&fencing=none" };
        format!("s3://{bucket}/volumes/{name}?endpoint={endpoint}&region={region}{fencing}")
    }

    /// A volume, as a node of this name has it.
    #[must_use]
    pub fn on_node(&self, name: &str, node: &str) -> String {
        format!("{}&cache-dir={}", self.volume(name), self.scratch.file(node))
    }

    /// `sheave volume COMMAND`, with what the bucket asks for in its environment.
    #[must_use]
    pub fn command(&self, command: &str) -> Run {
        self.run().args("volume").args(command)
    }

    /// `sheave`, with what the bucket asks for in its environment.
    #[must_use]
    pub fn run(&self) -> Run {
        let run = Run::new(sheave());
        self.environment().into_iter().fold(run, |run, (name, value)| run.env(name, value))
    }

    /// Serves a volume on a node.
    #[must_use]
    pub fn serve(&self, name: &str, node: &str) -> Serve {
        let serve = Serve::new(self.on_node(name, node));
        self.environment().into_iter().fold(serve, |serve, (name, value)| serve.env(name, value))
    }

    /// The AWS variables. This machine's own configuration and metadata services are not asked, and
    /// what it knows of stores is not used: another one may have had the port.
    fn environment(&self) -> [(&'static str, String); 6] {
        [
            ("AWS_ACCESS_KEY_ID", self.access.key.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.access.secret.clone()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
            ("AWS_CONFIG_FILE", "/dev/null".to_owned()),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null".to_owned()),
            ("SHEAVE_STATE_DIR", self.scratch.file("state")),
        ]
    }
}
