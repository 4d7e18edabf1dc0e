//! `voxgrad train`.

use super::interrupt::Interrupt;
use super::job::Job;
use super::prepare::FolderArguments;
use super::tuning::tuned;
use super::validation::{References, Validation};
use super::{BEGAN, DeviceArgument, ExactArgument, progress_bar};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;
use voxgrad::augment::{Recipe, TrainerVariant, Transforms};
use voxgrad::kernels::Context;
use voxgrad::report::write_progress;
use voxgrad::train::run::{self, Ended, Epoch};
use voxgrad::train::{Asked, Case, DataSource, Precision, Trainer, TrainingCases, TrainingData};

/// What was typed.
#[derive(clap::Args)]
pub struct Train {
    /// Dataset folder in nnU-Net's layout: dataset.json, imagesTr, labelsTr.
    #[arg(required_unless_present = "id", conflicts_with = "id")]
    pub dataset: Option<PathBuf>,
    /// Number or name of a dataset that plan-and-preprocess has prepared: its plans, splits and preprocessed cases are
    /// used.
    #[arg(short = 'd', long = "dataset", id = "id", value_name = "DATASET")]
    pub id: Option<String>,
    #[command(flatten)]
    pub folders: FolderArguments,
    /// Folder for checkpoints, pictures, predictions and scores. With -d, unless given, nnU-Net's place in the folder of
    /// results: DATASET/voxgradTrainer__PLANS__CONFIGURATION/fold_FOLD.
    #[arg(short, long, value_name = "FOLDER", required_unless_present = "id")]
    pub output: Option<PathBuf>,
    /// nnU-Net's plans: a file, or with -d the name of plans beside the preprocessed cases; nnUNetPlans unless given.
    #[arg(short, long, value_name = "PLANS")]
    pub plans: Option<PathBuf>,
    /// Configuration of the plans; 3d_fullres unless given.
    #[arg(short, long)]
    pub configuration: Option<String>,
    /// Fold of splits_final.json in the dataset folder, or of nnU-Net's own five folds without such a file; or `all`. 0
    /// unless given. An index beyond the folds is, as in nnU-Net, a random 80:20 split.
    #[arg(short, long)]
    pub fold: Option<String>,
    /// Epochs; 1000, or the trainer's number, unless given.
    #[arg(long)]
    epochs: Option<usize>,
    /// SGD iterations of an epoch; 250 unless given.
    #[arg(long)]
    iterations: Option<usize>,
    /// Validation batches after an epoch; 50 unless given.
    #[arg(long)]
    validation_iterations: Option<usize>,
    /// Learning rate of the first epoch; 0.01 unless given.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Share of SGD's momentum that is kept from step to step; 0.99 unless given, which is for hours of training: 0.9
    /// learns sooner.
    #[arg(long)]
    momentum: Option<f32>,
    /// What is done to training patches: nnunet (rotation, scaling, noise, blur, brightness, contrast, lower resolution,
    /// gamma, mirroring, as nnU-Net has them), mirror or none; nnunet unless given. With none, predictions are not
    /// mirrored either.
    #[arg(long)]
    augmentation: Option<Transforms>,
    /// A trainer class of nnU-Net (-tr) that differs in augmentation, mirroring or epochs: nnUNetTrainerNoMirroring,
    /// nnUNetTrainer_250epochs and others; an unknown name is answered with the list.
    #[arg(long, value_name = "TRAINER", conflicts_with_all = ["augmentation", "mirror"])]
    pub trainer: Option<String>,
    /// Axes to mirror patches along, of z,y,x = 0,1,2; `none` mirrors nothing. All three unless given.
    #[arg(long, value_parser = axes)]
    mirror: Option<Axes>,
    /// Type of activations and gradients: f32, f16 (with loss scaling, as nnU-Net trains on GPUs) or bf16. Weights stay f32.
    /// f32 unless given.
    #[arg(long)]
    precision: Option<Precision>,
    #[command(flatten)]
    exact: ExactArgument,
    /// Before training, measure which algorithm is the fastest for each convolution on this device, unless an earlier run
    /// has: the measurements are kept in the user's cache folder. Results then repeat bit for bit with the same
    /// measurements only; by default a fixed rule chooses.
    #[arg(long, conflicts_with = "exact")]
    tune: bool,
    /// Seed of weights and patches; 0 unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Go on where an earlier run in the same folder was stopped, with its plans, fold and settings; without one, begin.
    /// --epochs and --learning-rate may change then, everything else that is typed must be as it was.
    #[arg(long = "continue", visible_alias = "c")]
    pub resume: bool,
    /// Score the validation cases against these complete labels instead of labelsTr.
    #[arg(long, value_name = "FOLDER")]
    pub reference: Option<PathBuf>,
    /// Do not average the validation predictions over mirrored copies.
    #[arg(long = "disable-tta")]
    pub disable_tta: bool,
    #[command(flatten)]
    device: DeviceArgument,
}

