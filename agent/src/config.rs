//! The agent's configuration. `common::config` adds `--config`, and a variable and a file key for every flag.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr};

use clap::{Parser, ValueEnum};
use vmcast_common::{
    name::{DatastoreName, HostName},
    net::CongestionControl,
    telemetry::LogFormat,
    units::Limit,
};

/// The vmcast agent: receives, verifies, serves and publishes images on this host.
#[derive(Debug, Parser)]
#[command(name = "vmcast-agent", version, max_term_width = 100)]
pub struct Args {
    /// Name of this host; must be the name in its certificate.
    #[arg(long, value_name = "HOST")]
    pub name: HostName,
    /// Where the controller listens.
    #[arg(long, value_name = "https://ADDR:PORT")]
    pub controller: String,
    /// Where to listen for other agents; port 0 takes any free one.
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7444")]
    pub listen: SocketAddr,
    /// Where other agents reach this one, if not where it listens.
    #[arg(long, value_name = "ADDR:PORT")]
    pub advertise: Option<String>,
    /// A datastore; repeat for more. `shared=ID`: other hosts have the same storage under the same ID.
    #[arg(
        long,
        env = "VMCAST_DATASTORE",
        value_name = "NAME=DIR[,shared=ID]",
        required = true,
        value_delimiter = ';'
    )]
    pub datastore: Vec<DatastoreArg>,
    /// Directory for the agent's own state.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmcast-agent")]
    pub state_dir: PathBuf,
    /// Directory with ca.pem, cert.pem and key.pem.
    #[arg(long, value_name = "DIR", default_value = "/etc/vmcast/tls")]
    pub tls_dir: PathBuf,
    /// Most that is sent to other agents, such as 800mbit or 100MiB/s.
    #[arg(long, value_name = "RATE", default_value = "unlimited")]
    pub upload_limit: Limit,
    /// Most that is fetched from other agents.
    #[arg(long, value_name = "RATE", default_value = "unlimited")]
    pub download_limit: Limit,
    /// Congestion control of connections between agents, by its name in the kernel, or `system`. BBR slows chains down.
    #[arg(long, value_name = "NAME", default_value = "cubic")]
    pub congestion_control: CongestionControl,
    /// Whether blocks are compressed where that is faster: `auto` or `off`.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Compression::Auto)]
    pub compression: Compression,
    /// Take part in deployments with `--data-encryption off`: their blocks are neither secret nor protected on the way,
    /// though each is verified. Only where the network itself is protected.
    #[arg(long)]
    pub allow_clear_data: bool,
    /// What makes VMs of copies: `none`, `libvirt`, or `exec`, which runs --hypervisor-hook.
    #[arg(long, value_enum, value_name = "DRIVER", default_value_t = HypervisorKind::None, requires_if("exec", "hypervisor_hook"))]
    pub hypervisor: HypervisorKind,
    /// Where libvirt is.
    #[arg(long, value_name = "URI", default_value = "qemu:///system")]
    pub libvirt_uri: String,
    /// Program that is run for each step of a VM; see deploy/hooks/README.md.
    #[arg(long, value_name = "PROGRAM")]
    pub hypervisor_hook: Option<PathBuf>,
    /// How long the hook may take for one step, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub hypervisor_hook_seconds: u32,
    /// VMs that may be starting at once.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub starts_at_once: u32,
    /// A label, such as zone=NAME; repeat for more.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<Label>,
    /// How log lines are written.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// `--hypervisor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HypervisorKind {
    /// Copies stay copies.
    None,
    /// libvirt.
    Libvirt,
    /// A program of the operator's.
    Exec,
}

/// `--compression`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// What is sent over a link is compressed while it gains time there.
    Auto,
    /// Nothing is compressed.
    Off,
}

/// `NAME=DIR[,shared=ID]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatastoreArg {
    /// Its name.
    pub name: DatastoreName,
    /// Its directory.
    pub dir: PathBuf,
    /// Set when other hosts have the same storage.
    pub shared: Option<DatastoreName>,
}

impl FromStr for DatastoreArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("write NAME=DIR or NAME=DIR,shared=ID")?;
        let (dir, shared) = match rest.split_once(",shared=") {
            Some((dir, id)) => (dir, Some(DatastoreName::new(id).map_err(|e| e.to_string())?)),
            None => (rest, None),
        };
        if !dir.starts_with('/') {
            return Err(format!("the directory {dir:?} is not an absolute path"));
        }
        let name = DatastoreName::new(name).map_err(|e| e.to_string())?;
        Ok(Self { name, dir: dir.into(), shared })
    }
}

/// `KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label(pub String, pub String);

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && text.len() <= 256 => Ok(Self(key.into(), value.into())),
            _ => Err("write KEY=VALUE, at most 256 characters".into()),
        }
    }
}

impl Args {
    /// The labels by key; the last of equal keys counts.
    pub fn labels(&self) -> BTreeMap<String, String> {
        self.label.iter().map(|Label(key, value)| (key.clone(), value.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datastores_are_written_as_the_manual_says() {
        let plain: DatastoreArg = "fast=/srv/fast".parse().unwrap();
        assert_eq!((plain.name.as_str(), plain.dir, plain.shared), ("fast", "/srv/fast".into(), None));
        let shared: DatastoreArg = "nas=/mnt/a,b,shared=nas-1".parse().unwrap();
        assert_eq!((shared.dir, shared.shared.unwrap().as_str()), ("/mnt/a,b".into(), "nas-1"));
        for bad in ["", "x", "x=relative", "../x=/a", "x=/a,shared=", "x=/a,shared=a/b"] {
            assert!(bad.parse::<DatastoreArg>().is_err(), "{bad}");
        }
    }
}
