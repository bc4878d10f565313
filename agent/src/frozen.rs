//! Images that are the disks of a running VM, held still by a snapshot: the VM goes back to its disks when nobody needs them any more.
//!
//! That is: once the deployments that used the image have ended; if none began, [`HOLD`] after the import; if the controller is away
//! for [`ALONE`], whatever goes on. Then the image is no image of this host any more. What is on a snapshot is remembered on disk
//! (`DATASTORE/.vmcast/frozen`): an agent that was killed goes on with it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use vmcast_common::{manifest::ImageId, name::DatastoreName};

use crate::{
    datastore::{self, Datastore, FrozenRecord},
    deployments::{Context, Deployments},
    failure::Failure,
    hypervisor::Frozen,
    images,
};

/// How often it is looked whether a VM can go back.
const LOOK: Duration = Duration::from_secs(1);
/// An image that no deployment has used is kept for so long.
const HOLD: Duration = Duration::from_secs(600);
/// One that was used, and is not any more: another deployment may be about to begin.
const AFTER_USE: Duration = Duration::from_secs(3);
/// Without a controller a VM stays on its snapshot for so long.
const ALONE: Duration = Duration::from_secs(900);
/// Pause before it is tried again to put a VM back.
const AGAIN: Duration = Duration::from_secs(10);

/// The VMs of this host that are on a snapshot.
#[derive(Debug, Default)]
pub struct FrozenVms {
    /// An import is at work on these: nobody else touches them.
    importing: parking_lot::Mutex<std::collections::BTreeSet<String>>,
    /// There is a session with the controller.
    pub attached: AtomicBool,
    /// Wakes the session: this host holds other images than before.
    pub images_changed: Notify,
}

/// A VM whose disks are being made an image. Dropped without [`keep`](Self::keep), it goes back to them soon.
#[derive(Debug)]
pub struct Freezing<'a> {
    context: &'a Context,
    store: Arc<Datastore>,
    id: String,
    record: FrozenRecord,
}

impl FrozenVms {
    /// Holds a VM's disks still. `Failure` if that cannot be: then nothing has changed.
    pub async fn freeze<'a>(
        context: &'a Context,
        store: &Arc<Datastore>,
        vm: Frozen,
    ) -> Result<Freezing<'a>, Failure> {
        let hypervisor = context.hypervisor.as_ref().ok_or_else(|| {
            Failure::new(vmcast_proto::v1::failure::Kind::Hypervisor, "this host has no hypervisor")
        })?;
        let id = uuid::Uuid::new_v4().to_string();
        let record = FrozenRecord { vm: vm.clone(), image: None, used: false };
        context.frozen.importing.lock().insert(id.clone());
        let freezing = Freezing { context, store: store.clone(), id: id.clone(), record: record.clone() };
        {
            let (store, id) = (store.clone(), id.clone());
            // First of all: whatever happens from here on, the VM is put back.
            spawn_blocking(move || datastore::remember_frozen(&store, &id, &record)).await??;
        }
        hypervisor.driver().freeze(&vm).await?;
        Ok(freezing)
    }
}

impl Freezing<'_> {
    /// Its disks are this image from now on.
    pub async fn keep(mut self, image: ImageId) -> Result<(), Failure> {
        self.record.image = Some(image);
        let (store, id, record) = (self.store.clone(), self.id.clone(), self.record.clone());
        spawn_blocking(move || datastore::remember_frozen(&store, &id, &record)).await??;
        Ok(())
    }
}

impl Drop for Freezing<'_> {
    fn drop(&mut self) {
        self.context.frozen.importing.lock().remove(&self.id);
    }
}

/// What is known of a VM on a snapshot besides its record.
#[derive(Debug)]
struct Watched {
    record: FrozenRecord,
    /// Since when no deployment uses the image.
    idle_since: Instant,
    /// When it was last tried to put it back.
    tried: Option<Instant>,
}

/// Puts VMs back on their disks when it is time, until `stop`.
pub async fn watch(context: Arc<Context>, deployments: Arc<Deployments>, stop: CancellationToken) {
    let mut watched: BTreeMap<(DatastoreName, String), Watched> = BTreeMap::new();
    let mut tick = interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut alone_since = Some(Instant::now());
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        let now = Instant::now();
        if context.frozen.attached.load(Ordering::Relaxed) {
            alone_since = None;
        } else {
            alone_since.get_or_insert(now);
        }
        for store in context.datastores.values() {
            let of_store = store.clone();
            let Ok(Ok(records)) = spawn_blocking(move || datastore::frozen(&of_store)).await else {
                continue;
            };
            watched.retain(|(name, id), _| name != store.name() || records.contains_key(id));
            for (id, record) in records {
                let key = (store.name().clone(), id);
                match watched.get_mut(&key) {
                    Some(known) => known.record = record,
                    None => drop(watched.insert(key, Watched { record, idle_since: now, tried: None })),
                }
            }
        }
        for ((store, id), watched) in &mut watched {
            if context.frozen.importing.lock().contains(id) {
                continue;
            }
            let Some(store) = context.datastores.get(store) else { continue };
            let using = watched.record.image.is_some_and(|image| deployments.uses(image));
            if using {
                watched.idle_since = now;
                if !watched.record.used {
                    watched.record.used = true;
                    let (store, id, record) = (store.clone(), id.clone(), watched.record.clone());
                    let _ = spawn_blocking(move || datastore::remember_frozen(&store, &id, &record)).await;
                }
            }
            let idle = now.duration_since(watched.idle_since);
            let over = match (watched.record.image, alone_since) {
                // The import failed, or was cut short.
                (None, _) => true,
                (_, Some(since)) => now.duration_since(since) > ALONE,
                (Some(_), None) => idle > if watched.record.used { AFTER_USE } else { HOLD },
            };
            if over && watched.tried.is_none_or(|tried| now.duration_since(tried) > AGAIN) {
                watched.tried = Some(now);
                if let Err(failure) = thaw(&context, &deployments, store, id, &watched.record).await {
                    tracing::error!(
                        "VM {} is still on a snapshot: {}",
                        watched.record.vm.domain,
                        failure.message
                    );
                }
            }
        }
    }
}

/// Puts a VM back on its disks: they are no image any more.
async fn thaw(
    context: &Arc<Context>,
    deployments: &Arc<Deployments>,
    store: &Arc<Datastore>,
    id: &str,
    record: &FrozenRecord,
) -> Result<(), Failure> {
    let host = &context.host;
    let hypervisor = context.hypervisor.as_ref().ok_or_else(|| {
        let message =
            format!("host {host} runs without --hypervisor: start its agent with --hypervisor libvirt");
        Failure::new(vmcast_proto::v1::failure::Kind::Hypervisor, message)
    })?;
    if let Some(image) = record.image {
        // Nobody reads what is about to change.
        deployments.end_uses(image).await;
        let context = context.clone();
        spawn_blocking(move || images::remove(&context, image)).await??;
        deployments.images_changed();
    }
    hypervisor.driver().thaw(&record.vm).await?;
    let (store, id) = (store.clone(), id.to_owned());
    spawn_blocking(move || datastore::forget_frozen(&store, &id)).await??;
    Ok(())
}
