//! `voxgrad evaluate`, `evaluate-folder` and `evaluate-simple`: nnU-Net's summary to the byte, the table, bad input.

use crate::common::data;
use crate::common::place::text;
use ndarray::Array3;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use voxgrad::dataset::LabelGroup;
use voxgrad::eval::{Classes, JointHistogram, evaluate_case};
use voxgrad::io::{Geometry, write_labels};

fn folder(name: &str) -> PathBuf {
    data("evaluation").join(name)
}

/// Runs in a folder, so that the summary names files as nnU-Net's does there.
fn voxgrad(place: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_voxgrad")).args(arguments).current_dir(place).output().unwrap()
}

fn succeeds(place: &Path, arguments: &[&str]) -> String {
    let result = voxgrad(place, arguments);
    assert!(result.status.success(), "{arguments:?}: {}", text(&result.stderr));
    text(&result.stdout)
}

fn refused(place: &Path, arguments: &[&str], words: &[&str]) {
    let result = voxgrad(place, arguments);
    let said = text(&result.stderr);
    assert_eq!(result.status.code(), Some(2), "{arguments:?}: {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "no `{word}` in: {said}"));
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn summaries_are_nnunets_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("a name with blanks.json");
    let output = output.to_str().unwrap();
    for name in ["labels", "regions"] {
        let expected = fs::read_to_string(folder(name).join("summary.json")).unwrap();
        let theirs = ["-djfile", "dataset.json", "-pfile", "plans.json", "-np", "1", "-o", output];
        let said = succeeds(&folder(name), &[&["evaluate-folder", "references", "predictions"], &theirs[..]].concat());
        assert_eq!(fs::read_to_string(output).unwrap(), expected);
        assert!(said.contains("over 6 cases") || said.contains("in 6 cases"), "{said}");
        succeeds(
            &folder(name),
            &["evaluate", "references", "predictions", "--dataset-json", "dataset.json", "-o", output],
        );
        assert_eq!(fs::read_to_string(output).unwrap(), expected);
        let listed: &[&str] =
            if name == "labels" { &["-l", "1", "2", "3", "-il", "4"] } else { &["-l", "(1, 2)", "(2,)"] };
        let simple = ["evaluate-simple", "references", "predictions", "-o", output];
        succeeds(&folder(name), &[&simple[..], listed].concat());
        assert_eq!(fs::read_to_string(output).unwrap(), expected);
    }
    // Background is scored where it is listed, and in no mean.
    let simple = ["evaluate-simple", "references", "predictions", "-o", output, "-l", "0", "1", "2", "3", "-il", "4"];
    succeeds(&folder("labels"), &simple);
    let [found, expected] = [Path::new(output), &folder("labels").join("summary.json")].map(|path| {
        serde_json::from_str::<serde_json::Value>(&fs::read_to_string(path).unwrap().replace("NaN", "null")).unwrap()
    });
    assert_eq!(found["foreground_mean"], expected["foreground_mean"]);
    assert!(found["mean"]["0"]["Dice"].as_f64().unwrap() > 0.9);
}

#[test]
fn the_table_tells_how_sure_and_of_how_much() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("summary.json");
    let csv = dir.path().join("cases.csv");
    let [output, csv] = [&output, &csv].map(|path| path.to_str().unwrap());
    let base = ["evaluate", "references", "predictions", "--dataset-json", "dataset.json", "-o", output];
    let said = succeeds(
        &folder("labels"),
        &[&base[..], &["--csv", csv, "--surfaces", "elements", "--tolerance", "2"]].concat(),
    );
    for metric in ["Dice", "HD95 mm", "ASSD mm", "NSD 2 mm"] {
        let lines = said.lines().filter(|line| line.contains(&format!("  {metric} ")) && line.contains(" to ")).count();
        assert_eq!(lines, 3, "{metric}: {said}");
    }
    // One slice of twelve and one row of fifteen are not annotated: 77 % are.
    let line = said.lines().find(|line| line.contains("kidney") && line.contains("Dice")).unwrap();
    assert!(line.contains("5/6") && line.trim_end().ends_with("85.56 %"), "{line}");
    assert!(said.contains("surfaces are made of elements"), "{said}");
    let table = fs::read_to_string(csv).unwrap();
    assert_eq!(table.lines().count(), 1 + 6 * 3);
    assert!(table.lines().skip(1).all(|line| line.ends_with(",elements")));
    let said = succeeds(&folder("labels"), &[&base[..], &["--distances"]].concat());
    assert!(said.contains("surfaces are made of voxels"), "{said}");
}

