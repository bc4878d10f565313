//! Keeps an image's files from being a running VM's disks meanwhile.
//!
//! QEMU locks the disks that it opens: a byte for each thing that it does, and one for each thing that nobody else may do
//! meanwhile (`block/file-posix.c`, `raw_apply_lock_bytes`). We take part in that: who serves an image does not let others write to
//! it, so a VM does not start on it, and says why; and an image is not made of a disk that is in use. The locks are of the open
//! file, and go with it, also when the agent is killed.

use std::{
    fs::File,
    os::fd::{AsFd as _, AsRawFd as _},
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};

use super::{error::StoreError, store::Datastore};

/// First of the bytes that are locked by who does something.
const DOES: i64 = 100;
/// First of the bytes that are locked by who lets nobody else do it.
const FORBIDS: i64 = 200;
/// Things that are done to an image, as numbers of bytes: writing, and changing its size.
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Nobody writes to the file as long as it is open. `InUse` if somebody does now.
///
/// Where the file system knows no such locks, none is taken: a change is noticed all the same, only later.
pub(super) fn forbid_writing(store: &Datastore, path: &str, file: &File) -> Result<(), StoreError> {
    for thing in [WRITE, RESIZE] {
        let lock = lock(libc::F_RDLCK, FORBIDS + thing);
        if let Err(error) = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
            tracing::debug!(%error, path, "no lock is taken");
            return Ok(());
        }
    }
    for thing in [WRITE, RESIZE] {
        let mut held = lock(libc::F_WRLCK, DOES + thing);
        let asked = fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut held));
        if asked.is_ok() && i32::from(held.l_type) != libc::F_UNLCK {
            tracing::debug!(fd = file.as_raw_fd(), path, "a virtual machine writes to it");
            return Err(StoreError::InUse { datastore: store.name().to_string(), file: path.to_owned() });
        }
    }
    Ok(())
}

fn lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use vmcast_common::name::DatastoreName;

    use super::*;

    /// A process that another test is about to start has our locks too, until it runs its program.
    fn soon(condition: impl Fn() -> bool) -> bool {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::time::Instant::now() < deadline {
            if condition() {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    fn qemu_io(disk: &std::path::Path, commands: &[&str]) -> Option<std::process::Output> {
        let mut command = Command::new("qemu-io");
        for one in commands {
            command.args(["-c", one]);
        }
        command.args(["-f", "raw"]).arg(disk).output().ok()
    }

    #[test]
    fn qemu_does_not_write_to_what_is_served_and_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Datastore::open(DatastoreName::new("ds1").unwrap(), dir.path(), None).unwrap();
        let disk = dir.path().join("disk.img");
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let Some(output) = qemu_io(&disk, &["write 0 4k"]) else {
            eprintln!("skipped: there is no qemu-io (Debian: qemu-utils)");
            return;
        };
        assert!(output.status.success(), "{output:?}");
        let file = File::open(&disk).unwrap();
        forbid_writing(&store, "disk.img", &file).unwrap();
        let second = File::open(&disk).unwrap();
        forbid_writing(&store, "disk.img", &second).unwrap();
        let refused = qemu_io(&disk, &["write 0 4k"]).unwrap();
        assert!(!refused.status.success());
        assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"), "{refused:?}");
        drop((file, second));
        assert!(soon(|| qemu_io(&disk, &["write 0 4k"]).unwrap().status.success()));
    }

    #[test]
    fn what_a_vm_writes_to_is_no_image() {
        let dir = tempfile::tempdir().unwrap();
        let store = Datastore::open(DatastoreName::new("ds1").unwrap(), dir.path(), None).unwrap();
        let disk = dir.path().join("disk.img");
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        // As QEMU does when it opens a disk for writing.
        let vm = File::options().read(true).write(true).open(&disk).unwrap();
        fcntl(vm.as_fd(), FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, DOES + WRITE))).unwrap();
        let file = File::open(&disk).unwrap();
        let error = forbid_writing(&store, "disk.img", &file).unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
        drop(vm);
        assert!(soon(|| forbid_writing(&store, "disk.img", &file).is_ok()));
    }
}
