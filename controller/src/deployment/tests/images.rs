//! How images come and go.

use super::*;

fn import(bed: &mut Bed, host_name: &str, files: &[&str]) -> Result<u64, EngineError> {
    let files = files.iter().map(|file| (*file).to_owned()).collect();
    let of = ImportOf::Files { datastore: ds("d"), files };
    bed.engine.import(at(0), image(), host(host_name), of)
}

#[test]
fn bad_imports_are_refused() {
    let mut bed = Bed::with_targets(1);
    for bad in [&[][..], &["../x"], &["a/../../x"], &["a", "b/a"], &["a/"], &[".hidden"], &[""]] {
        let error = import(&mut bed, "s", bad).unwrap_err();
        assert!(
            matches!(&error, EngineError::Invalid { field, .. } if field.starts_with("files")),
            "{bad:?}"
        );
    }
    let unknown = bed.engine.import(
        at(0),
        image(),
        host("s"),
        ImportOf::Files { datastore: ds("x"), files: vec!["a".into()] },
    );
    assert!(matches!(unknown, Err(EngineError::NotFound { kind: Kind::Datastore, .. })));
    assert!(matches!(import(&mut bed, "x", &["a"]), Err(EngineError::NotFound { kind: Kind::Host, .. })));
    bed.leave(1, "s");
    assert!(matches!(import(&mut bed, "s", &["a"]), Err(EngineError::Precondition { .. })));
}

#[test]
fn progress_is_told_and_the_end_once() {
    let mut bed = Bed::with_targets(1);
    let number = import(&mut bed, "h1", &["web.img"]).unwrap();
    bed.engine.import_report(at(1), &host("s"), number, (1, 1), Some(Ok(held("d", false))));
    bed.engine.import_report(at(1), &host("h1"), number, (5, 10), None);
    let status = bed.engine.import_status(number).unwrap();
    assert_eq!(
        (status.hashed, status.total, status.outcome.is_none()),
        (5, 10, true),
        "only its host is heard"
    );
    bed.engine.import_report(at(2), &host("h1"), number, (10, 10), Some(Ok(held("d", false))));
    assert!(bed.engine.import_status(number).unwrap().outcome.unwrap().is_ok());
    assert!(bed.engine.import_status(number).is_none());
    let holders: Vec<&str> =
        bed.engine.image(&image()).unwrap().holders.keys().map(HostName::as_str).collect();
    assert_eq!(holders, ["h1", "s"], "the same content on another host is another holder");
}

#[test]
fn a_name_stands_for_one_content() {
    let mut bed = Bed::with_targets(1);
    let number = import(&mut bed, "h1", &["web.img"]).unwrap();
    let other = Held { image_id: "ffff".into(), ..held("d", false) };
    bed.engine.take_output();
    bed.engine.import_report(at(2), &host("h1"), number, (10, 10), Some(Ok(other)));
    let outcome = bed.engine.import_status(number).unwrap().outcome.unwrap();
    assert!(matches!(outcome, Err(EngineError::Exists { what: "image", .. })));
    let dropped = Command::DropImage { epoch: 0, image_id: "ffff".into() };
    assert!(bed.engine.take_output().commands.contains(&(host("h1"), dropped)));
}

#[test]
fn imports_end_with_their_host() {
    let mut bed = Bed::with_targets(1);
    let number = import(&mut bed, "h1", &["web.img"]).unwrap();
    bed.leave(1, "h1");
    assert!(bed.engine.import_status(number).unwrap().outcome.unwrap().is_err());
    let mut bed = Bed::with_targets(1);
    let number = import(&mut bed, "h1", &["web.img"]).unwrap();
    bed.engine.tick(at(121));
    assert!(bed.engine.import_status(number).unwrap().outcome.unwrap().is_err());
}

#[test]
fn a_removed_image_is_dropped_everywhere_sooner_or_later() {
    let mut bed = Bed::with_targets(1);
    bed.create(spec(&["h1"]));
    let busy = bed.engine.remove_image(at(0), &image()).unwrap_err();
    assert!(matches!(busy, EngineError::Precondition { reason: Reason::InUse, .. }));
    bed.engine.cancel(at(0), &id(1)).unwrap();
    bed.leave(1, "s");
    bed.engine.take_output();
    bed.engine.remove_image(at(1), &image()).unwrap();
    assert!(bed.engine.image(&image()).is_err());
    assert!(bed.engine.take_output().commands.is_empty());
    bed.join(Registration { images: vec![held("d", false)], ..registration("s", vec![store("d", None)]) });
    let dropped = Command::DropImage { epoch: 0, image_id: IMAGE_ID.into() };
    assert!(bed.engine.take_output().commands.contains(&(host("s"), dropped)));
    assert!(bed.engine.image(&image()).is_err());
    assert!(bed.engine.remove_image(at(1), &image()).is_err());
}

#[test]
fn what_a_host_holds_is_what_it_says() {
    let mut bed = Bed::with_targets(1);
    let images = vec![
        held("d", true),
        Held { image_id: "77".into(), name: ImageName::new("db").unwrap(), ..held("d", false) },
    ];
    bed.join(Registration { images, ..registration("h1", vec![store("d", None)]) });
    assert_eq!(bed.engine.image(&image()).unwrap().holders.len(), 2);
    assert!(bed.engine.image(&ImageName::new("db").unwrap()).is_ok(), "known again after the state was lost");
    bed.join(registration("s", vec![store("d", None)]));
    let holders: Vec<&str> =
        bed.engine.image(&image()).unwrap().holders.keys().map(HostName::as_str).collect();
    assert_eq!(holders, ["h1"]);
}
