//! `voxgrad train`.

use super::prepare::FolderArguments;
use super::{BEGAN, DeviceArgument, ExactArgument, evaluate, predict, progress_bar};
use anyhow::Context as _;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use voxgrad::augment::{TrainerVariant, Transforms};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::{self, Fold, Split};
use voxgrad::dataset::{CaseFiles, Dataset, LabelManager};
use voxgrad::device::Device;
use voxgrad::io;
use voxgrad::kernels::Context;
use voxgrad::preprocess::{Preprocessor, RawCase, case_path, label_counts, made_with, read_b2nd, read_npz};
use voxgrad::report::{Overlay, write_overlay, write_progress};
use voxgrad::sample::{ChunkCache, PatchSource, StoredPatches};
use voxgrad::train::{Checkpoint, Model, Outcome, Precision, Settings, Trainer};
use voxgrad::{Compat, predict as inference, tune};

/// What was typed.
#[derive(clap::Args)]
pub struct Train {
    /// Dataset folder in nnU-Net's layout: dataset.json, imagesTr, labelsTr.
    #[arg(required_unless_present = "id", conflicts_with = "id")]
    dataset: Option<PathBuf>,
    /// Number or name of a dataset that plan-and-preprocess has prepared: its plans, splits and preprocessed cases are
    /// used.
    #[arg(short = 'd', long = "dataset", id = "id", value_name = "DATASET")]
    id: Option<String>,
    #[command(flatten)]
    folders: FolderArguments,
    /// Folder for checkpoints, pictures, predictions and scores. With -d, unless given, nnU-Net's place in the folder of
    /// results: DATASET/voxgradTrainer__PLANS__CONFIGURATION/fold_FOLD.
    #[arg(short, long = "output", value_name = "FOLDER", required_unless_present = "id")]
    output_given: Option<PathBuf>,
    /// The output folder, once it is known.
    #[arg(skip)]
    output: PathBuf,
    /// nnU-Net's plans: a file, or with -d the name of plans beside the preprocessed cases; nnUNetPlans unless given.
    #[arg(short, long, value_name = "PLANS")]
    plans: Option<PathBuf>,
    /// Configuration of the plans.
    #[arg(short, long, default_value = "3d_fullres")]
    configuration: String,
    /// Fold of splits_final.json in the dataset folder, or of nnU-Net's own five folds without such a file; or `all`.
    #[arg(short, long, default_value = "0")]
    fold: String,
    /// Epochs; 1000, or the trainer's number, unless given.
    #[arg(long)]
    epochs: Option<usize>,
    /// SGD iterations of an epoch.
    #[arg(long, default_value_t = 250)]
    iterations: usize,
    /// Validation batches after an epoch.
    #[arg(long, default_value_t = 50)]
    validation_iterations: usize,
    /// Learning rate of the first epoch.
    #[arg(long, default_value_t = 0.01)]
    learning_rate: f64,
    /// Share of SGD's momentum that is kept from step to step. 0.99 is for hours of training; 0.9 learns sooner.
    #[arg(long, default_value_t = 0.99)]
    momentum: f32,
    /// What is done to training patches: nnunet (rotation, scaling, noise, blur, brightness, contrast, lower resolution,
    /// gamma, mirroring), mirror or none. With none, predictions are not mirrored either.
    #[arg(long, default_value_t = Transforms::Nnunet)]
    augmentation: Transforms,
    /// Axes to mirror patches along, of z,y,x = 0,1,2; `none` mirrors nothing. All of them unless given.
    #[arg(long, value_parser = axes)]
    mirror: Option<Axes>,
    /// A trainer class of nnU-Net that differs in augmentation, mirroring or epochs (-tr): nnUNetTrainerNoMirroring,
    /// nnUNetTrainer_250epochs and others; an unknown name is answered with the list.
    #[arg(long, value_name = "TRAINER", conflicts_with_all = ["augmentation", "mirror"])]
    trainer: Option<String>,
    /// Type of activations and gradients: f32, f16 (with loss scaling, as nnU-Net trains on GPUs) or bf16. Weights stay f32.
    #[arg(long, default_value_t = Precision::F32)]
    precision: Precision,
    #[command(flatten)]
    exact: ExactArgument,
    /// Before training, measure which algorithm is the fastest for each convolution on this device, unless an earlier run
    /// has: the measurements are kept in the user's cache folder. Results then repeat bit for bit with the same
    /// measurements only; by default a fixed rule chooses.
    #[arg(long, conflicts_with = "exact")]
    tune: bool,
    /// Seed of weights and patches.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on where an earlier run in the same folder was stopped; without one, begin.
    #[arg(long = "continue", visible_alias = "c")]
    resume: bool,
    /// Score the validation cases against these complete labels instead of labelsTr.
    #[arg(long, value_name = "FOLDER")]
    reference: Option<PathBuf>,
    /// Do not average the validation predictions over mirrored copies.
    #[arg(long = "disable-tta")]
    disable_tta: bool,
    #[command(flatten)]
    device: DeviceArgument,
}

