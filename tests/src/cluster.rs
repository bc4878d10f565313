//! A controller and its agents, as processes.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use vmcast_common::identity::Role;
use vmcast_proto::v1::{Deployment, Host, Image, ImportImageRequest};

use crate::{
    binaries::{self, Binaries},
    client::{Client, summary, told},
    image::{FileSpec, SourceImage},
    lock::{self, Share, Turn},
    netlab::Lab,
    pki::Pki,
    process::{Daemon, Launch},
    verify, wait,
};

/// From the start of a program until it listens, with a loaded machine in mind.
const START: Duration = Duration::from_secs(20);
/// For a clean end.
const STOP: Duration = Duration::from_secs(20);
/// From a deployment's end until the last trace of it is gone from the hosts.
const TIDY: Duration = Duration::from_secs(15);
/// Folder for source images in a datastore.
const SOURCE: &str = "src";

/// A datastore of a host.
#[derive(Debug, Clone)]
pub struct DatastoreConfig {
    /// Its name on the host.
    pub name: String,
    /// Its directory; none: one of its own below the host's.
    pub dir: Option<PathBuf>,
    /// The id that hosts give to the storage they share.
    pub shared: Option<String>,
}

impl DatastoreConfig {
    /// A datastore of its own.
    pub fn own(name: &str) -> Self {
        Self { name: name.into(), dir: None, shared: None }
    }
}

/// A host.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Its name.
    pub name: String,
    /// Its datastores.
    pub datastores: Vec<DatastoreConfig>,
    /// Further flags of its agent.
    pub args: Vec<String>,
}

/// What to start.
#[derive(Debug)]
pub struct Builder {
    hosts: Vec<HostConfig>,
    controller_args: Vec<String>,
    share: Share,
    lab: Option<Arc<Lab>>,
    data: Option<PathBuf>,
}

impl Builder {
    /// Each host `hI` gets the datastores `names` instead of `ds1`.
    #[must_use]
    pub fn datastores(mut self, names: &[&str]) -> Self {
        for host in &mut self.hosts {
            host.datastores = names.iter().map(|name| DatastoreConfig::own(name)).collect();
        }
        self
    }

    /// Changes one host.
    #[must_use]
    pub fn host(mut self, index: usize, change: impl FnOnce(&mut HostConfig)) -> Self {
        change(&mut self.hosts[index]);
        self
    }

    /// Limits what host `index` sends, so that a deployment from it lasts long enough to be disturbed.
    #[must_use]
    pub fn upload_limit(self, index: usize, rate: &str) -> Self {
        let args = ["--upload-limit".to_owned(), rate.to_owned()];
        self.host(index, |host| host.args.extend(args))
    }

    /// Further flags of an agent.
    #[must_use]
    pub fn agent_args(self, index: usize, args: &[&str]) -> Self {
        self.host(index, |host| host.args.extend(args.iter().map(|&arg| arg.to_owned())))
    }

    /// Further flags of the controller.
    #[must_use]
    pub fn controller_args(mut self, args: &[&str]) -> Self {
        self.controller_args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// No other test runs meanwhile.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.share = Share::Whole;
        self
    }

    /// Host `hI` runs in host I of the lab, and the controller in the one after the last. Must be started inside the
    /// latter: see [`Lab::block_on`].
    #[must_use]
    pub fn lab(mut self, lab: &Arc<Lab>) -> Self {
        self.lab = Some(Arc::clone(lab));
        self
    }

    /// Datastores lie below this directory.
    #[must_use]
    pub fn data(mut self, dir: &Path) -> Self {
        self.data = Some(dir.into());
        self
    }

