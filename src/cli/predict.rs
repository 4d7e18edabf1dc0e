//! `voxgrad predict`.

use super::advice;
use super::device::{DeviceArgument, ExactArgument};
use super::model::ModelArguments;
use super::options::Shown;
use anyhow::Context as _;
use indicatif::ProgressBar;
use ndarray::Array4;
use std::path::{Path, PathBuf};
use std::time::Instant;
use voxgrad::compilation::Compilation;
use voxgrad::dataset::{CaseFiles, LabelManager, list_cases};
use voxgrad::exchange::{TrainedModel, write_properties};
use voxgrad::infer::Prediction;
use voxgrad::infer::memory::planned_probabilities;
use voxgrad::io::grid_difference;
use voxgrad::kernels::Context;
use voxgrad::kernels::conv3d::Policy;
use voxgrad::nn::Network;
use voxgrad::predict::{self, Settings};
use voxgrad::preprocess::{PreprocessedCase, Preprocessor, Properties, RawCase, in_stages};
use voxgrad::train::{Model, Precision};
use voxgrad::{Compat, Error, device, io};

/// What was typed.
#[derive(clap::Args)]
pub struct Predict {
    /// Folder of images, named as for training: CASE_0000.nii.gz, CASE_0001.nii.gz, ...
    #[arg(short, long, value_name = "FOLDER")]
    input: PathBuf,
    /// Folder for the segmentations; those that are there already are made again unless --continue-prediction is given.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArguments,
    /// A single checkpoint instead of a model folder, voxgrad's or nnU-Net's.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "model_dataset", "folds", "checkpoint_name"])]
    checkpoint: Option<PathBuf>,
    /// Go on with an interrupted prediction: keep segmentations that are there already, if they are whole, lie on the
    /// image's grid and hold declared labels only.
    #[arg(long = "continue-prediction", alias = "c")]
    continue_prediction: bool,
    /// Make segmentations again that are there already, which is what happens without --continue-prediction.
    #[arg(long, conflicts_with = "continue_prediction")]
    overwrite: bool,
    /// Distance of neighbouring windows as a share of the patch.
    #[arg(long = "step-size", default_value_t = 0.5)]
    step_size: f64,
    /// Do not average over mirrored copies: up to 8 times as fast, a little less accurate.
    #[arg(long = "disable-tta")]
    disable_tta: bool,
    /// Write the probabilities of each case too, as nnU-Net does: CASE.npz (the array `probabilities`, one volume for each
    /// class or region on the image's grid) and CASE.pkl (where the case lies). They are large.
    #[arg(long)]
    save_probabilities: bool,
    /// Number of programs that share the cases, each with another --part-id.
    #[arg(long, value_name = "N", default_value_t = 1)]
    num_parts: usize,
    /// Which share of the cases this program predicts, from 0.
    #[arg(long, value_name = "K", default_value_t = 0)]
    part_id: usize,
    /// Type of activations: f32, f16 or bf16; that of training unless given, where the device has it.
    #[arg(long)]
    precision: Option<Precision>,
    #[command(flatten)]
    exact: ExactArgument,
    #[command(flatten)]
    device: DeviceArgument,
    #[command(flatten)]
    shown: Shown,
    #[command(flatten)]
    upstream: Upstream,
}

/// What nnU-Net's command takes and this one has no use for: said, or refused.
#[derive(clap::Args)]
struct Upstream {
    /// nnU-Net's -npp.
    #[arg(long, value_name = "N", hide = true)]
    preprocessing_workers: Option<usize>,
    /// nnU-Net's -nps.
    #[arg(long, value_name = "N", hide = true)]
    export_workers: Option<usize>,
    /// nnU-Net's --not_on_device.
    #[arg(long, hide = true)]
    not_on_device: bool,
    /// nnU-Net's -prev_stage_predictions.
    #[arg(long, value_name = "FOLDER", hide = true)]
    prev_stage_predictions: Option<PathBuf>,
}

