//! Which VMs' disks are held still as images: on disk, since a VM must not be left on a snapshot, whatever becomes of the agent.

use std::{collections::BTreeMap, io};

use serde::{Deserialize, Serialize};
use vmcast_common::manifest::ImageId;

use super::{error::StoreError, folder, store::Datastore};
use crate::hypervisor::Frozen;

const FROZEN: &str = "frozen";
/// Longest record, in bytes.
const MAX_RECORD: u64 = 1024 * 1024;

/// What is remembered of a VM whose disks are held still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenRecord {
    /// The VM, and where it writes meanwhile.
    pub vm: Frozen,
    /// The image that they are; none: it has not come to that.
    pub image: Option<ImageId>,
    /// A deployment has used the image.
    pub used: bool,
}

/// Remembers it under `id`: before the snapshot is taken, and when something changes.
pub fn remember_frozen(store: &Datastore, id: &str, record: &FrozenRecord) -> Result<(), StoreError> {
    let fail = |e| store.fail(&store.state_path(&format!("{FROZEN}/{id}")), e);
    let bytes = serde_json::to_vec(record).map_err(|e| fail(e.into()))?;
    folder::write_atomic(&store.state_folder(FROZEN)?, id, &bytes).map_err(fail)
}

/// Forgets it, once the VM is on its own disks again.
pub fn forget_frozen(store: &Datastore, id: &str) -> Result<(), StoreError> {
    folder::remove_file(&store.state_folder(FROZEN)?, id)
        .map_err(|e| store.fail(&store.state_path(&format!("{FROZEN}/{id}")), e))
}

/// All that are remembered, by id.
pub fn frozen(store: &Datastore) -> Result<BTreeMap<String, FrozenRecord>, StoreError> {
    let fail = |e| store.fail(&store.state_path(FROZEN), e);
    let folder = match folder::open_folder(store.state(), FROZEN) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        other => other.map_err(fail)?,
    };
    let mut all = BTreeMap::new();
    for id in folder::names(&folder).map_err(fail)? {
        // What was being replaced in a crash.
        if id.starts_with('.') {
            continue;
        }
        let bytes = folder::read_small(&folder, &id, MAX_RECORD).map_err(fail)?;
        match serde_json::from_slice(&bytes) {
            Ok(record) => drop(all.insert(id, record)),
            Err(error) => {
                tracing::error!("{} is damaged: {error}", store.state_path(&format!("{FROZEN}/{id}")));
            }
        }
    }
    Ok(all)
}