/// Axes that were listed.
#[derive(Clone, Copy, PartialEq)]
struct Axes([bool; 3]);

fn axes(text: &str) -> Result<Axes, String> {
    let mut axes = Axes([false; 3]);
    if text != "none" {
        for axis in text.split(',') {
            let place = axis.trim().parse::<usize>().ok().and_then(|axis| axes.0.get_mut(axis));
            *place.ok_or_else(|| format!("`{axis}` is no axis: list some of 0,1,2, or write none"))? = true;
        }
    }
    Ok(axes)
}

/// Unpacked chunks of preprocessed cases that are kept in memory: 512 MiB.
const CACHE_BYTES: usize = 512 << 20;
/// This program's name in the place of nnU-Net's trainer class.
const TRAINER: &str = "voxgradTrainer";
const LATEST: &str = "checkpoint_latest.safetensors";
const BEST: &str = "checkpoint_best.safetensors";
const FINAL: &str = "checkpoint_final.safetensors";

impl Train {
    /// Trains, predicts, scores.
    pub fn run(mut self) -> anyhow::Result<()> {
        let variant = self.variant()?;
        let source = self.source()?;
        let dataset = Dataset::open(&source.raw)?;
        let split = self.split(&dataset, &source)?;
        let model = self.model(&dataset, &source)?;
        let device = self.device.open()?;
        self.make_output(&model, &source)?;

        let preprocessor =
            Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected)?;
        let stored = source.prepared.join(&model.configuration.data_identifier);
        let cache = ChunkCache::new(CACHE_BYTES);
        let training = preprocess(&dataset, &split.train, &preprocessor, &stored, &cache)?;
        let validation = preprocess(&dataset, &split.val, &preprocessor, &stored, &cache)?;
        report_annotation(&training, &model)?;
        let [training, validation] =
            [training, validation].map(|cases| cases.into_iter().map(|case| case.source).collect::<Vec<_>>());

        let mut trainer = self.trainer(&device, model, &variant)?;
        println!("{}", augmentation(trainer.settings()));
        println!(
            "network: {} parameters, patch {:?}, batch {}, {} training and {} validation cases",
            trainer.network().parameters().count(),
            trainer.model().configuration.patch_size,
            trainer.model().configuration.batch_size,
            training.len(),
            validation.len(),
        );
        if !self.fit(&mut trainer, &training, &validation)? {
            return Ok(());
        }