impl Upstream {
    fn check(&self) -> anyhow::Result<()> {
        if self.prev_stage_predictions.is_some() {
            anyhow::bail!("-prev_stage_predictions: cascades are not supported, only configurations of one stage");
        }
        let without_use = [
            ("-npp", self.preprocessing_workers.is_some(), "one process uses all cores"),
            ("-nps", self.export_workers.is_some(), "one process uses all cores"),
            ("--not_on_device", self.not_on_device, "they are added up where memory allows it, on the device first"),
        ];
        for (name, given, why) in without_use {
            if given {
                eprintln!("note: {name} has no effect here: {why}");
            }
        }
        Ok(())
    }
}

impl Predict {
    /// Predicts all cases.
    pub fn run(self) -> anyhow::Result<()> {
        self.upstream.check()?;
        anyhow::ensure!(
            self.part_id < self.num_parts,
            "-part_id is {}, but of {} parts the last one is {}",
            self.part_id,
            self.num_parts,
            self.num_parts.saturating_sub(1)
        );
        let trained = match (&self.checkpoint, self.model.folder()?) {
            (Some(file), _) => TrainedModel::of_file(file, false)?,
            (None, Some(folder)) => self.model.open(&folder, false)?,
            (None, None) => {
                anyhow::bail!("name the model: -m FOLDER, -d DATASET -c CONFIGURATION, or --checkpoint FILE")
            }
        };
        trained.notes.iter().for_each(|note| eprintln!("note: {note}"));
        let model = &trained.model;
        anyhow::ensure!(
            model.configuration.previous_stage.is_none(),
            "{} is the second stage of a cascade, which is not supported",
            model.configuration_name
        );
        let found = list_cases(&self.input, None, &model.dataset)?;
        found.notes.iter().for_each(|note| eprintln!("note: {note}"));
        Error::all(found.failures)?;
        let (all, mut cases) = (found.complete.len(), found.complete);
        if self.num_parts > 1 {
            cases = cases.into_iter().skip(self.part_id).step_by(self.num_parts).collect();
            println!("part {} of {}: {} of {all} cases", self.part_id, self.num_parts, cases.len());
        }
        let trained_with = trained.folds.iter().map(|fold| &fold.checkpoint.settings);
        let exact = self.exact.exact || trained_with.clone().any(|settings| settings.exact);
        let context = Policy::default().with_exact(exact).on(&self.device.open()?.context);
        let networks = trained.networks(&context)?;
        let mirror = if self.disable_tta { [false; 3] } else { trained.mirror };
        let of_training = trained_with.map(|settings| settings.precision).next().unwrap_or_default();
        let precision = match self.precision {
            Some(asked) => asked,
            None if of_training.check(context.caps()).is_ok() => of_training,
            None => Precision::F32,
        };
        precision.check(context.caps())?;
        let settings = Settings { step_size: self.step_size, mirror, dtype: precision.dtype() };
        let going = Going {
            keep_existing: self.continue_prediction,
            probabilities: self.save_probabilities,
            shown: self.shown,
        };
        predict_cases(&context, &networks, model, &cases, &self.output, &settings, &going)?;
        if self.save_probabilities { write_description(&self.output, model) } else { Ok(()) }
    }
}

/// What nnU-Net's ensembling looks for beside probabilities.
fn write_description(output: &Path, model: &Model) -> anyhow::Result<()> {
    let (plans, dataset) = (output.join("plans.json"), output.join("dataset.json"));
    let before = [&plans, &dataset].map(|file| std::fs::read(file).ok());
    io::write_json(&plans, &model.plans)?;
    io::write_json(&dataset, model.dataset.source())?;
    for (file, before) in [&plans, &dataset].into_iter().zip(before) {
        if before.is_some_and(|before| std::fs::read(file).is_ok_and(|now| now != before)) {
            eprintln!("note: {} was of another model, and is replaced", file.display());
        }
    }
    Ok(())
}

