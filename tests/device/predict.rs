//! Predicting folders of cases on the command line: what is kept and what is made again, what fails alone, and what it
//! takes of memory.

use crate::common::network::network;
use crate::common::{context, device, phantom};
use ndarray::Array3;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use voxgrad::augment::flip;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{CaseFiles, Dataset, DatasetJson};
use voxgrad::error::PredictError;
use voxgrad::infer::{Accumulator, SlidingWindow, mirror_subsets};
use voxgrad::io::{self, Geometry};
use voxgrad::nn::Network;
use voxgrad::preprocess::{Preprocessor, RawCase};
use voxgrad::tape::{Tape, Var};
use voxgrad::tensor::{Shape, Tensor};
use voxgrad::train::{Model, Settings, Trainer};
use voxgrad::{Compat, Error, predict};

const SIDE: usize = phantom::SIDE;

/// Writes the checkpoint of a network that has not learned anything, for the dataset and plans of a folder.
fn untrained(folder: &Path) -> PathBuf {
    let (context, _guard) = device();
    let dataset = DatasetJson::read(&folder.join("dataset.json")).unwrap();
    let plans = Plans::read(&folder.join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset).unwrap();
    let path = folder.join("checkpoint.safetensors");
    Trainer::new(context, model, Settings::default()).unwrap().checkpoint().unwrap().write(&path).unwrap();
    path
}

fn command(checkpoint: &Path, input: &Path, output: &Path, extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
    command.args(["predict", "--device", "cpu", "--disable-tta", "--step-size", "1"]).args(extra);
    command.arg("-i").arg(input).arg("-o").arg(output).arg("--checkpoint").arg(checkpoint);
    command
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

fn has_all(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

fn write(path: &Path, labels: Array3<u8>, geometry: &Geometry) {
    io::write_labels(path, labels.view(), geometry).unwrap();
}

#[test]
fn what_is_there_is_kept_only_when_asked_and_only_if_it_is_a_segmentation() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 7);
    let checkpoint = untrained(folder.path());
    let (input, output) = (folder.path().join("imagesTr"), folder.path().join("out"));
    fs::create_dir(&output).unwrap();
    let file = |case: usize| output.join(format!("case_{case:03}.nii.gz"));
    let ones = || Array3::<u8>::ones((SIDE, SIDE, SIDE));
    let unit = Geometry::new([1.0; 3]);
    write(&file(0), ones(), &unit);
    fs::write(file(1), "a note").unwrap();
    fs::write(file(2), "").unwrap();
    let whole = fs::read(file(0)).unwrap();
    fs::write(file(3), &whole[..whole.len() / 2]).unwrap();
    write(&file(4), ones(), &Geometry::new([2.0, 1.0, 1.0]));
    write(&file(5), ones() * 7, &unit);
    let leftover = output.join(".voxgrad-1-0.partial");
    fs::create_dir(&leftover).unwrap();
    fs::write(input.join("._case_000_0000.nii.gz"), "attributes").unwrap();

    let result = command(&checkpoint, &input, &output, &["--continue_prediction"]).output().unwrap();
    let (said, warned) = texts(&result);
    assert!(result.status.success(), "{warned}");
    has_all(&said, &["6 made (5 in the place of an older file), 1 kept", "removed 1 unfinished"]);
    let numbers: Vec<String> = (1..6).map(|case| format!("case case_{case:03}:")).collect();
    has_all(&warned, &numbers.iter().map(String::as_str).collect::<Vec<_>>());
    has_all(&warned, &["case_005.nii.gz holds label 7", "spacing (z, y, x) [2.0, 1.0, 1.0]", "._"]);
    assert!(!warned.contains("case case_000:"), "{warned}");
    assert!(!leftover.exists());
    assert_eq!(fs::read_dir(&output).unwrap().count(), 7);
    assert_eq!(io::read_labels(&file(0)).unwrap().data, ones().mapv(i16::from), "kept as it was");
    for case in 1..7 {
        let made = io::read_labels(&file(case)).unwrap();
        assert!(made.data.dim() == (SIDE, SIDE, SIDE) && made.data.iter().all(|&label| label < 2), "{case}");
    }

    // Without the option nothing is kept.
    let result = command(&checkpoint, &input, &output, &[]).output().unwrap();
    let (said, warned) = texts(&result);
    assert!(result.status.success(), "{warned}");
    has_all(&said, &["7 made (7 in the place of an older file), 0 kept"]);
    assert_ne!(io::read_labels(&file(0)).unwrap().data, ones().mapv(i16::from));
}

#[test]
fn annotations_are_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 2);
    let checkpoint = untrained(folder.path());
    let labels = folder.path().join("labelsTr");
    let before: Vec<_> = (0..2).map(|case| fs::read(phantom::label_path(folder.path(), case)).unwrap()).collect();
    let result = command(&checkpoint, &folder.path().join("imagesTr"), &labels, &[]).output().unwrap();
    let (_, error) = texts(&result);
    assert_eq!(result.status.code(), Some(2), "{error}");
    has_all(&error, &["case_000.nii.gz", "case_001.nii.gz", "ignore label", "--output"]);
    let after: Vec<_> = (0..2).map(|case| fs::read(phantom::label_path(folder.path(), case)).unwrap()).collect();
    assert!(before == after);
}

