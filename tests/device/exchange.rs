//! Models of nnU-Net, read and predicted with, and models for nnU-Net.

use crate::common::{data, device, phantom, pickles};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::Fold;
use voxgrad::dataset::{CaseFiles, DatasetJson};
use voxgrad::exchange::checkpoint;
use voxgrad::exchange::pickle::Value;
use voxgrad::exchange::torch::TorchFile;
use voxgrad::exchange::{Format, TrainedModel, load_pretrained};
use voxgrad::parameters::Slot;
use voxgrad::preprocess::{Preprocessor, RawCase};
use voxgrad::train::{Checkpoint, Model, Settings, Trainer};
use voxgrad::{Compat, io, predict};

const MODEL: &str = "exchange/nnUNetTrainer__nnUNetPlans__3d_fullres";

type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// Tensors that another program wrote down.
fn expected(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |(name, view): (&str, safetensors::tensor::TensorView)| {
        (name.to_owned(), (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data())))
    };
    file.iter().map(read).collect()
}

fn run(arguments: &[&str], environment: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
    command.args(arguments).env_remove("nnUNet_results").envs(environment.iter().copied()).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_checkpoint_of_nnunet_is_read_to_the_bit() {
    for fold in [0, 1] {
        let folder = data(MODEL).join(format!("fold_{fold}"));
        let read = checkpoint::read(&folder.join("checkpoint_final.pth"), None, true).unwrap();
        assert_eq!((read.fold, read.trainer.as_str()), (Fold::Index(fold), "nnUNetTrainer_onlyMirror01"));
        assert!(read.notes.is_empty(), "{:?}", read.notes);
        let mut expected = expected(&folder.join("expected.safetensors"));
        let mut momenta = 0;
        for (name, (shape, values)) in read.checkpoint.momentum() {
            match expected.remove(&format!("momentum.{name}")) {
                Some(found) => {
                    momenta += 1;
                    assert_eq!(found, (shape.clone(), values.clone()), "{name}");
                }
                None => assert!(values.iter().all(|&value| value == 0.0), "{name}"),
            }
        }
        assert_eq!(momenta, read.checkpoint.network().len() - 2, "the deepest head never learns");
        assert_eq!(read.checkpoint.network(), &expected);
        let Checkpoint { settings, progress, model, .. } = &read.checkpoint;
        assert_eq!((settings.mirror, settings.epochs, progress.epoch), ([true, true, false], 1000, 2));
        assert_eq!(model.labels.ignore_label(), Some(3));
        let history = &progress.history;
        assert_eq!((history.epochs(), &history.lrs[..]), (2, &[0.01, 0.009][..]));
        assert_eq!(history.mean_fg_dice, [0.25, 0.5]);
        assert_eq!(history.train_losses, [-0.5, -0.75]);
        assert!(history.dice_per_class_or_region[0][1].is_nan() && history.dice_per_class_or_region[1] == [0.25, 0.75]);
    }
}

#[test]
fn tensors_of_every_kind() {
    let file = TorchFile::open(&data("exchange/odd.pth")).unwrap();
    let expected = expected(&data("exchange/odd.safetensors"));
    let Some(Value::Dict(tensors)) = file.content.get("tensors") else { panic!("no tensors") };
    assert_eq!(tensors.len(), expected.len());
    for (name, tensor) in tensors {
        let (name, Value::Tensor(tensor)) = (name.as_text().unwrap(), tensor) else { panic!("no tensor") };
        assert_eq!((&tensor.shape, &file.values(tensor).unwrap()), (&expected[name].0, &expected[name].1), "{name}");
    }
    assert_eq!(file.content.get("size"), Some(&Value::Tuple(vec![Value::Int(3), Value::Int(20)])));
    assert_eq!(file.content.get("big"), Some(&Value::Int(1 << 40)));
    assert_eq!(file.content.get("negative"), Some(&Value::Int(-7)));
}

/// nnU-Net's own segmentation with two folds, mirrored along two of the three axes.
#[test]
fn a_model_folder_of_nnunet_predicts_as_nnunet() {
    let results = tempfile::tempdir().unwrap();
    let model = results.path().join("Dataset007_Exchange/nnUNetTrainer__nnUNetPlans__3d_fullres");
    copy(&data(MODEL), &model);
    let output = results.path().join("out");
    let images = data("exchange/images");
    let common = ["predict", "-i", path(&images), "-o", path(&output), "-device", "cpu"];
    let from = ["-d", "7", "-c", "3d_fullres", "-f", "0", "1", "-npp", "2", "-nps", "1", "--not_on_device"];
    let done = run(&[&common[..], &from[..]].concat(), &[("nnUNet_results", results.path())]);
    let said = text(&done);
    assert!(done.status.success(), "{said}");
    for word in ["-npp has no effect", "-nps has no effect", "--not_on_device has no effect", "1 made"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let [found, expected] = [output.join("case.nii.gz"), data("exchange/segmentation.nii.gz")].map(|path| {
        let map = io::read_labels(&path).unwrap();
        (map.data, map.geometry.spacing)
    });
    assert_eq!(found.1, expected.1);
    let different = found.0.iter().zip(&expected.0).filter(|(a, b)| a != b).count();
    assert!(different <= found.0.len() / 1000, "{different} of {} voxels", found.0.len());

    // Probabilities too; what was predicted without them is made again.
    let again = ["--save_probabilities", "--continue_prediction"];
    let done = run(&[&common[..], &from[..], &again].concat(), &[("nnUNet_results", results.path())]);
    assert!(done.status.success() && text(&done).contains("1 made (1 in the place"), "{}", text(&done));
    let read = |path: &Path| io::read_npz_array(path, predict::PROBABILITIES).unwrap();
    let (ours, theirs) = (read(&output.join("case.npz")), read(&data("exchange/probabilities.npz")));
    assert_eq!(ours.dim(), theirs.dim());
    let apart = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 2e-3, "{apart}");
    let properties = results.path().join("properties.pth");
    pickles::torch(&properties, &fs::read(output.join("case.pkl")).unwrap(), &[]);
    let properties = TorchFile::open(&properties).unwrap().content.to_json().unwrap();
    let placed = serde_json::json!({
        "spacing": [1.0, 1.0, 2.0], "origin": [0.0, 0.0, 0.0],
        "direction": [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0],
    });
    assert_eq!(properties["sitk_stuff"], placed);
    assert_eq!(properties["spacing"], serde_json::json!([2.0, 1.0, 1.0]));
    assert_eq!(properties["shape_before_cropping"], serde_json::json!([9, 20, 18]));
    assert_eq!(properties["bbox_used_for_cropping"], serde_json::json!([[0, 9], [0, 20], [0, 18]]));
    let done = run(&[&common[..], &from[..], &again].concat(), &[("nnUNet_results", results.path())]);
    assert!(text(&done).contains("0 made, 1 kept"), "{}", text(&done));
    // Without the option they would be those of an earlier prediction.
    let done = run(&[&common[..], &from[..]].concat(), &[("nnUNet_results", results.path())]);
    assert!(done.status.success() && text(&done).contains("case.npz"), "{}", text(&done));

    // Without -f the folds that are there, which is said.
    let done = run(&[&common[..], &["-m", path(&model), "-step_size", "1"]].concat(), &[]);
    assert!(done.status.success() && text(&done).contains("folds 0, 1"), "{}", text(&done));
    let refusals: [(&[&str], &[&str]); 8] = [
        (&["-m", path(&model), "-f", "0", "3", "all"], &["fold 3, all", "folds 0, 1 are here"]),
        (&["-m", path(&model), "-f", "1", "1"], &["twice"]),
        (&["-m", path(&model), "-chk", "checkpoint_best.pth"], &["checkpoint_best.pth", "-chk"]),
        (&["-m", path(&model), "-prev_stage_predictions", "x"], &["-prev_stage_predictions", "cascade"]),
        (&["-m", path(&model), "-num_parts", "2", "-part_id", "2"], &["-part_id is 2"]),
        (&["-m", path(&model), "-d", "7"], &["--model"]),
        (&["-d", "7", "-c", "3d_lowres", "--results", path(results.path())], &["3d_lowres", "-tr"]),
        (&[], &["-m FOLDER"]),
    ];
    for (arguments, words) in refusals {
        let done = run(&[&common[..], arguments].concat(), &[]);
        let said = text(&done);
        assert_eq!(done.status.code(), Some(2), "{said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{word}: {said}"));
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// Logits are averaged, not labels: those of two folds are the mean of those of each.
#[test]
fn folds_are_averaged() {
    let (context, _guard) = device();
    let trained = TrainedModel::open(&data(MODEL), &[Fold::Index(0), Fold::Index(1)], None, false).unwrap();
    let networks = trained.networks(context).unwrap();
    let model = &trained.model;
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let image = data("exchange/images/case_0000.nii.gz");
    let files = CaseFiles { name: "case".into(), images: vec![image], label: None };
    let case = preprocessor.run(RawCase::read(&files, &model.labels).unwrap()).unwrap();
    let settings = predict::Settings { mirror: [false; 3], step_size: 1.0, ..Default::default() };
    let of = |networks: &[_]| predict::logits(context, networks, &case, [8, 16, 16], &settings, |_, _| ()).unwrap();
    let (both, first, second) = (of(&networks), of(&networks[..1]), of(&networks[1..]));
    let mean: Vec<f64> = first.iter().zip(&second).map(|(&a, &b)| (f64::from(a) + f64::from(b)) / 2.0).collect();
    crate::common::assert_close("mean of folds", &both, &mean, 1e-6);
}

/// A network that voxgrad has trained for one step.
fn trained(folder: &Path) -> PathBuf {
    phantom::write(folder, 1);
    let (context, _guard) = device();
    let dataset = DatasetJson::read(&folder.join("dataset.json")).unwrap();
    let plans = Plans::read(&folder.join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset).unwrap();
    let settings = Settings { mirror: [false, true, true], epochs: 3, ..Settings::default() };
    let path = folder.join("checkpoint.safetensors");
    Trainer::new(context, model, settings).unwrap().checkpoint().unwrap().write(&path).unwrap();
    path
}

#[test]
fn a_model_goes_to_nnunets_format_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let own = trained(folder.path());
    let [theirs, back] = ["theirs", "back"].map(|name| folder.path().join(name));
    let done = run(&["export", path(&own), "--to", "nnunet", "-f", "2", "-o", path(&theirs)], &[]);
    assert!(done.status.success() && text(&done).contains("nnUNetTrainer"), "{}", text(&done));
    let done = run(&["export", path(&theirs), "--to", "safetensors", "-o", path(&back)], &[]);
    assert!(done.status.success(), "{}", text(&done));
    let before = Checkpoint::read(&own).unwrap();
    let after = Checkpoint::read(&back.join("fold_2/checkpoint_final.safetensors")).unwrap();
    assert_eq!((before.network(), before.momentum()), (after.network(), after.momentum()));
    assert_eq!(before.settings.mirror, after.settings.mirror);
    assert_eq!(before.progress.history, after.progress.history);
    assert_eq!(before.model.plans, after.model.plans);
    assert_eq!(before.model.dataset.source(), after.model.dataset.source());

    // A folder that is there is not overwritten.
    let done = run(&["export", path(&own), "--to", "nnunet", "-o", path(&theirs)], &[]);
    assert!(done.status.code() == Some(2) && text(&done).contains("is there already"), "{}", text(&done));
}

/// What nnU-Net's real checkpoint holds is written again as it was.
#[test]
fn a_written_checkpoint_is_laid_out_as_pytorchs() {
    let folder = tempfile::tempdir().unwrap();
    let model = TrainedModel::open(&data(MODEL), &[Fold::Index(0)], None, true).unwrap();
    let target = folder.path().join("model");
    model.write(&target, Format::Nnunet).unwrap();
    let [written, original] =
        [target, data(MODEL)].map(|model| TorchFile::open(&model.join("fold_0/checkpoint_final.pth")).unwrap());
    assert!(written.is_aligned().unwrap() && original.is_aligned().unwrap());
    let Value::Dict(fields) = &original.content else { panic!("no dict") };
    for (key, value) in fields {
        let name = key.as_text().unwrap();
        let found = written.content.get(name).unwrap_or_else(|| panic!("{name} is missing"));
        match (name, value, found) {
            ("network_weights", Value::Dict(before), Value::Dict(after)) => {
                let keys = |entries: &[(Value, Value)]| entries.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>();
                assert_eq!(keys(before), keys(after), "all names in PyTorch's order");
                let storages = |entries: &[(Value, Value)]| {
                    let storage =
                        |value: &Value| if let Value::Tensor(t) = value { t.storage.clone() } else { panic!() };
                    let mut first = HashMap::new();
                    entries
                        .iter()
                        .enumerate()
                        .map(|(i, (_, value))| *first.entry(storage(value)).or_insert(i))
                        .collect::<Vec<_>>()
                };
                assert_eq!(storages(before), storages(after), "names share storages");
            }
            ("optimizer_state", before, after) => {
                let keys = |value: &Value| -> Vec<Value> {
                    let Some(Value::Dict(states)) = value.get("state") else { panic!("no states") };
                    states.iter().map(|(key, _)| key.clone()).collect()
                };
                assert_eq!(keys(before), keys(after));
                let group = |value: &Value| value.get("param_groups").unwrap().items().unwrap()[0].clone();
                for field in ["momentum", "weight_decay", "nesterov", "params", "dampening", "maximize"] {
                    assert_eq!(group(before).get(field), group(after).get(field), "{field}");
                }
            }
            // NaN is not equal to itself; the device is where it runs.
            ("logging" | "init_args", before, after) => {
                let shown = |value: &Value| format!("{value:?}").replace("cuda:0", "cpu").replace("Tuple", "List");
                assert_eq!(shown(before), shown(after), "{name}");
            }
            (_, before, after) => assert_eq!(before, after, "{name}"),
        }
    }
}

#[test]
fn archives_of_models() {
    let folder = tempfile::tempdir().unwrap();
    let [from, to] = ["from", "to"].map(|name| folder.path().join(name));
    let inside = Path::new("Dataset007_Exchange/nnUNetTrainer__nnUNetPlans__3d_fullres");
    copy(&data(MODEL), &from.join(inside));
    fs::create_dir_all(from.join(inside).join("fold_0/validation")).unwrap();
    fs::write(from.join(inside).join("fold_0/validation/summary.json"), "{}").unwrap();
    let zip = folder.path().join("model.zip");
    let pack = ["export-zip", "-d", "7", "-c", "3d_fullres", "-o", path(&zip)];
    let done = run(&[&pack[..], &["-f", "0", "4"]].concat(), &[("nnUNet_results", &from)]);
    assert!(done.status.code() == Some(2) && text(&done).contains("fold_4"), "{}", text(&done));
    assert!(!zip.exists());
    let done = run(&pack, &[("nnUNet_results", &from)]);
    assert!(done.status.success() && text(&done).contains("5 files"), "{}", text(&done));
    // No archive is made that could not be installed.
    let elsewhere = folder.path().join("my models/of the brain");
    copy(&data(MODEL), &elsewhere);
    let other = folder.path().join("other.zip");
    let done = run(&["export-zip", "-m", path(&elsewhere), "-o", path(&other)], &[]);
    assert!(done.status.code() == Some(2) && !other.exists(), "{}", text(&done));
    for word in ["my models/of the brain", "DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION"] {
        assert!(text(&done).contains(word), "{word}: {}", text(&done));
    }
    let install = ["install-zip", path(&zip)];
    let done = run(&install, &[("nnUNet_results", &to)]);
    assert!(done.status.success() && text(&done).contains("5 files"), "{}", text(&done));
    for name in ["plans.json", "dataset.json", "fold_1/checkpoint_final.pth", "fold_0/validation/summary.json"] {
        let [a, b] = [&from, &to].map(|results| fs::read(results.join(inside).join(name)).unwrap());
        assert_eq!(a, b, "{name}");
    }
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1, "nothing else");
    let changed = to.join(inside).join("plans.json");
    fs::write(&changed, "mine").unwrap();
    let done = run(&install, &[("nnUNet_results", &to)]);
    assert!(done.status.code() == Some(2) && text(&done).contains("--overwrite"), "{}", text(&done));
    assert_eq!(fs::read(&changed).unwrap(), b"mine");
    assert!(run(&[&install[..], &["--overwrite"]].concat(), &[("nnUNet_results", &to)]).status.success());
    assert_ne!(fs::read(&changed).unwrap(), b"mine");
}