    /// Starts all programs; returns when every agent is connected.
    pub async fn start(self) -> Result<Cluster> {
        let turn = lock::take(self.share)?;
        let binaries = Binaries::find()?;
        let parent = binaries::profile_dir()?.join("../tmp");
        fs::create_dir_all(&parent)?;
        let dir = tempfile::Builder::new().prefix("cluster-").tempdir_in(parent.canonicalize()?)?;
        let pki = Pki::new(dir.path().join("tls"))?;
        let place = Place { lab: self.lab.clone() };
        let controller_host = self.hosts.len();

        let sans: Vec<String> = self.lab.iter().map(|lab| lab.address(controller_host)).collect();
        let tls = pki.issue(Role::Controller, "controller", &sans)?;
        let mut command = place.prefix(controller_host);
        command.push(binaries.controller().into());
        push(&mut command, "--listen", format!("{}:0", place.address(controller_host)));
        let launch = finish_command(dir.path(), "controller", command, &tls, &self.controller_args)?;
        let mut controller = Daemon::spawn(launch)?;
        let address = controller.listening(START).await?;

        let mut cluster = Cluster {
            agents: Vec::new(),
            address: address.clone(),
            operator: Client::connect(&address, &pki.issue(Role::Operator, "admin", &[])?).await?,
            controller,
            pki,
            finished: false,
            dir,
            lab: self.lab,
            _turn: turn,
        };
        let data = self.data.unwrap_or_else(|| cluster.dir.path().join("data"));
        for (index, host) in self.hosts.into_iter().enumerate() {
            let sans: Vec<String> = cluster.lab.iter().map(|lab| lab.address(index)).collect();
            let tls = cluster.pki.issue(Role::Agent, &host.name, &sans)?;
            let mut command = place.prefix(index);
            command.push(binaries.agent().into());
            push(&mut command, "--name", &host.name);
            push(&mut command, "--controller", format!("https://{address}"));
            push(&mut command, "--listen", format!("{}:0", place.address(index)));
            let mut datastores = Vec::new();
            for datastore in &host.datastores {
                let own = || data.join(&host.name).join(&datastore.name);
                let path = datastore.dir.clone().unwrap_or_else(own);
                fs::create_dir_all(&path)?;
                let shared = datastore.shared.as_ref().map(|id| format!(",shared={id}")).unwrap_or_default();
                push(&mut command, "--datastore", format!("{}={}{shared}", datastore.name, path.display()));
                datastores.push((datastore.name.clone(), path));
            }
            let launch = finish_command(cluster.dir.path(), &host.name, command, &tls, &host.args)?;
            let daemon = Daemon::spawn(launch)?;
            cluster.agents.push(Agent { name: host.name, datastores, daemon });
        }
        let names: Vec<String> = cluster.agents.iter().map(|agent| agent.name.clone()).collect();
        for agent in &mut cluster.agents {
            agent.daemon.listening(START).await?;
        }
        cluster.wait_connected(&names).await?;
        Ok(cluster)
    }
}

/// Where processes run.
struct Place {
    lab: Option<Arc<Lab>>,
}

impl Place {
    fn prefix(&self, host: usize) -> Vec<OsString> {
        self.lab.as_ref().map(|lab| lab.prefix(host)).unwrap_or_default()
    }

    fn address(&self, host: usize) -> String {
        self.lab.as_ref().map_or_else(|| "127.0.0.1".into(), |lab| lab.address(host))
    }
}

fn push(command: &mut Vec<OsString>, flag: &str, value: impl AsRef<std::ffi::OsStr>) {
    command.push(flag.into());
    command.push(value.as_ref().into());
}

fn finish_command(
    dir: &Path,
    name: &str,
    mut command: Vec<OsString>,
    tls: &Path,
    args: &[String],
) -> Result<Launch> {
    let state_dir = dir.join("state").join(name);
    fs::create_dir_all(&state_dir)?;
    push(&mut command, "--state-dir", &state_dir);
    push(&mut command, "--tls-dir", tls);
    push(&mut command, "--log-format", "text");
    command.extend(args.iter().map(OsString::from));
    Ok(Launch { name: name.into(), command, state_dir, log: dir.join(format!("{name}.log")) })
}

/// An agent of a cluster.
#[derive(Debug)]
pub struct Agent {
    name: String,
    datastores: Vec<(String, PathBuf)>,
    /// Its process.
    pub daemon: Daemon,
}

impl Agent {
    /// Its host's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory of one of its datastores.
    pub fn datastore(&self, name: &str) -> Result<&Path> {
        let found = self.datastores.iter().find(|(own, _)| own == name);
        found
            .map(|(_, path)| path.as_path())
            .with_context(|| format!("{} has no datastore {name}", self.name))
    }

    /// The directories of all its datastores.
    pub fn datastores(&self) -> impl Iterator<Item = &Path> {
        self.datastores.iter().map(|(_, path)| path.as_path())
    }
}

/// A running cluster. A test that succeeds calls [`Cluster::finish`]; if the value is dropped without, the ends of all
/// logs are printed.
#[derive(Debug)]
pub struct Cluster {
    // Fields are dropped in this order: processes before their files, files before the namespaces.
    agents: Vec<Agent>,
    /// The controller's process.
    pub controller: Daemon,
    /// A client with an operator's certificate.
    pub operator: Client,
    address: String,
    /// Issues further certificates of this cluster's CA.
    pub pki: Pki,
    finished: bool,
    dir: TempDir,
    lab: Option<Arc<Lab>>,
    _turn: Turn,
}