/// How cases are gone through.
#[derive(Default)]
pub struct Going {
    /// Whether segmentations that are there are kept.
    pub keep_existing: bool,
    /// Whether probabilities are written beside segmentations.
    pub probabilities: bool,
    /// What is shown.
    pub shown: Shown,
}

/// Predicts cases from their raw images, as [`predict_prepared`] does.
pub fn predict_cases(
    context: &Context,
    networks: &[Network],
    model: &Model,
    cases: &[CaseFiles],
    output: &Path,
    settings: &Settings,
    going: &Going,
) -> anyhow::Result<()> {
    let preprocessor = preprocessor(model)?;
    let prepare = |case: &CaseFiles| -> voxgrad::Result<_> {
        let image_only = CaseFiles { label: None, ..case.clone() };
        let raw = RawCase::read(&image_only, &model.labels)?;
        let warnings = raw.warnings.clone();
        Ok((preprocessor.run(raw)?, warnings))
    };
    predict_prepared(context, networks, model, cases, output, settings, going, prepare)
}

fn preprocessor(model: &Model) -> voxgrad::Result<Preprocessor> {
    Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected)
}

/// Predicts cases that `prepare` gives, with its warnings, into a folder, each file complete or absent. A case that fails
/// does not keep the others from being predicted. What is in the place of a segmentation already is kept only if `going`
/// says so, and only if it is one.
#[expect(clippy::too_many_arguments, reason = "what is predicted, with what, to where")]
pub fn predict_prepared(
    context: &Context,
    networks: &[Network],
    model: &Model,
    cases: &[CaseFiles],
    output: &Path,
    settings: &Settings,
    going: &Going,
    prepare: impl Fn(&CaseFiles) -> voxgrad::Result<(PreprocessedCase, Vec<String>)> + Sync,
) -> anyhow::Result<()> {
    std::fs::create_dir_all(output).with_context(|| format!("creating {}", output.display()))?;
    let unfinished = io::remove_leftovers(output)?;
    if unfinished > 0 {
        println!("removed {unfinished} unfinished files of an earlier run from {}", output.display());
    }
    let (patch, _) = model.configuration.three_dimensional()?;
    let preprocessor = preprocessor(model)?;
    let file = |case: &CaseFiles| output.join(format!("{}{}", case.name, model.dataset.file_ending));
    let places = examine(cases, file, &model.labels)?;
    let beside = |case: &CaseFiles, ending: &str| output.join(format!("{}.{ending}", case.name));
    if !going.probabilities {
        warn_of_older_probabilities(cases.iter().map(|case| beside(case, "npz")));
    }

    let bar = going.shown.bar("predicting", cases.len());
    let wanted = left_to_do(cases, places, going, &bar, beside);
    let mut tally = Tally { kept: cases.len() - wanted.len(), ..Tally::default() };
    // While the first case is read.
    let mut compilation = networks.first().filter(|_| !wanted.is_empty()).map(|network| {
        let (shape, labels, settings) = (network.shape().clone(), model.labels.clone(), *settings);
        let labels = (!going.probabilities).then_some(labels);
        Compilation::start(context, move |compiling, has_time| {
            predict::compile(compiling, &shape, labels.as_ref(), patch, &settings, has_time)
        })
    });
    let mut predict = |case: &CaseFiles, prepared: PreprocessedCase| -> voxgrad::Result<Made> {
        compilation.take().into_iter().for_each(Compilation::finish);
        let progress = Windows::new(&bar, &case.name);
        let observe = |done, all| progress.show(done, all);
        let found = match going.probabilities {
            false => {
                let labels =
                    predict::segmentation(context, networks, &prepared, &preprocessor, patch, settings, observe)?;
                Prediction { labels, probabilities: Array4::zeros((0, 0, 0, 0)) }
            }
            true => predict::prediction(context, networks, &prepared, &preprocessor, patch, settings, observe)?,
        };
        let PreprocessedCase { properties, geometry, .. } = prepared;
        Ok(Made { found, properties, geometry })
    };
    let memory = device::host_memory().unwrap_or(u64::MAX);
    let heads = if going.probabilities { model.labels.num_segmentation_heads() } else { 0 };
    let went = in_stages(
        &wanted,
        |(case, _)| prepare(case),
        |prepared| prepared.as_ref().map_or(true, |(case, _)| bytes_of_three(case, heads) <= memory / 2),
        |(case, _), prepared| {
            bar.set_message(case.name.clone());
            let predicted = prepared.and_then(|(prepared, warnings)| {
                warnings.iter().for_each(|warning| bar.suspend(|| eprintln!("warning: {warning}")));
                predict(case, prepared)
            });
            match predicted {
                // Of the device: no other case would fare better.
                Err(error @ Error::Kernel(_)) => {
                    Err(anyhow::Error::from(error).context(format!("predicting {}", case.name)))
                }
                predicted => Ok(predicted),
            }
        },
        |&(case, replaces), predicted| match predicted
            .and_then(|made: Made| made.write(&file(case), |ending| beside(case, ending)))
        {
            Ok(()) => {
                tally.made += 1;
                tally.replaced += usize::from(replaces);
                going.shown.done(&bar, "predicted", &case.name);
            }
            Err(error) => {
                bar.suspend(|| eprintln!("error: predicting {}: {error}", case.name));
                if let Some(options) = advice(&error.into()) {
                    bar.suspend(|| eprintln!("options: {options}"));
                }
                tally.failed.push(case.name.clone());
                bar.inc(1);
            }
        },
    );
    bar.finish_and_clear();
    tally.tell(output);
    went?;
    let failed = &tally.failed;
    anyhow::ensure!(
        failed.is_empty(),
        "{} of {} cases could not be predicted: {}",
        failed.len(),
        cases.len(),
        failed.join(", ")
    );
    Ok(())
}

