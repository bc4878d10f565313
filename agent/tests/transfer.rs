//! Agents that feed each other over real TLS on loopback, with hand-made assignments in the controller's place.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{interval, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vmcast_agent::{
    assignment::Assignment,
    datastore::{self, Datastore, ImageCatalog},
    deployments::{Context, Deployments},
    frozen::FrozenVms,
    peers::Peers,
    serve::{PeerService, Serving},
    transfer::{outgoing::CopyFree, swarm::RateLimit},
};
use vmcast_common::{
    identity::Role,
    name::{DatastoreName, DeploymentId, HostName, ImageName},
    net::{self, ClearLink, CongestionControl, LinkKey},
    pki::{self, IssueRequest},
    telemetry::{self, LogFormat},
    tls::TlsDir,
};
use vmcast_proto::v1::{
    AssignCommand, CopyPlacement, DataEncryption, DeploymentReport, FetchBase, FetchOpen, FetchRequest,
    FetchStripe, GetManifestRequest, PeerAddress, PingRequest, assign_command, deployment_report::Phase,
    failure::Kind, fetch_request, peer_client::PeerClient,
};

struct Host {
    name: String,
    address: String,
    dir: PathBuf,
    store: Arc<Datastore>,
    deployments: Arc<Deployments>,
    stop: CancellationToken,
}

struct Net {
    _dir: tempfile::TempDir,
    hosts: BTreeMap<String, Host>,
}

impl Net {
    async fn new(names: &[&str]) -> Self {
        // VMCAST_LOG=debug shows what the agents do; the first test of the process to come here sets it up.
        let _ = telemetry::init(LogFormat::Text, "off");
        let dir = tempfile::tempdir().unwrap();
        let pki_dir = dir.path().join("pki");
        pki::init(&pki_dir).unwrap();
        let mut hosts = BTreeMap::new();
        for name in names {
            let tls = dir.path().join(format!("{name}.tls"));
            pki::issue(&IssueRequest::new(&pki_dir, Role::Agent, *name, &tls)).unwrap();
            let tls = TlsDir::load(&tls).unwrap();
            hosts.insert((*name).to_owned(), Host::start(name, dir.path().join(name), tls).await);
        }
        Self { _dir: dir, hosts }
    }

    fn image(&self, host: &str, size: usize) -> String {
        let host = &self.hosts[host];
        let mut content = vec![0; size];
        StdRng::seed_from_u64(7).fill_bytes(&mut content);
        fs::write(host.dir.join("disk.raw"), &content).unwrap();
        fs::write(host.dir.join("vm.xml"), "<domain/>").unwrap();
        let files = ["disk.raw".to_owned(), "vm.xml".to_owned()];
        let image = datastore::scan(&host.store, &files, None, &mut |_, _| (), &false.into()).unwrap();
        ImageCatalog::new(host.store.clone()).save(&ImageName::new("web").unwrap(), &image).unwrap();
        image.manifest.id().to_string()
    }

    fn command(
        &self,
        image: &str,
        host: &str,
        serve_to: &[&str],
        copies: &[&str],
        stripes: &[&[&str]],
    ) -> AssignCommand {
        let copy = |name: &&str| CopyPlacement { datastore: "ds1".into(), name: (*name).to_owned() };
        let stripe =
            |u: &&[&str]| FetchStripe { weight: 1, upstreams: u.iter().map(|h| (*h).to_owned()).collect() };
        let peer = |h: &Host| PeerAddress {
            host: h.name.clone(),
            address: h.address.clone(),
            ..PeerAddress::default()
        };
        AssignCommand {
            epoch: 1,
            deployment_id: "d1".into(),
            version: 1,
            image_id: image.into(),
            image_name: "web".into(),
            serve_to: serve_to.iter().filter(|h| **h != host).map(|h| (*h).to_owned()).collect(),
            peers: self.hosts.values().map(peer).collect(),
            copies: copies.iter().map(copy).collect(),
            base: (!copies.is_empty()).then(|| {
                assign_command::Base::Fetch(FetchBase {
                    stripes: stripes.iter().map(stripe).collect(),
                    fallback: self.hosts.keys().filter(|h| *h != host).cloned().collect(),
                })
            }),
            ..AssignCommand::default()
        }
    }