impl Cluster {
    /// `count` hosts `h0`, `h1`, ... with one datastore `ds1` each, on loopback.
    pub fn builder(count: usize) -> Builder {
        let host = |index| HostConfig {
            name: format!("h{index}"),
            datastores: vec![DatastoreConfig::own("ds1")],
            args: Vec::new(),
        };
        Builder {
            hosts: (0..count).map(host).collect(),
            controller_args: Vec::new(),
            share: Share::Light,
            lab: None,
            data: None,
        }
    }

    /// The controller's ADDR:PORT.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A directory that goes with the cluster.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// An agent.
    pub fn agent(&mut self, index: usize) -> &mut Agent {
        &mut self.agents[index]
    }

    /// All agents.
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// The agent of a host.
    pub fn agent_of(&self, host: &str) -> Result<&Agent> {
        self.agents.iter().find(|agent| agent.name == host).with_context(|| format!("no host {host}"))
    }

    /// A client with a new certificate.
    pub async fn client(&self, role: Role, name: &str) -> Result<Client> {
        Client::connect(&self.address, &self.pki.issue(role, name, &[])?).await
    }

    /// Waits until these hosts have live sessions.
    pub async fn wait_connected(&self, names: &[String]) -> Result<()> {
        wait::until_true("all agents to be connected", START, async || {
            let hosts = self.operator.list_hosts().await?;
            let connected = |name: &String| hosts.iter().any(|host| host.name == *name && host.connected);
            Ok(names.iter().all(connected))
        })
        .await
    }

    /// Waits until the matrix covers all hosts.
    pub async fn wait_matrix(&self) -> Result<()> {
        let hosts = self.agents.len();
        // A probe takes at most half a second, a tournament N-1 rounds of two; twice that, and start-up.
        let within = Duration::from_secs(20 + 2 * hosts as u64);
        self.operator.wait_matrix(hosts * (hosts - 1), within).await
    }

    /// The host as the controller sees it.
    pub async fn host(&self, name: &str) -> Result<Host> {
        let hosts = self.operator.list_hosts().await?;
        hosts.into_iter().find(|host| host.name == name).with_context(|| format!("no host {name}"))
    }

    /// Writes files to a datastore of host `index` and imports them as image `name`.
    pub async fn import(
        &self,
        name: &str,
        index: usize,
        datastore: &str,
        files: &[FileSpec],
    ) -> Result<(SourceImage, Image)> {
        let source = self.create_source(name, index, datastore, files)?;
        let image = self.import_source(name, index, datastore, &source).await?;
        Ok((source, image))
    }

    /// Files in a datastore that are not imported yet; the same name gives the same content.
    pub fn create_source(
        &self,
        name: &str,
        index: usize,
        datastore: &str,
        files: &[FileSpec],
    ) -> Result<SourceImage> {
        let seed = u64::from_le_bytes(blake3::hash(name.as_bytes()).as_bytes()[..8].try_into()?);
        SourceImage::create(
            self.agents[index].datastore(datastore)?,
            &format!("{SOURCE}/{name}"),
            files,
            seed,
        )
    }

    /// Imports `before` again with a run of `changed` bytes in the middle of each file that are different.
    pub async fn import_version(
        &self,
        name: &str,
        index: usize,
        datastore: &str,
        before: &SourceImage,
        changed: u64,
    ) -> Result<(SourceImage, Image)> {
        let source =
            before.version(self.agents[index].datastore(datastore)?, &format!("{SOURCE}/{name}"), changed)?;
        let image = self.import_source(name, index, datastore, &source).await?;
        Ok((source, image))
    }

    /// Imports files that are there.
    pub async fn import_source(
        &self,
        name: &str,
        index: usize,
        datastore: &str,
        source: &SourceImage,
    ) -> Result<Image> {
        let agent = &self.agents[index];
        let request = ImportImageRequest {
            name: name.into(),
            host: agent.name.clone(),
            datastore: datastore.into(),
            files: source.paths.clone(),
            domain: String::new(),
        };
        let import = self.operator.try_import(request);
        let image = wait::answer("the import", Duration::from_secs(300), import).await?.map_err(told)?;
        ensure!(image.total_bytes == source.total_bytes, "{image:?} is not {source:?}");
        Ok(image)
    }

