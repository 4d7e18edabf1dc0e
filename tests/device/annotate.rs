//! Completing annotated cases, and suggesting what to annotate, with trained models.

use crate::common::{device, phantom};
use ndarray::{Array3, Array4, Axis};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use voxgrad::Compat;
use voxgrad::annotate::{Assessment, Ensemble};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::{Fold, Split};
use voxgrad::dataset::{CaseFiles, Dataset, DatasetJson};
use voxgrad::exchange::{Format, TrainedFold, TrainedModel};
use voxgrad::io::{self, Geometry};
use voxgrad::predict;
use voxgrad::preprocess::{PreprocessedCase, Preprocessor, RawCase};
use voxgrad::train::{Model, Settings, Trainer, TrainingCases};

const CASES: usize = 4;
const IGNORE: i16 = phantom::IGNORE as i16;

fn names(cases: &[usize]) -> Vec<String> {
    cases.iter().map(|case| format!("case_{case:03}")).collect()
}

fn model_of(folder: &Path) -> Model {
    let plans = Plans::read(&folder.join("nnUNetPlans.json")).unwrap();
    Model::new(plans, "3d_fullres", DatasetJson::read(&folder.join("dataset.json")).unwrap()).unwrap()
}

/// Folds that have learned nothing, each with other weights; each holds other cases out.
fn untrained(folder: &Path, held_out: &[&[usize]]) -> TrainedModel {
    let (context, _guard) = device();
    let model = model_of(folder);
    let fold = |(index, held_out): (usize, &&[usize])| {
        let settings = Settings { seed: 7 + index as u64, mirror: [false, true, true], ..Settings::default() };
        let mut checkpoint = Trainer::new(context, model.clone(), settings).unwrap().checkpoint().unwrap();
        let (fold, compat) = (Fold::Index(index), Compat::Corrected);
        let train: Vec<usize> = (0..CASES).filter(|case| !held_out.contains(case)).collect();
        let split = Split { train: names(&train), val: names(held_out) };
        checkpoint.cases = Some(TrainingCases { fold, split, compat });
        TrainedFold { fold, path: folder.join(format!("fold_{index}")), checkpoint, trainer: None }
    };
    let folds = held_out.iter().enumerate().map(fold).collect();
    TrainedModel { model: model.clone(), mirror: [false, true, true], folds, notes: Vec::new() }
}

/// A dataset of spheres and a model folder beside it.
struct Place {
    _folder: tempfile::TempDir,
    root: PathBuf,
    data: PathBuf,
}

impl Place {
    fn new(held_out: &[&[usize]]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let (data, model) = (root.join("data"), root.join("model"));
        fs::create_dir(&data).unwrap();
        phantom::write(&data, CASES);
        untrained(&data, held_out).write(&model, Format::Safetensors).unwrap();
        Place { _folder: folder, root, data }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
        command.current_dir(&self.root).args(arguments).args(["--device", "cpu", "--step-size", "1"]);
        command.env_remove("nnUNet_raw").env_remove("nnUNet_preprocessed").env_remove("nnUNet_results");
        command.output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = said(&output);
        assert!(output.status.success(), "{arguments:?}: {said}");
        said
    }

    /// Refused with all of these words, and nothing changed.
    fn refuses(&self, arguments: &[&str], words: &[&str]) {
        let before = files(&self.root);
        let output = self.run(arguments);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{arguments:?}: no `{word}` in {said}"));
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(files(&self.root), before, "{arguments:?}");
    }

    fn labels(&self, folder: &str, case: usize) -> Array3<i16> {
        io::read_labels(&self.root.join(folder).join(format!("case_{case:03}.nii.gz"))).unwrap().data
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.root.join(file)).unwrap()).unwrap()
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}

fn preprocessed(folder: &Path, model: &Model, case: usize) -> (PreprocessedCase, Preprocessor) {
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let dataset = Dataset::open(folder).unwrap();
    let files = CaseFiles { label: None, ..dataset.cases[case].clone() };
    let prepared = preprocessor.run(RawCase::read(&files, &model.labels).unwrap()).unwrap();
    (prepared, preprocessor)
}

/// Sums may be added up in another order: a voxel of no margin at all may go either way.
fn assert_same_labels(found: &Assessment, labels: &Array3<u16>) {
    for ((&found, &label), &margin) in found.labels.iter().zip(labels).zip(&found.margin) {
        assert!(found == label || margin < 1e-4, "{found} instead of {label} with margin {margin}");
    }
}

