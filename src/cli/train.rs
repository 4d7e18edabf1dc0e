//! `voxgrad train`.

use super::interrupt::Interrupt;
use super::job::Job;
use super::progress::{BEGAN, print_above, progress_bar};
use super::records::{self, Records};
use super::tuning::tuned;
use super::typed::Train;
use super::validation::{References, Validation};
use anyhow::Context as _;
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use voxgrad::compilation::Compilation;
use voxgrad::device::Device;
use voxgrad::exchange::load_pretrained;
use voxgrad::kernels::Context;
use voxgrad::report::write_progress;
use voxgrad::train::run::{self, Ended, Epoch};
use voxgrad::train::{Checkpoint, DataSource, Report, Trainer, TrainingData, compile};

impl Train {
    /// Trains, predicts, scores.
    pub fn run(self) -> anyhow::Result<()> {
        let typed = self.settled()?;
        typed.train()
    }

    fn train(&self) -> anyhow::Result<()> {
        let job = Job::new(self)?;
        let references = References::find(self.reference.as_deref(), &job)?;
        let device = self.device.open()?;
        if self.val {
            let trainer = trainer(&device.context, &job, None)?;
            job.make_output()?;
            return self.validate(&job, &trainer, references).map(drop);
        }
        let loading = self.loading();
        let compilation = compiled_meanwhile(&device.context, &job);
        let data = open(&job, loading.skip_unreadable)?;
        compilation.into_iter().for_each(Compilation::finish);
        let context = match job.settings.tuned {
            true => tuned(&device, &job.model, &job.settings)?,
            false => device.context.clone(),
        };
        let mut trainer = trainer(&context, &job, self.memory_budget)?.with_loading(loading);
        if let (Some(path), None) = (&self.pretrained_weights, &job.checkpoint) {
            let loaded = load_pretrained(&context, path, trainer.network().parameters())?;
            let path = path.display();
            println!(
                "begins with {loaded} parameters of {path}, all but those of the layers that make the segmentation"
            );
        }
        if let (Some(path), Some(_)) = (&self.pretrained_weights, &job.checkpoint)
            && self.begun_with(&job) != serde_json::json!(path.display().to_string())
        {
            eprintln!("note: --pretrained-weights has no effect: training goes on with the weights of its checkpoint");
        }
        job.make_output()?;
        println!("augmentation: {}", trainer.settings().augmentation);
        println!("sampling: {}", trainer.settings().sampling);
        let (threads, bytes) = trainer.prefetch();
        println!(
            "loading: {threads} threads, which hold at most {:.1} MiB of patches",
            bytes as f64 / (1 << 20) as f64
        );
        println!(
            "network: {} parameters, patch {:?}, batch {}, fold {}, {} training and {} validation cases",
            trainer.network().parameters().count(),
            trainer.model().configuration.patch_size,
            trainer.model().configuration.batch_size,
            data.cases.fold,
            data.training.len(),
            data.validation.len(),
        );
        let mut records = Records::begin(&job.output, &trainer, self.about(&job, &device, &data))?;
        let interrupt = Interrupt::install()?;
        let ended = self.fit(&mut trainer, &data, &job.output, &mut records, &interrupt);
        match ended.with_context(|| what_is_left(&job.output))? {
            Ended::Finished(Some(file)) => println!("trained; the network is {}", file.display()),
            Ended::Finished(None) => println!("trained; no checkpoint was written, as --disable-checkpointing says"),
            Ended::Stopped(Some(file)) => {
                println!("stopped; the same command with --continue goes on from {}", file.display());
            }
            Ended::Stopped(None) => println!("stopped; nothing was saved, as --disable-checkpointing says"),
        }
        // Before the question: a signal is then either seen by it or ends the program.
        interrupt.end_at_once();
        if let Some(interrupted) = interrupt.asked() {
            return Err(interrupted.into());
        }
        if self.val_best {
            let best = job.output.join(run::BEST);
            Checkpoint::read(&best)?.load_into(trainer.context(), trainer.network().parameters())?;
            println!("validating with {}", best.display());
        }
        if let Some(dice) = self.validate(&job, &trainer, references)? {
            records.say(&[format!("Mean Validation Dice:  {dice}")])?;
        }
        Ok(())
    }

