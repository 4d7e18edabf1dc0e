//! `voxgrad benchmark`: what it measures, what it refuses, what it writes.

use crate::common::phantom;
use crate::common::place::{json, text};
use std::path::Path;
use std::process::{Command, Output};

fn voxgrad(arguments: &[&str]) -> Output {
    let arguments = [&["benchmark", "--device", "cpu"], arguments].concat();
    Command::new(env!("CARGO_BIN_EXE_voxgrad")).args(arguments).output().unwrap()
}

fn refused(arguments: &[&str], words: &[&str]) {
    let result = voxgrad(arguments);
    let said = text(&result.stderr);
    assert_eq!(result.status.code(), Some(2), "{arguments:?}: {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "no `{word}` in: {said}"));
    assert!(!said.contains("panicked"), "{said}");
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().unwrap().into()
}

#[test]
fn plans_are_timed_on_random_data_and_on_the_cases_beside_them() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 5);
    let (plans, file) = (path(folder.path(), "nnUNetPlans.json"), path(folder.path(), "benchmark.json"));
    let short = ["--epochs", "2", "--iterations", "2", "--validation-iterations", "1"];
    let result = voxgrad(&[&[&plans, "3d_fullres", "--profile", "--json", &file], &short[..]].concat());
    let (said, noted) = (text(&result.stdout), text(&result.stderr));
    assert!(result.status.success(), "{said}{noted}");
    for words in
        ["multiply-add peak", "conv3d/", "between", "scratch", "random data: fastest of 2", "real cases: fastest of 2"]
    {
        assert!(said.contains(words), "no `{words}` in: {said}");
    }
    let report = json(Path::new(&file));
    assert_eq!(report["voxgrad"], env!("CARGO_PKG_VERSION"));
    assert!(report["cubecl"].as_str().unwrap().starts_with("0."), "{report}");
    assert_eq!(report["workload"]["features"], serde_json::json!([4, 8]));
    for kind in ["without_loading", "with_loading"] {
        let epochs: Vec<f64> =
            report[kind]["epochs"].as_array().unwrap().iter().map(|epoch| epoch["wall"].as_f64().unwrap()).collect();
        assert_eq!(epochs.len(), 2);
        assert_eq!(report[kind]["fastest_epoch"].as_f64().unwrap(), epochs[0].min(epochs[1]));
    }
    assert!(report["with_loading"]["epochs"][0]["load"].as_f64().unwrap() > 0.0);
    assert!(!report["profile"]["launches"].as_array().unwrap().is_empty());

    // What is there is not replaced silently, and nothing is measured for it.
    let before = std::fs::read(&file).unwrap();
    refused(&[&plans, "--json", &file], &["benchmark.json", "it exists", "--overwrite"]);
    assert_eq!(std::fs::read(&file).unwrap(), before);
    let again = ["--features", "4,8", "--patch", "8,8,8", "--epochs", "0", "--profile", "--json", &file, "--overwrite"];
    assert!(voxgrad(&again).status.success());
    let report = json(Path::new(&file));
    assert_eq!(
        (&report["workload"]["patch"], &report["without_loading"]),
        (&serde_json::json!([8, 8, 8]), &serde_json::Value::Null)
    );
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    refused(&[], &["PLANS", "--features"]);
    refused(&["--features", "8,16"], &["--patch"]);
    refused(&["--features", "8,16", "--patch", "8,8"], &["--patch", "z,y,x"]);
    refused(&["--features", "8,16", "--patch", "8,8,9"], &["patch", "multiples"]);
    refused(&["--features", "8", "--patch", "8,8,8", "--classes", "1"], &["2 faults", "features", "classes"]);
    refused(&["--features", "8,16", "--patch", "8,8,8", "--epochs", "0"], &["--epochs 0", "--profile"]);
    refused(&["--features", "8,16", "--patch", "8,8,8", "--iterations", "0"], &["--iterations 0"]);
    refused(&[&path(folder.path(), "none.json")], &["none.json"]);
    phantom::write(folder.path(), 5);
    let plans = path(folder.path(), "nnUNetPlans.json");
    refused(&[&plans, "--features", "8,16", "--patch", "8,8,8"], &["--features"]);
    refused(&[&plans, "3d_lowres"], &["3d_lowres", "3d_fullres"]);
    // Before anything is measured, which would be lost.
    let nowhere = path(folder.path(), "none/benchmark.json");
    refused(&[&plans, "--json", &nowhere], &["--json", "no folder"]);
    std::fs::remove_dir_all(folder.path().join("imagesTr")).unwrap();
    refused(&[&plans, "--profile"], &["--no-data-loading"]);
    assert!(!text(&voxgrad(&[&plans, "--profile"]).stderr).contains("the first step"));
    std::fs::remove_file(folder.path().join("dataset.json")).unwrap();
    refused(&[&plans], &["dataset.json"]);
}
