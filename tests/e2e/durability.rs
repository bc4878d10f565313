//! kill -9 of either program, and a controller that comes back from an old copy of its state.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::net::TcpListener;
use vmcast_proto::v1::{Deployment, deployment::State};
use vmcast_tests::{
    Cluster, FileSpec,
    client::{ended, spec, summary},
    verify, wait,
};

use super::DEPLOYED;

const SIZE: u64 = 24 << 20;
/// What a kill -9 may cost: blocks that were received and not written, and what was on its way.
const LOST: u64 = 2 << 20;

#[tokio::test]
async fn hosts_go_on_while_the_controller_is_dead() -> Result<()> {
    let mut cluster = Cluster::builder(3).upload_limit(0, "4MiB/s").start().await?;
    let (source, _) = cluster.import("web", 0, "ds1", &[FileSpec::full("disk.img", SIZE)]).await?;
    let created = cluster.operator.create(spec("web", &["h1", "h2"], 2)).await?;
    let begun = |now: &Deployment| now.targets.iter().all(|target| target.verified_bytes > SIZE / 10);
    let running = cluster.operator.watch(&created.id, DEPLOYED, begun).await?;
    ensure!(!ended(&running), "too fast to be disturbed: {}", summary(&running));
    cluster.controller.kill()?;
    let written = |host: &str| verify::together(&[cluster.agent_of(host)?.datastore("ds1")?], "disk.img");
    for host in ["h1", "h2"] {
        let before = written(host)?;
        wait::until_true("more blocks without a controller", DEPLOYED, async || {
            Ok(written(host)? >= (before + SIZE / 4).min(SIZE))
        })
        .await?;
    }
    cluster.start_controller().await?;
    let last = cluster.operator.watch(&created.id, DEPLOYED, |_| false).await?;
    ensure!(last.state() == State::Succeeded, "{}", summary(&last));
    for target in &last.targets {
        ensure!(target.reused_bytes == 0 && target.received_bytes <= SIZE + LOST, "{}", summary(&last));
    }
    for agent in cluster.agents() {
        let log = agent.daemon.log();
        ensure!(
            !log.contains("beginning again") && !log.contains("resumed"),
            "{}",
            agent.daemon.log_tail(40)
        );
    }
    ensure!(cluster.check_disks(&[(&last, &source)]).await? == 4);
    cluster.finish().await
}

/// Everything in a datastore's state but the images that lie there, which are in the catalogue.
fn strays(datastore: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut todo = vec![datastore.join(".vmcast")];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.strip_prefix(datastore)?.display().to_string();
            match name.as_str() {
                ".vmcast/images" | ".vmcast/contents" | ".vmcast/copies" => {}
                ".vmcast/deployments" => todo.push(path),
                _ => found.push(name),
            }
        }
    }
    Ok(found)
}

#[tokio::test]
async fn an_agent_that_is_killed_again_and_again_goes_on_and_leaves_nothing() -> Result<()> {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::builder(3).upload_limit(0, "4MiB/s").start().await?;
    let (source, _) = cluster.import("web", 0, "ds1", &[FileSpec::full("disk.img", SIZE)]).await?;
    let created = cluster.operator.create(spec("web", &["h1", "h2"], 3)).await?;
    // The last instants are those of copying and publishing.
    let mut instants: Vec<u64> = (0..4).map(|_| random.random_range(0..=SIZE)).chain([SIZE]).collect();
    instants.sort_unstable();
    for verified in instants {
        let far = |now: &Deployment| now.targets[0].verified_bytes >= verified;
        let now = cluster.operator.watch(&created.id, DEPLOYED, far).await?;
        if ended(&now) {
            break;
        }
        cluster.restart_agent(1).await?;
    }
    let last = cluster.operator.watch(&created.id, DEPLOYED, |_| false).await?;
    ensure!(last.state() == State::Succeeded, "{}", summary(&last));
    ensure!(last.targets[0].received_bytes <= SIZE + 5 * LOST, "{}", summary(&last));
    ensure!(last.targets[1].received_bytes <= SIZE + 5 * LOST, "{}", summary(&last));
    ensure!(cluster.check_disks(&[(&last, &source)]).await? == 6);
    for host in ["h1", "h2"] {
        let datastore = cluster.agent_of(host)?.datastore("ds1")?;
        // An agent that has just begun measures its disk.
        let clean =
            wait::until_true("nothing to be left", DEPLOYED, async || Ok(strays(datastore)?.is_empty()));
        clean.await.with_context(|| format!("{host}: {:?}", strays(datastore)))?;
    }
    cluster.finish().await
}

fn copy_state(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        fs::copy(&path, to.join(path.file_name().context("a file has a name")?))?;
    }
    Ok(())
}