/// Axes that were listed.
#[derive(Clone, Copy)]
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

impl Train {
    /// What was typed of the settings.
    pub fn asked(&self) -> anyhow::Result<Asked> {
        let trainer = self.trainer.as_deref().map(TrainerVariant::of).transpose()?;
        let mut mirror = self.mirror.map(|axes| axes.0);
        if self.augmentation == Some(Transforms::None) {
            if mirror.unwrap_or_default() != [false; 3] {
                anyhow::bail!(
                    "--augmentation none mirrors nothing: leave out --mirror, or choose another augmentation"
                );
            }
            mirror = Some([false; 3]);
        }
        let epochs = trainer.as_ref().and_then(|trainer| trainer.epochs);
        if let (Some(asked), Some(named)) = (self.epochs, epochs)
            && asked != named
        {
            anyhow::bail!("--epochs is {asked}, but the trainer's name says {named}; give one of the two");
        }
        let typed = self.augmentation.map(|transforms| Recipe { transforms, ..Recipe::default() });
        Ok(Asked {
            epochs: self.epochs.or(epochs),
            iterations: self.iterations,
            validation_iterations: self.validation_iterations,
            learning_rate: self.learning_rate,
            momentum: self.momentum,
            mirror: trainer.as_ref().map_or(mirror, |trainer| Some(trainer.mirror)),
            augmentation: trainer.as_ref().map_or(typed, |trainer| Some(trainer.recipe)),
            precision: self.precision,
            // A flag can be typed in one way only.
            exact: self.exact.exact.then_some(true),
            seed: self.seed,
        })
    }

    /// Trains, predicts, scores.
    pub fn run(self) -> anyhow::Result<()> {
        let job = Job::new(&self)?;
        let references = References::find(self.reference.as_deref(), &job)?;
        let device = self.device.open()?;
        let TrainingData { cases, training, validation, .. } = open(&job)?;
        let context = match self.tune && !job.settings.exact {
            true => tuned(&device, &job.model, &job.settings)?,
            false => device.context.clone(),
        };
        let mut trainer = match job.checkpoint.clone() {
            Some(checkpoint) => Trainer::resume(&context, checkpoint)?,
            None => Trainer::new(&context, job.model.clone(), job.settings)?,
        };
        job.make_output()?;
        println!("augmentation: {}", trainer.settings().augmentation);
        println!(
            "network: {} parameters, patch {:?}, batch {}, fold {}, {} training and {} validation cases",
            trainer.network().parameters().count(),
            trainer.model().configuration.patch_size,
            trainer.model().configuration.batch_size,
            cases.fold,
            training.len(),
            validation.len(),
        );
        let interrupt = Interrupt::install()?;
        match fit(&mut trainer, &cases, &job.output, [&training, &validation], &interrupt)? {
            Ended::Finished(file) => println!("trained; the network is {}", file.display()),
            Ended::Stopped(file) => {
                println!("stopped; the same command with --continue goes on from {}", file.display());
            }
        }
        // Before the question: a signal is then either seen by it or ends the program.
        interrupt.end_at_once();
        if let Some(interrupted) = interrupt.asked() {
            return Err(interrupted.into());
        }
        match references {
            Some(references) => Validation { job: &job, trainer: &trainer, references, typed: &self }.run(),
            None => {
                println!("the validation cases have no raw files here: not predicted and not scored");
                Ok(())
            }
        }
    }
}

