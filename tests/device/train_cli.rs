//! `voxgrad train` as `nnUNetv2_train` is typed: places, options, files; what is not offered is refused by name.

use crate::common::place::{Place, json};
use crate::common::{device, phantom};
use std::fs;
use std::path::Path;
use voxgrad::Error;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::error::{ExchangeError, TrainError};
use voxgrad::exchange::load_pretrained;
use voxgrad::io;
use voxgrad::parameters::Slot;
use voxgrad::predict::PROBABILITIES;
use voxgrad::report::EventFile;
use voxgrad::train::{Model, Settings, Trainer};

const DATASET: &str = "Dataset007_Spheres";
const SHORT: [&str; 8] =
    ["--device", "cpu", "--iterations", "1", "--validation-iterations", "1", "--disable_tta", "--augmentation=mirror"];

fn names(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = files.collect();
    names.sort();
    names
}

#[test]
fn places_and_files_as_nnunets() {
    let place = Place::with_spheres(DATASET, 5);
    place.succeeds(&["preprocess", "-d", "7"]);
    fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["train", "7", "3d_fullres", "1"], &SHORT[..], more].concat()
    }
    let said = place.succeeds(&train(&["--epochs", "2", "--val_best"]));
    assert!(said.contains("validating with") && said.contains("checkpoint_best"), "{said}");
    let folder = place.path("results").join(DATASET).join("voxgradTrainer__nnUNetPlans__3d_fullres/fold_1");
    let present = names(&folder);
    let log = present.iter().find(|name| name.starts_with("training_log_") && name.ends_with(".txt")).unwrap();
    for name in ["checkpoint_best.safetensors", "checkpoint_final.safetensors", "progress.png", "validation"] {
        assert!(present.iter().any(|present| present == name), "no {name} in {present:?}");
    }
    assert!(!present.iter().any(|name| name.contains("latest")), "{present:?}");
    let log = fs::read_to_string(folder.join(log)).unwrap();
    for words in
        [": Epoch 1\n", ": Current learning rate: 0.0", ": train_loss ", ": Pseudo dice [", "Validation Dice:  "]
    {
        assert!(log.contains(words), "no `{words}` in {log}");
    }
    let about = json(&folder.join("debug.json"));
    assert_eq!((&about["fold"], &about["settings"]["epochs"]), (&"1".into(), &2.into()));
    let lines = fs::read_to_string(folder.join("epochs.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 2);
    assert_eq!(names(&folder.join("tensorboard")).len(), 1);
    assert!(folder.join("validation/summary.json").is_file());

    // Once it is preprocessed, raw files are not needed, not even to score.
    let summary = json(&folder.join("validation/summary.json"));
    fs::remove_dir_all(folder.join("validation")).unwrap();
    fs::remove_dir_all(place.path("raw").join(DATASET)).unwrap();
    fs::copy(
        folder.parent().unwrap().join("dataset.json"),
        place.path("preprocessed").join(DATASET).join("dataset.json"),
    )
    .unwrap();
    let said = place.succeeds(&train(&["--val", "--val_best"]));
    assert!(said.contains("no pictures"), "{said}");
    let again = json(&folder.join("validation/summary.json"));
    assert_eq!(again["foreground_mean"], summary["foreground_mean"]);
    assert!(!again["foreground_mean"]["Dice"].is_null());
    let before = fs::metadata(folder.join("checkpoint_final.safetensors")).unwrap().modified().unwrap();
    place.succeeds(&train(&["--val", "--npz"]));
    let of = |ending: &str| -> Vec<String> {
        let files = names(&folder.join("validation"));
        files.iter().filter_map(|name| name.strip_suffix(ending)).map(String::from).collect()
    };
    let cases = of(".nii.gz");
    assert!(!cases.is_empty() && of(".npz") == cases && of(".pkl") == cases, "{cases:?}");
    let probabilities =
        io::read_npz_array(&folder.join("validation").join(format!("{}.npz", cases[0])), PROBABILITIES).unwrap();
    let [background, sphere] = [0, 1].map(|head| probabilities.index_axis(ndarray::Axis(0), head));
    assert!(background.iter().zip(sphere).all(|(a, b)| (a + b - 1.0).abs() < 1e-6));
    assert_eq!(fs::metadata(folder.join("checkpoint_final.safetensors")).unwrap().modified().unwrap(), before);

    // Another fold begins with its weights, and keeps none of its own.
    let weights = folder.join("checkpoint_final.safetensors");
    let more = ["--epochs", "1", "-pretrained_weights", weights.to_str().unwrap(), "--disable_checkpointing"];
    let said = place.succeeds(&[&["train", "7", "3d_fullres", "all"], &SHORT[..], &more].concat());
    assert!(said.contains("no checkpoint was written") && said.contains("begins with"), "{said}");
    let present = names(&folder.with_file_name("fold_all"));
    assert!(!present.iter().any(|name| name.contains("checkpoint")), "{present:?}");
}

#[test]
fn what_is_not_offered_is_refused_by_name() {
    let place = Place::with_spheres(DATASET, 5);
    let refuse = |more: &[&str], words: &[&str]| {
        place.refuses(&[&["train", "7", "3d_fullres"], more, &["--device", "cpu"]].concat(), words);
    };
    refuse(&["0", "-num_gpus", "2"], &["-num_gpus is 2", "cuda:0"]);
    refuse(&["5"], &["fold 5", "folds 0 to 4, and `all`"]);
    refuse(&["five"], &["five", "`all` or a number"]);
    refuse(&["0", "--val"], &["--val needs", "checkpoint_final"]);
    refuse(&["0", "--val", "--val_best"], &["--val --val-best needs", "checkpoint_best"]);
    refuse(&["0", "--val", "--c"], &["--val", "--continue", "cannot be used with"]);
    refuse(&["0", "--val", "-pretrained_weights", "x"], &["--val", "--pretrained-weights"]);
    refuse(&["0", "--val_best", "--disable_checkpointing"], &["cannot be used with"]);
    refuse(&["0", "-f", "1"], &["cannot be used with"]);
    let zip = place.path("weights.pth");
    fs::write(&zip, b"PK\x03\x04 and more").unwrap();
    refuse(&["0", "-pretrained_weights", zip.to_str().unwrap()], &["weights.pth"]);
    place.refuses(&["train", "8", "3d_fullres", "0"], &["8", DATASET]);
    assert_eq!(names(&place.path("results")), Vec::<String>::new());
}

#[test]
fn weights_to_begin_with() {
    let (context, _guard) = device();
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let dataset = Dataset::open(folder.path()).unwrap();
    let file = folder.path().join("nnUNetPlans.json");
    let model = |features: [usize; 2]| {
        let mut plans = json(&file);
        let network = &mut plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"];
        network["features_per_stage"] = features.to_vec().into();
        fs::write(&file, plans.to_string()).unwrap();
        Model::new(Plans::read(&file).unwrap(), "3d_fullres", dataset.json.clone()).unwrap()
    };
    let weights = |trainer: &Trainer| trainer.network().parameters().to_torch(context, Slot::Value).unwrap();
    let other = Trainer::new(context, model([4, 8]), Settings { seed: 1, ..Settings::default() }).unwrap();
    let path = folder.path().join("other.safetensors");
    other.checkpoint().unwrap().write(&path).unwrap();

    let fresh = Trainer::new(context, model([4, 8]), Settings::default()).unwrap();
    let begun = Trainer::new(context, model([4, 8]), Settings::default()).unwrap();
    load_pretrained(context, &path, begun.network().parameters()).unwrap();
    let (mut taken, mut kept) = (0, 0);
    for ((begun, fresh), other) in weights(&begun).into_iter().zip(weights(&fresh)).zip(weights(&other)) {
        if begun.0.contains(".seg_layers.") {
            assert_eq!(begun, fresh);
            kept += 1;
        } else {
            assert_eq!(begun, other);
            taken += usize::from(other != fresh);
        }
    }
    assert!(taken > 0 && kept > 0);

    let wider = Trainer::new(context, model([4, 16]), Settings::default()).unwrap();
    let error = load_pretrained(context, &path, wider.network().parameters()).unwrap_err();
    assert!(matches!(error, Error::Exchange(ExchangeError::StateDict { .. })), "{error}");
    let words = error.to_string();
    for word in ["other.safetensors", "[8, 4, 3, 3, 3]", "[16, 4, 3, 3, 3]"] {
        assert!(words.contains(word), "no `{word}` in: {words}");
    }
}

#[test]
fn a_patch_that_does_not_fit_is_told_what_would() {
    let (context, _guard) = device();
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let dataset = Dataset::open(folder.path()).unwrap();
    let file = folder.path().join("nnUNetPlans.json");
    let mut plans = json(&file);
    let configuration = &mut plans["configurations"]["3d_fullres"];
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = serde_json::json!([32, 64]);
    let mut trainer = |patch: [usize; 3], batch: usize| {
        configuration["patch_size"] = patch.to_vec().into();
        configuration["batch_size"] = batch.into();
        let plans = serde_json::json!({"dataset_name": DATASET, "plans_name": "nnUNetPlans",
            "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
            "configurations": {"3d_fullres": configuration}});
        fs::write(&file, plans.to_string()).unwrap();
        let model = Model::new(Plans::read(&file).unwrap(), "3d_fullres", dataset.json.clone()).unwrap();
        Trainer::new(context, model, Settings::default())
    };
    let Some(error) = trainer([384; 3], 1).err() else {
        return eprintln!("skipped: this device has room for 384^3 voxels");
    };
    let Error::Train(TrainError::TrainingMemory { fits: Some((patch, batch)), .. }) = error else { panic!("{error}") };
    assert!(error.to_string().contains(&format!("`\"patch_size\": {patch:?}` and `\"batch_size\": 1`")), "{error}");
    assert!(batch == 1 && patch.iter().all(|&extent| extent < 384 && extent % 2 == 0), "{patch:?}");
    trainer(patch, batch).unwrap();
}

/// CRC-32C of the definition: a bit at a time, the polynomial x^32 + ... reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut rest = u32::MAX;
    for bit in bytes.iter().flat_map(|byte| (0..8).map(move |bit| u32::from(byte >> bit & 1))) {
        rest = if (rest ^ bit) & 1 == 1 { rest >> 1 ^ 0x82F6_3B78 } else { rest >> 1 };
    }
    !rest
}