/// Whoever puts back an old copy of the controller's state has a controller that knows nothing of what happened since: agents that
/// were there take nothing from it.
#[tokio::test]
async fn a_controller_from_an_old_copy_is_refused() -> Result<()> {
    let mut cluster = Cluster::builder(1).start().await?;
    let all = ["h0".to_owned()];
    let state = cluster.controller.launch().state_dir.clone();
    let (old, new) = (cluster.path().join("old"), cluster.path().join("new"));
    // Epoch 1.
    cluster.controller.kill()?;
    copy_state(&state, &old)?;
    // Epoch 2.
    cluster.start_controller().await?;
    cluster.wait_connected(&all).await?;
    cluster.controller.kill()?;
    copy_state(&state, &new)?;

    let refused = |cluster: &Cluster, why: &'static str| {
        let log = cluster.agents()[0].daemon.launch().log.clone();
        wait_for_line(log, why)
    };
    // Counts on from the copy to epoch 2, which another had before.
    copy_state(&old, &state)?;
    cluster.start_controller().await?;
    refused(&cluster, "epoch 2 and is not the one").await?;
    cluster.controller.kill()?;
    // Epoch 3: the real one again.
    copy_state(&new, &state)?;
    cluster.start_controller().await?;
    cluster.wait_connected(&all).await?;
    cluster.controller.kill()?;
    copy_state(&old, &state)?;
    cluster.start_controller().await?;
    refused(&cluster, "epoch 2, and this agent has seen epoch 3: it is stale").await?;
    // The operator wants the old one: agents that are restarted follow it.
    cluster.restart_agent(0).await?;
    cluster.wait_connected(&all).await?;
    cluster.import("web", 0, "ds1", &super::machine()).await?;
    cluster.finish().await
}

async fn wait_for_line(log: std::path::PathBuf, line: &str) -> Result<()> {
    wait::until_true(&format!("{line:?} in the log"), DEPLOYED, async || {
        Ok(String::from_utf8_lossy(&fs::read(&log)?).contains(line))
    })
    .await
}

/// Nobody reads a log that says the same all day: connecting again is tried ever more seldom, and hardly written about.
#[tokio::test]
async fn a_controller_that_is_away_costs_neither_log_nor_memory() -> Result<()> {
    const ATTEMPTS: usize = 12;
    const LINES: usize = 4;
    let mut cluster = Cluster::builder(2).upload_limit(0, "2MiB/s").start().await?;
    let (source, _) = cluster.import("web", 0, "ds1", &[FileSpec::full("disk.img", SIZE)]).await?;
    let created = cluster.operator.create(spec("web", &["h1"], 1)).await?;
    let begun = |now: &Deployment| now.targets[0].verified_bytes > 0;
    let running = cluster.operator.watch(&created.id, DEPLOYED, begun).await?;
    ensure!(!ended(&running), "too fast to be disturbed: {}", summary(&running));
    let address = cluster.address().to_owned();
    cluster.controller.kill()?;
    let lines = |cluster: &Cluster| -> Vec<usize> {
        cluster.agents().iter().map(|agent| agent.daemon.log().lines().count()).collect()
    };
    let before = lines(&cluster);
    // Somebody answers there, and is no controller: each attempt is seen.
    let listener = TcpListener::bind(&address).await?;
    let mut seen = Vec::new();
    let mut memory = Vec::new();
    for attempt in 0..ATTEMPTS {
        let connected = wait::answer("another attempt", Duration::from_secs(15), listener.accept()).await??;
        drop(connected);
        seen.push(Instant::now());
        if attempt == ATTEMPTS / 2 {
            memory = cluster.agents().iter().map(|agent| agent.daemon.rss()).collect::<Result<Vec<_>>>()?;
        }
    }
    // Two agents, each every 2.5 to 5 s by now.
    let last = seen[ATTEMPTS - 1] - seen[ATTEMPTS - 5];
    ensure!(last > Duration::from_secs(3), "four attempts within {last:?}");
    for ((agent, before), now) in cluster.agents().iter().zip(before).zip(lines(&cluster)) {
        ensure!(now - before <= LINES, "{} lines: {}", now - before, agent.daemon.log_tail(20));
    }
    for (agent, then) in cluster.agents().iter().zip(memory) {
        // A transfer runs meanwhile: what it has in hand comes and goes.
        let now = agent.daemon.rss()?;
        ensure!(now < then + (24 << 20), "{}: {then} bytes, then {now}", agent.name());
    }
    drop(listener);
    cluster.start_controller().await?;
    let last = cluster.operator.watch(&created.id, DEPLOYED, |_| false).await?;
    ensure!(last.state() == State::Succeeded, "{}", summary(&last));
    ensure!(cluster.check_disks(&[(&last, &source)]).await? == 1);
    cluster.finish().await
}