/// Opens all cases of the split and says how much is annotated.
fn open(job: &Job) -> anyhow::Result<TrainingData> {
    let Job { model, dataset, prepared, fold, split, compat, .. } = job;
    let source = DataSource { dataset, prepared, fold: *fold, split, compat: *compat };
    let bar = progress_bar("reading", split.train.len() + split.val.len());
    let data = source.open(model, |_| bar.inc(1));
    bar.finish_and_clear();
    let data = data?;
    data.notes.iter().for_each(|note| eprintln!("note: {note}"));
    if model.labels.ignore_label().is_some() {
        println!("annotated: {:.1} % of the voxels", 100.0 * data.annotated);
    }
    Ok(data)
}

/// Trains all remaining epochs.
fn fit(
    trainer: &mut Trainer,
    cases: &TrainingCases,
    output: &Path,
    patches: [&[Case]; 2],
    interrupt: &Interrupt,
) -> anyhow::Result<Ended> {
    let settings = *trainer.settings();
    let per_epoch = settings.iterations + settings.validation_iterations;
    let bar = progress_bar("training", settings.epochs * per_epoch);
    let configuration = &trainer.model().configuration;
    let voxels = configuration.batch_size * configuration.patch_size.iter().product::<usize>();
    bar.set_position((trainer.progress().epoch * per_epoch + trainer.progress().iteration) as u64);
    bar.reset_eta();
    let (context, mut first) = (trainer.context().clone(), FirstIterations::new());
    let (mut loss, mut epoch, mut iterations) = (f32::NAN, None, 0);
    let (mut start, mut before) = (Instant::now(), Instant::now());
    let ended = run::train(
        trainer,
        cases,
        output,
        patches,
        |report| {
            if epoch != Some(report.epoch) {
                (epoch, start, iterations) = (Some(report.epoch), before, 0);
            }
            before = Instant::now();
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
            match interrupt.asked() {
                Some(_) => ControlFlow::Break(()),
                None => ControlFlow::Continue(()),
            }
        },
        |epoch| {
            write_progress(&output.join("progress.png"), &epoch.trainer.progress().history)?;
            print_above(&bar, &line(&epoch));
            Ok(())
        },
    )?;
    match ended {
        Ended::Finished(_) => bar.finish(),
        Ended::Stopped(_) => bar.abandon(),
    }
    Ok(ended)
}

/// What there is to say about an epoch.
fn line(Epoch { trainer, best, not_finite }: &Epoch) -> String {
    let history = &trainer.progress().history;
    let last = |list: &[f64]| list.last().copied().unwrap_or(f64::NAN);
    let dice: Vec<String> =
        history.dice_per_class_or_region.last().into_iter().flatten().map(|d| format!("{d:.4}")).collect();
    let skipped = match not_finite {
        0 => String::new(),
        n => format!("  {n} steps not taken: loss or gradient not finite"),
    };
    format!(
        "epoch {:>4}  lr {:.5}  train loss {:.4}  val loss {:.4}  pseudo Dice [{}]  {:.1} s{}{skipped}",
        trainer.progress().epoch - 1,
        last(&history.lrs),
        last(&history.train_losses),
        last(&history.val_losses),
        dice.join(", "),
        last(&history.epoch_end_timestamps) - last(&history.epoch_start_timestamps),
        if *best { "  best" } else { "" },
    )
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
