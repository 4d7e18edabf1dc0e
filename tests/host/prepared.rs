//! Preprocessed cases: where they lie, what makes them stale, what deletion leaves, and how much memory they may take.

use crate::common::place::{Place, json};
use crate::common::{data, phantom};
use ndarray::Array3;
use rayon::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::{Fold, Split};
use voxgrad::dataset::{CaseFiles, Dataset, DatasetJson};
use voxgrad::error::PreprocessError;
use voxgrad::io::{self, Geometry};
use voxgrad::preprocess::{Opening, PreparedCase, Preprocessor, in_parallel};
use voxgrad::train::{DataSource, Model};
use voxgrad::{Compat, Error};

const NAME: &str = "Dataset007_Spheres";
const SHORT: [&str; 6] = ["--epochs", "1", "--iterations", "1", "--validation-iterations", "1"];

fn prepared(place: &Place) -> PathBuf {
    place.path("preprocessed").join(NAME)
}

fn own(place: &Place) -> PathBuf {
    prepared(place).join("voxgrad/nnUNetPlans_3d_fullres")
}

fn train<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    [&["train", "-d", "7", "-f", "all", "--disable-tta", "--device", "cpu"], &SHORT[..], extra].concat()
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { all.extend(files(&path)) } else { all.push(path) }
    }
    all.sort();
    all
}

/// nnU-Net stops where it finds two kinds of file under one name.
#[test]
fn cases_lie_in_a_folder_of_their_own() {
    let place = Place::with_spheres(NAME, 2);
    place.succeeds(&["preprocess", "-d", "7"]);
    let theirs = prepared(&place).join("nnUNetPlans_3d_fullres");
    assert!(own(&place).join("case_000.vxg").exists() && !theirs.exists());
    // Where an earlier version has put them.
    fs::rename(own(&place), &theirs).unwrap();
    let said = place.succeeds(&train(&[]));
    assert!(said.contains("2 cases lie where nnU-Net's own belong"), "{said}");
    fs::write(theirs.join("case_000.b2nd"), "nnU-Net's").unwrap();
    let said = place.succeeds(&["preprocess", "-d", "7"]);
    assert!(said.contains("moved 2 cases") && said.contains("2 cases (2 of them from an earlier run)"), "{said}");
    assert_eq!(files(&theirs), [theirs.join("case_000.b2nd")]);
}

#[test]
fn clean_removes_cases_and_nothing_else() {
    let place = Place::with_spheres(NAME, 2);
    place.succeeds(&["preprocess", "-d", "7"]);
    fs::write(own(&place).join("notes.txt"), "mine").unwrap();
    fs::write(own(&place).join("case_000.b2nd"), "mine").unwrap();
    fs::write(own(&place).join("case_009.vxg"), "a case that is no more").unwrap();
    place.succeeds(&["preprocess", "-d", "7", "--clean"]);
    let kept: Vec<String> =
        files(&own(&place)).iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
    assert_eq!(kept, ["case_000.b2nd", "case_000.vxg", "case_001.vxg", "notes.txt"]);

    let plans = prepared(&place).join("nnUNetPlans.json");
    let good = json(&plans);
    for name in ["", "../x", "..", ".", place.path("elsewhere").to_str().unwrap()] {
        let mut changed = good.clone();
        changed["configurations"]["3d_fullres"]["data_identifier"] = name.into();
        fs::write(&plans, changed.to_string()).unwrap();
        let before = files(place.path("").as_path());
        place.refuses(&["preprocess", "-d", "7", "--clean"], &["nnUNetPlans.json", "data_identifier", "name"]);
        place.refuses(&train(&[]), &["data_identifier"]);
        assert_eq!(files(place.path("").as_path()), before, "{name}");
    }
    place.refuses(&["preprocess", "-d", "7", "--plans-name", "../x"], &["--plans-name", "../x"]);
    fs::write(&plans, good.to_string()).unwrap();
    place.succeeds(&["fingerprint", "-d", "7"]);
    place.refuses(&["plan", "-d", "7", "--overwrite-plans-name", "../x"], &["plans name", "../x"]);
}