        let files: Vec<CaseFiles> = case_files(&dataset, &split.val)?.into_iter().cloned().collect();
        let folder = self.output.join("validation");
        let mirror = if self.disable_tta { [false; 3] } else { trainer.settings().mirror };
        let dtype = trainer.settings().precision.dtype();
        let settings = inference::Settings { mirror, dtype, ..Default::default() };
        predict::predict_cases(
            trainer.context(),
            trainer.network(),
            trainer.model(),
            &files,
            &folder,
            &settings,
            false,
        )?;
        let references = self.reference.clone().unwrap_or_else(|| source.raw.join("labelsTr"));
        let (labels, ending) = (&trainer.model().labels, &dataset.json.file_ending);
        // In nnU-Net's layout the scores lie beside the predictions.
        let summary = if self.output_given.is_some() { &self.output } else { &folder }.join("summary.json");
        // The references may hold more cases than this fold's.
        let result = evaluate::score(&references, &folder, ending, labels, true, &summary)?;
        evaluate::print(&result, labels);
        let pictures = self.output.join("overlays");
        std::fs::create_dir_all(&pictures).with_context(|| format!("creating {}", pictures.display()))?;
        for case in &files {
            self.draw(case, &folder, ending, labels, &pictures)?;
        }
        println!("pictures in {}, scores in {}", pictures.display(), summary.display());
        Ok(())
    }

    /// The raw dataset, and the folder of its plans and splits: the same one unless the dataset has been prepared.
    fn source(&self) -> anyhow::Result<Source> {
        match (&self.id, &self.dataset) {
            (Some(id), _) => {
                let folders = self.folders.folders();
                let located = folders.locate(id)?;
                let prepared = folders.preprocessed_of(&located.name)?;
                let results = match self.output_given {
                    None => Some(folders.results_of(&located.name)?),
                    Some(_) => None,
                };
                Ok(Source { raw: located.raw()?.into(), prepared, results })
            }
            (None, Some(folder)) => Ok(Source { raw: folder.clone(), prepared: folder.clone(), results: None }),
            (None, None) => anyhow::bail!("name a dataset folder, or a dataset with -d"),
        }
    }

    /// Makes the output folder. In nnU-Net's layout the folder above it holds what all folds share.
    fn make_output(&mut self, model: &Model, source: &Source) -> anyhow::Result<()> {
        let create =
            |folder: &Path| std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()));
        if let Some(given) = &self.output_given {
            self.output = given.clone();
            return create(given);
        }
        let results = source.results.as_ref().context("name an output folder with -o")?;
        // nnUNetTrainer_250epochs is voxgradTrainer_250epochs here.
        let suffix = self.trainer.as_deref().and_then(|name| name.strip_prefix("nnUNetTrainer")).unwrap_or("");
        let folder = results.join(format!("{TRAINER}{suffix}__{}__{}", model.plans.plans_name, self.configuration));
        self.output = folder.join(format!("fold_{}", self.fold));
        create(&self.output)?;
        let plans = self.plans_path(source);
        let plans = std::fs::read(&plans).with_context(|| format!("reading {}", plans.display()))?;
        io::write_atomically(&folder.join("plans.json"), &plans)?;
        io::write_json(&folder.join("dataset.json"), model.dataset.source())?;
        let fingerprint = source.prepared.join("dataset_fingerprint.json");
        if let Ok(bytes) = std::fs::read(&fingerprint) {
            io::write_atomically(&folder.join("dataset_fingerprint.json"), &bytes)?;
        }
        println!("results: {}", self.output.display());
        Ok(())
    }

    fn plans_path(&self, source: &Source) -> PathBuf {
        match &self.plans {
            Some(name) if self.id.is_some() && !name.is_file() => {
                source.prepared.join(format!("{}.json", name.display()))
            }
            Some(file) => file.clone(),
            None => source.prepared.join("nnUNetPlans.json"),
        }
    }

    fn model(&self, dataset: &Dataset, source: &Source) -> anyhow::Result<Model> {
        let path = self.plans_path(source);
        let plans = Plans::read(&path).context("reading the plans (--plans FILE names another file)")?;
        Ok(Model::new(plans, &self.configuration, dataset.json.clone())?)
    }

    fn split(&self, dataset: &Dataset, source: &Source) -> anyhow::Result<Split> {
        let names = dataset.case_names();
        let fold: Fold = self.fold.parse()?;
        let file = source.prepared.join("splits_final.json");
        let splits = match (fold, file.exists()) {
            (Fold::All, _) => Vec::new(),
            (_, true) => splits::read(&file, &names)?,
            (_, false) => splits::k_fold(&names)?,
        };
        Ok(splits::cases_of_fold(&splits, fold, &names)?)
    }

    /// The trainer that was named, or the one that the other options describe.
    fn variant(&self) -> anyhow::Result<TrainerVariant> {
        let mut variant = TrainerVariant::of(self.trainer.as_deref().unwrap_or("nnUNetTrainer"))?;
        if self.trainer.is_none() {
            variant.recipe.transforms = self.augmentation;
            variant.mirror = match (self.augmentation, self.mirror) {
                (Transforms::None, None | Some(Axes([false, false, false]))) => [false; 3],
                (Transforms::None, Some(_)) => {
                    anyhow::bail!(
                        "--augmentation none mirrors nothing: leave out --mirror, or choose another augmentation"
                    )
                }
                (_, axes) => axes.map_or([true; 3], |axes| axes.0),
            };
        }
        match (self.epochs, variant.epochs) {
            (Some(asked), Some(named)) if asked != named => {
                anyhow::bail!("--epochs is {asked}, but {} trains for {named}; give one of the two", variant.name)
            }
            (asked, named) => variant.epochs = asked.or(named),
        }
        Ok(variant)
    }

    fn trainer(&self, device: &Device, model: Model, variant: &TrainerVariant) -> anyhow::Result<Trainer> {
        let saved = [FINAL, LATEST, BEST].map(|name| self.output.join(name)).into_iter().find(|path| path.exists());
        match saved {
            Some(path) if self.resume => {
                println!("continuing from {}", path.display());
                let checkpoint = Checkpoint::read(&path)?;
                let context = self.context(device, &checkpoint.model, &checkpoint.settings)?;
                Ok(Trainer::resume(&context, checkpoint)?)
            }
            Some(path) => anyhow::bail!(
                "{} is there already; use --continue to go on with it, or choose another --output",
                path.display()
            ),
            None => {
                let settings = Settings {
                    epochs: variant.epochs.unwrap_or(Settings::default().epochs),
                    iterations: self.iterations,
                    validation_iterations: self.validation_iterations,
                    learning_rate: self.learning_rate,
                    momentum: self.momentum,
                    mirror: variant.mirror,
                    augmentation: variant.recipe,
                    precision: self.precision,
                    exact: self.exact.exact,
                    seed: self.seed,
                };
                Ok(Trainer::new(&self.context(device, &model, &settings)?, model, settings)?)
            }
        }
    }

    /// The device, with the algorithms that were measured to be the fastest if that was asked for.
    fn context(&self, device: &Device, model: &Model, settings: &Settings) -> anyhow::Result<Context> {
        if !self.tune || settings.exact {
            return Ok(device.context.clone());
        }
        let (patch, _) = model.configuration.three_dimensional()?;
        let problems = tune::convolutions(&model.architecture()?, model.configuration.batch_size, patch)?;
        let identity = tune::identity(device);
        let file = tune::cache_file(&identity);
        let mut table = match &file {
            Some(file) => tune::Table::read(file, &identity).unwrap_or_else(|error| {
                eprintln!("note: {error}; measuring anew");
                tune::Table::new(&identity)
            }),
            None => tune::Table::new(&identity),
        };
        let dtype = settings.precision.dtype();
        let measured = table.complete(&device.context, &problems, dtype, |problem, pass, times| {
            let [depth, height, width] = problem.in_dims();
            let inputs = problem.channels_in() + problem.second_channels();
            let times: Vec<String> = times.iter().map(|(name, ms)| format!("{name} {ms:.2} ms")).collect();
            println!(
                "measured: {inputs} to {} channels, {depth}x{height}x{width}, {pass}: {}",
                problem.channels_out(),
                times.join(", ")
            );
        })?;
        match &file {
            Some(file) if measured > 0 => {
                table.write(file)?;
                println!("kept {measured} measurements in {}", file.display());
            }
            Some(_) if table.choices().is_empty() => println!("tuning: one algorithm only for each convolution"),
            Some(file) => println!("algorithms as measured in {}", file.display()),
            None => eprintln!("note: no cache folder in the environment; the measurements are not kept"),
        }
        Ok(device.context.clone().with_choices(table.choices()))
    }

    /// Trains all remaining epochs. False if Ctrl-C stopped it; the place is saved then.
    fn fit(
        &self,
        trainer: &mut Trainer,
        training: &[Box<dyn PatchSource + Send + Sync>],
        validation: &[Box<dyn PatchSource + Send + Sync>],
    ) -> anyhow::Result<bool> {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        ctrlc::set_handler(move || {
            // A second Ctrl-C does not wait for the iteration to end.
            if asked.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        })
        .context("installing the Ctrl-C handler")?;

        let settings = *trainer.settings();
        let per_epoch = settings.iterations + settings.validation_iterations;
        let bar = progress_bar("training", settings.epochs * per_epoch);
        let configuration = &trainer.model().configuration;
        let voxels = configuration.batch_size * configuration.patch_size.iter().product::<usize>();
        bar.set_position((trainer.progress().epoch * per_epoch + trainer.progress().iteration) as u64);
        bar.reset_eta();
        let mut loss = f32::NAN;
        let (context, mut first) = (trainer.context().clone(), FirstIterations::new());
        while !trainer.is_finished() {
            let (start, mut iterations) = (Instant::now(), 0);
            let outcome = trainer.epoch(training, validation, |report| {
                iterations += 1;
                if let Some(line) = first.after(&context) {
                    print_above(&bar, &line);
                }
                if !report.validation {
                    loss = report.loss.unwrap_or(loss);
                }
                let rate = (iterations * voxels) as f64 / start.elapsed().as_secs_f64() / 1e6;
                bar.set_message(format!("epoch {}, loss {loss:.4}, {rate:.2} Mvoxel/s", report.epoch));
                bar.inc(1);
                match stop.load(Ordering::SeqCst) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })?;
            let latest = self.output.join(LATEST);
            match outcome {
                Outcome::Interrupted => {
                    trainer.checkpoint()?.write(&latest)?;
                    bar.abandon();
                    println!("stopped; the same command with --continue goes on from {}", latest.display());
                    return Ok(false);
                }
                Outcome::Finished { best } => {
                    self.after_epoch(trainer, best, &bar)?;
                }
            }
        }
        bar.finish();
        let last = self.output.join(FINAL);
        trainer.checkpoint()?.write(&last)?;
        // As nnU-Net does: what the final checkpoint holds is not kept twice.
        match std::fs::remove_file(self.output.join(LATEST)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context("removing the latest checkpoint");
            }
            _ => println!("trained; the network is {}", last.display()),
        }
        Ok(true)
    }

    fn after_epoch(&self, trainer: &Trainer, best: bool, bar: &indicatif::ProgressBar) -> anyhow::Result<()> {
        let checkpoint = trainer.checkpoint()?;
        checkpoint.write(&self.output.join(LATEST))?;
        if best {
            checkpoint.write(&self.output.join(BEST))?;
        }
        let history = &trainer.progress().history;
        write_progress(&self.output.join("progress.png"), history)?;
        let last = |list: &[f64]| list.last().copied().unwrap_or(f64::NAN);
        let dice: Vec<String> =
            history.dice_per_class_or_region.last().into_iter().flatten().map(|d| format!("{d:.4}")).collect();
        let line = format!(
            "epoch {:>4}  lr {:.5}  train loss {:.4}  val loss {:.4}  pseudo Dice [{}]  {:.1} s{}",
            trainer.progress().epoch - 1,
            last(&history.lrs),
            last(&history.train_losses),
            last(&history.val_losses),
            dice.join(", "),
            last(&history.epoch_end_timestamps) - last(&history.epoch_start_timestamps),
            if best { "  best" } else { "" },
        );
        print_above(bar, &line);
        Ok(())
    }

    fn draw(
        &self,
        case: &CaseFiles,
        predictions: &Path,
        ending: &str,
        labels: &LabelManager,
        pictures: &Path,
    ) -> anyhow::Result<()> {
        let file = format!("{}{ending}", case.name);
        let first = case.images.first().context("a case without images")?;
        let image = io::read_image(first)?;
        let prediction = io::read_labels(&predictions.join(&file))?;
        let annotation = case.label.as_deref().map(io::read_labels).transpose()?;
        let reference = self.reference.as_ref().map(|folder| io::read_labels(&folder.join(&file))).transpose()?;
        write_overlay(
            &pictures.join(format!("{}.png", case.name)),
            &Overlay {
                case: &case.name,
                image: image.data.view(),
                annotation: annotation.as_ref().map(|labels| labels.data.view()),
                prediction: prediction.data.view(),
                reference: reference.as_ref().map(|labels| labels.data.view()),
                ignore: labels.ignore_label(),
                labels: &legend(labels),
                spacing: image.geometry.spacing,
            },
        )?;
        Ok(())
    }
}

