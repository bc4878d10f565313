//! The longer parts of the help: examples first, since that is what people look for. Lines of at most 99 characters,
//! which even a terminal of 100 does not break.

pub(super) const SHORT: &str = "`vmcast --help` has examples, and what settings and exit status mean.";

pub(super) const LONG: &str = "\
Examples:
  vmcast demo                                       see it work on this machine
  vmcast image import web-1 --host h1 --datastore ds1 web.qcow2 web.xml
  vmcast matrix --image web-1                       what a copy costs over every link
  vmcast plan web-1 --to h2,h3,h4                   what would be done
  vmcast deploy web-1 --to h2,h3,h4 --copies 3 --wait
  vmcast events --follow
  `vmcast COMMAND --help` has more.

Settings:
  The flags of `vmcast` itself can also be set by environment variables (VMCAST_CONTROLLER,
  VMCAST_TLS_DIR, VMCAST_JSON) and by keys of the same names in a TOML file given with --config
  or VMCAST_CONFIG. Flags count before variables, and variables before the file.

Exit status:
  0    done; for `deploy --wait` and `deployment watch`: SUCCEEDED
  1    failed, refused, cancelled, or the controller cannot be reached
  2    the command line is wrong
  3    PARTIAL: some targets have their copies and some have not
  130  interrupted; a deployment goes on without its watcher

Output:
  Results go to stdout; progress and errors to stderr. With --json every command that reads
  prints JSON, with sizes in bytes, times in seconds and dates in RFC 3339; fields are only ever
  added. An error is then one object on stderr: {\"error\": {\"code\", \"reason\", \"message\",
  \"fields\", \"metadata\", \"retry_after_seconds\"}}.";

pub(super) const MATRIX: &str = "\
Examples:
  vmcast matrix                                     for an image of 1 GiB
  vmcast matrix --image web-1                       for an image, with the links it would take
  vmcast matrix --size 20GiB --from h1
  vmcast matrix --measure                           send real bytes over every link first
  vmcast --json matrix --image web-1 | jq '.rows[] | select(.preferred)'

Columns:
  DEPLOYMENT TIME  one copy over this link alone
  BANDWIDTH, RTT   of the network alone
  MEASURED         how long ago
  SOURCE           PROBE, TRANSFER, OPERATOR or ESTIMATE
  PREFERRED        it is on a shortest path to a host without the image
  AFTER            the host that must hold a copy before this link is used";

pub(super) const PLAN: &str = "\
Examples:
  vmcast plan web-1 --to h2,h3,h4 --copies 3
  vmcast plan web-1 --to h2,h3,h4 --strategy staged

The lower bound is what no scheme can beat on these links.";

pub(super) const DEPLOY: &str = "\
Examples:
  vmcast deploy web-1 --to h2,h3,h4                 one copy each; prints the deployment's id
  vmcast deploy web-1 --to h2,h3,h4 --copies 3 --wait
                                                    three each, with progress, to the end
  vmcast deploy web-1 --to h2=5,h3=1 --wait         a number for each
  vmcast deploy web-1 --to h2:ds1=2+ds2=1,h3        and in which datastores
  vmcast deploy web-1 --to h2,h3 --copies auto      as many as disk, memory and CPU allow
  vmcast deploy web-1 --to h2,h3 --name-template '{host}-web-{n}'
  vmcast --json deploy web-1 --to h2,h3 --wait      one JSON object at the end

Targets:
  HOST                   as many copies as --copies says, where --datastores says
  HOST=N                 N copies
  HOST:DS[=N][+DS[=N]]   in these datastores; N copies in each that has a number

JSON of --wait:
  id, state (SUCCEEDED, PARTIAL, FAILED, CANCELLED), makespan_seconds, image_bytes,
  bytes_over_network, bytes_reused, targets[] (host, state, copies: how many are published, reason)

Ctrl-C while waiting leaves the deployment running; `vmcast deployment watch ID` goes on watching
it.";

pub(super) const IMPORT: &str = "\
Example:
  vmcast image import web-1 --host h1 --datastore ds1 web/disk.qcow2 web/vm.xml
  vmcast image import web-1 --host h1 --domain web    a libvirt domain that is shut off: its disks,
                                                      firmware variables and definition

The last component of each path becomes the file's name in the image.";

pub(super) const PKI: &str = "\
Examples:
  vmcast pki init --dir pki
  vmcast pki issue --dir pki --role controller --name c1 --san controller.example --out tls/c1
  vmcast pki issue --dir pki --role agent --name h1 --san 10.0.0.11 --out tls/h1
  vmcast pki issue --dir pki --role operator --name alice --out ~/vmcast-tls
  vmcast pki issue --dir pki --role viewer --name dashboard --out tls/dashboard

Issuing again with the same --out renews: running programs take the new certificate without a
restart.";

pub(super) const COMPLETIONS: &str = "\
Examples:
  vmcast completions bash > /etc/bash_completion.d/vmcast
  vmcast completions zsh  > ~/.zfunc/_vmcast
  vmcast completions fish > ~/.config/fish/completions/vmcast.fish";

pub(super) const DEMO: &str = "\
Starts vmcast-controller and five times vmcast-agent from the directory of this program, on
loopback, with certificates of their own. Imports a qcow2 disk with its hardware description on the
first host, measures the links, deploys three copies to each of the other hosts, and compares every
copy with the source. Then deploys a second image, kills one of the hosts on the way, and shows
that the others get theirs. Everything is removed at the end, also on Ctrl-C.

Takes less than a minute. Exit status 0 only if every copy was found identical to its source.

Examples:
  vmcast demo
  vmcast demo --hosts 9 --size 1GiB --dir /var/tmp
  vmcast demo --image disk.qcow2
  vmcast demo --keep              leave it running, to look around with vmcast and grpcurl";

#[cfg(test)]
mod tests {
    #[test]
    fn no_line_is_too_long_for_a_terminal() {
        let texts = [
            super::LONG,
            super::MATRIX,
            super::PLAN,
            super::DEPLOY,
            super::IMPORT,
            super::PKI,
            super::COMPLETIONS,
            super::DEMO,
        ];
        for line in texts.iter().flat_map(|text| text.lines()) {
            assert!(line.chars().count() <= 99, "{line}");
        }
    }
}