#[test]
fn changed_labels_make_stored_cases_stale() {
    let place = Place::with_spheres(NAME, 2);
    place.succeeds(&["preprocess", "-d", "7"]);
    let label = phantom::label_path(&place.path("raw").join(NAME), 1);
    let copy = prepared(&place).join("gt_segmentations/case_001.nii.gz");
    let scribbles = Array3::from_shape_fn((16, 16, 16), |(z, ..)| if z < 9 { 0 } else { phantom::IGNORE });
    io::write_labels(&label, scribbles.view(), &Geometry::new([1.0; 3])).unwrap();
    // The time of an archive from which it was restored: older than the copy.
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    fs::File::options().write(true).open(&label).unwrap().set_modified(old).unwrap();
    let said =
        place.refuses(&train(&[]), &["case_001 made before the raw images or labels changed", "voxgrad preprocess"]);
    assert!(!said.contains("case_000"), "{said}");
    assert_ne!(fs::read(&copy).unwrap(), fs::read(&label).unwrap());
    let said = place.succeeds(&["preprocess", "-d", "7"]);
    assert!(said.contains("(1 of them from an earlier run)"), "{said}");
    assert_eq!(fs::read(&copy).unwrap(), fs::read(&label).unwrap());
    place.succeeds(&train(&[]));
}

/// Neither training nor validation needs raw files, only pictures do.
#[test]
fn training_without_raw_files() {
    let place = Place::with_spheres(NAME, 2);
    place.succeeds(&["preprocess", "-d", "7"]);
    let raw = place.path("raw").join(NAME);
    fs::copy(raw.join("dataset.json"), prepared(&place).join("dataset.json")).unwrap();
    fs::remove_dir_all(&raw).unwrap();
    let said = place.succeeds(&train(&[]));
    assert!(said.contains("raw files are not there") && said.contains("no pictures"), "{said}");
    let results = place.path(&format!("results/{NAME}/voxgradTrainer__nnUNetPlans__3d_fullres/fold_all"));
    assert!(results.join("validation/summary.json").exists());
    fs::remove_dir_all(prepared(&place).join("voxgrad")).unwrap();
    fs::remove_dir_all(place.path("results").join(NAME)).unwrap();
    place.refuses(&train(&[]), &["no preprocessed case", "--raw"]);
}

/// Not only once a patch shows one, perhaps after days.
#[test]
fn labels_that_are_not_declared_are_found_when_cases_are_opened() {
    let folder = tempfile::tempdir().unwrap();
    let from = data("brats_regions/preprocessed");
    let theirs = folder.path().join("nnUNetPlans_3d_fullres");
    fs::create_dir(&theirs).unwrap();
    let names = ["case_000", "case_001"].map(String::from);
    for name in &names {
        fs::copy(from.join(format!("{name}.npz")), theirs.join(format!("{name}.npz"))).unwrap();
    }
    let mut described = json(&from.join("dataset.json"));
    // They hold 0 to 4.
    described["labels"] = serde_json::json!({"background": 0, "edema": 1, "ignore": 2});
    described.as_object_mut().unwrap().remove("regions_class_order");
    fs::write(folder.path().join("dataset.json"), described.to_string()).unwrap();
    let read = DatasetJson::read(&folder.path().join("dataset.json")).unwrap();
    let model = Model::new(Plans::read(&from.join("nnUNetPlans.json")).unwrap(), "3d_fullres", read.clone()).unwrap();
    let cases = names.iter().map(|name| CaseFiles { name: name.clone(), images: Vec::new(), label: None }).collect();
    let labels = model.labels.clone();
    let dataset = Dataset { folder: folder.path().into(), json: read, labels, cases, notes: Vec::new() };
    let split = Split { train: names.to_vec(), val: Vec::new() };
    let source = DataSource {
        dataset: &dataset,
        prepared: folder.path(),
        fold: Fold::All,
        split: &split,
        compat: None,
        skip_unreadable: false,
    };
    let error = source.open(&model, |_| ()).err().unwrap().to_string();
    for words in ["case case_000 holds", "case case_001 holds", "3 (", " voxels), 4 (", "declares is 2"] {
        assert!(error.contains(words), "no `{words}` in: {error}");
    }
}

/// The folder of fold 0 has no checkpoint, that of another has: most likely that one is meant.
#[test]
fn continuing_by_number_names_the_folds_that_there_are() {
    let place = Place::with_spheres(NAME, 2);
    place.succeeds(&["preprocess", "-d", "7"]);
    place.succeeds(&train(&[]));
    place.refuses(&["train", "-d", "7", "--continue", "--device", "cpu"], &["fold_0", "fold_all", "--fold"]);
    place.succeeds(&["train", "-d", "7", "--continue", "--device", "cpu", "--fold", "all", "--disable-tta"]);
}