/// What is done to training patches, for the log.
fn augmentation(settings: &Settings) -> String {
    let axes: Vec<String> = (0..3).filter(|&a| settings.mirror[a]).map(|axis| axis.to_string()).collect();
    let axes = if axes.is_empty() { "none".into() } else { axes.join(",") };
    let recipe = settings.augmentation;
    let nearest = if recipe.nearest_labels { ", labels of the nearest voxel" } else { "" };
    let in_space = if recipe.dummy_2d { "" } else { ", never in the plane" };
    format!("augmentation: {}, mirrored axes: {axes}{nearest}{in_space}", recipe.transforms)
}

/// Prints above the bar on a terminal, plainly into a file.
fn print_above(bar: &indicatif::ProgressBar, line: &str) {
    if bar.is_hidden() { println!("{line}") } else { bar.println(line) }
}

/// The time of the first two iterations: the first one compiles the kernels.
struct FirstIterations {
    last: Instant,
    durations: Vec<f64>,
}

impl FirstIterations {
    fn new() -> Self {
        Self { last: Instant::now(), durations: Vec::new() }
    }

    /// To be called after every iteration. Waits for the device after the first two only, and then has something to say.
    fn after(&mut self, context: &Context) -> Option<String> {
        // A device that has failed says so when the loss is read.
        if self.durations.len() == 2 || context.finish([]).is_err() {
            return None;
        }
        self.durations.push(self.last.elapsed().as_secs_f64());
        self.last = Instant::now();
        let &[first, second] = self.durations.as_slice() else { return None };
        let since_begin = BEGAN.get()?.elapsed().as_secs_f64() - second;
        Some(format!(
            "first iteration done {since_begin:.1} s after the program's begin: {first:.1} s, of which {:.1} s compiling \
             kernels; the second took {second:.3} s",
            (first - second).max(0.0),
        ))
    }
}

