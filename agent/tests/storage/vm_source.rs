//! A VM's disks as an image: chains of files, firmware variables, and what is made of them.

use std::{fs, path::Path, process::Command};

use vmcast_agent::datastore::{ImageCatalog, StoreError, forget_vm_source, vm_source};
use vmcast_common::name::ImageName;

use crate::{GO, Place, place};

/// Runs a program of QEMU's in a directory; false if it fails, or is not there.
fn qemu(dir: &Path, program: &str, args: &[&str]) -> bool {
    Command::new(program).current_dir(dir).args(args).output().is_ok_and(|output| output.status.success())
}

/// A chain of two files with something in each; none where there is no qemu-img.
fn chain(place: &Place, base: &str) -> Option<()> {
    let made = qemu(&place.path, "qemu-img", &["create", "-q", "-f", "qcow2", base, "8M"])
        && qemu(&place.path, "qemu-io", &["-c", "write -P 1 0 1M", "-c", "write -P 2 4M 1M", base])
        && qemu(
            &place.path,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", "top.qcow2"],
        )
        && qemu(&place.path, "qemu-io", &["-c", "write -P 3 512k 1M", "top.qcow2"]);
    if !made {
        eprintln!("skipped: there is no qemu-img (Debian: qemu-utils)");
    }
    made.then_some(())
}

#[test]
fn a_chain_becomes_one_file_with_the_same_content() {
    let place = place("ds");
    let Some(()) = chain(&place, "base.qcow2") else { return };
    place.write("plain.raw", 1 << 20, &[(0, 1 << 20)]);
    let elsewhere = tempfile::tempdir().unwrap();
    let nvram = elsewhere.path().join("vm_VARS.fd");
    fs::write(&nvram, "variables").unwrap();
    let disks = ["top.qcow2".to_owned(), "plain.raw".to_owned()];
    let files = vm_source(&place.store, &disks, "<domain/>", Some(&nvram), &GO).unwrap();
    assert_eq!(files.len(), 4, "{files:?}");
    assert_eq!(files[1], "plain.raw", "what stands alone stays where it is");
    assert!(files[0].starts_with(".vmcast/sources/") && files[0].ends_with("/top.qcow2"), "{files:?}");
    let whole = place.path.join(&files[0]).display().to_string();
    assert!(qemu(&place.path, "qemu-img", &["compare", "top.qcow2", &whole]), "another content");
    // Without its base it is what it is: it stands alone.
    fs::remove_file(place.path.join("base.qcow2")).unwrap();
    assert!(qemu(&place.path, "qemu-img", &["check", "-q", &whole]));
    assert_eq!(fs::read_to_string(place.path.join(&files[2])).unwrap(), "variables");
    assert_eq!(fs::read_to_string(place.path.join(&files[3])).unwrap(), "<domain/>");

    // What was made goes with the image, and what was there stays.
    let names: Vec<&str> = files.iter().map(String::as_str).collect();
    let image = place.scan(&names).unwrap();
    let catalog = ImageCatalog::new(place.store.clone());
    catalog.save(&ImageName::new("vm").unwrap(), &image).unwrap();
    assert!(catalog.has(image.manifest.id()).unwrap());
    catalog.remove(image.manifest.id()).unwrap();
    assert!(!place.path.join(&files[0]).exists() && !place.path.join(&files[3]).exists());
    assert!(place.path.join("plain.raw").exists() && place.path.join("top.qcow2").exists());
    assert!(!catalog.has(image.manifest.id()).unwrap());
}

#[test]
fn a_chain_that_leads_out_of_the_datastore_is_not_read() {
    let place = place("ds");
    let outside = tempfile::tempdir().unwrap();
    let base = outside.path().join("base.qcow2").display().to_string();
    let Some(()) = chain(&place, &base) else { return };
    let error = vm_source(&place.store, &["top.qcow2".into()], "<domain/>", None, &GO).unwrap_err();
    assert!(matches!(error, StoreError::Invalid { .. }) && error.to_string().contains(&base), "{error}");
    assert!(
        fs::read_dir(place.path.join(".vmcast/sources")).unwrap().next().is_none(),
        "something is left behind"
    );
    // Nor through a link that leads there.
    std::os::unix::fs::symlink(&base, place.path.join("link.qcow2")).unwrap();
    assert!(qemu(&place.path, "qemu-img", &["rebase", "-u", "-b", "link.qcow2", "-F", "qcow2", "top.qcow2"]));
    assert!(vm_source(&place.store, &["top.qcow2".into()], "<domain/>", None, &GO).is_err());
}

#[test]
fn two_files_of_one_name_are_refused_and_what_was_made_is_removed() {
    let place = place("ds");
    for dir in ["a", "b"] {
        fs::create_dir(place.path.join(dir)).unwrap();
        place.write(&format!("{dir}/disk.raw"), 4096, &[(0, 4096)]);
    }
    let disks = ["a/disk.raw".to_owned(), "b/disk.raw".to_owned()];
    let error = vm_source(&place.store, &disks, "<domain/>", None, &GO).unwrap_err();
    assert!(error.to_string().contains("disk.raw"), "{error}");
    let files = vm_source(&place.store, &disks[..1], "<domain/>", None, &GO).unwrap();
    assert!(place.path.join(&files[1]).is_file());
    forget_vm_source(&place.store, &files);
    assert!(place.path.join("a/disk.raw").is_file() && !place.path.join(&files[1]).exists());
}