/// The cases that are to be predicted, and whether something is in the place of their segmentation.
fn left_to_do<'a>(
    cases: &'a [CaseFiles],
    places: Vec<Place>,
    going: &Going,
    bar: &ProgressBar,
    beside: impl Fn(&CaseFiles, &str) -> PathBuf,
) -> Vec<(&'a CaseFiles, bool)> {
    let mut wanted = Vec::with_capacity(cases.len());
    for (case, place) in cases.iter().zip(places) {
        if let Place::Other(reason) = &place {
            bar.suspend(|| eprintln!("warning: no segmentation of case {}: {reason}; it is made again", case.name));
        }
        // They are written before the segmentation: where it is, they are whole.
        let is_complete = !going.probabilities || ["npz", "pkl"].iter().all(|ending| beside(case, ending).is_file());
        if going.keep_existing && matches!(place, Place::Segmentation) && is_complete {
            bar.inc(1);
        } else {
            wanted.push((case, !matches!(place, Place::Empty)));
        }
    }
    wanted
}

/// How many cases came to what.
#[derive(Default)]
struct Tally {
    made: usize,
    replaced: usize,
    kept: usize,
    failed: Vec<String>,
}

impl Tally {
    fn tell(&self, output: &Path) {
        let Tally { made, replaced, kept, .. } = self;
        let older = if *replaced > 0 { format!(" ({replaced} in the place of an older file)") } else { String::new() };
        println!("segmentations in {}: {made} made{older}, {kept} kept", output.display());
    }
}

/// Bytes that three cases like this one take at most, one preprocessed, one predicted, one written: copies of the image, as
/// read, cropped and resampled, and of the probabilities of `heads` heads.
fn bytes_of_three(case: &PreprocessedCase, heads: usize) -> u64 {
    let raw: usize = case.properties.shape_before_cropping.iter().product();
    let image = (case.data.len().max(raw.saturating_mul(case.data.dim().0)) as u64).saturating_mul(4 * 8);
    image.saturating_add(planned_probabilities(heads, case.properties.shape_before_cropping).saturating_mul(3))
}

