//! The steps from a raw dataset to preprocessed cases, each with what it says.

use super::options::{Configurations, Reading, Which};
use super::{summary, verify};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::folders::Located;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{Dataset, splits};
use voxgrad::error::PlanError;
use voxgrad::kernels::{Context, Dtype};
use voxgrad::nn::pytorch_kept_bytes;
use voxgrad::plan::fingerprint::{Age, Fingerprint, Measured};
use voxgrad::plan::planner::Planner;
use voxgrad::preprocess::{Preprocessor, cases_folder, move_stored, preprocess_folder, remove_stored};
use voxgrad::tape::Fusion;
use voxgrad::train::{Model, planned_memory};
use voxgrad::{Error, io};

/// A raw dataset and the folder of what is made from it.
pub struct Target {
    /// `DatasetXXX_Name`.
    pub name: String,
    /// The raw dataset.
    pub dataset: Dataset,
    /// Where plans and preprocessed cases go.
    pub folder: PathBuf,
}

impl Target {
    /// Opens the dataset, checked by the names and headers of its files, and makes the folder.
    pub fn new(which: &Which, located: &Located) -> anyhow::Result<Self> {
        let folder = which.folders.folders().preprocessed_of(&located.name)?;
        let dataset = verify::quickly(located.raw()?)?;
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        Ok(Target { name: located.name.clone(), dataset, folder })
    }
}

/// Checks a dataset if that is wanted, and refuses one that cannot be used.
pub fn check_if(wanted: bool, located: &Located, which: &Which, reading: &Reading) -> anyhow::Result<()> {
    let folders = which.folders.folders();
    anyhow::ensure!(
        !wanted || verify::check(located, &folders, reading.workers(), &reading.shown)? == 0,
        "{} cannot be used as it is",
        located.name
    );
    Ok(())
}

/// Measures a dataset unless an earlier run has.
pub fn fingerprint(target: &Target, reading: &Reading) -> anyhow::Result<Fingerprint> {
    let file = target.folder.join("dataset_fingerprint.json");
    if !reading.clean
        && let Ok(earlier) = Fingerprint::read(&file)
    {
        match Measured::age(&target.dataset, Some(reading.compat()), &file)? {
            Age::Current => {
                println!("{}: using the fingerprint in {} (--clean measures again)", target.name, file.display());
                return Ok(earlier);
            }
            Age::Stale => println!(
                "{}: files or settings have changed since the fingerprint in {} was measured: measuring again",
                target.name,
                file.display()
            ),
            Age::Unknown => println!(
                "{}: the fingerprint in {} does not say from which files it was measured: measuring again",
                target.name,
                file.display()
            ),
        }
    }
    let bar = reading.shown.bar("measuring", target.dataset.cases.len());
    let done = |case: &str| reading.shown.done(&bar, "measured", case);
    let measured = Fingerprint::extract(&target.dataset, reading.compat(), reading.workers(), done)?;
    bar.finish_and_clear();
    measured.write(&file)?;
    Measured::now(&target.dataset, reading.compat(), &file)?.write(&file)?;
    println!("{}: wrote {}", target.name, file.display());
    Ok(measured)
}

/// Plans, and puts dataset.json and the splits beside the plans.
pub fn plan(target: &Target, planner: &Planner, measured: &Fingerprint) -> anyhow::Result<Plans> {
    let mut plans = planner.plan(&target.name, &target.dataset, measured)?;
    let file = target.folder.join(format!("{}.json", plans.plans_name));
    // Configurations that somebody has added by hand outlive planning again.
    if file.exists() {
        for (name, configuration) in Plans::read(&file)?.configurations {
            plans.configurations.entry(name).or_insert(configuration);
        }
    }
    for (name, problem) in plans.configurations.keys().filter(|name| name.starts_with("3d")).filter_map(|name| {
        let model = Model::new(plans.clone(), name, target.dataset.json.clone()).and_then(|model| model.check());
        Some((name, model.err()?))
    }) {
        eprintln!("note: {name} can be planned, but not be trained by voxgrad yet: {problem}");
    }
    plans.write(&file)?;
    io::write_json(&target.folder.join("dataset.json"), target.dataset.json.source())?;
    write_splits(target)?;
    println!("{}: wrote {}", target.name, file.display());
    Ok(plans)
}

/// The memory of a training step on a device, as a dry run counts it, and what PyTorch would keep for its backward pass.
pub fn print_memory(target: &Target, plans: &Plans, context: &Context) -> anyhow::Result<()> {
    let gibibytes = |bytes: u64| format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64);
    for name in plans.configurations.keys().filter(|name| name.starts_with("3d")) {
        let model = Model::new(plans.clone(), name, target.dataset.json.clone())?;
        if let Err(error) = model.check() {
            println!("{} {name}: {error}", target.name);
            continue;
        }
        let (shape, batch) = (model.architecture()?, model.configuration.batch_size);
        let (patch, _) = model.configuration.three_dimensional()?;
        println!("{} {name}: a training step on {batch} patches of {patch:?} voxels takes", target.name);
        for (precision, dtype) in [("f32", Dtype::F32), ("f16", Dtype::F16)] {
            let plan = match planned_memory(context, &model.labels, &shape, batch, patch, dtype, Fusion::default()) {
                Ok(plan) => plan,
                Err(error) => {
                    println!("  {precision}: {error}");
                    continue;
                }
            };
            println!(
                "  {precision}: {} ({} parameters, {} kept for backward, {} temporaries); PyTorch keeps {} for backward",
                gibibytes(plan.total),
                gibibytes(plan.parameters),
                gibibytes(plan.activations),
                gibibytes(plan.temporaries),
                gibibytes(pytorch_kept_bytes(&shape, batch, patch, dtype.size())),
            );
        }
    }
    Ok(())
}

