//! Sparse datasets from dense ones: files, reproducibility, what is kept, what is never replaced, and bad input.

use crate::common::sparse::{LABELS, Place, REGIONS, files, kept, labels, nnunet};

use ndarray::Array3;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use voxgrad::dataset::Dataset;
use voxgrad::io::{Geometry, read_labels, write_labels, write_labels_as_stored};
use voxgrad::numpy_random::NumpyRandom;
use voxgrad::sparsify::{
    Blocks, Budget, Mask, MaskRule, Mix, Report, Scheme, Scribbles, Selection, Settings, Slices, slices,
    sparsify_dataset,
};

fn settings(scheme: Scheme) -> Settings {
    Settings { scheme, seed: 7, copy_images: false, overwrite: false, workers: 1 }
}

#[test]
fn nnunets_integration_dataset() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], REGIONS);
    let target = place.path("sparse");
    let nnunets = Settings { seed: 1234, ..settings(Scheme::Slices(nnunet())) };
    sparsify_dataset(&source, &target, &nnunets, |_| {}).unwrap();
    let dataset = Dataset::open(&target).unwrap();
    let keys: Vec<String> = dataset.labels.foreground().iter().map(|g| g.to_string()).collect();
    assert_eq!(keys, ["(1, 2)", "1"]);
    assert_eq!(dataset.labels.regions_class_order(), Some([2, 1].as_slice()));
    assert_eq!(dataset.labels.ignore_label(), Some(3));
    // The stream goes on from case to case.
    let mut random = NumpyRandom::new(1234);
    for case in ["a", "b"] {
        let dense = labels(&source, case);
        let planes = nnunet().nnunets(dense.dim().into(), &mut random);
        assert_eq!(labels(&target, case), slices::keep(dense.view(), 3, &planes).labels);
    }
}

#[test]
fn a_case_depends_on_seed_and_name_alone() {
    let place = Place::new();
    let source = place.dataset(&["a", "b", "c"], LABELS);
    let schemes = [
        Scheme::Scribbles(Scribbles::default()),
        Scheme::Blocks(Blocks { size: [4; 3], budget: Budget::Count(2), foreground: 0.5 }),
        Scheme::Slices(Slices { axes: [true; 3], fraction: 0.2, selection: Selection::Random }),
    ];
    for (index, scheme) in schemes.into_iter().enumerate() {
        let made = |name: &str, seed: u64, workers: usize, source: &Path| {
            let target = place.path(&format!("{index}-{name}"));
            let settings = Settings { seed, workers, ..settings(scheme.clone()) };
            sparsify_dataset(source, &target, &settings, |_| {}).unwrap();
            target
        };
        let (one, three) = (made("one", 5, 1, &source), made("three", 5, 3, &source));
        let relative = |folder: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
            files(folder).into_iter().map(|(path, bytes)| (path.strip_prefix(folder).unwrap().into(), bytes)).collect()
        };
        assert_eq!(relative(&one), relative(&three));
        let other = made("other", 6, 1, &source);
        assert_ne!(labels(&one, "b"), labels(&other, "b"));

        // Without its neighbours the case is the same.
        let fewer = Place::new();
        let alone = fewer.dataset(&["b"], LABELS);
        for part in ["imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"] {
            fs::copy(source.join(part), alone.join(part)).unwrap();
        }
        assert_eq!(labels(&made("alone", 5, 1, &alone), "b"), labels(&one, "b"));
    }
}

