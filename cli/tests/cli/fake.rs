//! A controller that answers as a test tells it to.

use std::{
    path::PathBuf,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{net::TcpListener, process::Command, sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use vmcast_common::{
    identity::Role,
    net::{serve_incoming, server_builder},
    pki::{self, IssueRequest},
    tls::TlsDir,
};
use vmcast_proto::v1::{
    self,
    deployments_server::{Deployments, DeploymentsServer},
};

/// What one call of `Watch` does.
#[derive(Debug, Clone)]
pub(crate) enum Watch {
    /// These, and then the stream ends.
    Say(Vec<v1::Deployment>),
    /// These, and then nothing for as long as the client stays.
    SayAndHang(Vec<v1::Deployment>),
    /// An error at once.
    Fail(Status),
}

#[derive(Debug, Default)]
pub(crate) struct Script {
    /// Answers of `Create`, in order; the last counts on.
    pub(crate) create: Vec<Result<v1::Deployment, Status>>,
    /// Answers of `Watch`, in order; the last counts on.
    pub(crate) watch: Vec<Watch>,
    /// What `Get` says.
    pub(crate) get: v1::Deployment,
    /// The requests that `Create` had.
    pub(crate) created: Vec<v1::CreateDeploymentRequest>,
    /// The ids that `Remove` was asked for.
    pub(crate) removed: Vec<String>,
}

/// The next answer; the last one stays.
fn next<T: Clone>(answers: &mut Vec<T>) -> Option<T> {
    if answers.len() > 1 { Some(answers.remove(0)) } else { answers.first().cloned() }
}

#[derive(Debug, Clone)]
struct Service(Arc<Mutex<Script>>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Deployments for Service {
    async fn plan(&self, _: Request<v1::DeploymentSpec>) -> Answer<v1::Plan> {
        Ok(Response::new(v1::Plan::default()))
    }

    async fn create(&self, request: Request<v1::CreateDeploymentRequest>) -> Answer<v1::Deployment> {
        let mut script = self.0.lock().unwrap();
        script.created.push(request.into_inner());
        next(&mut script.create).unwrap_or_else(|| Err(Status::unimplemented("create"))).map(Response::new)
    }

    async fn get(&self, _: Request<v1::GetDeploymentRequest>) -> Answer<v1::Deployment> {
        Ok(Response::new(self.0.lock().unwrap().get.clone()))
    }

    async fn list(&self, _: Request<v1::ListDeploymentsRequest>) -> Answer<v1::ListDeploymentsResponse> {
        let deployments = vec![self.0.lock().unwrap().get.clone(); 500];
        Ok(Response::new(v1::ListDeploymentsResponse { deployments }))
    }

    async fn cancel(&self, _: Request<v1::CancelDeploymentRequest>) -> Answer<v1::Deployment> {
        Ok(Response::new(self.0.lock().unwrap().get.clone()))
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveDeploymentRequest>,
    ) -> Answer<v1::RemoveDeploymentResponse> {
        self.0.lock().unwrap().removed.push(request.into_inner().id);
        Ok(Response::new(v1::RemoveDeploymentResponse { copies: 6 }))
    }

    type WatchStream = ReceiverStream<Result<v1::Deployment, Status>>;

    async fn watch(&self, _: Request<v1::WatchDeploymentRequest>) -> Answer<Self::WatchStream> {
        let watch = next(&mut self.0.lock().unwrap().watch);
        let (said, hang) = match watch.unwrap_or(Watch::Say(Vec::new())) {
            Watch::Say(said) => (said, false),
            Watch::SayAndHang(said) => (said, true),
            Watch::Fail(status) => return Err(status),
        };
        let (sender, receiver) = mpsc::channel(said.len() + 1);
        for deployment in said {
            sender.try_send(Ok(deployment)).unwrap();
        }
        if hang {
            // Only the client's leaving ends it.
            std::mem::forget(sender);
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type EventsStream = ReceiverStream<Result<v1::Event, Status>>;

    async fn events(&self, _: Request<v1::EventsRequest>) -> Answer<Self::EventsStream> {
        Err(Status::unimplemented("events"))
    }
}

/// A fake controller with certificates, and `vmcast` to ask it.
#[derive(Debug)]
pub(crate) struct Fake {
    dir: TempDir,
    address: String,
    script: Arc<Mutex<Script>>,
    _tasks: JoinSet<()>,
}

impl Fake {
    pub(crate) async fn start(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        pki::init(&ca).unwrap();
        for (role, name) in [(Role::Controller, "controller"), (Role::Operator, "operator")] {
            pki::issue(&IssueRequest::new(&ca, role, name, dir.path().join(name))).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let tls = TlsDir::load(dir.path().join("controller")).unwrap();
        let incoming = serve_incoming(listener, &tls, CancellationToken::new()).unwrap();
        let script = Arc::new(Mutex::new(script));
        let service = DeploymentsServer::new(Service(Arc::clone(&script)));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            server_builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { dir, address, script, _tasks: tasks }
    }

    pub(crate) fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    fn tls(&self) -> PathBuf {
        self.dir.path().join("operator")
    }

    /// `vmcast` with the flags that it needs here.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = vmcast();
        command.arg("--controller").arg(format!("https://{}", self.address));
        command.arg("--tls-dir").arg(self.tls()).args(line.split_whitespace());
        command
    }

    pub(crate) async fn run(&self, line: &str) -> Ran {
        run(self.command(line)).await
    }
}

/// `vmcast`, without the settings of whoever runs the tests.
pub(crate) fn vmcast() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmcast"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("VMCAST_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) async fn run(mut command: Command) -> Ran {
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await;
    output.expect("vmcast ended in time").unwrap().into()
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
