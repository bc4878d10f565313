//! The command line.

mod deploy;
mod help;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use vmcast_common::{
    identity::Role,
    name::{DatastoreName, HostName, ImageName},
    units::{ByteSize, Limit, Rate},
};

pub(crate) use self::deploy::{DeployArgs, SpecArgs};

/// Deploys VM images to many hypervisor hosts.
///
/// One image goes from a host that holds it to all the others: every host passes on what it has verified, along
/// routes that follow measured links. This tool asks the controller; nothing is changed but by the commands that say
/// so.
#[derive(Debug, Parser)]
#[command(name = "vmcast", version, max_term_width = 110, after_help = help::SHORT, after_long_help = help::LONG)]
pub(crate) struct Cli {
    /// Where the controller listens
    #[arg(long, global = true, value_name = "URL", default_value = "https://127.0.0.1:7443")]
    pub(crate) controller: String,

    /// Directory with ca.pem, cert.pem and key.pem of an operator or viewer
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,

    /// Print JSON instead of tables; errors become JSON on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the hosts that have an agent
    Hosts,
    /// Take a host out of new deployments; in those that run it feeds nobody while others can
    Cordon {
        /// Host, as `vmcast hosts` names it
        host: HostName,
    },
    /// Put a cordoned host back
    Uncordon {
        /// Host, as `vmcast hosts` names it
        host: HostName,
    },
    /// Import or remove an image
    #[command(subcommand)]
    Image(ImageCommand),
    /// List the images
    Images,
    /// Show what one copy costs over every link
    #[command(after_long_help = help::MATRIX)]
    Matrix(MatrixArgs),
    /// Overrule or release the measured rate of a link
    #[command(subcommand)]
    Link(LinkCommand),
    /// Show what `deploy` would do, and change nothing
    #[command(after_long_help = help::PLAN)]
    Plan(SpecArgs),
    /// Deploy an image to hosts
    #[command(after_long_help = help::DEPLOY)]
    Deploy(DeployArgs),
    /// List the deployments, newest first
    Deployments,
    /// Show, watch, cancel or undo a deployment
    #[command(subcommand)]
    Deployment(DeploymentCommand),
    /// Show what happened, and what the engine did about it
    Events(EventsArgs),
    /// Make a certificate authority, and certificates
    #[command(subcommand, after_long_help = help::PKI)]
    Pki(PkiCommand),
    /// Print completions for a shell
    #[command(after_long_help = help::COMPLETIONS)]
    Completions { shell: clap_complete::Shell },
    /// Write manual pages into a directory
    Man {
        /// Made if it is missing
        dir: PathBuf,
    },
    /// See it work: a controller and agents on this machine, a real image, a deployment, and its proof
    #[command(after_long_help = help::DEMO)]
    Demo(DemoArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make files on a host, or a VM there, an image
    ///
    /// The files stay where they are and must not change as long as the image is used. The host reads and hashes
    /// them once.
    #[command(after_long_help = help::IMPORT)]
    Import {
        /// Name for the image: letters, digits, '.', '_', '-'
        name: ImageName,
        /// Host on which the files lie
        #[arg(long)]
        host: HostName,
        /// Datastore in which they lie
        #[arg(long, value_name = "DS", required_unless_present = "domain")]
        datastore: Option<DatastoreName>,
        /// A VM that the host's hypervisor knows, instead of files; it must be shut off
        #[arg(long, conflicts_with_all = ["datastore", "files"])]
        domain: Option<String>,
        /// Paths inside the datastore, relative to it or absolute
        #[arg(required_unless_present = "domain", value_name = "FILE")]
        files: Vec<String>,
    },
    /// Forget an image; kept copies of it are deleted, imported files are not touched
    Rm {
        /// Image, as `vmcast images` names it
        name: ImageName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct MatrixArgs {
    /// Image whose size the times are for
    #[arg(long, value_name = "NAME", conflicts_with = "size")]
    pub(crate) image: Option<ImageName>,
    /// Size the times are for, such as 20GiB; 1 GiB unless told
    #[arg(long, value_name = "BYTES")]
    pub(crate) size: Option<ByteSize>,
    /// Host the image would come from, to see the preferred links; by default those that hold it
    #[arg(long, value_name = "HOST")]
    pub(crate) from: Option<HostName>,
    /// First measure all links again with real bytes
    #[arg(long)]
    pub(crate) measure: bool,
    /// Hosts to measure; all connected ones unless told
    #[arg(long, value_name = "H1,H2,...", value_delimiter = ',', requires = "measure")]
    pub(crate) hosts: Vec<HostName>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LinkCommand {
    /// Fix the rate of a link, whatever is measured
    Set {
        /// Sending host
        from: HostName,
        /// Receiving host
        to: HostName,
        /// Such as 100mbit or 12.5MB/s
        rate: Rate,
    },
    /// Go by measurements again
    Clear {
        /// Sending host
        from: HostName,
        /// Receiving host
        to: HostName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeploymentCommand {
    /// Show a deployment with its targets and plan
    Show {
        /// As `vmcast deployments` lists it
        id: String,
    },
    /// Follow a deployment to its end
    ///
    /// Ends as `deploy --wait` does, with the same exit status. With --json one object is printed per change, and the
    /// last has the end state.
    Watch {
        /// As `vmcast deployments` lists it
        id: String,
    },
    /// End a deployment: partial copies are removed, finished ones stay
    Cancel {
        /// As `vmcast deployments` lists it
        id: String,
    },
    /// Undo an ended deployment: its VMs are stopped and undefined, its copies deleted
    ///
    /// Nothing that it did not make is touched. Asks first, unless told --yes.
    Rm {
        /// As `vmcast deployments` lists it
        id: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on as things happen
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only events of this deployment
    #[arg(long, value_name = "ID")]
    pub(crate) deployment: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a certificate authority
    Init {
        /// Its directory: keep it on one machine, ca-key.pem in it is the key to everything
        #[arg(long)]
        dir: PathBuf,
    },
    /// Issue a certificate, or renew one
    #[command(after_long_help = help::PKI)]
    Issue {
        /// Directory of the authority
        #[arg(long)]
        dir: PathBuf,
        /// What its holder may do
        #[arg(long, value_enum)]
        role: Role,
        /// Name of its holder; an agent's is its host's
        #[arg(long)]
        name: String,
        /// Address or DNS name under which other gRPC clients reach it; may be repeated
        #[arg(long, value_name = "ADDR")]
        san: Vec<String>,
        /// How long it is valid, such as 90days
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        valid: Option<std::time::Duration>,
        /// Directory for ca.pem, cert.pem and key.pem: the holder's --tls-dir
        #[arg(long)]
        out: PathBuf,
    },
}

/// Fewer than two hosts deploy nothing, and one machine has no room for many.
const DEMO_HOSTS: std::ops::RangeInclusive<i64> = 2..=20;

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Disk image to deploy instead of one made for the purpose
    #[arg(long, value_name = "FILE", conflicts_with = "size")]
    pub(crate) image: Option<PathBuf>,
    /// Size of the disk that is made; three eighths of it are data
    #[arg(long, value_name = "BYTES", default_value = "256MiB")]
    pub(crate) size: ByteSize,
    /// Hosts, the one with the image included
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(DEMO_HOSTS))]
    pub(crate) hosts: u32,
    /// What each host may send, so that the plan has something to plan; or "unlimited"
    #[arg(long, value_name = "RATE", default_value = "400mbit")]
    pub(crate) uplink: Limit,
    /// Keep the files; on a terminal, also keep everything running until Ctrl-C
    #[arg(long)]
    pub(crate) keep: bool,
    /// Where to put the demonstration's directory; needs room for all copies
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        let args = std::iter::once("vmcast").chain(line.split_whitespace());
        vmcast_common::config::try_parse_from(args, |_| None)
    }

    #[test]
    fn the_declaration_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_may_stand_anywhere() {
        let cli = parse("hosts --json --controller https://c:1 --tls-dir /t").unwrap();
        assert!(cli.json);
        assert_eq!(cli.controller, "https://c:1");
        assert_eq!(cli.tls_dir.unwrap(), PathBuf::from("/t"));
        assert!(!parse("hosts").unwrap().json);
    }

    #[test]
    fn bad_usage_is_found_here_and_has_status_2() {
        for line in [
            "",
            "nothing",
            "hosts extra",
            "cordon ../x",
            "image import web --host h1 --datastore ds1",
            "image import .web --host h1 --datastore ds1 f",
            "matrix --image a --size 1G",
            "matrix --size lots",
            "matrix --hosts h1",
            "link set a b 0mbit",
            "link set a b fast",
            "deployment show",
            "pki issue --dir d --role root --name x --out o",
            "pki issue --dir d --role agent --name x --out o --valid soon",
            "demo --hosts 1",
            "demo --hosts 1000",
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line:?}: {error}");
        }
    }

    #[test]
    fn every_command_says_what_it_is_for() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for sub in command.get_subcommands() {
                check(sub);
            }
        }
        check(&Cli::command());
    }
}