#[test]
fn types_geometry_images_and_description_stay() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], LABELS);
    fs::create_dir_all(source.join("imagesTs")).unwrap();
    fs::copy(source.join("imagesTr/a_0000.nii.gz"), source.join("imagesTs/t_0000.nii.gz")).unwrap();
    fs::write(source.join("splits_final.json"), "[]").unwrap();
    // Labels as 16-bit integers.
    let geometry = read_labels(&source.join("labelsTr/a.nii.gz")).unwrap().geometry;
    write_labels(&source.join("labelsTr/b.nii.gz"), labels(&source, "b").mapv(|l| l as u16).view(), &geometry).unwrap();

    let target = place.path("sparse");
    let said = place.succeeds(&["sparsify", "dense", "-o", "sparse", "--scheme", "scribbles", "--seed", "3"]);
    assert!(
        said.contains("3 files are hard links") && said.contains("Posterior") && said.contains("% of it"),
        "{said}"
    );
    for (case, datatype) in [("a", 2_i16), ("b", 512)] {
        let file = target.join(format!("labelsTr/{case}.nii.gz"));
        assert_eq!(read_labels(&file).unwrap().geometry.affine(), geometry.affine());
        let mut bytes = Vec::new();
        let packed = fs::File::open(&file).unwrap();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(packed), &mut bytes).unwrap();
        assert_eq!(i16::from_le_bytes([bytes[70], bytes[71]]), datatype, "{case}");
    }
    for file in ["imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTs/t_0000.nii.gz", "splits_final.json"] {
        assert_eq!(fs::read(source.join(file)).unwrap(), fs::read(target.join(file)).unwrap());
    }
    let json: serde_json::Value = serde_json::from_slice(&fs::read(target.join("dataset.json")).unwrap()).unwrap();
    assert_eq!(json["labels"].to_string(), r#"{"background":0,"Anterior":1,"Posterior":2,"ignore":3}"#);
    assert_eq!(json["licence"], "kept");
    let record: serde_json::Value = serde_json::from_slice(&fs::read(target.join("sparsify.json")).unwrap()).unwrap();
    assert_eq!(record["settings"]["seed"], 3);
    let counted = labels(&target, "a").iter().filter(|&&label| label == 1).count();
    assert_eq!(record["cases"][0]["classes"][1]["annotated"], counted);
    assert_eq!(record["cases"][0]["annotated"], labels(&target, "a").iter().filter(|&&label| label != 3).count());

    // Nothing is replaced without being asked, and only what this command made.
    place.refuses(&["sparsify", "dense", "-o", "sparse", "--scheme", "slices"], &["sparse", "--overwrite"]);
    place.succeeds(&[
        "sparsify",
        "dense",
        "-o",
        "sparse",
        "--scheme",
        "slices",
        "--overwrite",
        "--copy",
        "--pictures",
        "png",
    ]);
    assert!(fs::metadata(place.path("png/b.png")).unwrap().len() > 1000);
    fs::write(target.join("notes.txt"), "mine").unwrap();
    place.refuses(&["sparsify", "dense", "-o", "sparse", "--scheme", "slices", "--overwrite"], &["notes.txt"]);
    place.refuses(&["sparsify", "dense", "-o", "dense", "--scheme", "slices", "--overwrite"], &["source"]);
    place.refuses(&["sparsify", "dense", "-o", "dense/sparse", "--scheme", "slices"], &["source"]);
    fs::remove_file(target.join("notes.txt")).unwrap();
    fs::remove_file(target.join("sparsify.json")).unwrap();
    place.refuses(
        &["sparsify", "dense", "-o", "sparse", "--scheme", "slices", "--overwrite"],
        &["no dataset that this command made"],
    );
}

#[test]
fn every_stored_type_comes_back() {
    let place = Place::new();
    let map = Array3::from_shape_fn((2, 3, 4), |(z, y, x)| (z + y + x) as i16);
    let path = place.path("map.nii");
    macro_rules! stored {
        ($($voxel:ty),*) => {$(
            write_labels(&path, map.mapv(|label| label as $voxel).view(), &Geometry::new([1.0; 3])).unwrap();
            let before = fs::read(&path).unwrap();
            let read = read_labels(&path).unwrap();
            write_labels_as_stored(&path, read.data.view(), &read.geometry).unwrap();
            assert_eq!(fs::read(&path).unwrap(), before, stringify!($voxel));
        )*};
    }
    stored!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
    // A byte does not hold 300.
    write_labels(&path, map.mapv(|label| label as u8).view(), &Geometry::new([1.0; 3])).unwrap();
    let geometry = read_labels(&path).unwrap().geometry;
    let large = map.mapv(|label| 60 * label);
    write_labels_as_stored(&path, large.view(), &geometry).unwrap();
    assert_eq!(read_labels(&path).unwrap().data, large);
}

