//! Annotations as people draw them: unlabelled values, several annotators, one mask a class, and bad input.

use crate::common::sparse::{LABELS, Place, REGIONS, labels};
use ndarray::Array3;
use std::fs;
use std::path::Path;
use voxgrad::dataset::Dataset;
use voxgrad::io::{Geometry, write_labels};

const SPACING: [f64; 3] = [2.0, 1.0, 0.5];

fn write(path: &Path, map: &Array3<i16>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_labels(path, map.mapv(|label| label as u8).view(), &Geometry::new(SPACING)).unwrap();
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// What `import` is called with, before its options.
fn import<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&["import", "dense", "-o", "sparse"], options].concat()
}

#[test]
fn an_unlabelled_value_becomes_ignored() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], LABELS);
    // Scribbles over 0, background drawn with 9, another spelling of Posterior: 7.
    let dense = labels(&source, "a");
    let drawn = Array3::from_shape_fn(dense.dim(), |at| match (at.0 % 3, dense[at]) {
        (0, 0) => 9,
        (0, 2) => 7,
        (0, label) => label,
        _ => 0,
    });
    write(&place.path("drawn/a.nii.gz"), &drawn);
    let said =
        place.succeeds(&import(&["--labels", "drawn", "--unlabelled", "0", "--map", "9=background,7=Posterior"]));
    let imported = labels(&place.path("sparse"), "a");
    for (at, &label) in dense.indexed_iter() {
        assert_eq!(imported[at], if at.0 % 3 == 0 { label } else { 3 }, "{at:?}");
    }
    let count = |value: i16| drawn.iter().filter(|&&label| label == value).count();
    for (value, name) in [(9, "background"), (7, "Posterior")] {
        let line = format!("{} voxels of value {value} were turned into {name}", count(value));
        assert!(said.contains(&line), "no `{line}` in {said}");
    }
    assert!(said.contains(&format!("{} voxels", count(0))) && said.contains("left out: b"), "{said}");
    let dataset = Dataset::open(&place.path("sparse")).unwrap();
    assert_eq!((dataset.case_names(), dataset.labels.ignore_label()), (vec!["a".to_owned()], Some(3)));
    let rules = json(&place.path("sparse/dataset.json"))["annotation"]["rules"].to_string();
    assert!(rules.contains("value 0 is unlabelled") && rules.contains("value 9 is background"), "{rules}");
    assert_eq!(json(&place.path("sparse/import.json"))["turned"]["a"]["unlabelled"], count(0));

    // Without the background's value nothing is background: said, not passed over.
    let said =
        place.succeeds(&import(&["--labels", "drawn", "--unlabelled", "0", "--map", "9=ignore,7=2", "--overwrite"]));
    assert!(said.contains("background is annotated nowhere"), "{said}");
}

#[test]
fn annotators_who_disagree_are_ignored() {
    let place = Place::new();
    let source = place.dataset(&["a"], LABELS);
    let dense = labels(&source, "a");
    // Columns 0 to 3 of the first annotator, 2 to 5 of the second, who sees column 3 otherwise.
    let first = Array3::from_shape_fn(dense.dim(), |at| if at.2 < 4 { dense[at] } else { 99 });
    let second = Array3::from_shape_fn(dense.dim(), |at| match at.2 {
        3 => (dense[at] + 1) % 3,
        2 | 4 | 5 => dense[at],
        _ => 99,
    });
    write(&place.path("first/a.nii.gz"), &first);
    write(&place.path("second/a.nii.gz"), &second);
    let options = ["--labels", "first", "--labels", "second", "--unlabelled", "99"];
    let said = place.succeeds(&import(&options));
    let (imported, (depth, rows, columns)) = (labels(&place.path("sparse"), "a"), dense.dim());
    for (at, &label) in dense.indexed_iter() {
        let expected = if at.2 == 3 || at.2 > 5 { 3 } else { label };
        assert_eq!(imported[at], expected, "{at:?}");
    }
    assert!(said.contains(&format!("{} voxels on which annotators disagree", depth * rows)), "{said}");
    let turned = &json(&place.path("sparse/import.json"))["turned"]["a"];
    assert_eq!((&turned["files"], &turned["unlabelled"]), (&2.into(), &(depth * rows * (columns - 6)).into()));
}