#[test]
fn a_fingerprint_is_measured_again_when_files_or_settings_change() {
    let place = Place::with_spheres(NAME, 5);
    let measure = |extra: &[&str]| place.succeeds(&[&["fingerprint", "-d", "7"], extra].concat());
    measure(&[]);
    assert!(measure(&[]).contains("using the fingerprint"));
    assert!(measure(&["--compat", "nnunet"]).contains("measuring again"));
    measure(&[]);
    let image = phantom::image_path(&place.path("raw").join(NAME), 2);
    let brighter = io::read_image(&image).unwrap().data.mapv(|value| (value * 2.0) as u8);
    io::write_labels(&image, brighter.view(), &Geometry::new([1.0; 3])).unwrap();
    place.refuses(&["plan", "-d", "7"], &["dataset_fingerprint.json", "before the raw files changed"]);
    let said = place.succeeds(&["preprocess", "-d", "7"]);
    assert!(said.contains("older than the raw files"), "{said}");
    let before = json(&prepared(&place).join("dataset_fingerprint.json"));
    assert!(measure(&[]).contains("measuring again"));
    assert_ne!(json(&prepared(&place).join("dataset_fingerprint.json")), before);
    // One that somebody else has put there.
    fs::write(prepared(&place).join("dataset_fingerprint.json"), before.to_string()).unwrap();
    assert!(measure(&[]).contains("does not say from which files"));
}

#[test]
fn cases_in_no_fold_are_named_when_planning() {
    let place = Place::with_spheres(NAME, 5);
    let both = ["plan-and-preprocess", "-d", "7", "--no-preprocessing"];
    place.succeeds(&both);
    let raw = place.path("raw").join(NAME);
    phantom::write(&raw, 7);
    let said = place.succeeds(&both);
    assert!(said.contains("measuring again") && said.contains("splits_final.json has case_005, case_006"), "{said}");
}