#[test]
fn masks_take_away_what_they_say() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], REGIONS);
    let rules = vec![
        MaskRule { cases: vec!["a".into()], classes: vec!["anterior".into()], bounds: None },
        MaskRule { cases: vec![], classes: vec![], bounds: Some([[0, 2], [0, 99], [3, 5]]) },
    ];
    let masks = place.path("masks");
    fs::create_dir(&masks).unwrap();
    let mask = Array3::from_shape_fn((13, 14, 13), |(z, y, _)| u8::from(z == 5 && y > 7));
    write_labels(&masks.join("b.nii.gz"), mask.view(), &Geometry::new([2.0, 1.0, 0.5])).unwrap();
    let scheme = Scheme::Mask(Mask { rules, folder: Some(masks.clone()) });
    let report = sparsify_dataset(&source, &place.path("sparse"), &settings(scheme), |_| {}).unwrap();
    for case in ["a", "b"] {
        let (dense, sparse) = (labels(&source, case), labels(&place.path("sparse"), case));
        for (at, &label) in dense.indexed_iter() {
            let (z, y, x) = at;
            let taken =
                (z < 2 && (3..5).contains(&x)) || (case == "a" && label == 1) || (case == "b" && z == 5 && y > 7);
            assert_eq!(sparse[at], if taken { 3 } else { label }, "{case} {at:?}");
        }
    }
    let without = report
        .warnings
        .iter()
        .any(|warning| warning.contains("1 (hippocampus, anterior)") && warning.contains("1 case: a"));
    assert!(without, "{:?}", report.warnings);

    // What is sparse already can lose more; its ignore label stays.
    let more = ["sparsify", "sparse", "-o", "sparser", "--scheme", "mask", "--mask-class", "anterior"];
    place.succeeds(&more);
    let (before, after) = (labels(&place.path("sparse"), "b"), labels(&place.path("sparser"), "b"));
    assert!(before.iter().zip(&after).all(|(&before, &after)| after == if before == 1 { 3 } else { before }));

    // A mask that lies elsewhere, of another shape, or of no case.
    write_labels(&masks.join("b.nii.gz"), mask.view(), &Geometry::new([2.0, 1.0, 5.0])).unwrap();
    place.refuses(
        &["sparsify", "dense", "-o", "x", "--scheme", "mask", "--mask-folder", "masks"],
        &["case b", "same grid"],
    );
    write_labels(&masks.join("b.nii.gz"), mask.t(), &Geometry::new([2.0, 1.0, 0.5])).unwrap();
    fs::write(masks.join("nobody.nii.gz"), "").unwrap();
    place.refuses(&["sparsify", "dense", "-o", "x", "--scheme", "mask", "--mask-folder", "masks"], &["nobody.nii.gz"]);
    let names = ["--mask-class", "liver", "--mask-case", "z", "--mask-box", "0:4,5:5,0:4"];
    let words = ["class `liver`", "case `z`", "[5, 5]", "3 faults"];
    place.refuses(&[&["sparsify", "dense", "-o", "x", "--scheme", "mask"], &names[..]].concat(), &words);
    place.refuses(&["sparsify", "dense", "-o", "x", "--scheme", "mask"], &["what to take away"]);
    fs::write(place.path("rules.json"), r#"[{"classes": ["anterior"], "case": "a"}]"#).unwrap();
    place.refuses(
        &["sparsify", "dense", "-o", "x", "--scheme", "mask", "--mask-rules", "rules.json"],
        &["rules.json", "`case`"],
    );
}

