use serde_json::{Value, json};

use super::*;

fn deployment() -> v1::Deployment {
    let copy = |n: u32, published| v1::CopyStatus {
        name: format!("web-h2-{n}"),
        datastore: "ds1".into(),
        published,
        ..Default::default()
    };
    v1::Deployment {
        id: "d1".into(),
        state: v1::deployment::State::Partial.into(),
        spec: Some(v1::DeploymentSpec { image: "web".into(), ..Default::default() }),
        source: "h1".into(),
        image_id: "ab".into(),
        image_bytes: 1000,
        image_data_bytes: 600,
        created_at: Some(Timestamp { seconds: 1_793_714_531, nanos: 0 }),
        makespan_seconds: 2.5,
        bytes_over_network: 601,
        bytes_reused: 7,
        targets: vec![
            v1::TargetStatus {
                host: "h2".into(),
                state: v1::target_status::State::Succeeded.into(),
                copies: vec![copy(1, true), copy(2, true)],
                finished_after_seconds: 2.5,
                ..Default::default()
            },
            v1::TargetStatus {
                host: "h3".into(),
                state: v1::target_status::State::Failed.into(),
                copies: vec![copy(1, false)],
                reason: "h3: no room".into(),
                ..Default::default()
            },
        ],
        plan: Some(plan()),
        reason: "1 of 2 targets failed".into(),
        revision: 9,
        ..Default::default()
    }
}

fn plan() -> v1::Plan {
    let edge = v1::PlanEdge { from: "h1".into(), to: "h2".into(), stage: 1, ..Default::default() };
    v1::Plan {
        strategy: v1::Strategy::Staged.into(),
        stripes: vec![v1::PlanStripe { share: 1.0, edges: vec![edge] }],
        local: vec![v1::PlanLocal { host: "h2".into(), copies: 1, ..Default::default() }],
        ..Default::default()
    }
}

fn host() -> v1::Host {
    v1::Host {
        name: "h1".into(),
        datastores: vec![v1::Datastore { name: "ds1".into(), ..Default::default() }],
        metrics: Some(v1::HostMetrics::default()),
        ..Default::default()
    }
}

fn json_of<T: serde::Serialize>(view: &T) -> Value {
    serde_json::to_value(view).unwrap()
}

#[test]
fn what_wait_prints_is_fixed() {
    let expected = json!({
        "id": "d1",
        "state": "PARTIAL",
        "makespan_seconds": 2.5,
        "image_bytes": 1000,
        "bytes_over_network": 601,
        "bytes_reused": 7,
        "targets": [
            {"host": "h2", "state": "SUCCEEDED", "copies": 2, "reason": ""},
            {"host": "h3", "state": "FAILED", "copies": 0, "reason": "h3: no room"},
        ],
    });
    assert_eq!(json_of(&WaitView::from(&deployment())), expected);
}

#[test]
fn what_matrix_prints_has_the_columns_of_the_matrix() {
    let row = v1::MatrixRow {
        from: "h1".into(),
        to: "h2".into(),
        deployment_time: 8.0,
        bandwidth: 1e8,
        rtt: 0.001,
        measured_at: Some(Timestamp { seconds: 1_793_714_531, nanos: 0 }),
        source: v1::matrix_row::Source::Probe.into(),
        preferred: true,
        prerequisite_host: "h1".into(),
    };
    let matrix = v1::GetMatrixResponse {
        rows: vec![row, v1::MatrixRow { from: "h2".into(), to: "h1".into(), ..Default::default() }],
        unmeasured: 1,
        size: 8 << 30,
    };
    let expected = json!({
        "size": 8_u64 << 30,
        "unmeasured": 1,
        "rows": [
            {
                "from": "h1", "to": "h2", "deployment_time": 8.0, "bandwidth": 1e8, "rtt": 0.001,
                "measured_at": "2026-11-03T14:02:11.000Z", "source": "PROBE", "preferred": true,
                "prerequisite_host": "h1",
            },
            {
                "from": "h2", "to": "h1", "deployment_time": 0.0, "bandwidth": 0.0, "rtt": 0.0,
                "measured_at": null, "source": "SOURCE_UNSPECIFIED", "preferred": false,
                "prerequisite_host": null,
            },
        ],
    });
    assert_eq!(json_of(&MatrixView::from(&matrix)), expected);
}

#[test]
fn what_is_unknown_is_null_and_copies_are_counted() {
    let view = json_of(&DeploymentView::from(&deployment()));
    assert_eq!(view["finished_at"], Value::Null);
    assert_eq!(view["created_at"], "2026-11-03T14:02:11.000Z");
    assert_eq!(view["strategy"], "PIPELINED");
    assert_eq!(view["targets"][1]["finished_after_seconds"], Value::Null);
    assert_eq!(view["targets"][0]["reason"], Value::Null);
    assert_eq!(view["targets"][1]["copies"], 0);
    assert_eq!(view["targets"][1]["copies_wanted"], 1);
}

/// All keys of a JSON value.
fn keys(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            found.push(key.clone());
            keys(value, found);
        }),
        Value::Array(values) => values.iter().for_each(|value| keys(value, found)),
        _ => {}
    }
}

#[test]
fn every_field_is_documented() {
    let image = v1::Image { files: vec![v1::ImageFile::default()], ..Default::default() };
    let matrix = v1::GetMatrixResponse { rows: vec![v1::MatrixRow::default()], ..Default::default() };
    let views = [
        json_of(&HostsView::from(&[host()][..])),
        json_of(&ImagesView::from(&[image][..])),
        json_of(&MatrixView::from(&matrix)),
        json_of(&EventView::from(&v1::Event::default())),
        json_of(&DeploymentsView::from(&[deployment()][..])),
        json_of(&WaitView::from(&deployment())),
        json_of(&CreatedView::from(&deployment())),
        json_of(&CancelView::from(&deployment())),
    ];
    let mut found = Vec::new();
    for view in &views {
        keys(view, &mut found);
    }
    let document = include_str!("../../JSON.md");
    for key in found {
        assert!(document.contains(&format!("`{key}`")), "JSON.md says nothing about {key:?}");
    }
}