#[test]
fn a_class_that_resampling_removes_is_named() {
    let place = Place::with_spheres(NAME, 2);
    let raw = place.path("raw").join(NAME);
    let half = Array3::from_shape_fn((16, 16, 16), |p| u8::from(p.0 < 8));
    let one = Array3::from_shape_fn((16, 16, 16), |p| u8::from(p == (5, 5, 5)));
    for (case, labels) in [half, one].iter().enumerate() {
        io::write_labels(&phantom::label_path(&raw, case), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    }
    let plans = prepared(&place).join("nnUNetPlans.json");
    let mut coarse = json(&plans);
    coarse["configurations"]["3d_fullres"]["spacing"] = serde_json::json!([2.0, 2.0, 2.0]);
    fs::write(&plans, coarse.to_string()).unwrap();
    let said = place.succeeds(&["preprocess", "-d", "7"]);
    let words = "case case_001: resampling from [1.0, 1.0, 1.0] to [2.0, 2.0, 2.0] mm leaves none of the 1 voxels of class \
                 sphere";
    assert!(said.contains(words), "{said}");
    assert!(!said.contains("case case_000: resampling"), "{said}");
}

#[test]
fn images_too_small_for_a_network_are_refused_when_planning() {
    let place = Place::with_spheres(NAME, 6);
    let raw = place.path("raw").join(NAME);
    let geometry = Geometry::new([1.0; 3]);
    for case in 0..6 {
        let volume = Array3::from_shape_fn((8, 7, 7), |(z, y, _)| u8::from(z + y > 5));
        io::write_labels(&phantom::image_path(&raw, case), volume.view(), &geometry).unwrap();
        io::write_labels(&phantom::label_path(&raw, case), volume.view(), &geometry).unwrap();
    }
    place.refuses(&["plan-and-preprocess", "-d", "7"], &["[8.0, 7.0, 7.0] voxels", "at least 2", "target-spacing"]);
}

fn opening<'a>(folder: &'a Path, preprocessor: &'a Preprocessor, memory: u64) -> Opening<'a> {
    Opening {
        prepared: folder,
        data_identifier: "nnUNetPlans_3d_fullres",
        preprocessor,
        compat: None,
        workers: 2,
        memory,
        skip_unreadable: false,
    }
}

#[test]
fn cases_that_are_not_stored_have_a_bound_on_their_memory() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 4);
    let dataset = Dataset::open(folder.path()).unwrap();
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let configuration = plans.configuration("3d_fullres").unwrap();
    let preprocessor =
        Preprocessor::from_plans(&plans, &configuration, dataset.labels.clone(), Compat::Corrected).unwrap();
    let files: Vec<&CaseFiles> = dataset.cases.iter().collect();
    // A case has 4096 voxels of 4 and 2 bytes, and locations of every annotated one.
    let open = |memory| opening(folder.path(), &preprocessor, memory).open(&files, |_| ());
    let opened = open(1 << 20).unwrap();
    assert!(
        opened.notes.iter().any(|note| note.contains("4 cases are kept in memory as a whole: 0.1 MiB")),
        "{opened:?}"
    );
    let error = open(60_000).unwrap_err();
    let Error::Preprocess(PreprocessError::CaseMemory { cases, whole: 4, held, expected, limit: 60_000 }) = error
    else {
        panic!("{error}")
    };
    assert!((2..=3).contains(&cases) && held > 60_000 && expected > held, "{cases} {held} {expected}");
    assert!(error.to_string().contains("voxgrad preprocess"));

    let other = data("b2nd");
    let small = folder.path().join("nnUNetPlans_3d_fullres");
    fs::create_dir(&small).unwrap();
    for (from, to) in [("one_channel", "case_000"), ("one_channel_seg", "case_000_seg")] {
        fs::copy(other.join(format!("{from}.b2nd")), small.join(format!("{to}.b2nd"))).unwrap();
    }
    // nnU-Net's are copied into chunks once, and again when they have changed; none is kept in memory.
    let open = || opening(folder.path(), &preprocessor, 0).open(&files[..1], |_| ()).unwrap();
    let notes = |notes: &[String]| notes.iter().filter(|note| note.contains("copied into chunks, once")).count();
    let opened = open();
    assert_eq!((notes(&opened.notes), opened.compat), (1, Compat::Nnunet), "{:?}", opened.notes);
    let PreparedCase::Stored(case) = &opened.cases[0] else { panic!("kept in memory") };
    let original = voxgrad::preprocess::read_b2nd(&small.join("case_000.b2nd"), &dataset.labels, [1.0; 3]).unwrap();
    let copy = case.read().unwrap();
    assert!(copy.data == original.data && copy.seg == original.seg);
    assert_eq!(notes(&open().notes), 0);
    let later = fs::OpenOptions::new().write(true).open(small.join("case_000_seg.b2nd")).unwrap();
    later.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(9)).unwrap();
    assert_eq!(notes(&open().notes), 1);

    // Stored ones are read piece by piece.
    let own = voxgrad::preprocess::cases_folder(folder.path(), "nnUNetPlans_3d_fullres");
    voxgrad::preprocess::preprocess_folder(&dataset, &preprocessor, &own, 2, |_| ()).unwrap();
    let opened = opening(folder.path(), &preprocessor, 0).open(&files, |_| ()).unwrap();
    assert!(opened.cases.iter().all(|case| matches!(case, PreparedCase::Stored(_))));
    assert_eq!(opened.compat, Compat::Corrected);

    // Cases made in the other way are neither mixed in nor taken for a training that began otherwise.
    let nnunets = Preprocessor { compat: Compat::Nnunet, ..preprocessor.clone() };
    let wanted = Opening { compat: Some(Compat::Nnunet), ..opening(folder.path(), &preprocessor, 0) };
    let error = wanted.open(&files, |_| ()).unwrap_err().to_string();
    assert!(error.contains("all made for corrected numbers where training has nnunet ones"), "{error}");
    let first = Dataset { cases: dataset.cases[..1].to_vec(), ..dataset.clone() };
    voxgrad::preprocess::preprocess_folder(&first, &nnunets, &own, 2, |_| ()).unwrap();
    let error = opening(folder.path(), &preprocessor, 0).open(&files, |_| ()).unwrap_err().to_string();
    assert!(error.contains("case_000 made with nnU-Net's treatment"), "{error}");
}

/// A thread that waits for inner parallel work must not begin another item meanwhile.
#[test]
fn at_most_so_many_items_are_worked_on_as_there_are_workers() {
    let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let items: Vec<usize> = (0..24).collect();
    let results = in_parallel(&items, 3, |&item| {
        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let inner: usize = (0..64usize)
            .into_par_iter()
            .map(|n| {
                std::thread::sleep(std::time::Duration::from_micros(100));
                n
            })
            .sum();
        now.fetch_sub(1, Ordering::SeqCst);
        item + inner
    });
    assert_eq!(results, items.iter().map(|item| item + 2016).collect::<Vec<_>>());
    assert!(most.into_inner() <= 3);
}
