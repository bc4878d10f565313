//! Why a datastore could not do what it was asked.

use std::io;

use rustix::io::Errno;
use vmcast_proto::v1::failure::Kind;

/// Why something failed. Every message names the datastore and the file, and says what to do where that is not plain.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file, copy or image is not there.
    #[error("datastore {datastore}: {path} does not exist")]
    NotFound {
        /// The datastore.
        datastore: String,
        /// What was looked for, relative to it.
        path: String,
    },
    /// The name is taken by something that this deployment did not make.
    #[error("datastore {datastore}: {name} exists already; choose another name or remove it first")]
    Exists {
        /// The datastore.
        datastore: String,
        /// The name, relative to it.
        name: String,
    },
    /// A path, name or number that cannot be used.
    #[error("datastore {datastore}: {what}")]
    Invalid {
        /// The datastore.
        datastore: String,
        /// What is wrong and what would be right.
        what: String,
    },
    /// The file system has no room.
    #[error(
        "datastore {datastore} has no room: {needed} bytes are needed, {available} are available; free space there or choose another datastore"
    )]
    NoSpace {
        /// The datastore.
        datastore: String,
        /// Bytes still to be written.
        needed: u64,
        /// Bytes free, less what running deployments have reserved.
        available: u64,
    },
    /// A source file is not as it was when it was imported.
    #[error(
        "datastore {datastore}: {file} changed after it was imported; import the image again and leave its files alone"
    )]
    SourceChanged {
        /// The datastore.
        datastore: String,
        /// The file, relative to it.
        file: String,
    },
    /// A virtual machine writes to the file.
    #[error(
        "datastore {datastore}: {file} is the disk of a virtual machine that runs: shut it down, and try again"
    )]
    InUse {
        /// The datastore.
        datastore: String,
        /// The file, relative to it.
        file: String,
    },
    /// What lies in a file is not what was verified when it was written or imported, though nobody seems to have written to it.
    #[error(
        "datastore {datastore}: {file} is damaged: block {block} is not what was verified; check the disk, and import the image again from a good copy"
    )]
    Damaged {
        /// The datastore.
        datastore: String,
        /// The file, relative to it.
        file: String,
        /// The block.
        block: u32,
    },
    /// Reading or writing failed.
    #[error("datastore {datastore}: {file}: {source}; check the disk and its mount")]
    Disk {
        /// The datastore.
        datastore: String,
        /// The file, relative to it.
        file: String,
        /// The system's word for it.
        #[source]
        source: io::Error,
    },
    /// The caller asked to stop.
    #[error("datastore {datastore}: cancelled")]
    Cancelled {
        /// The datastore.
        datastore: String,
    },
}

impl StoreError {
    /// The kind under which it is reported to the controller.
    pub fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } => Kind::NotFound,
            Self::Exists { .. } => Kind::Exists,
            Self::Invalid { .. } => Kind::Invalid,
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::SourceChanged { .. } | Self::InUse { .. } => Kind::SourceChanged,
            Self::Damaged { .. } => Kind::Damaged,
            Self::Disk { .. } => Kind::Disk,
            Self::Cancelled { .. } => Kind::Internal,
        }
    }
}

/// The error says that the file system, or this user's quota in it, is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOSPC | Errno::DQUOT))
}

/// The error says that this file system, or this pair of them, has no such operation.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    // PERM: the system call filters of container runtimes answer so.
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::XDEV | Errno::PERM | Errno::NOTTY)
    )
}