#[test]
fn mixtures_and_pooled_blocks_are_shared_out() {
    let place = Place::new();
    let names: Vec<String> = (0..9).map(|case| format!("case{case}")).collect();
    let source = place.dataset(&names.iter().map(String::as_str).collect::<Vec<_>>(), LABELS);
    let count = |report: &Report, name: &str| report.cases.iter().filter(|case| case.scheme == name).count();
    let pooled = Scheme::Blocks(Blocks { size: [6; 3], budget: Budget::Pooled(0.05), foreground: 0.0 });
    let parts = vec![(Scheme::Dense, 1.0), (Scheme::Scribbles(Scribbles::default()), 2.0), (pooled.clone(), 1.0)];
    let report = sparsify_dataset(&source, &place.path("mix"), &settings(Scheme::Mix(Mix { parts })), |_| {}).unwrap();
    assert_eq!(["dense", "scribbles", "blocks"].map(|name| count(&report, name)), [2, 5, 2]);
    assert!(report.cases.iter().all(|case| (case.scheme == "dense") == (case.annotated == case.voxels())));

    let report = sparsify_dataset(&source, &place.path("pool"), &settings(pooled), |_| {}).unwrap();
    let annotated = report.cases.iter().map(|case| case.annotated).sum::<u64>() as f64;
    let all = report.cases.iter().map(|case| case.voxels()).sum::<u64>() as f64;
    assert!((annotated / all - 0.05).abs() * all <= 108.0, "{}", annotated / all);
    assert!(report.warnings[0].contains("without any annotation"), "{:?}", report.warnings);
}