    /// Predicts and scores the validation cases, and returns the mean foreground Dice.
    fn validate(&self, job: &Job, trainer: &Trainer, references: Option<References>) -> anyhow::Result<Option<f64>> {
        match references {
            Some(references) => Validation { job, trainer, references, typed: self }.run().map(Some),
            None => {
                println!("the validation cases have no files here to score them with: not predicted and not scored");
                Ok(None)
            }
        }
    }

    /// What a person wants to know who asks later how a network was trained.
    fn about(&self, job: &Job, device: &Device, data: &TrainingData) -> serde_json::Value {
        let arguments: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        serde_json::json!({
            "voxgrad": env!("CARGO_PKG_VERSION"),
            "command": arguments,
            "device": device.found.choice.to_string(),
            "device_name": device.found.name,
            "output_folder": job.output.display().to_string(),
            "preprocessed": job.prepared.display().to_string(),
            "plans_name": job.model.plans.plans_name,
            "configuration_name": job.model.configuration_name,
            "configuration": job.model.configuration,
            "fold": data.cases.fold,
            "split": data.cases.split,
            "compat": data.cases.compat,
            "annotated": data.annotated,
            "settings": job.settings,
            "continued_from_epoch": job.checkpoint.as_ref().map(|checkpoint| checkpoint.progress.epoch),
            "pretrained_weights": self.begun_with(job),
        })
    }

    /// The file whose weights the training began with; of one that goes on, what was written down then.
    fn begun_with(&self, job: &Job) -> serde_json::Value {
        if job.checkpoint.is_none() {
            return self.pretrained_weights.as_ref().map(|path| path.display().to_string()).into();
        }
        let before = std::fs::read(job.output.join(records::ABOUT)).ok();
        let mut before: Option<serde_json::Value> = before.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        before.as_mut().and_then(|about| about.get_mut("pretrained_weights")).map(std::mem::take).unwrap_or_default()
    }