/// Windows that do not overlap, so that mirroring the case is mirroring its windows: each member's logits one by one, and
/// everything else in f64 from them.
#[test]
fn an_assessment_is_what_its_members_say() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let trained = untrained(folder.path(), &[&[0], &[]]);
    let (case, preprocessor) = preprocessed(folder.path(), &trained.model, 0);
    let (context, _guard) = device();
    let settings = predict::Settings { step_size: 1.0, mirror: trained.mirror, ..Default::default() };
    let ensemble = Ensemble::new(context, &trained, settings).unwrap();
    let mut passes = 0;
    let found = ensemble.assess(&case, &[0, 1], &mut |_| {
        passes += 1;
        ControlFlow::Continue(())
    });
    let found = found.unwrap().unwrap();
    assert_eq!(passes, 2 * 4 * 8, "folds, mirrored copies, windows");
    let networks = trained.networks(context).unwrap();
    let labels = predict::segmentation(context, &networks, &case, &preprocessor, [8; 3], &settings, |_, _| ()).unwrap();
    assert_same_labels(&found, &labels);
    assert!(labels.iter().any(|&label| label == 0) && labels.iter().any(|&label| label == 1), "a telling case");

    let plain = predict::Settings { mirror: [false; 3], ..settings };
    let mut members: Vec<Vec<[f64; 2]>> = Vec::new();
    for network in &networks {
        for axes in [vec![], vec![1], vec![2], vec![1, 2]] {
            let mut mirrored = case.clone();
            axes.iter().for_each(|&axis| mirrored.data.invert_axis(Axis(axis + 1)));
            mirrored.data = mirrored.data.as_standard_layout().into_owned();
            let one = std::slice::from_ref(network);
            let logits = predict::logits(context, one, &mirrored, [8; 3], &plain, |_, _| ()).unwrap();
            let mut logits = Array4::from_shape_vec((16, 16, 16, 2), logits).unwrap();
            axes.iter().for_each(|&axis| logits.invert_axis(Axis(axis)));
            let softmax = |voxel: ndarray::ArrayView1<f32>| {
                let first = 1.0 / (1.0 + (f64::from(voxel[1]) - f64::from(voxel[0])).exp());
                [first, 1.0 - first]
            };
            members.push(logits.lanes(Axis(3)).into_iter().map(softmax).collect());
        }
    }
    let entropy = |p: [f64; 2]| -p.iter().map(|p| p * p.ln()).sum::<f64>();
    let mut largest = 0.0f64;
    for (voxel, ((&e, &d), (&m, &label))) in
        found.entropy.iter().zip(&found.disagreement).zip(found.margin.iter().zip(&found.labels)).enumerate()
    {
        let share = members.len() as f64;
        let first = members.iter().map(|member| member[voxel][0]).sum::<f64>() / share;
        let own = members.iter().map(|member| entropy(member[voxel])).sum::<f64>() / share;
        let mean = [first, 1.0 - first];
        let signed = mean[usize::from(label)] - mean[1 - usize::from(label)];
        assert!((f64::from(e) - entropy(mean)).abs() < 2e-6, "{voxel}: {e} {}", entropy(mean));
        assert!((f64::from(d) - (entropy(mean) - own)).abs() < 2e-6, "{voxel}: {d} {}", entropy(mean) - own);
        assert!((f64::from(m) - signed.max(0.0)).abs() < 2e-6, "{voxel}: {m} {signed}");
        largest = largest.max(f64::from(d));
    }
    assert!(largest > 1e-3, "members that never disagree show nothing");
    let stopped = ensemble.assess(&case, &[0], &mut |_| ControlFlow::Break(())).unwrap();
    assert!(stopped.is_none());
    assert!(ensemble.assess(&case, &[2], &mut |_| ControlFlow::Continue(())).is_err());
}