#[test]
fn pretrained_weights_leave_the_heads_alone() {
    let folder = tempfile::tempdir().unwrap();
    let other = trained(folder.path());
    let (context, _guard) = device();
    let theirs = TrainedModel::open(&data(MODEL), &[Fold::Index(0)], None, false).unwrap();
    let trainer = Trainer::new(context, theirs.model.clone(), Settings { seed: 5, ..Settings::default() }).unwrap();
    let parameters = trainer.network().parameters();
    let values = || -> Tensors {
        let named = parameters.to_torch(context, Slot::Value).unwrap();
        named.into_iter().map(|(name, shape, values)| (name, (shape, values))).collect()
    };
    let before = values();
    let own = folder.path().join("own.safetensors");
    theirs.folds[0].checkpoint.write(&own).unwrap();
    let pth = data(MODEL).join("fold_0/checkpoint_final.pth");
    for file in [&pth, &own, &data(MODEL).join("fold_0/expected.safetensors")] {
        // From the beginning each time.
        let find = |name: &str| before.get(name).map(|(shape, values)| (&shape[..], &values[..]));
        parameters.load_torch(context, Slot::Value, find).unwrap();
        let loaded = load_pretrained(context, file, parameters).unwrap();
        assert_eq!(loaded, before.len() - 4, "{}", file.display());
        for (name, value) in values() {
            let from = if name.contains("seg_layers") { &before } else { theirs.folds[0].checkpoint.network() };
            assert_eq!(&value, &from[&name], "{name} of {}", file.display());
        }
    }
    let kept = values();
    let error = load_pretrained(context, &other, parameters).unwrap_err().to_string();
    for word in
        ["encoder.stages.0.0.convs.0.conv.weight has shape", "encoder.stages.2.0.convs.0.conv.weight is missing"]
    {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!(kept, values(), "nothing is loaded");
}
