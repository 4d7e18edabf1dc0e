//! `voxgrad train`.

use super::interrupt::Interrupt;
use super::job::Job;
use super::tuning::tuned;
use super::typed::Train;
use super::validation::{References, Validation};
use super::{BEGAN, progress_bar};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use voxgrad::kernels::Context;
use voxgrad::report::write_progress;
use voxgrad::train::run::{self, Ended, Epoch};
use voxgrad::train::{Case, DataSource, Trainer, TrainingCases, TrainingData};

impl Train {
    /// Trains, predicts, scores.
    pub fn run(self) -> anyhow::Result<()> {
        let job = Job::new(&self)?;
        let references = References::find(self.reference.as_deref(), &job)?;
        let device = self.device.open()?;
        let loading = self.loading();
        let TrainingData { cases, training, validation, .. } = open(&job, loading.skip_unreadable)?;
        let context = match self.tune && !job.settings.exact {
            true => tuned(&device, &job.model, &job.settings)?,
            false => device.context.clone(),
        };
        let trainer = match job.checkpoint.clone() {
            Some(checkpoint) => Trainer::resume(&context, checkpoint)?,
            None => Trainer::new(&context, job.model.clone(), job.settings)?,
        };
        let mut trainer = trainer.with_loading(loading);
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
            for line in left_out(&epoch) {
                print_above(&bar, &line);
            }
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