#[test]
fn masks_of_classes() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], LABELS);
    let dense = labels(&source, "a");
    let mask =
        |inside: &dyn Fn((usize, usize, usize)) -> bool| Array3::from_shape_fn(dense.dim(), |at| i16::from(inside(at)));
    // The two masks overlap in row 0.
    write(&place.path("masks/a/segmentations/Anterior.nii.gz"), &mask(&|at| dense[at] == 1 || at.1 == 0));
    write(&place.path("masks/a/segmentations/Posterior.nii.gz"), &mask(&|at| dense[at] == 2 || at.1 == 0));
    write(&place.path("masks/a/segmentations/liver.nii.gz"), &dense);
    let expect = |options: &[&str], row: i16, outside: i16| {
        let said = place.succeeds(&import(&[&["--masks", "masks", "--overwrite"], options].concat()));
        let imported = labels(&place.path("sparse"), "a");
        for (at, &label) in dense.indexed_iter() {
            let expected = if at.1 == 0 {
                row
            } else if label == 0 {
                outside
            } else {
                label
            };
            assert_eq!(imported[at], expected, "{options:?} {at:?}");
        }
        let (depth, _, columns) = dense.dim();
        assert!(said.contains(&format!("{} voxels in masks or segments of several", depth * columns)), "{said}");
        assert!(said.contains("liver.nii.gz"), "{said}");
    };
    expect(&[], 3, 0);
    expect(&["--overlap", "first"], 1, 0);
    expect(&["--overlap", "last", "--outside", "ignore"], 2, 3);

    fs::remove_file(place.path("masks/a/segmentations/Posterior.nii.gz")).unwrap();
    place.refuses(&import(&["--masks", "masks", "--overwrite"]), &["case a", "no mask of Posterior", "empty"]);
    place.succeeds(&import(&["--masks", "masks", "--overwrite", "--missing-is-empty"]));
    assert!(labels(&place.path("sparse"), "a").iter().all(|&label| label != 2));
}

#[test]
fn masks_of_regions_are_painted_in_order() {
    let place = Place::new();
    let source = place.dataset(&["a"], REGIONS);
    let dense = labels(&source, "a");
    write(&place.path("masks/a/hippocampus.nii.gz"), &dense.mapv(|label| i16::from(label > 0)));
    write(&place.path("masks/a/anterior.nii.gz"), &dense.mapv(|label| i16::from(label == 1)));
    let said = place.succeeds(&import(&["--masks", "masks"]));
    assert_eq!(labels(&place.path("sparse"), "a"), dense);
    assert!(!said.contains("of several"), "{said}");
}

#[test]
fn bad_annotations_are_refused() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], LABELS);
    let drawn = |case: &str| labels(&source, case);
    write(&place.path("drawn/a.nii.gz"), &drawn("a").mapv(|label| label + 4));
    write(&place.path("drawn/b.nii.gz"), &drawn("a"));
    // All cases at once: undeclared values, another shape.
    place.refuses(&import(&["--labels", "drawn"]), &["2 faults", "case a", "label 4", "case b", "shape"]);
    write(&place.path("drawn/c.nii.gz"), &drawn("a"));
    place.refuses(&import(&["--labels", "drawn"]), &["annotated case `c`"]);
    place.refuses(&import(&["--labels", "imagesTr"]), &["imagesTr"]);
    place.refuses(&import(&["--labels", "."]), &["no annotation found", "<case>.nii.gz"]);
    place.refuses(&import(&["--labels", "drawn", "--map", "4=liver"]), &["`liver`", "Anterior"]);
    place.refuses(&import(&["--labels", "drawn", "--map", "4=1,4=2"]), &["twice"]);
    place.refuses(&import(&["--labels", "drawn", "--map", "4=1", "--unlabelled", "4"]), &["unlabelled", "one thing"]);
    place.refuses(&import(&["--labels", "drawn", "--outside", "ignore"]), &["--masks"]);
    place.refuses(&import(&["--masks", "drawn", "--unlabelled", "0"]), &["--unlabelled"]);
    // Drawn on another grid: refused unless it is meant.
    fs::remove_file(place.path("drawn/b.nii.gz")).unwrap();
    fs::remove_file(place.path("drawn/c.nii.gz")).unwrap();
    let map = drawn("a").mapv(|label| label as u8);
    write_labels(&place.path("drawn/a.nii.gz"), map.view(), &Geometry::new([1.0; 3])).unwrap();
    place.refuses(&import(&["--labels", "drawn"]), &["case a", "same grid"]);
    let said = place.succeeds(&import(&["--labels", "drawn", "--by-index"]));
    assert!(said.contains("voxel by voxel"), "{said}");
    assert_eq!(labels(&place.path("sparse"), "a"), drawn("a"));
}