/// Overlapping windows, thick slices, other axes, a crop and regions: the labels are those that prediction gives, and every
/// map lies on the raw grid.
#[test]
fn an_assessment_lies_on_the_raw_grid() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let edit = |name: &str, change: &dyn Fn(&mut Value)| {
        let path = folder.path().join(name);
        let mut json = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
    };
    edit("dataset.json", &|json| {
        json["labels"] = serde_json::json!({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3});
        json["regions_class_order"] = serde_json::json!([1, 2]);
    });
    edit("nnUNetPlans.json", &|json| {
        json["transpose_forward"] = serde_json::json!([2, 0, 1]);
        json["transpose_backward"] = serde_json::json!([1, 2, 0]);
    });
    let shape = (9, 12, 14);
    let image = Array3::from_shape_fn(shape, |(z, y, x)| match (z, y, x) {
        (2.., 3.., ..12) => 60 + ((z * 7 + y * 5 + x * 3) % 31) as u8 * 4,
        _ => 0,
    });
    let geometry = Geometry::new([2.0, 0.8, 1.0]);
    io::write_labels(&phantom::image_path(folder.path(), 0), image.view(), &geometry).unwrap();
    let trained = untrained(folder.path(), &[&[0]]);
    let (case, preprocessor) = preprocessed(folder.path(), &trained.model, 0);
    assert_ne!(case.properties.shape_before_cropping, case.properties.shape_after_cropping);
    let (context, _guard) = device();
    let settings = predict::Settings { mirror: [false, false, true], ..Default::default() };
    let ensemble = Ensemble::new(context, &trained, settings).unwrap();
    let found = ensemble.assess(&case, &[0], &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
    let networks = trained.networks(context).unwrap();
    let labels = predict::segmentation(context, &networks, &case, &preprocessor, [8; 3], &settings, |_, _| ()).unwrap();
    assert_same_labels(&found, &labels);
    for map in [&found.margin, &found.entropy, &found.disagreement] {
        assert_eq!(map.dim(), shape);
    }
    for (place, &value) in image.indexed_iter() {
        let (z, y, x) = place;
        let outside = z < 2 || y < 3 || x >= 12;
        assert_eq!(outside, value == 0);
        let certain = found.entropy[place] == 0.0 && found.margin[place] == 1.0 && found.disagreement[place] == 0.0;
        assert_eq!(certain, outside, "{place:?}");
        assert!(found.disagreement[place] >= 0.0 && found.entropy[place] <= 1.4);
    }
}

/// Each case as the fold predicts it that held it out, and not as the other one does; annotated voxels as they were.
#[test]
fn cases_are_completed_by_the_fold_that_held_them_out() {
    let place = Place::new(&[&[0, 3], &[1, 2]]);
    let said = place.succeeds(&["complete", "data", "-o", "dense", "-m", "model"]);
    assert!(said.contains("case_003") && said.contains("sphere"), "{said}");
    for fold in ["0", "1"] {
        let out = format!("predicted_{fold}");
        place.succeeds(&["predict", "-i", "data/imagesTr", "-o", &out, "-m", "model", "-f", fold]);
    }
    for case in 0..CASES {
        let (annotation, completed) = (place.labels("data/labelsTr", case), place.labels("dense/labelsTr", case));
        let [own, other] = if [0, 3].contains(&case) { [0, 1] } else { [1, 0] };
        let [own, other] = [own, other].map(|fold| place.labels(&format!("predicted_{fold}"), case));
        let margin =
            io::read_image(&place.root.join(format!("dense/confidence/case_{case:03}_margin.nii.gz"))).unwrap();
        let mut different = 0;
        for (voxel, &annotated) in annotation.indexed_iter() {
            let expected = if annotated == IGNORE { own[voxel] } else { annotated };
            let tied = annotated == IGNORE && margin.data[voxel] < 1e-4;
            assert!(completed[voxel] == expected || tied, "{case} {voxel:?}");
            different += usize::from(annotated == IGNORE && own[voxel] != other[voxel]);
        }
        assert!(different > 50, "folds that say the same show nothing: {different}");
        let image = io::read_overview(&phantom::image_path(&place.data, case)).unwrap();
        for name in ["margin", "disagreement"] {
            let path = place.root.join(format!("dense/confidence/case_{case:03}_{name}.nii.gz"));
            let map = io::read_overview(&path).unwrap();
            assert_eq!(map.shape, image.shape);
            assert!(map.geometry.same_placement(&image.geometry, image.shape));
        }
    }
    // A whole dataset without an ignore label, which says where it comes from.
    let dense = Dataset::open(&place.root.join("dense")).unwrap();
    assert_eq!((dense.labels.ignore_label(), dense.cases.len()), (None, CASES));
    let report = place.json("dense/complete.json");
    assert_eq!(report["cases"][0]["folds"], serde_json::json!(["0"]));
    assert_eq!(report["cases"][1]["folds"], serde_json::json!(["1"]));
    for case in report["cases"].as_array().unwrap() {
        let sum = |field: &str| -> u64 {
            case["classes"].as_array().unwrap().iter().map(|class| class[field].as_u64().unwrap()).sum()
        };
        assert_eq!((sum("kept"), sum("completed"), sum("ignored")), (4 * 256, 12 * 256, 0));
        assert!(sum("agreeing") <= sum("kept") && case["held_out"] == true);
    }

    // With a least margin some stay ignored, exactly those below it.
    place.succeeds(&["complete", "data", "-o", "sure", "-m", "model", "--min-confidence", "0.2"]);
    assert_eq!(Dataset::open(&place.root.join("sure")).unwrap().labels.ignore_label(), Some(IGNORE));
    let margin = io::read_image(&place.root.join("sure/confidence/case_001_margin.nii.gz")).unwrap().data;
    let (annotation, sure) = (place.labels("data/labelsTr", 1), place.labels("sure/labelsTr", 1));
    let dense = place.labels("dense/labelsTr", 1);
    let mut ignored = 0;
    for (voxel, &label) in sure.indexed_iter() {
        let left = annotation[voxel] == IGNORE && margin[voxel] < 0.2;
        ignored += usize::from(left);
        assert_eq!(label, if left { IGNORE } else { dense[voxel] }, "{voxel:?}");
    }
    assert!(ignored > 0 && ignored < 12 * 256, "{ignored}");

    // What is there stays, and is replaced when that is asked for, by the same bytes.
    place.refuses(&["complete", "data", "-o", "dense", "-m", "model"], &["dense", "exists", "--overwrite"]);
    let before = files(&place.root.join("dense/labelsTr"));
    place.succeeds(&["complete", "data", "-o", "dense", "-m", "model", "--overwrite"]);
    assert_eq!(files(&place.root.join("dense/labelsTr")), before);
}