/// Two channels; the first case's second one lies elsewhere in the world.
#[test]
fn one_bad_case_fails_alone_and_warnings_are_told() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 3);
    let edit = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = folder.path().join(name);
        let mut json = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
    };
    edit("dataset.json", &|json| json["channel_names"] = serde_json::json!({"0": "T1", "1": "T2"}));
    edit("nnUNetPlans.json", &|json| {
        let configuration = &mut json["configurations"]["3d_fullres"];
        configuration["normalization_schemes"] = serde_json::json!(["ZScoreNormalization", "ZScoreNormalization"]);
        configuration["use_mask_for_norm"] = serde_json::json!([false, false]);
    });
    let checkpoint = untrained(folder.path());
    let (input, output) = (folder.path().join("imagesTr"), folder.path().join("out"));
    for case in 0..3 {
        let first = phantom::image_path(folder.path(), case);
        let second = input.join(format!("case_{case:03}_0001.nii.gz"));
        fs::copy(&first, &second).unwrap();
        if case == 0 {
            // As plain NIfTI, whose header can be edited: the x axis begins 9 mm further on.
            let labels = io::read_labels(&first).unwrap().data.mapv(|label| label as u8);
            let plain = folder.path().join("plain.nii");
            write(&plain, labels, &Geometry::new([1.0; 3]));
            let mut bytes = fs::read(&plain).unwrap();
            bytes[292..296].copy_from_slice(&9f32.to_le_bytes());
            fs::write(&second, bytes).unwrap();
        }
    }
    let bad = input.join("case_001_0001.nii.gz");
    let bytes = fs::read(&bad).unwrap();
    fs::write(&bad, &bytes[..bytes.len() / 2]).unwrap();

    let result = command(&checkpoint, &input, &output, &[]).output().unwrap();
    let (said, told) = texts(&result);
    assert_eq!(result.status.code(), Some(2), "{told}");
    has_all(&said, &["2 made, 0 kept"]);
    has_all(
        &told,
        &["case_001_0001.nii.gz: damaged gzip", "1 of 3 cases", "case_000_0001.nii.gz (channel 1) lies elsewhere"],
    );
    assert!(output.join("case_000.nii.gz").exists() && output.join("case_002.nii.gz").exists());
    assert!(!output.join("case_001.nii.gz").exists());
}

#[test]
fn an_error_of_the_system_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.safetensors");
    let result = command(&missing, folder.path(), folder.path(), &[]).output().unwrap();
    let (_, told) = texts(&result);
    assert_eq!(result.status.code(), Some(2), "{told}");
    assert_eq!(told.matches("No such file").count(), 1, "{told}");
}

/// Windows on the device, several at once, mirrored, of two networks, against the same by hand on the host.
#[test]
fn the_device_adds_up_what_the_host_does() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let (context, _guard) = device();
    let dataset = Dataset::open(folder.path()).unwrap();
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let networks: Vec<Network> =
        [1, 2].map(|seed| Network::new(context, model.architecture().unwrap(), seed).unwrap()).into();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let files = CaseFiles { label: None, ..dataset.cases[0].clone() };
    let mut case = preprocessor.run(RawCase::read(&files, &model.labels).unwrap()).unwrap();
    // Deeper than a window, and narrower.
    let part = ndarray::s![.., .., ..13, ..5];
    case.data = case.data.slice(part).to_owned();
    case.seg = case.seg.slice(ndarray::s![.., ..13, ..5]).to_owned();
    let (patch, mirror) = ([8; 3], [true, false, true]);
    let heads = networks[0].shape().heads;

    let window = SlidingWindow::new(case.seg.dim().into(), patch, 0.5).unwrap();
    let mut sums = Accumulator::new(window.clone(), heads);
    let mut expected = Vec::new();
    let mut collect = |slice: &[f32]| {
        expected.extend(slice.iter().map(|&logit| f64::from(logit)));
        Ok(())
    };
    let shape = Shape { batch: 1, dims: patch, channels: 1 };
    for &start in &window.starts {
        let (mut input, mut mean) = (vec![0.0; 512], vec![0.0; 512 * heads]);
        window.extract(case.data.view(), start, &mut input).unwrap();
        for axes in mirror_subsets(mirror) {
            let mut mirrored = input.clone();
            flip(&mut mirrored, patch, 1, axes);
            let x = Var::data(Tensor::upload(context, shape, &mirrored).unwrap());
            for network in &networks {
                let outputs = network.forward(&mut Tape::inference(context), &x, 1).unwrap();
                let mut logits = outputs[0].value().download(context).unwrap();
                flip(&mut logits, patch, heads, axes);
                mean.iter_mut().zip(&logits).for_each(|(mean, logit)| *mean += logit / 8.0);
            }
        }
        sums.add(start, &mean, &mut collect).unwrap();
    }
    sums.finish(collect).unwrap();

    let settings = predict::Settings { mirror, ..Default::default() };
    let before = context.launches();
    let mut passes = (0, 0);
    let found = predict::logits(context, &networks, &case, patch, &settings, |done, all| passes = (done, all)).unwrap();
    eprintln!("{} launches for {} windows", context.launches() - before, window.starts.len());
    assert_eq!(passes, (window.starts.len() * 8, window.starts.len() * 8));
    crate::common::assert_close("mean logits", &found, &expected, 1e-5);
    let again = predict::logits(context, &networks, &case, patch, &settings, |_, _| ()).unwrap();
    assert_eq!(found, again, "to the bit");
}

