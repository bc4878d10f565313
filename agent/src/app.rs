//! Wires the agent together: owns every task, and ends them in order.

use std::{
    collections::BTreeMap,
    fs::File,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use rustix::fs::FlockOperation;
use tokio::{
    net::{TcpListener, UdpSocket},
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
    time::{interval, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vmcast_common::{
    name::HostName,
    net::{self, CongestionControl},
    tls::TlsDir,
};
use vmcast_proto::v1::Register;

use crate::{
    condition::Condition,
    config::{Args, Compression, HypervisorKind},
    datastore::{Datastore, SharedStorage, Survey},
    deployments::{Context, Deployments},
    frozen::{self, FrozenVms},
    hypervisor::{Driver, Exec, Hypervisor},
    peers::Peers,
    serve::{PeerService, Serving},
    session::Session,
    transfer::{outgoing::CopyFree, swarm::RateLimit},
};

/// Tasks have this long to end after SIGTERM; systemd's own limit is far longer.
const SHUTDOWN: Duration = Duration::from_secs(8);
/// File faults waiting to be reported.
const FAULTS: usize = 16;

/// Runs the agent until SIGTERM or SIGINT.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let tls = TlsDir::load(&args.tls_dir)?;
    let host = check_identity(&tls, &args)?;
    std::fs::create_dir_all(&args.state_dir)
        .with_context(|| format!("cannot make the state directory {}", args.state_dir.display()))?;
    let _lock = lock(&args)?;
    let stores = open_datastores(&args)?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}; is another agent running?", args.listen))?;
    let bound = listener.local_addr()?;
    let address = match &args.advertise {
        Some(address) => net::parse_address(address)?,
        None => advertised(bound, &args.controller).await?,
    };

    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let peers = Arc::new(Peers::new(tls.clone(), congestion(&listener, args.congestion_control.clone())));
    let bytes =
        |limit: vmcast_common::units::Limit| limit.0.map(vmcast_common::units::Rate::bytes_per_second);
    let context = Arc::new(Context {
        host: host.clone(),
        datastores: stores.clone(),
        peers: peers.clone(),
        serving: Arc::new(Serving::default()),
        turns: Arc::default(),
        upload: Arc::new(RateLimit::new(bytes(args.upload_limit))),
        download: Arc::new(RateLimit::new(bytes(args.download_limit))),
        urgent: Arc::new(Notify::new()),
        compression: args.compression == Compression::Auto,
        allows_clear_data: args.allow_clear_data,
        hypervisor: hypervisor(&args)?,
        frozen: FrozenVms::default(),
    });
    let jobs = CancellationToken::new();
    let deployments = Arc::new(Deployments::new(context.clone(), tasks.clone(), jobs.clone()));
    let (faults, mut faulty) = mpsc::channel(FAULTS);
    {
        let (deployments, stop) = (deployments.clone(), stop.clone());
        tasks.spawn(async move {
            while let Some(Some((deployment, error))) = stop.run_until_cancelled(faulty.recv()).await {
                deployments.fault(&deployment, &error);
            }
        });
    }

    let service = PeerService::new(context.clone(), tasks.clone(), jobs.clone(), faults);
    let mut incoming = net::serve_incoming(listener, &tls, stop.clone())?;
    if args.allow_clear_data {
        tracing::warn!(
            "this host takes part in deployments whose blocks travel in clear (--allow-clear-data)"
        );
        incoming = incoming.allowing_clear(context.link_keys());
    }
    let server = net::server_builder()
        .add_service(CopyFree::new(service))
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    tasks.spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the peer service has ended");
        }
    });
    write_listen_file(&args, bound)?;
    tracing::info!(host.id = %host, %bound, %address, "agent {} is listening", env!("CARGO_PKG_VERSION"));

    let condition = Condition::new(stores);
    tasks.spawn({
        let (condition, stop) = (condition.clone(), stop.clone());
        async move {
            let _ = stop.run_until_cancelled(condition.measure()).await;
        }
    });
    let (frozen_of, frozen_jobs) = (context.clone(), deployments.clone());
    let session = Session {
        controller: args.controller.clone(),
        tls,
        register: Register {
            host: host.to_string(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            instance_id: uuid::Uuid::new_v4().to_string(),
            address,
            labels: args.labels().into_iter().collect(),
            allows_clear_data: args.allow_clear_data,
            hypervisor: context
                .hypervisor
                .as_ref()
                .map(|it| it.driver().kind().to_owned())
                .unwrap_or_default(),
            ..Register::default()
        },
        context,
        deployments,
        condition,
        held: Survey::default(),
        epoch: 0,
        start_id: String::new(),
        swept: false,
    };
    tasks.spawn(session.run(stop.clone()));
    for store in frozen_of.datastores.values() {
        tasks.spawn(frozen::watch(frozen_of.clone(), frozen_jobs.clone(), store.clone(), stop.clone()));
    }
    tasks.spawn(watchdog(stop.clone()));
    notify(&[sd_notify::NotifyState::Ready]);

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    notify(&[sd_notify::NotifyState::Stopping]);
    // Jobs and what they serve first: their streams end with a reason, and the server then has nothing to wait for.
    jobs.cancel();
    stop.cancel();
    tasks.close();
    if timeout(SHUTDOWN, tasks.wait()).await.is_err() {
        tracing::warn!(left = tasks.len(), "some tasks did not end in time");
    }
    tracing::info!("stopped");
    Ok(())
}