#[test]
fn events_as_tensorboard_reads_them() {
    assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    let folder = tempfile::tempdir().unwrap();
    let mut events = EventFile::create(folder.path(), 1.5, 300).unwrap();
    events.add(2.5, 300, &[("loss".into(), -0.5), ("dice".into(), f64::NAN), ("lr".into(), 0.25)]).unwrap();
    let names = names(folder.path());
    assert!(names.len() == 1 && names[0].starts_with("events.out.tfevents.1."), "{names:?}");
    let file = fs::read(folder.path().join(&names[0])).unwrap();
    // The first twelve bytes of every event file that TensorFlow has written.
    assert_eq!(file[..12], [0x18, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
    let (mut rest, mut records) = (&file[..], Vec::new());
    let mask = |crc: u32| crc.rotate_right(15).wrapping_add(0xa282_ead8);
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        let sum = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let content = &rest[12..12 + length];
        assert_eq!((sum(8), sum(12 + length)), (mask(crc32c(&rest[..8])), mask(crc32c(content))));
        records.push(content);
        rest = &rest[16 + length..];
    }
    let time = |seconds: f64| [&[0x09][..], &seconds.to_le_bytes()].concat();
    // Step 300 as a number of seven bits a byte.
    let step = [0x10, 0xac, 0x02];
    let value = |tag: &str, value: f32| {
        let inside = [&[0x0a, tag.len() as u8], tag.as_bytes(), &[0x15], &value.to_le_bytes()].concat();
        [&[0x0a, inside.len() as u8], &inside[..]].concat()
    };
    let summary = [value("loss", -0.5), value("lr", 0.25)].concat();
    let expected = [
        [&time(1.5)[..], b"\x1a\x0dbrain.Event:2"].concat(),
        [&time(1.5)[..], &step, &[0x3a, 2, 0x08, 1]].concat(),
        [&time(2.5)[..], &step, &[0x2a, summary.len() as u8], &summary].concat(),
    ];
    assert_eq!(records, expected);
}