/// A predicted case, to be written.
struct Made {
    found: Prediction,
    properties: Properties,
    geometry: io::Geometry,
}

impl Made {
    /// Writes the segmentation, and before it the probabilities if there are any.
    fn write(&self, segmentation: &Path, beside: impl Fn(&str) -> PathBuf) -> voxgrad::Result<()> {
        if !self.found.probabilities.is_empty() {
            io::write_npz_array(&beside("npz"), predict::PROBABILITIES, self.found.probabilities.view())?;
            write_properties(&beside("pkl"), &self.properties, &self.geometry)?;
        }
        io::write_segmentation(segmentation, self.found.labels.view(), &self.geometry)
    }
}

/// How far a case is, beside its name.
struct Windows<'a> {
    bar: &'a ProgressBar,
    case: &'a str,
    began: Instant,
}

impl<'a> Windows<'a> {
    fn new(bar: &'a ProgressBar, case: &'a str) -> Self {
        Self { bar, case, began: Instant::now() }
    }

    fn show(&self, done: usize, all: usize) {
        let left = self.began.elapsed().as_secs_f64() * (all - done) as f64 / done.max(1) as f64;
        self.bar.set_message(format!("{} {} %, {left:.0} s left of it", self.case, 100 * done / all.max(1)));
        self.bar.tick();
    }
}

/// Probabilities of an earlier prediction would be taken for those of the new one.
fn warn_of_older_probabilities(files: impl Iterator<Item = PathBuf>) {
    let older: Vec<String> = files.filter(|file| file.exists()).map(|file| file.display().to_string()).collect();
    if !older.is_empty() {
        eprintln!(
            "warning: these probabilities are of an earlier prediction, and are not made again; remove them, or have them \
             made too: {}",
            older.join(", ")
        );
    }
}

/// What is where a segmentation is to go.
enum Place {
    Empty,
    Segmentation,
    /// No segmentation of this case, and why.
    Other(String),
}

/// Looks at what is there before anything is predicted.
///
/// An annotation holds the ignore label, which is never predicted: one in the place of a segmentation is an error.
fn examine(
    cases: &[CaseFiles],
    file: impl Fn(&CaseFiles) -> PathBuf,
    labels: &LabelManager,
) -> anyhow::Result<Vec<Place>> {
    let (mut places, mut annotations) = (Vec::with_capacity(cases.len()), Vec::new());
    for case in cases {
        let path = file(case);
        let place = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Place::Empty,
            _ => match io::read_labels(&path) {
                Ok(map) => {
                    if labels.ignore_label().is_some_and(|ignore| map.data.iter().any(|&label| label == ignore)) {
                        annotations.push(path.display().to_string());
                    }
                    other_than_segmentation(&path, &map, case, labels).map_or(Place::Segmentation, Place::Other)
                }
                Err(error) => Place::Other(error.to_string()),
            },
        };
        places.push(place);
    }
    if !annotations.is_empty() {
        anyhow::bail!(
            "these files hold the ignore label, so they are annotations, not predictions: {}; nothing was predicted: \
             choose another --output",
            annotations.join(", ")
        );
    }
    Ok(places)
}

/// Why a label map is no segmentation of the case.
fn other_than_segmentation(path: &Path, map: &io::LabelMap, case: &CaseFiles, labels: &LabelManager) -> Option<String> {
    let declared = labels.all_labels();
    if let Some(label) = map.data.iter().find(|label| !declared.contains(label)) {
        return Some(format!("{} holds label {label}, which the dataset does not declare", path.display()));
    }
    // An image that cannot be read is told about when it is to be predicted.
    let image = io::read_image(case.images.first()?).ok()?;
    let grid = (&image.geometry, image.data.dim().into());
    let difference = grid_difference((&map.geometry, map.data.dim().into()), grid)?;
    Some(format!("{} does not lie on the image's grid: {difference}", path.display()))
}