#[test]
fn what_cannot_be_completed_is_refused_by_name() {
    let place = Place::new(&[&[0, 3]]);
    let complete = ["complete", "data", "-o", "dense", "-m", "model"];
    place.refuses(&complete, &["2 cases", "case_001, case_002", "folds 0", "--all-folds"]);
    place.refuses(&["complete", "data", "-o", "dense", "-m", "model", "-f", "0", "1"], &["fold 1", "folds 0 are here"]);
    place.refuses(&["complete", "data", "-o", "dense", "-m", "model", "--min-confidence", "2"], &["least margin", "2"]);
    place.refuses(&["complete", "data", "-o", "dense"], &["-m FOLDER"]);
    place.refuses(&["complete", "data", "-o", "data/dense", "-m", "model", "--all-folds"], &["lies in the source"]);
    place.refuses(&["suggest", "data", "-o", "next", "-m", "model", "--held-out"], &["case_001, case_002"]);
    place.refuses(&["suggest", "data", "-o", "next", "-m", "model", "--count", "0"], &["count", "0"]);
    place.refuses(&["suggest", "data", "-o", "next", "-m", "model", "--block", "4"], &["--block", "slices"]);
    place.refuses(&["suggest", "data", "-o", "data", "-m", "model", "--overwrite"], &["data", "imagesTr"]);
    let said = place.succeeds(&["complete", "data", "-o", "dense", "-m", "model", "--all-folds"]);
    assert!(said.contains("0*"), "{said}");

    // Everything is annotated now.
    place.refuses(
        &["complete", "dense", "-o", "again", "-m", "model", "--all-folds"],
        &["nothing to complete", "ignore"],
    );
    place.refuses(&["suggest", "dense", "-o", "next", "-m", "model"], &["nothing to suggest"]);

    // Another dataset, and a label that nobody declared.
    let text = fs::read_to_string(place.data.join("dataset.json")).unwrap();
    fs::write(place.data.join("dataset.json"), text.replace("sphere", "cube").replace("MRI", "CT")).unwrap();
    for verb in ["complete", "suggest"] {
        let arguments = [verb, "data", "-o", "next", "-m", "model"];
        place.refuses(&arguments, &["another dataset", "channels", "CT", "the model has sphere 1, the dataset cube 1"]);
    }
    fs::write(place.data.join("dataset.json"), text).unwrap();
    let seven = Array3::from_elem((16, 16, 16), 7u8);
    io::write_labels(&phantom::label_path(&place.data, 2), seven.view(), &Geometry::new([1.0; 3])).unwrap();
    place.refuses(&["complete", "data", "-o", "next", "-m", "model", "--all-folds"], &["case_002", "7"]);
}