/// Logits of a whole case may be more than there is memory: that is said before room for them is asked for.
#[test]
fn logits_that_no_memory_holds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let dataset = Dataset::open(folder.path()).unwrap();
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let files = CaseFiles { label: None, ..dataset.cases[0].clone() };
    let case = preprocessor.run(RawCase::read(&files, &model.labels).unwrap()).unwrap();
    // A tebibyte of logits. Nothing is computed on a dry context, and weights take no memory.
    let context = context().dry();
    let network = Network::new(&context, network(&[4, 8], 1, 1 << 26), 0).unwrap();
    let settings = predict::Settings::default();
    let error = predict::logits(&context, &[network], &case, [8; 3], &settings, |_, _| ()).unwrap_err();
    eprintln!("{error}");
}

/// Infinity or NaN must not become background.
#[test]
fn logits_that_are_no_numbers_name_case_and_window() {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let (context, _guard) = device();
    let dataset = Dataset::open(folder.path()).unwrap();
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let trainer = Trainer::new(context, model.clone(), Settings::default()).unwrap();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let files = CaseFiles { label: None, ..dataset.cases[0].clone() };
    let mut case = preprocessor.run(RawCase::read(&files, &model.labels).unwrap()).unwrap();
    let settings = predict::Settings { mirror: [false; 3], step_size: 1.0, ..Default::default() };
    let patch = [8; 3];
    predict::segmentation(
        context,
        std::slice::from_ref(trainer.network()),
        &case,
        &preprocessor,
        patch,
        &settings,
        |_, _| (),
    )
    .unwrap();
    // In the last of the eight windows only.
    case.data[[0, 12, 12, 12]] = f32::NAN;
    let mut windows = 0;
    let error = predict::segmentation(
        context,
        std::slice::from_ref(trainer.network()),
        &case,
        &preprocessor,
        patch,
        &settings,
        |done, _| {
            windows = done;
        },
    )
    .unwrap_err();
    assert_eq!(windows, 8);
    let text = error.to_string();
    assert!(matches!(error, Error::Predict(PredictError::NonFiniteLogits { start: [8, 8, 8], .. })), "{text}");
    has_all(&text, &["case_000", "[8, 8, 8]", "predict in f32"]);
}

/// 105 classes, 96x96x96 voxels: every copy of classes times voxels is 354 MiB.
#[test]
fn many_classes_take_less_than_one_and_a_half_copies() {
    if !cfg!(target_os = "linux") {
        return eprintln!("skipped: peak memory is read from /proc");
    }
    if crate::common::is_slow() {
        return eprintln!("skipped on a software device: a network of 105 classes");
    }
    let (side, classes) = (96, 105);
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 0);
    let labels: serde_json::Map<_, _> =
        (0..classes).map(|c| (if c == 0 { "background".into() } else { format!("c{c}") }, c.into())).collect();
    let dataset =
        serde_json::json!({"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"});
    fs::write(folder.path().join("dataset.json"), dataset.to_string()).unwrap();
    let plans = fs::read_to_string(folder.path().join("nnUNetPlans.json")).unwrap();
    let plans = plans.replace("\"patch_size\":[8,8,8]", "\"patch_size\":[32,32,32]");
    assert!(plans.contains("[32,32,32]"));
    fs::write(folder.path().join("nnUNetPlans.json"), plans).unwrap();
    let checkpoint = untrained(folder.path());
    let image = Array3::from_shape_fn((side, side, side), |(z, y, x)| (1 + (z * 7 + y * 5 + x * 3) % 31) as u8);
    write(&folder.path().join("imagesTr/case_0000.nii.gz"), image, &Geometry::new([1.0; 3]));
    let output = folder.path().join("out");
    let mut child =
        command(&checkpoint, &folder.path().join("imagesTr"), &output, &[]).stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    // The peak only grows: the last value before the end counts.
    let mut peak = 0;
    let exit = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(peak);
        if let Some(exit) = child.try_wait().unwrap() {
            break exit;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(exit.success());
    let found = io::read_labels(&output.join("case.nii.gz")).unwrap().data;
    assert!(found.dim() == (side, side, side) && found.iter().any(|&label| label > 1));
    let copies = (peak << 10) as f64 / (4 * classes * side * side * side) as f64;
    eprintln!("peak {} MiB: {copies:.2} copies", peak >> 10);
    assert!(peak > 0 && copies < 1.5, "peak {peak} KiB: {copies:.2} copies");
}
