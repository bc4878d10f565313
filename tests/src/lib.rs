//! Tests of whole vmcast: real processes that speak TLS to each other.
//!
//! [`Cluster`] is a controller and its agents, on loopback or in the network namespaces of a [`netlab::Lab`]; all of
//! it is gone when the value is dropped. Nothing here sleeps for an outcome: [`wait::until`] polls a condition up to
//! a deadline, and every wait has one.

pub mod binaries;
pub mod client;
pub mod cluster;
pub mod disk;
pub mod fake;
pub mod image;
pub mod libvirt;
pub mod lock;
pub mod netlab;
pub mod pki;
pub mod process;
pub mod smoke;
pub mod store;
pub mod tmpfs;
pub mod verify;
pub mod wait;

pub use cluster::{Builder, Cluster, DatastoreConfig, HostConfig};
pub use image::{FileSpec, SourceImage};
