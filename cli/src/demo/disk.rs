//! The image of the demonstration: a disk and its hardware description.

use std::{
    fs,
    io::{self, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rand::RngCore as _;
use tokio::process::Command;
use vmcast_proto::v1;

use super::layout::Layout;
use crate::error::{Error, file};

/// Of each stretch of the disk the first three eighths are data: holes in between, as disks have them.
const STRETCH: u64 = 8 << 20;
const DATA: u64 = 3 << 20;

/// What is deployed.
#[derive(Debug)]
pub(super) struct Disk {
    /// Name of the image, and of the directory of its files.
    pub(super) image: &'static str,
    /// File name of the disk.
    pub(super) name: String,
    /// Every file of the image.
    pub(super) files: Vec<PathBuf>,
    /// Whether there is a `qemu-img` to compare with.
    pub(super) qemu_img: bool,
    pub(super) description: String,
}

/// Whether `qemu-img` can be used.
async fn has_qemu_img() -> bool {
    let mut command = Command::new("qemu-img");
    command.arg("--version").kill_on_drop(true);
    command.output().await.is_ok_and(|output| output.status.success())
}

impl Disk {
    pub(super) fn import_request(&self, layout: &Layout) -> v1::ImportImageRequest {
        let file = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            format!("{}/{name}", self.image)
        };
        v1::ImportImageRequest {
            name: self.image.into(),
            host: layout.source().name.clone(),
            datastore: layout.source().datastores[0].into(),
            files: self.files.iter().map(file).collect(),
            ..Default::default()
        }
    }
}

/// Makes an image's files on the first host, from a given disk or anew.
pub(super) async fn make(
    image: &'static str,
    given: Option<&Path>,
    size: u64,
    layout: &Layout,
) -> Result<Disk, Error> {
    let host = layout.source();
    let dir = layout.datastore(&host.name, host.datastores[0]).join(image);
    fs::create_dir_all(&dir).map_err(file(&dir))?;
    let qemu_img = has_qemu_img().await;
    let (name, description) = match given {
        Some(disk) => (copied(disk, &dir, layout).await?, format!("a copy of {}", disk.display())),
        None => made(size, qemu_img, &dir, layout).await?,
    };
    let hardware = dir.join("vm.xml");
    fs::write(&hardware, domain(&name)).map_err(file(&hardware))?;
    Ok(Disk { image, files: vec![dir.join(&name), hardware], name, qemu_img, description })
}

/// Somebody's own disk: copied, so that nothing can happen to it.
async fn copied(image: &Path, dir: &Path, layout: &Layout) -> Result<String, Error> {
    let meta = fs::metadata(image).map_err(file(image))?;
    if !meta.is_file() {
        return Err(Error::Usage(format!("{} is not a file", image.display())));
    }
    let name = image.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let name = name.ok_or_else(|| Error::Usage(format!("{} has no name in UTF-8", image.display())))?;
    layout.check_room(meta.blocks().saturating_mul(512))?;
    let mut command = Command::new("cp");
    command.args(["--reflink=auto", "--sparse=always", "--"]).arg(image).arg(dir.join(&name));
    run(command, "cp").await?;
    Ok(name)
}

async fn made(size: u64, qemu_img: bool, dir: &Path, layout: &Layout) -> Result<(String, String), Error> {
    layout.check_room(size / STRETCH * DATA + DATA)?;
    let raw = dir.join("disk.raw");
    let (path, length) = (raw.clone(), size);
    tokio::task::spawn_blocking(move || fill(&path, length))
        .await
        .map_err(|e| Error::Failed(format!("the disk was not made: {e}")))?
        .map_err(file(&raw))?;
    if !qemu_img {
        let text =
            "a raw disk with holes (there is no qemu-img here to make a qcow2 file: install qemu-utils)";
        return Ok(("disk.raw".into(), text.into()));
    }
    let name = "disk.qcow2";
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(dir.join(name));
    run(command, "qemu-img").await?;
    fs::remove_file(&raw).map_err(file(&raw))?;
    Ok((name.into(), "a new qcow2 disk of random data and holes".into()))
}

/// Random data, which nothing can compress or guess, between holes.
fn fill(path: &Path, size: u64) -> io::Result<()> {
    let mut file = fs::File::create_new(path)?;
    file.set_len(size)?;
    let mut random = rand::rng();
    let mut data = vec![0; DATA as usize];
    for start in (0..size).step_by(STRETCH as usize) {
        random.fill_bytes(&mut data);
        file.seek(io::SeekFrom::Start(start))?;
        file.write_all(&data[..DATA.min(size - start) as usize])?;
    }
    Ok(())
}

/// Runs a tool to its end; what it said is the reason if it fails.
pub(super) async fn run(mut command: Command, name: &str) -> Result<(), Error> {
    let output = command.kill_on_drop(true).output().await;
    let output = output.map_err(|e| Error::Failed(format!("{name} cannot be run: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stderr, output.stdout].concat();
    Err(Error::Failed(format!(
        "{name} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&said).trim()
    )))
}

/// A hardware description, as libvirt writes it.
fn domain(disk: &str) -> String {
    let qcow2 = Path::new(disk).extension().is_some_and(|extension| extension == "qcow2");
    let format = if qcow2 { "qcow2" } else { "raw" };
    let disk = disk.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;");
    format!(
        "<domain type='qemu'>
  <name>web</name>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{format}'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='network'><source network='default'/><model type='virtio'/></interface>
  </devices>
</domain>
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_data_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let size = 2 * STRETCH + 1000;
        fill(&path, size).unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), size);
        assert!(meta.blocks() * 512 < size, "{} blocks", meta.blocks());
        let bytes = fs::read(&path).unwrap();
        assert!(bytes[..64].iter().any(|b| *b != 0));
        assert!(bytes[DATA as usize..STRETCH as usize].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_description_names_the_disk() {
        let text = domain("my <disk>.img");
        assert!(text.contains("<source file='my &lt;disk>.img'/>") && text.contains("type='raw'"), "{text}");
        assert!(domain("d.qcow2").contains("type='qcow2'"));
    }
}