#[test]
fn bad_input_is_named() {
    let place = folder("labels");
    let simple = ["evaluate-simple", "references", "predictions", "-l"];
    refused(&place, &[&simple[..], &["one"]].concat(), &["`one` is no label", "(1, 2, 3)"]);
    refused(&place, &[&simple[..], &["1", "1"]].concat(), &["1 twice"]);
    refused(&place, &[&simple[..], &["1", "4", "-il", "4"]].concat(), &["no label that is ignored"]);
    let base = ["evaluate-folder", "references", "predictions", "-djfile", "dataset.json"];
    refused(&place, &[&base[..], &["--tolerance", "1"]].concat(), &["--distances or --csv FILE"]);
    refused(&place, &[&base[..], &["-np", "0"]].concat(), &["--workers"]);
    refused(&place, &[&base[..3], &["-djfile", "nowhere.json"]].concat(), &["nowhere.json"]);
    refused(&place, &[&base[..], &["-pfile", "dataset.json"]].concat(), &["dataset.json"]);

    // All that is wrong with files, at once.
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, shape: [usize; 3], spacing: [f64; 3]| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_labels(&path, Array3::<u8>::ones(shape).view(), &Geometry::new(spacing)).unwrap();
    };
    write("references/größe 1.nii.gz", [3, 4, 5], [1.0; 3]);
    write("predictions/größe 1.nii.gz", [3, 4, 6], [1.0; 3]);
    write("references/abstand.nii.gz", [3, 4, 5], [1.0; 3]);
    write("predictions/abstand.nii.gz", [3, 4, 5], [1.0, 2.0, 1.0]);
    write("references/missing.nii.gz", [3, 4, 5], [1.0; 3]);
    write("predictions/病例.nii.gz", [3, 4, 5], [1.0; 3]);
    let words = ["größe 1.nii.gz", "shape", "abstand.nii.gz", "spacing", "missing.nii.gz", "病例.nii.gz", "4 faults"];
    refused(dir.path(), &["evaluate-simple", "references", "predictions", "-l", "1"], &words);
    assert!(!dir.path().join("predictions/summary.json").exists());
    write("predictions/other.nii", [3, 4, 5], [1.0; 3]);
    refused(
        dir.path(),
        &["evaluate-simple", "references", "predictions", "-l", "1"],
        &["files ending in .nii.gz and in .nii"],
    );
    refused(dir.path(), &["evaluate-simple", "references", "nowhere", "-l", "1"], &["nowhere"]);
}

/// One pass over both maps counts what a pass for each label does.
#[test]
fn joint_counts_are_those_of_each_label() {
    let noise = crate::common::uniform(4, 2 * 7 * 9 * 11);
    let map = |from: usize| {
        // Long runs, so that whole pieces are skipped, and labels beyond a byte.
        Array3::from_shape_fn((7, 9, 11), |(z, y, x)| {
            let value = noise[from + (z * 9 + y) * 11 + x];
            if y < 5 { 300 * i16::from(z % 2 == 0) } else { (value * 3.0) as i16 + 2 }
        })
    };
    let (prediction, reference) = (map(0), map(7 * 9 * 11));
    let groups =
        [LabelGroup::Label(300), LabelGroup::Label(1), LabelGroup::Region(vec![2, 3, 4]), LabelGroup::Label(77)];
    let found = evaluate_case(prediction.view(), reference.view(), &groups, Some(4));
    for (group, found) in groups.iter().zip(found) {
        let mut counts = [0; 4];
        for (p, t) in prediction.iter().zip(&reference).filter(|(_, t)| **t != 4) {
            counts[2 * usize::from(group.contains(*p)) + usize::from(group.contains(*t))] += 1;
        }
        let found = [found.true_negatives, found.false_negatives, found.false_positives, found.true_positives];
        assert_eq!(found, counts, "{group}");
    }
    // Whatever the layout of the maps.
    let (turned, reference) = (prediction.t(), reference.t());
    let joint = JointHistogram::count(turned, reference);
    assert_eq!(joint.pairs().iter().map(|(_, _, voxels)| voxels).sum::<u64>(), 7 * 9 * 11);
    assert!(Classes::listed(Vec::new(), None).is_err());
}