    fn assign(&self, host: &str, command: AssignCommand) {
        self.hosts[host].deployments.assign(Assignment::try_from(command).unwrap());
    }

    async fn ended(&self, host: &str) -> DeploymentReport {
        self.reaches(host, &[Phase::Done, Phase::Failed]).await
    }

    async fn reaches(&self, host: &str, phases: &[Phase]) -> DeploymentReport {
        let mut tick = interval(Duration::from_millis(10));
        let wait = async {
            loop {
                tick.tick().await;
                for (_, progress) in self.hosts[host].deployments.progress() {
                    let report = progress.report();
                    if phases.contains(&report.phase()) {
                        return report;
                    }
                }
            }
        };
        timeout(Duration::from_secs(60), wait).await.expect("the deployment ends")
    }

    fn same(&self, host: &str, copy: &str) {
        let source = self.hosts.values().find(|h| h.dir.join("vm.xml").exists()).unwrap();
        for file in ["disk.raw", "vm.xml"] {
            let there = fs::read(self.hosts[host].dir.join(copy).join(file)).unwrap();
            assert!(there == fs::read(source.dir.join(file)).unwrap(), "{host}/{copy}/{file} differs");
        }
    }

    fn leftovers(&self, host: &str) -> usize {
        fs::read_dir(self.hosts[host].dir.join(".vmcast/deployments")).unwrap().count()
    }
}