fn check_identity(tls: &TlsDir, args: &Args) -> anyhow::Result<HostName> {
    let identity = tls.identity();
    if identity.host().as_ref() != Some(&args.name) {
        anyhow::bail!(
            "the certificate in {} is for {} {}, not for agent {}; issue one with `vmcast pki issue --role agent --name {}`",
            args.tls_dir.display(),
            identity.role,
            identity.name,
            args.name,
            args.name,
        );
    }
    Ok(args.name.clone())
}

fn hypervisor(args: &Args) -> anyhow::Result<Option<Hypervisor>> {
    let driver: Arc<dyn Driver> = match (args.hypervisor, &args.hypervisor_hook) {
        (HypervisorKind::None, _) => return Ok(None),
        (HypervisorKind::Libvirt, _) => libvirt(args)?,
        (HypervisorKind::Exec, Some(hook)) => {
            let within = Duration::from_secs(args.hypervisor_hook_seconds.into());
            Arc::new(Exec::new(hook.clone(), args.name.clone(), within))
        }
        (HypervisorKind::Exec, None) => anyhow::bail!("--hypervisor exec needs --hypervisor-hook PROGRAM"),
    };
    Ok(Some(Hypervisor::new(driver, args.starts_at_once)))
}

#[cfg(feature = "libvirt")]
#[expect(clippy::unnecessary_wraps, reason = "it fails where libvirt is not compiled in")]
fn libvirt(args: &Args) -> anyhow::Result<Arc<dyn Driver>> {
    Ok(Arc::new(crate::hypervisor::Libvirt::new(args.libvirt_uri.clone(), args.name.clone())))
}

#[cfg(not(feature = "libvirt"))]
fn libvirt(_args: &Args) -> anyhow::Result<Arc<dyn Driver>> {
    anyhow::bail!(
        "this agent was built without libvirt; build it with `cargo build --features vmcast-agent/libvirt`, or use --hypervisor exec"
    )
}

/// Two agents on one state directory would fight over the same datastores.
fn lock(args: &Args) -> anyhow::Result<File> {
    let path = args.state_dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).with_context(|| {
        format!("{} is held: another agent runs with this state directory", path.display())
    })?;
    Ok(file)
}

fn open_datastores(
    args: &Args,
) -> anyhow::Result<BTreeMap<vmcast_common::name::DatastoreName, Arc<Datastore>>> {
    let mut stores = BTreeMap::new();
    for arg in &args.datastore {
        let shared =
            arg.shared.as_ref().map(|id| SharedStorage { id: id.to_string(), host: args.name.clone() });
        let store = Datastore::open(arg.name.clone(), &arg.dir, shared)?;
        if stores.insert(arg.name.clone(), store).is_some() {
            anyhow::bail!("datastore {} is given twice", arg.name);
        }
    }
    Ok(stores)
}

/// Sets how connections that carry blocks share their links, as far as the kernel lets this process: it is the speed of
/// transfers that depends on it, and not that they work.
fn congestion(listener: &TcpListener, wanted: CongestionControl) -> CongestionControl {
    let Err(error) = wanted.apply(listener) else { return wanted };
    tracing::warn!(
        "congestion control {wanted} is refused ({error}): the system's default is used. Allow it with sysctl \
         net.ipv4.tcp_allowed_congestion_control, or set congestion-control to system"
    );
    CongestionControl::system()
}

/// The address by which this machine is known on the way to the controller, when it listens on all of them.
async fn advertised(bound: SocketAddr, controller: &str) -> anyhow::Result<String> {
    if !bound.ip().is_unspecified() {
        return Ok(bound.to_string());
    }
    let any: IpAddr = bound.ip();
    let route = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        // Connecting a UDP socket sends nothing: it asks the routing table.
        socket.connect(net::parse_address(controller).map_err(std::io::Error::other)?).await?;
        socket.local_addr()
    };
    let local =
        route.await.context("cannot tell by which address other agents reach this host; give --advertise")?;
    Ok(SocketAddr::new(local.ip(), bound.port()).to_string())
}

/// Tells scripts and tests which port was taken.
fn write_listen_file(args: &Args, bound: SocketAddr) -> anyhow::Result<()> {
    let (path, new) = (args.state_dir.join("listen"), args.state_dir.join("listen.new"));
    std::fs::write(&new, bound.to_string())
        .and_then(|()| std::fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd is not told");
    }
}

/// Tells systemd that the runtime still turns, at half the period that the unit asks for.
async fn watchdog(stop: CancellationToken) {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    let mut tick = interval(period / 2);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        notify(&[sd_notify::NotifyState::Watchdog]);
    }
}
