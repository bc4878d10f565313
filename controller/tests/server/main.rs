//! The controller as a server: certificates, roles, sessions, and a deployment from end to end with scripted agents.

mod bed;

use bed::{Bed, DATA, read, register};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1alpha::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tonic_types::StatusExt as _;
use vmcast_common::identity::Role;
use vmcast_proto::v1::{
    self as pb, deployment::State, deployments_client::DeploymentsClient, hosts_client::HostsClient,
    images_client::ImagesClient, matrix_client::MatrixClient,
};

fn import(name: &str) -> pb::ImportImageRequest {
    pb::ImportImageRequest {
        name: name.into(),
        host: "s".into(),
        datastore: "d".into(),
        files: vec!["disk.img".into()],
        domain: String::new(),
    }
}

fn request(targets: &[&str], strategy: pb::Strategy) -> pb::CreateDeploymentRequest {
    let targets = targets
        .iter()
        .map(|host| pb::TargetSpec { host: (*host).into(), ..pb::TargetSpec::default() })
        .collect();
    let spec = pb::DeploymentSpec {
        image: "web".into(),
        targets,
        strategy: strategy.into(),
        name_template: format!("{{image}}-{{n}}-{}", strategy.as_str_name().to_lowercase()),
        ..pb::DeploymentSpec::default()
    };
    pb::CreateDeploymentRequest { spec: Some(spec), request_id: String::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_imported_and_deployed_and_all_of_it_is_remembered() {
    let mut bed = Bed::new().await;
    for name in ["s", "h1", "h2"] {
        bed.agent(name).await;
    }
    let channel = bed.channel(Role::Operator, "ada").await;
    let mut images = ImagesClient::new(channel.clone());
    let mut progress = images.import(import("web")).await.unwrap().into_inner();
    let mut last = None;
    while let Some(message) = progress.next().await {
        last = Some(message.unwrap());
    }
    let image = last.unwrap().image.unwrap();
    assert_eq!((image.data_bytes, image.holders.as_slice()), (DATA, &["s".to_owned()][..]));

    let mut deployments = DeploymentsClient::new(channel.clone());
    for strategy in [pb::Strategy::Pipelined, pb::Strategy::Staged] {
        let created = deployments.create(request(&["h1", "h2"], strategy)).await.unwrap().into_inner();
        let watch = pb::WatchDeploymentRequest { id: created.id.clone() };
        let mut watch = deployments.watch(watch).await.unwrap().into_inner();
        let mut last = created;
        while let Some(message) = watch.next().await {
            last = message.unwrap();
        }
        assert_eq!(last.state(), State::Succeeded, "{last:?}");
        assert_eq!((last.bytes_over_network, last.targets.len()), (2 * DATA, 2));
        assert!(last.plan.unwrap().predicted_makespan_seconds > 0.0);
    }
    let probed = MatrixClient::new(channel.clone()).probe(pb::ProbeMatrixRequest::default()).await.unwrap();
    assert_eq!(probed.into_inner(), pb::ProbeMatrixResponse { measured: 6, failed: 0 });
    let all = deployments.events(pb::EventsRequest::default()).await.unwrap().into_inner();
    let events: Vec<pb::Event> = all.map(Result::unwrap).collect().await;
    assert!(events.windows(2).all(|pair| pair[0].sequence + 1 == pair[1].sequence));
    assert_eq!(events.iter().filter(|event| event.kind == "DEPLOYMENT_SUCCEEDED").count(), 2);

    bed.stop().await;
    bed.start().await;
    let channel = bed.channel(Role::Viewer, "eve").await;
    let mut deployments = DeploymentsClient::new(channel.clone());
    let list = deployments.list(pb::ListDeploymentsRequest {}).await.unwrap().into_inner().deployments;
    assert_eq!(list.len(), 2);
    assert!(list.iter().all(|deployment| deployment.state() == State::Succeeded));
    let rows = pb::GetMatrixRequest {
        of: Some(pb::get_matrix_request::Of::Image("web".into())),
        from: String::new(),
    };
    let matrix = MatrixClient::new(channel).get(rows).await.unwrap().into_inner();
    assert_eq!((matrix.size, matrix.rows.len()), (DATA, 6));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_does_what_it_may_and_no_more() {
    let mut bed = Bed::new().await;
    let viewer = bed.channel(Role::Viewer, "eve").await;
    assert!(HostsClient::new(viewer.clone()).list(pb::ListHostsRequest {}).await.is_ok());
    let denied = [
        HostsClient::new(viewer.clone()).cordon(pb::CordonHostRequest::default()).await.err(),
        ImagesClient::new(viewer.clone()).import(import("web")).await.err(),
        DeploymentsClient::new(viewer.clone()).cancel(pb::CancelDeploymentRequest::default()).await.err(),
        DeploymentsClient::new(viewer.clone()).create(pb::CreateDeploymentRequest::default()).await.err(),
        MatrixClient::new(viewer.clone()).probe(pb::ProbeMatrixRequest::default()).await.err(),
        HostsClient::new(bed.channel(Role::Agent, "h1").await).list(pb::ListHostsRequest {}).await.err(),
    ];
    for status in denied {
        assert_eq!(status.unwrap().code(), Code::PermissionDenied);
    }
    let operator = bed.channel(Role::Operator, "ada").await;
    let bad =
        DeploymentsClient::new(operator).create(pb::CreateDeploymentRequest::default()).await.unwrap_err();
    assert_eq!(bad.get_details_bad_request().unwrap().field_violations[0].field, "spec.image");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_of_the_host_in_the_certificate() {
    let mut bed = Bed::new().await;
    let refused = |status: Result<_, tonic::Status>| status.map(|_: (_, _)| ()).unwrap_err();
    let other = refused(bed.attach("h1", register("h2")).await);
    assert_eq!(other.code(), Code::PermissionDenied);
    let version = pb::Register { protocol_version: 9, ..register("h1") };
    let status = refused(bed.attach("h1", version).await);
    assert_eq!(status.code(), Code::FailedPrecondition);
    let address = pb::Register { address: "nowhere".into(), ..register("h1") };
    assert_eq!(refused(bed.attach("h1", address).await).code(), Code::InvalidArgument);

    let first = bed.attach("h1", register("h1")).await.unwrap();
    let twin = pb::Register { instance_id: "twin".into(), ..register("h1") };
    assert_eq!(refused(bed.attach("h1", twin).await).code(), Code::AlreadyExists);
    // The same process again: the newer session takes over, and the older one ends with a reason.
    let (_sender, mut second) = bed.attach("h1", register("h1")).await.unwrap();
    assert!(matches!(
        second.message().await.unwrap().unwrap().message,
        Some(pb::controller_message::Message::Welcome(_))
    ));
    let (_sender, mut old) = first;
    let end = loop {
        match old.message().await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    assert_eq!(end.unwrap_err().code(), Code::Unavailable);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_can_be_found_and_explored() {
    let mut bed = Bed::new().await;
    let file = read(&bed.state_dir().join("listen")).unwrap();
    assert!(file.trim().starts_with("127.0.0.1:"));
    let channel = bed.channel(Role::Viewer, "eve").await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "vmcast.v1.Deployments"] {
        let check = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        assert_eq!(check.status(), ServingStatus::Serving);
    }
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(ask))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["Deployments", "Hosts", "Images", "Matrix", "AgentSession"] {
        assert!(names.contains(&format!("vmcast.v1.{name}").as_str()), "{names:?}");
    }
    bed.stop().await;
}
