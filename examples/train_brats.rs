//! Trains a U-Net on sparsely annotated brain tumours in four MRI channels, then predicts, draws and scores two slabs that it
//! has not seen, against their complete labels: regions as in BraTS (whole tumour, tumour core, enhancing tumour).
//!
//! ```sh
//! cargo run --release --example train_brats [OUTPUT [DATASET]]
//! ```
//!
//! OUTPUT is `target/brats` unless given; DATASET a folder in nnU-Net's layout, `examples/data/brats` unless given. The device
//! is the one that `VOXGRAD_DEVICE` names (`cpu` unless set).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::{self, Fold};
use voxgrad::dataset::{CaseFiles, Dataset};
use voxgrad::eval::evaluate_folder;
use voxgrad::preprocess::{Preprocessor, RawCase};
use voxgrad::report::{Overlay, write_overlay, write_progress};
use voxgrad::train::run::{self, Ended};
use voxgrad::train::{DataSource, Model, Settings, Trainer};
use voxgrad::{Compat, device, io, predict};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let output = PathBuf::from(arguments.next().unwrap_or_else(|| "target/brats".into()));
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/brats");
    let folder = PathBuf::from(arguments.next().unwrap_or_else(|| shipped.into()));
    let device = device::open(std::env::var("VOXGRAD_DEVICE").as_deref().unwrap_or("cpu").parse()?)?;
    let predictions = output.join("predictions");
    std::fs::create_dir_all(&predictions)?;

    let dataset = Dataset::open(&folder)?;
    let model = Model::new(Plans::read(&folder.join("nnUNetPlans.json"))?, "3d_fullres", dataset.json.clone())?;
    let split = splits::read(&folder.join("splits_final.json"), &dataset.case_names())?.swap_remove(0);
    let source = DataSource {
        dataset: &dataset,
        prepared: &folder,
        fold: Fold::Index(0),
        split: &split,
        compat: None,
        skip_unreadable: false,
    };
    let data = source.open(&model, |_| ())?;
    println!("{} cases to train on, {:.1} % of their voxels annotated", data.training.len(), 100.0 * data.annotated);

    // nnU-Net's settings are for hours of training; for minutes, less momentum learns sooner.
    let settings = Settings {
        epochs: 20,
        iterations: 25,
        validation_iterations: 4,
        learning_rate: 0.05,
        momentum: 0.9,
        ..Settings::default()
    };
    let began = Instant::now();
    let mut trainer = Trainer::new(&device.context, model, settings)?;
    let ended = run::train(
        &mut trainer,
        &data.cases,
        &output,
        [&data.training, &data.validation],
        |_| ControlFlow::Continue(()),
        |epoch| {
            let history = &epoch.trainer.progress().history;
            if let (Some(loss), Some(dice)) = (history.train_losses.last(), history.dice_per_class_or_region.last()) {
                println!("epoch {:>2}: loss {loss:.3}, pseudo Dice {dice:.3?}", epoch.trainer.progress().epoch);
            }
            write_progress(&output.join("progress.png"), history)
        },
    )?;
    if let Ended::Finished(checkpoint) = ended {
        println!("trained in {:.0} s: {}", began.elapsed().as_secs_f64(), checkpoint.display());
    }

    let dense = folder.join("labelsTr_dense");
    for case in dataset.cases.iter().filter(|case| split.val.contains(&case.name)) {
        segment(&trainer, case, &dense, &predictions)?;
    }
    let (labels, ending) = (&trainer.model().labels, &dataset.json.file_ending);
    let summary = evaluate_folder(&dense, &predictions, ending, labels, true)?;
    for (group, name) in labels.foreground_names().into_iter().enumerate() {
        println!("{name}: Dice {:.3}", summary.mean(group)[0]);
    }
    summary.write(&output.join("summary.json"))?;
    println!("pictures and segmentations in {}", predictions.display());
    Ok(())
}

/// Predicts a case without looking at its annotation, writes the segmentation, and a picture beside the complete labels.
fn segment(trainer: &Trainer, case: &CaseFiles, dense: &Path, output: &Path) -> voxgrad::Result<()> {
    let model = trainer.model();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected)?;
    let image_only = CaseFiles { label: None, ..case.clone() };
    let prepared = preprocessor.run(RawCase::read(&image_only, &model.labels)?)?;
    let (patch, _) = model.configuration.three_dimensional()?;
    let settings = predict::Settings::default();
    let (context, network) = (trainer.context(), trainer.network());
    let labels = predict::segmentation(
        context,
        std::slice::from_ref(network),
        &prepared,
        &preprocessor,
        patch,
        &settings,
        |_, _| (),
    )?;
    let file = format!("{}{}", case.name, model.dataset.file_ending);
    io::write_segmentation(&output.join(&file), labels.view(), &prepared.geometry)?;

    let image = io::read_image(&case.images[0])?;
    let annotation = case.label.as_deref().map(io::read_labels).transpose()?;
    let reference = io::read_labels(&dense.join(&file))?;
    let values = model.labels.regions_class_order().unwrap_or_default().iter().copied();
    let names: Vec<(i16, String)> = values.zip(model.labels.foreground_names().into_iter().map(String::from)).collect();
    write_overlay(
        &output.join(format!("{}.png", case.name)),
        &Overlay {
            case: &case.name,
            image: image.data.view(),
            annotation: annotation.as_ref().map(|labels| labels.data.view()),
            prediction: labels.mapv(|label| label as i16).view(),
            reference: Some(reference.data.view()),
            ignore: model.labels.ignore_label(),
            labels: &names,
            spacing: image.geometry.spacing,
        },
    )
}