    /// The directories of the copies that a deployment says it has published.
    pub fn published(&self, deployment: &Deployment) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for target in &deployment.targets {
            let agent = self.agent_of(&target.host)?;
            for copy in target.copies.iter().filter(|copy| copy.published) {
                paths.push(agent.datastore(&copy.datastore)?.join(&copy.name));
            }
        }
        Ok(paths)
    }

    /// Checks what the deployments so far have left: that each published copy is bit for bit its source, that there is
    /// nothing else to see, and that no unfinished state stays behind. Returns the number of copies.
    pub async fn check_disks(&self, deployments: &[(&Deployment, &SourceImage)]) -> Result<usize> {
        let mut expected = BTreeSet::new();
        let mut copies = 0;
        for (deployment, source) in deployments {
            let published = self.published(deployment)?;
            copies += verify::identical(&source.dir, published.iter().cloned())
                .with_context(|| summary(deployment))?;
            expected.extend(published);
        }
        for path in self.agents.iter().flat_map(Agent::datastores) {
            for name in verify::visible(path)? {
                let path = path.join(&name);
                if name != SOURCE && !expected.contains(&path) {
                    bail!("{} is visible and no finished copy", path.display());
                }
            }
        }
        self.wait_tidy().await?;
        Ok(copies)
    }

    /// Waits until no unfinished state of any deployment is left on the hosts.
    pub async fn wait_tidy(&self) -> Result<()> {
        let mut last = Vec::new();
        let tidy = wait::until_true("unfinished state to be removed", TIDY, async || {
            last.clear();
            for path in self.agents.iter().flat_map(Agent::datastores) {
                last.extend(verify::leftovers(path)?);
            }
            Ok(last.is_empty())
        });
        tidy.await.with_context(|| format!("left behind: {last:?}"))
    }

    /// Starts the controller again, at the address it had; returns when it listens.
    pub async fn start_controller(&mut self) -> Result<()> {
        let mut launch = self.controller.launch().clone();
        let listen = launch.command.iter().position(|arg| arg == "--listen").context("no --listen")?;
        launch.command[listen + 1] = self.address.clone().into();
        self.controller = Daemon::spawn(launch)?;
        self.controller.listening(START).await?;
        Ok(())
    }

    /// Starts an agent again with the same flags; returns when it listens.
    pub async fn start_agent(&mut self, index: usize) -> Result<()> {
        let agent = &mut self.agents[index];
        agent.daemon = Daemon::spawn(agent.daemon.launch().clone())?;
        agent.daemon.listening(START).await?;
        Ok(())
    }

    /// Kills an agent and starts it again with the same flags; returns when it listens.
    pub async fn restart_agent(&mut self, index: usize) -> Result<()> {
        self.agents[index].daemon.kill()?;
        self.start_agent(index).await
    }

    /// Ends a cluster in which programs were killed: whatever still runs is killed too.
    pub fn discard(mut self) {
        self.finished = true;
    }

    /// Ends the cluster: every program must still run, end with status 0 on SIGTERM, and have logged no panic.
    pub async fn finish(mut self) -> Result<()> {
        for agent in &mut self.agents {
            ensure!(agent.daemon.alive()?, "agent {} has died", agent.name);
        }
        ensure!(self.controller.alive()?, "the controller has died");
        // All at once: each must end in time whatever the others do.
        for agent in &mut self.agents {
            agent.daemon.signal(rustix::process::Signal::TERM)?;
        }
        for agent in &mut self.agents {
            agent.daemon.terminate(STOP).await?;
        }
        self.controller.terminate(STOP).await?;
        for daemon in self.daemons() {
            let log = daemon.log();
            if let Some(at) = log.find("panicked at") {
                let end = log[at..].lines().take(8).collect::<Vec<_>>().join("\n");
                bail!("{} {end}", daemon.launch().name);
            }
        }
        self.finished = true;
        Ok(())
    }

    fn daemons(&self) -> impl Iterator<Item = &Daemon> {
        std::iter::once(&self.controller).chain(self.agents.iter().map(|agent| &agent.daemon))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.finished {
            for daemon in self.daemons() {
                eprintln!("{}", daemon.log_tail(60));
            }
        }
        if std::env::var_os("VMCAST_KEEP").is_some() {
            self.dir.disable_cleanup(true);
            eprintln!("kept: {}", self.dir.path().display());
        }
    }
}