#[test]
fn listed_slices() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], LABELS);
    fs::write(place.path("planes.json"), r#"{"*": {"z": [5]}, "b": {"y": [1, 7], "x": [0]}}"#).unwrap();
    place.succeeds(&["sparsify", "dense", "-o", "sparse", "--scheme", "slices", "--planes", "planes.json"]);
    let kept_in = |case: &str| [0, 1, 2].map(|axis| kept(labels(&place.path("sparse"), case).view(), axis));
    assert_eq!(kept_in("a"), [vec![5], vec![], vec![]]);
    assert_eq!(kept_in("b"), [vec![], vec![1, 7], vec![0]]);
    assert_eq!(labels(&source, "a").dim().0, 12);
    fs::write(place.path("planes.json"), r#"{"a": {"z": [12]}, "c": {"z": [1]}}"#).unwrap();
    let words = ["3 faults", "0 to 11", "[12]", "case `c`", "case b"];
    place.refuses(&["sparsify", "dense", "-o", "x", "--scheme", "slices", "--planes", "planes.json"], &words);
}

#[test]
fn bad_datasets_are_refused_before_anything_is_written() {
    let sparsify = ["sparsify", "dense", "-o", "x", "--scheme", "scribbles"];
    // Labels with a gap, and a class that no case has.
    let place = Place::new();
    place.dataset(&["a"], r#"{"background": 0, "Anterior": 1, "Posterior": 3}"#);
    place.refuses(&sparsify, &["consecutive"]);
    place.dataset(&["a"], r#"{"background": 0, "A": 1, "B": 2, "C": 3, "D": 4}"#);
    place.refuses(&sparsify, &["2 faults", "C (label 3)", "D (label 4)"]);
    // The value that the ignore label must have is in use: all cases are named.
    place.dataset(&["a", "b"], r#"{"background": 0, "A": 1}"#);
    place.refuses(&sparsify, &["2 faults", "case a", "case b", "label 2", "declares [0, 1]"]);
    // An image of one slice.
    let source = place.dataset(&["a", "b"], LABELS);
    let flat = Array3::from_elem((1, 8, 8), 1_u8);
    write_labels(&source.join("labelsTr/b.nii.gz"), flat.view(), &Geometry::new([1.0; 3])).unwrap();
    fs::remove_file(source.join("labelsTr/a.nii.gz")).unwrap();
    place.refuses(&sparsify, &["case b", "single slice", "case a: no label file"]);
}

#[test]
fn bad_settings_are_refused() {
    let place = Place::new();
    place.dataset(&["a", "b"], LABELS);
    let refuses = |scheme: &str, options: &[&str], words: &[&str]| {
        place.refuses(&[&["sparsify", "dense", "-o", "x", "--scheme", scheme], options].concat(), words);
    };
    refuses("blocks", &["--block", "10"], &["2 faults", "10.000 %", "smaller blocks"]);
    refuses("scribbles", &["--fraction", "0.9"], &["case a", "case b", "90.000 %", "every slice"]);
    refuses("scribbles", &["--fraction", "0.0001"], &["raise the fraction"]);
    refuses("slices", &["--fraction", "1.5"], &["fraction", "1.5"]);
    refuses("slices", &["--fraction", "nan"], &["fraction", "NaN"]);
    refuses("scribbles", &["--thickness", "2", "--control-points", "2"], &["odd", "at least 3"]);
    refuses("scribbles", &["--border-length", "0.5:0.2"], &["0.5:0.2"]);
    refuses("scribbles", &["--border-depth", "a"], &["LOW:HIGH"]);
    refuses("blocks", &["--block", "0"], &["block"]);
    refuses("blocks", &["--count", "1", "--foreground", "2"], &["foreground share"]);
    // What would not be looked at is refused by its name.
    refuses("slices", &["--thickness", "3", "--pool"], &["--thickness", "--pool", "slices"]);
    refuses("mask", &["--mask-class", "Anterior", "--fraction", "0.1"], &["--fraction"]);
    refuses("scribbles", &["--mix", "dense=1"], &["--mix"]);
    refuses("scribbles", &["--fraction", "0.01", "--foreground-slices", "0.1"], &["--foreground-slices"]);
    refuses("mix", &[], &["--mix"]);
    refuses("mix", &["--mix", "scribbles=1,mix=1"], &["`mix`"]);
    refuses("mix", &["--mix", "scribbles=0,dense=1"], &["positive"]);
}

#[test]
fn pooled_slices_make_the_share_of_the_whole_dataset() {
    let place = Place::new();
    let cases = ["a", "b", "c", "d", "e", "f"];
    let source = place.dataset(&cases, LABELS);
    for (fraction, seed) in [(0.01, 1), (0.05, 2), (0.3, 3), (0.9, 4)] {
        let target = place.path(&format!("sparse-{fraction}"));
        let scheme = Scheme::Slices(Slices { axes: [true; 3], fraction, selection: Selection::Pooled });
        let settings = Settings { seed, ..settings(scheme) };
        let report = sparsify_dataset(&source, &target, &settings, |_| {}).unwrap();
        let all: u64 = report.cases.iter().map(|case| case.voxels()).sum();
        let annotated: u64 = report.cases.iter().map(|case| case.annotated).sum();
        // Nearer to the share than half the largest slice.
        let largest = (17 * 14) as f64;
        assert!(
            (annotated as f64 - fraction * all as f64).abs() <= largest / 2.0,
            "{annotated} of {all} for {fraction}"
        );
        for case in cases {
            let (sparse, dense) = (labels(&target, case), labels(&source, case));
            let chosen: [Vec<usize>; 3] = [0, 1, 2].map(|axis| kept(sparse.view(), axis));
            // Whole slices and nothing else: where enough of them cross, others are whole too.
            if fraction < 0.1 {
                assert_eq!(sparse, slices::keep(dense.view(), 3, &chosen).labels, "{case}");
            }
        }
        if fraction == 0.01 {
            assert!(
                report.warnings.iter().any(|line| line.contains("without any annotation")),
                "{:?}",
                report.warnings
            );
        }
        let again = place.path("again");
        sparsify_dataset(&source, &again, &Settings { overwrite: true, workers: 1, ..settings }, |_| {}).unwrap();
        assert!(cases.iter().all(|case| labels(&again, case) == labels(&target, case)));
    }
    place.succeeds(&[
        "sparsify",
        "dense",
        "-o",
        "x",
        "--scheme",
        "slices",
        "--pool",
        "--fraction",
        "0.02",
        "--axes",
        "z",
    ]);
    for how in ["even", "change", "nnunet"] {
        place.refuses(
            &["sparsify", "dense", "-o", "y", "--scheme", "slices", "--pool", "--select", how],
            &["pooled", "--select"],
        );
    }
    place.refuses(&["sparsify", "dense", "-o", "y", "--scheme", "scribbles", "--pool"], &["--pool", "scribbles"]);
}