impl Host {
    async fn start(name: &str, dir: PathBuf, tls: TlsDir) -> Self {
        fs::create_dir(&dir).unwrap();
        let store = Datastore::open(DatastoreName::new("ds1").unwrap(), &dir, None).unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let host = HostName::new(name).unwrap();
        let context = Arc::new(Context {
            host: host.clone(),
            datastores: BTreeMap::from([(store.name().clone(), store.clone())]),
            peers: Arc::new(Peers::new(tls.clone(), CongestionControl::system())),
            serving: Arc::new(Serving::default()),
            turns: Arc::default(),
            upload: Arc::new(RateLimit::new(None)),
            download: Arc::new(RateLimit::new(None)),
            urgent: Arc::new(Notify::new()),
            compression: true,
            allows_clear_data: true,
            hypervisor: None,
            frozen: FrozenVms::default(),
        });
        let deployments = Arc::new(Deployments::new(context.clone(), tasks.clone(), stop.clone()));
        let (faults, mut faulty) = mpsc::channel(4);
        tasks.spawn({
            let deployments = deployments.clone();
            async move {
                while let Some((deployment, error)) = faulty.recv().await {
                    deployments.fault(&deployment, &error);
                }
            }
        });
        let keys = context.link_keys();
        let service = PeerService::new(context, tasks.clone(), stop.clone(), faults);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incoming = net::serve_incoming(listener, &tls, stop.clone()).unwrap().allowing_clear(keys);
        let server = net::server_builder().add_service(CopyFree::new(service));
        let serve = server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        tasks.spawn(async move { serve.await.unwrap() });
        Self { name: name.into(), address, dir, store, deployments, stop }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hosts_feed_each_other_and_the_source_sends_once() {
    let net = Net::new(&["s", "a", "b", "c"]).await;
    let size = 24 * 1024 * 1024 + 77;
    let image = net.image("s", size);
    let all = ["a", "b", "c"];
    net.assign("s", net.command(&image, "s", &all, &[], &[]));
    for host in all {
        let stripes: Vec<[&str; 1]> =
            all.iter().map(|relay| [if *relay == host { "s" } else { relay }]).collect();
        let stripes: Vec<&[&str]> = stripes.iter().map(<[&str; 1]>::as_slice).collect();
        net.assign(host, net.command(&image, host, &all, &["web-1", "web-2"], &stripes));
    }
    for host in all {
        let report = net.ended(host).await;
        assert_eq!(report.phase(), Phase::Done, "{host}: {:?}", report.failure);
        assert_eq!(report.published, ["web-1", "web-2"]);
        assert!(report.received_bytes < size as u64 * 102 / 100, "{host} received {}", report.received_bytes);
        net.same(host, "web-1");
        net.same(host, "web-2");
    }
    let id = DeploymentId::new("d1").unwrap();
    let report = net.hosts["s"].deployments.release(&id).await;
    assert!(report.sent_bytes < size as u64 * 115 / 100, "the source sent {}", report.sent_bytes);
    for host in all {
        net.hosts[host].deployments.release(&id).await;
        assert_eq!(net.leftovers(host), 0, "leftovers on {host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stripe_of_a_dead_relay_comes_from_others() {
    let net = Net::new(&["s", "a", "b"]).await;
    let image = net.image("s", 8 * 1024 * 1024);
    net.assign("s", net.command(&image, "s", &["a", "b"], &[], &[]));
    net.hosts["b"].stop.cancel();
    net.assign("a", net.command(&image, "a", &[], &["web-1"], &[&["s"], &["b"]]));
    let report = net.ended("a").await;
    assert_eq!(report.phase(), Phase::Done, "{:?}", report.failure);
    net.same("a", "web-1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_file_that_changes_ends_the_transfer_and_leaves_nothing() {
    let net = Net::new(&["s", "a"]).await;
    let image = net.image("s", 8 * 1024 * 1024);
    net.assign("s", net.command(&image, "s", &["a"], &[], &[]));
    net.reaches("s", &[Phase::Serving]).await;
    let disk = net.hosts["s"].dir.join("disk.raw");
    let mut content = fs::read(&disk).unwrap();
    content[5_000_000] ^= 1;
    fs::write(&disk, content).unwrap();
    net.assign("a", net.command(&image, "a", &[], &["web-1"], &[&["s"]]));
    for host in ["s", "a"] {
        let failure = net.ended(host).await.failure.unwrap();
        assert_eq!(failure.kind(), Kind::SourceChanged, "{host}: {}", failure.message);
        assert!(failure.message.contains("disk.raw"), "{}", failure.message);
    }
    assert!(!net.hosts["a"].dir.join("web-1").exists());
    assert_eq!(net.leftovers("a"), 0, "the partial copy is deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_begins_again_when_it_is_told_something_new() {
    let net = Net::new(&["s", "a"]).await;
    let image = net.image("s", 8 * 1024 * 1024);
    net.assign("s", net.command(&image, "s", &["a"], &[], &[]));
    let in_the_way = net.hosts["a"].dir.join("web-1");
    fs::create_dir(&in_the_way).unwrap();
    let command = net.command(&image, "a", &[], &["web-1"], &[&["s"]]);
    net.assign("a", Clone::clone(&command));
    let report = net.ended("a").await;
    assert_eq!((report.phase(), report.version), (Phase::Failed, 1));
    fs::remove_dir(&in_the_way).unwrap();
    net.assign("a", Clone::clone(&command));
    assert_eq!(net.ended("a").await.phase(), Phase::Failed, "the same again changes nothing");
    net.assign("a", AssignCommand { version: 2, ..command });
    let report = net.reaches("a", &[Phase::Done]).await;
    assert_eq!((report.version, report.failure), (2, None));
    net.same("a", "web-1");
}

/// A listener that passes connections on, and keeps what comes back. Ends when it is dropped.
struct Wiretap {
    address: String,
    heard: Arc<Mutex<Vec<u8>>>,
    _tasks: JoinSet<()>,
}

impl Wiretap {
    async fn new(to: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        let all = heard.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&to).await.unwrap();
                connections.spawn(Self::listen(client, server, all.clone()));
            }
        });
        Self { address, heard, _tasks: tasks }
    }

    async fn listen(client: TcpStream, server: TcpStream, heard: Arc<Mutex<Vec<u8>>>) {
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let back = async move {
            let mut part = vec![0; 64 << 10];
            while let Ok(read @ 1..) = from_server.read(&mut part).await {
                heard.lock().extend(&part[..read]);
                if to_client.write_all(&part[..read]).await.is_err() {
                    break;
                }
            }
        };
        let _ = tokio::join!(tokio::io::copy(&mut from_client, &mut to_server), back);
    }
}

/// Deploys from `s` to `a` past a wiretap; gives what was heard there, and the content of the image.
async fn overheard(clear: bool) -> (Vec<u8>, Vec<u8>) {
    let net = Net::new(&["s", "a"]).await;
    let image = net.image("s", 2 << 20);
    let tap = Wiretap::new(net.hosts["s"].address.clone()).await;
    let name = |name: &str| HostName::new(name).unwrap();
    let key = LinkKey::random().of_pair(&name("s"), &name("a"));
    let with_key = |mut command: AssignCommand, address: Option<&str>| {
        command.data_encryption = if clear { DataEncryption::Off } else { DataEncryption::On }.into();
        for peer in &mut command.peers {
            if clear {
                peer.link_key = key.as_bytes().to_vec().into();
            }
            if let Some(address) = address.filter(|_| peer.host == "s") {
                peer.address = address.to_owned();
            }
        }
        command
    };
    net.assign("s", with_key(net.command(&image, "s", &["a"], &[], &[]), None));
    net.assign("a", with_key(net.command(&image, "a", &[], &["web-1"], &[&["s"]]), Some(&tap.address)));
    let report = net.ended("a").await;
    assert_eq!(report.phase(), Phase::Done, "{:?}", report.failure);
    net.same("a", "web-1");
    let heard = tap.heard.lock().clone();
    let disk = fs::read(net.hosts["s"].dir.join("disk.raw")).unwrap();
    if clear {
        only_blocks_are_to_be_had(&net, &image, &key).await;
    }
    (heard, disk)
}

/// What a key opens is of no use for anything but the blocks of its deployment.
async fn only_blocks_are_to_be_had(net: &Net, image: &str, key: &LinkKey) {
    let id = |id: &str| DeploymentId::new(id).unwrap();
    let name = |name: &str| HostName::new(name).unwrap();
    let connect = |deployment: &str, client: &str, key: LinkKey| {
        let link = ClearLink { deployment: id(deployment), client: name(client), server: name("s") };
        let address = net.hosts["s"].address.clone();
        async move { net::connect_clear(&address, link, key, CongestionControl::system()).await }
    };
    let mut peer = PeerClient::new(connect("d1", "a", key.clone()).await.unwrap());
    let asked = GetManifestRequest { deployment_id: "d1".into(), image_id: image.into() };
    let status = peer.get_manifest(asked).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    let status = peer.ping(PingRequest {}).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    let open = |deployment: &str| {
        let open = FetchOpen { deployment_id: deployment.into(), image_id: image.into(), zstd: true };
        tokio_stream::iter([FetchRequest { message: Some(fetch_request::Message::Open(open)) }])
    };
    let status = peer.fetch(open("d2")).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    assert!(peer.fetch(open("d1")).await.is_ok());
    // Another key, and another name.
    let error = connect("d1", "a", LinkKey::random()).await.unwrap_err().to_string();
    assert!(error.contains("does not have the key"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_travel_in_clear_if_that_is_asked_for_and_only_then() {
    for clear in [false, true] {
        let (heard, disk) = overheard(clear).await;
        assert!(heard.len() > disk.len());
        // Frames of HTTP/2 cut blocks somewhere: of 64 bytes at the beginning of each, most are in one piece.
        let blocks: Vec<&[u8]> = disk.chunks(64 << 10).map(|block| &block[..64]).collect();
        let found = blocks.iter().filter(|block| heard.windows(64).any(|part| part == **block)).count();
        if clear {
            assert!(found * 2 > blocks.len(), "{found} of {} blocks", blocks.len());
        } else {
            assert_eq!(found, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_link_key_is_refused() {
    let net = Net::new(&["s"]).await;
    let mut command = net.command(&"0".repeat(64), "s", &[], &[], &[]);
    command.peers[0].link_key = vec![0; 31].into();
    let error = Assignment::try_from(command).unwrap_err().to_string();
    assert!(error.contains("host s does not have 32 bytes"), "{error}");
}