/// What the label values of a segmentation mean: for regions, the region that is decoded to the value.
fn legend(labels: &LabelManager) -> Vec<(i16, String)> {
    let names = labels.foreground_names();
    let values: Vec<i16> = match labels.regions_class_order() {
        Some(order) => order.to_vec(),
        None => labels.foreground().iter().flat_map(|group| group.members().to_vec()).collect(),
    };
    values.into_iter().zip(names.into_iter().map(String::from)).collect()
}

fn case_files<'a>(dataset: &'a Dataset, names: &[String]) -> anyhow::Result<Vec<&'a CaseFiles>> {
    names
        .iter()
        .map(|name| {
            let found = dataset.cases.iter().find(|case| case.name == *name);
            found.with_context(|| format!("case {name} of the split has no files in {}", dataset.folder.display()))
        })
        .collect()
}

/// A case to cut patches from, and how many voxels have each label.
struct Prepared {
    source: Box<dyn PatchSource + Send + Sync>,
    label_counts: BTreeMap<i16, u64>,
}

/// Opens cases in parallel: in the folder `stored` as voxgrad or nnU-Net has preprocessed them, else from the raw files,
/// which are preprocessed then. Of voxgrad's own files patches are read as they are needed.
fn preprocess(
    dataset: &Dataset,
    names: &[String],
    preprocessor: &Preprocessor,
    stored: &Path,
    cache: &Arc<ChunkCache>,
) -> anyhow::Result<Vec<Prepared>> {
    let files = case_files(dataset, names)?;
    let bar = progress_bar("reading", files.len());
    let open = |case: &CaseFiles| -> anyhow::Result<Prepared> {
        let file = case_path(stored, &case.name);
        if file.exists() {
            let patches = StoredPatches::open(&file, cache)?;
            if !made_with(patches.case(), preprocessor) {
                anyhow::bail!("{} was made with other settings; run `voxgrad preprocess` again", file.display());
            }
            return Ok(Prepared { label_counts: patches.case().label_counts(), source: Box::new(patches) });
        }
        let theirs = |ending: &str| Some(stored.join(format!("{}{ending}", case.name))).filter(|file| file.exists());
        let case = match (theirs(".b2nd"), theirs(".npz")) {
            (Some(file), _) => read_b2nd(&file, &dataset.labels, preprocessor.spacing)?,
            (None, Some(file)) => read_npz(&file, &dataset.labels, preprocessor.spacing)?,
            (None, None) => {
                let raw = RawCase::read(case, &dataset.labels)?;
                raw.warnings.iter().for_each(|warning| bar.suspend(|| eprintln!("warning: {warning}")));
                preprocessor.run(raw)?
            }
        };
        Ok(Prepared { label_counts: label_counts(case.seg.view()), source: Box::new(case) })
    };
    let cases = files.par_iter().map(|case| open(case).inspect(|_| bar.inc(1))).collect();
    bar.finish_and_clear();
    cases
}

/// Says how much is annotated, and refuses a dataset of which nothing is.
fn report_annotation(cases: &[Prepared], model: &Model) -> anyhow::Result<()> {
    let Some(ignore) = model.labels.ignore_label() else { return Ok(()) };
    let (mut annotated, mut all) = (0, 0);
    for case in cases {
        let voxels: u64 = case.label_counts.values().sum();
        let here = voxels - case.label_counts.get(&ignore).unwrap_or(&0);
        if here == 0 {
            eprintln!("warning: case {} has no annotated voxel: nothing is learned from it", case.source.name());
        }
        annotated += here;
        all += voxels;
    }
    if annotated == 0 {
        anyhow::bail!(
            "every voxel of all {} training cases has the ignore label {ignore}: annotate some, or correct the value of \
             `ignore` in dataset.json",
            cases.len()
        );
    }
    println!("annotated: {:.1} % of the voxels", 100.0 * annotated as f64 / all as f64);
    Ok(())
}

/// Where a dataset's files are, and where its results go unless an output folder is given.
struct Source {
    raw: PathBuf,
    prepared: PathBuf,
    results: Option<PathBuf>,
}