    /// Trains all remaining epochs.
    fn fit(
        &self,
        trainer: &mut Trainer,
        data: &TrainingData,
        output: &Path,
        records: &mut Records,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Ended> {
        let mut shown = Shown::new(trainer, data.annotated);
        let bar = shown.bar.clone();
        let ended = run::train(
            trainer,
            &data.cases,
            output,
            self.saving(),
            [&data.training, &data.validation],
            |report| {
                shown.after(report);
                match interrupt.asked() {
                    Some(_) => ControlFlow::Break(()),
                    None => ControlFlow::Continue(()),
                }
            },
            |epoch| {
                write_progress(&output.join("progress.png"), &epoch.trainer.progress().history)?;
                records.epoch(&epoch)?;
                print_above(&bar, &line(&epoch));
                left_out(&epoch).iter().for_each(|line| print_above(&bar, line));
                Ok(())
            },
        )?;
        match ended {
            Ended::Finished(_) => bar.finish(),
            Ended::Stopped(_) => bar.abandon(),
        }
        Ok(ended)
    }
}

/// The network, as the job has it.
fn trainer(context: &Context, job: &Job, budget: Option<u64>) -> voxgrad::Result<Trainer> {
    let trainer = match job.checkpoint.clone() {
        Some(checkpoint) => Trainer::resume_within(context, checkpoint, budget)?,
        None => Trainer::within(context, job.model.clone(), job.settings, budget)?,
    };
    if budget.is_some() {
        let (stages, bytes) = trainer.recomputed();
        println!(
            "memory: a step takes {:.1} MiB, with the convolutions of {stages} of {} stages computed again",
            bytes as f64 / (1 << 20) as f64,
            trainer.network().shape().stages.len()
        );
    }
    Ok(trainer)
}

/// What somebody whose training has failed can go on with.
fn what_is_left(output: &Path) -> String {
    match run::newest(output) {
        Ok(Some(newest)) => format!(
            "training has ended early; when the cause is removed, --continue goes on from {}, after epoch {}",
            newest.path.display(),
            newest.checkpoint.progress.epoch
        ),
        _ => "training has ended early, before anything was saved".into(),
    }
}

/// The kernels of the steps that follow are compiled while cases are read. Which these are is not known before algorithms are
/// measured.
fn compiled_meanwhile(context: &Context, job: &Job) -> Option<Compilation> {
    if job.settings.tuned {
        return None;
    }
    let (model, settings) = (job.model.clone(), job.settings);
    Some(Compilation::start(context, move |compiling, has_time| compile(compiling, &model, &settings, has_time)))
}

/// Opens all cases of the split and says how much is annotated.
fn open(job: &Job, skip_unreadable: bool) -> anyhow::Result<TrainingData> {
    let Job { model, dataset, prepared, fold, split, compat, .. } = job;
    let source = DataSource { dataset, prepared, fold: *fold, split, compat: *compat, skip_unreadable };
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

/// The progress bar, and what it says.
struct Shown {
    bar: ProgressBar,
    context: Context,
    first: FirstIterations,
    /// Voxels of a batch.
    voxels: usize,
    annotated: f64,
    loss: f32,
    epoch: Option<usize>,
    iterations: usize,
    /// Of the epoch.
    start: Instant,
    /// The end of the last iteration.
    before: Instant,
}

impl Shown {
    fn new(trainer: &Trainer, annotated: f64) -> Self {
        let settings = trainer.settings();
        let per_epoch = settings.iterations + settings.validation_iterations;
        let bar = progress_bar("training", settings.epochs * per_epoch);
        bar.set_position((trainer.progress().epoch * per_epoch + trainer.progress().iteration) as u64);
        bar.reset_eta();
        let configuration = &trainer.model().configuration;
        Shown {
            bar,
            context: trainer.context().clone(),
            first: FirstIterations::new(),
            voxels: configuration.batch_size * configuration.patch_size.iter().product::<usize>(),
            annotated,
            loss: f32::NAN,
            epoch: None,
            iterations: 0,
            start: Instant::now(),
            before: Instant::now(),
        }
    }

    /// To be called after every iteration.
    fn after(&mut self, report: Report) {
        if self.epoch != Some(report.epoch) {
            (self.epoch, self.start, self.iterations) = (Some(report.epoch), self.before, 0);
        }
        self.before = Instant::now();
        self.iterations += 1;
        if let Some(line) = self.first.after(&self.context) {
            print_above(&self.bar, &line);
        }
        if !report.validation {
            self.loss = report.loss.unwrap_or(self.loss);
        }
        let rate = (self.iterations * self.voxels) as f64 / self.start.elapsed().as_secs_f64() / 1e6;
        self.bar.set_message(format!(
            "epoch {}, loss {:.4}, {rate:.2} Mvoxel/s, {:.1} % annotated",
            report.epoch,
            self.loss,
            100.0 * self.annotated
        ));
        self.bar.inc(1);
    }
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
        "epoch {:>4}  lr {:.5}  train loss {:.4}  val loss {:.4}  pseudo Dice [{}]  {:.1} s ({}){}{skipped}",
        trainer.progress().epoch - 1,
        last(&history.lrs),
        last(&history.train_losses),
        last(&history.val_losses),
        dice.join(", "),
        last(&history.epoch_end_timestamps) - last(&history.epoch_start_timestamps),
        trainer.times(),
        if *best { "  best" } else { "" },
    )
}

/// Cases that training goes on without, all of them after every epoch.
fn left_out(Epoch { trainer, .. }: &Epoch) -> Vec<String> {
    let unreadable = trainer.unreadable();
    let all = unreadable.len();
    let line = |(index, (case, reason))| {
        format!("warning: left out, {} of {all} that cannot be read: {case}: {reason}", index + 1)
    };
    unreadable.into_iter().enumerate().map(line).collect()
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