/// The splits of the raw dataset, those that are there, or nnU-Net's five folds.
fn write_splits(target: &Target) -> anyhow::Result<()> {
    let names = target.dataset.case_names();
    let warn = |splits: &[splits::Split], path: &Path| {
        let without = splits::without_fold(splits, &names);
        if !without.is_empty() {
            eprintln!(
                "warning: no fold of {} has {}: not trained and not validated on. Add them there, or delete the file to \
                 have it made again",
                path.display(),
                without.join(", ")
            );
        }
    };
    let (given, file) = (target.dataset.folder.join("splits_final.json"), target.folder.join("splits_final.json"));
    let present = if file.exists() { Some(splits::read(&file, &names)?) } else { None };
    if let Some(present) = &present {
        warn(present, &file);
    }
    if given.exists() {
        let given_splits = splits::read(&given, &names)?;
        return match present {
            Some(present) if present != given_splits => {
                Err(Error::Plan(PlanError::SplitsDiffer { raw: given, preprocessed: file }).into())
            }
            Some(_) => Ok(()),
            None => {
                warn(&given_splits, &given);
                Ok(splits::write(&file, &given_splits)?)
            }
        };
    }
    if present.is_none() {
        match splits::k_fold(&names) {
            Ok(folds) => splits::write(&file, &folds)?,
            Err(error) => eprintln!("warning: {error}"),
        }
    }
    Ok(())
}

/// Preprocesses the configurations, copies the labels, and says what there is to learn from.
pub fn preprocess(
    target: &Target,
    plans: &Plans,
    configurations: &Configurations,
    reading: &Reading,
) -> anyhow::Result<()> {
    let file = target.folder.join("dataset_fingerprint.json");
    if file.exists() && Measured::age(&target.dataset, Some(reading.compat()), &file)? == Age::Stale {
        eprintln!(
            "warning: {} and the plans that were made from it are older than the raw files, or were made with another \
             --compat; `voxgrad plan-and-preprocess` makes them again",
            file.display()
        );
    }
    for name in configurations.of(plans)? {
        let configuration = plans.configuration(&name)?;
        let preprocessor =
            Preprocessor::from_plans(plans, &configuration, target.dataset.labels.clone(), reading.compat())?;
        let folder = cases_folder(&target.folder, &configuration.data_identifier);
        let moved = move_stored(&target.folder, &configuration.data_identifier)?;
        if moved > 0 {
            println!("{}: moved {moved} cases to {}, out of nnU-Net's way", target.name, folder.display());
        }
        if reading.clean {
            remove_stored(&folder)?;
        }
        let bar = reading.shown.bar("preprocessing", target.dataset.cases.len());
        let reports = preprocess_folder(&target.dataset, &preprocessor, &folder, reading.workers(), |case| {
            reading.shown.done(&bar, "preprocessed", case);
        })?;
        bar.finish_and_clear();
        let (mut good, mut failures) = (Vec::new(), 0);
        for report in reports {
            match report {
                Ok(report) => good.push(report),
                Err(error) => {
                    failures += 1;
                    eprintln!("{}: {error}", target.name);
                }
            }
        }
        summary::print(&format!("{} {name}", target.name), &target.dataset, &configuration, &good);
        anyhow::ensure!(
            failures == 0,
            "{failures} cases could not be preprocessed; the others are in {}",
            folder.display()
        );
        println!("  in {}", folder.display());
    }
    copy_labels(target)
}

/// Copies the raw labels to where evaluation looks for them, those that are not there yet as they are now.
fn copy_labels(target: &Target) -> anyhow::Result<()> {
    let folder = target.folder.join("gt_segmentations");
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let seen = |path: &Path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.len(), metadata.modified().ok()?))
    };
    for case in &target.dataset.cases {
        let Some(label) = &case.label else { continue };
        let copy = folder.join(format!("{}{}", case.name, target.dataset.json.file_ending));
        let original = seen(label);
        if original.is_none() || seen(&copy) != original {
            let bytes = std::fs::read(label).with_context(|| format!("reading {}", label.display()))?;
            io::write_atomically(&copy, &bytes)?;
            // With the original's time the next run sees that nothing has changed.
            if let Some((_, modified)) = original {
                let file = std::fs::File::options().write(true).open(&copy);
                file.and_then(|file| file.set_modified(modified))
                    .with_context(|| format!("setting the time of {}", copy.display()))?;
            }
        }
    }
    Ok(())
}