#[test]
fn suggestions_leave_out_what_is_annotated() {
    let place = Place::new(&[&[0, 3], &[1, 2]]);
    let suggest = ["suggest", "data", "-o", "next", "-m", "model", "--count", "10"];
    let said = place.succeeds(&suggest);
    assert!(said.contains("by folds that trained on them too"), "{said}");
    let table = fs::read_to_string(place.root.join("next/suggestions.csv")).unwrap();
    let lines: Vec<Vec<&str>> = table.lines().skip(1).map(|line| line.split(',').collect()).collect();
    assert_eq!(lines.len(), 10);
    let mut firsts: Vec<&str> = lines[..CASES].iter().map(|line| line[1]).collect();
    firsts.sort_unstable();
    firsts.dedup();
    assert!(firsts.len() >= 3, "cases take turns: {table}");
    for (index, line) in lines.iter().enumerate() {
        let z: usize = line[2].parse().unwrap();
        assert_eq!(line[0].parse::<usize>().unwrap(), index + 1);
        assert!(z % 4 != 1, "slice {z} is annotated throughout");
        let mask = io::read_labels(&place.root.join(format!("next/masks/{}.nii.gz", line[1]))).unwrap().data;
        assert!(mask.index_axis(Axis(0), z).iter().all(|&rank| rank == index as i16 + 1), "{line:?}");
        let same_case = |other: &&Vec<&str>| other[1] == line[1] && other[0] != line[0] && other[11] == line[11];
        let apart = lines.iter().filter(same_case).map(|other| other[2].parse::<usize>().unwrap().abs_diff(z));
        apart.for_each(|apart| assert!(apart > 3, "neighbours in one round: {table}"));
        let picture = place.root.join(format!("next/previews/{:03}_{}.png", index + 1, line[1]));
        assert!(image::open(picture).unwrap().width() > 400);
    }
    for case in 0..CASES {
        let image = io::read_overview(&phantom::image_path(&place.data, case)).unwrap();
        for folder in ["uncertainty", "segmentations"] {
            let map = io::read_overview(&place.root.join(format!("next/{folder}/case_{case:03}.nii.gz"))).unwrap();
            assert!(map.shape == image.shape && map.geometry.same_placement(&image.geometry, image.shape));
        }
    }
    assert_eq!(fs::read_to_string(place.root.join("next/cases.csv")).unwrap().lines().count(), CASES + 1);

    place.refuses(&suggest, &["next", "exists", "--overwrite"]);
    let before = files(&place.root.join("next"));
    place.succeeds(&[&suggest[..], &["--overwrite"]].concat());
    assert_eq!(files(&place.root.join("next")), before, "the same to the byte");

    // Blocks, by disagreement, of images without any annotation too.
    fs::create_dir(place.root.join("more")).unwrap();
    fs::copy(phantom::image_path(&place.data, 0), place.root.join("more/new_0000.nii.gz")).unwrap();
    let blocks = ["--unit", "blocks", "--block", "6", "--by", "disagreement", "--images", "more", "--held-out"];
    place.succeeds(&[&["suggest", "data", "-o", "blocks", "-m", "model", "--count", "8"], &blocks[..]].concat());
    let report = place.json("blocks/suggestions.json");
    let new = report["cases"].as_array().unwrap().iter().find(|case| case["case"] == "new").unwrap();
    assert_eq!((&new["open"], &new["folds"]), (&4096.into(), &serde_json::json!(["0", "1"])));
    for one in report["suggestions"].as_array().unwrap() {
        let case = one["case"].as_str().unwrap();
        let mask = io::read_labels(&place.root.join(format!("blocks/masks/{case}.nii.gz"))).unwrap().data;
        let rank = one["rank"].as_i64().unwrap();
        let asked = mask.iter().filter(|&&here| i64::from(here) == rank).count();
        assert_eq!((Value::from(asked), &one["place"]["extent"]), (one["place"]["open"].clone(), &[6, 6, 6].into()));
    }
}
