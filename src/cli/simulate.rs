//! `voxgrad simulate`.

use super::device::{DeviceArgument, ExactArgument};
use super::interrupt::Interrupt;
use super::progress::{print_above, progress_bar};
use super::schemes::SchemeOptions;
use super::typed::{Axes, axes};
use anyhow::{Context as _, bail};
use indicatif::ProgressBar;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use voxgrad::augment::{Recipe, Transforms};
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits;
use voxgrad::predict;
use voxgrad::report::{Curve, write_curves};
use voxgrad::simulate::{Ended, Event, NetworkPlan, Outcome, Strategy, Study, markdown, rows};
use voxgrad::sparsify::{Budget, Scheme, Scribbles};
use voxgrad::train::{Asked, Precision, Settings};

/// What was typed.
#[derive(clap::Args)]
pub struct Simulate {
    /// The densely labelled dataset: dataset.json, imagesTr, labelsTr.
    dataset: PathBuf,
    /// Folder of the comparison: results.csv, results.md, plots, and a folder for each run. What is finished there is kept,
    /// what was stopped goes on.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Ways of annotating: scribbles, slices, blocks, and dense, which is drawn once whatever the shares.
    #[arg(long, value_name = "SCHEMES", value_delimiter = ',', default_value = "scribbles,slices,blocks,dense",
        value_parser = ["scribbles", "slices", "blocks", "dense"])]
    schemes: Vec<String>,
    /// Shares of the voxels to annotate: of every case with scribbles, of all cases together with slices and blocks, of
    /// which some cases then get several and some none.
    #[arg(long, value_name = "SHARES", value_delimiter = ',', default_value = "0.01,0.03,0.1")]
    shares: Vec<f64>,
    /// Every scheme is drawn and trained with each of these; all schemes with the first come first.
    #[arg(long, value_name = "SEEDS", value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    /// The validation cases of this fold are held out to be scored on, those of splits_final.json in the dataset folder or
    /// of nnU-Net's own five folds; all others are annotated.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    fold: usize,
    /// Cases that are read at a time; all processor cores unless given.
    #[arg(long, visible_alias = "np", value_name = "N")]
    workers: Option<usize>,
    /// Make runs again that are there with other settings.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten, next_help_heading = "Network and training")]
    training: TrainingOptions,
    #[command(flatten)]
    options: SchemeOptions,
    #[command(flatten)]
    device: DeviceArgument,
}

#[derive(clap::Args)]
struct TrainingOptions {
    /// nnU-Net's plans for all runs; unless given, each is planned from its own annotation.
    #[arg(short, long, value_name = "FILE")]
    plans: Option<PathBuf>,
    /// Configuration of the plans.
    #[arg(short, long, default_value = "3d_fullres")]
    configuration: String,
    /// Channels of each stage, such as 8,16,32,64; the plans' unless given. Fewer train sooner.
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    features: Vec<usize>,
    /// Patches of a step; the plans' unless given.
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Extent of a patch along z,y,x; the plans' unless given.
    #[arg(long, value_name = "Z,Y,X", value_delimiter = ',')]
    patch_size: Vec<usize>,
    /// Epochs; 1000 unless given.
    #[arg(long)]
    epochs: Option<usize>,
    /// SGD iterations of an epoch; 250 unless given.
    #[arg(long)]
    iterations: Option<usize>,
    /// Learning rate of the first epoch; 0.01 unless given.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Share of SGD's momentum that is kept from step to step; 0.99 unless given.
    #[arg(long)]
    momentum: Option<f32>,
    /// What is done to training patches: nnunet, mirror or none; nnunet unless given.
    #[arg(long)]
    augmentation: Option<Transforms>,
    /// Axes to mirror patches along, of z,y,x = 0,1,2; `none` mirrors nothing. All three unless given.
    #[arg(long, value_parser = axes)]
    mirror: Option<Axes>,
    /// Type of activations and gradients: f32, f16 or bf16; f32 unless given.
    #[arg(long)]
    precision: Option<Precision>,
    #[command(flatten)]
    exact: ExactArgument,
    /// Do not average predictions over mirrored copies.
    #[arg(long = "disable-tta")]
    disable_tta: bool,
    /// Write a checkpoint after every so many epochs, from which a killed run goes on.
    #[arg(long, value_name = "EPOCHS", default_value_t = 1)]
    save_every: usize,
}

impl Simulate {
    /// Makes all runs that are not there yet.
    pub fn run(self) -> anyhow::Result<()> {
        let dataset = Dataset::open(&self.dataset)?;
        let names = dataset.case_names();
        let file = self.dataset.join("splits_final.json");
        let folds = if file.exists() { splits::read(&file, &names)? } else { splits::k_fold(&names)? };
        let fold = folds
            .get(self.fold)
            .with_context(|| format!("--fold {}: there are {} folds, from 0", self.fold, folds.len()))?;
        let left_out = splits::without_fold(std::slice::from_ref(fold), &names);
        if !left_out.is_empty() {
            eprintln!("note: fold {} has neither to train nor to validate on: {}", self.fold, left_out.join(", "));
        }
        let dataset = Dataset {
            cases: dataset
                .cases
                .into_iter()
                .filter(|case| fold.train.contains(&case.name) || fold.val.contains(&case.name))
                .collect(),
            ..dataset
        };
        let training = self.training.settings()?;
        let study = Study {
            dataset: &dataset,
            held_out: fold.val.clone(),
            folder: &self.output,
            strategies: self.strategies()?,
            seeds: self.seeds.clone(),
            network: self.training.network()?,
            training,
            prediction: predict::Settings {
                mirror: if self.training.disable_tta { [false; 3] } else { training.mirror },
                dtype: training.precision.dtype(),
                ..predict::Settings::default()
            },
            save_every: self.training.save_every.max(1),
            workers: self
                .workers
                .filter(|&n| n > 0)
                .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
            again: self.overwrite,
        };
        println!(
            "{} cases to annotate and train on, {} held out; {} strategies, {} seeds",
            dataset.cases.len() - study.held_out.len(),
            study.held_out.len(),
            study.strategies.len(),
            study.seeds.len()
        );
        let device = self.device.open()?;
        let interrupt = Interrupt::install()?;
        let mut shown =
            Shown { bar: ProgressBar::hidden(), per_epoch: study.training.iterations, epochs: study.training.epochs };
        let ended = study.run(&device.context, |event| {
            shown.tell(event);
            if let Event::Finished(outcomes) = event {
                self.plot(outcomes)?;
            }
            Ok(if interrupt.asked().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        shown.bar.finish_and_clear();
        match ended? {
            Ended::Finished(outcomes) => {
                print!("{}", markdown(&outcomes));
                println!(
                    "\nin {}: results.csv, results.md, dice_by_voxels.png, dice_by_strokes.png",
                    self.output.display()
                );
                Ok(())
            }
            Ended::Stopped => {
                println!("stopped; the same command goes on");
                interrupt.asked().map_or(Ok(()), |interrupted| Err(interrupted.into()))
            }
        }
    }

    fn strategies(&self) -> anyhow::Result<Vec<Strategy>> {
        if let Some(share) = self.shares.iter().find(|share| !(**share > 0.0 && **share < 1.0)) {
            bail!("--shares {share}: give shares above 0 and below 1; `--schemes dense` annotates everything");
        }
        let unused: Vec<&str> = self
            .options
            .typed()
            .into_iter()
            .filter(|(_, given, schemes)| {
                *given && !schemes.iter().any(|scheme| self.schemes.iter().any(|s| s == scheme))
            })
            .map(|(option, ..)| option)
            .collect();
        if !unused.is_empty() {
            bail!("{} mean nothing for --schemes {}", unused.join(", "), self.schemes.join(","));
        }
        if self.options.slices_of_scribbles() {
            bail!(
                "--shares says on how many slices to scribble; leave --foreground-slices and --background-slices away"
            );
        }
        let mut strategies = Vec::new();
        for scheme in self.schemes.iter().filter(|scheme| *scheme != "dense") {
            for &share in &self.shares {
                let scheme = match scheme.as_str() {
                    // In some cases every slice may have scribbles before; the share of all cases is what is checked.
                    "scribbles" => {
                        Scheme::Scribbles(Scribbles { saturate: true, ..self.options.scribbles(Some(share))? })
                    }
                    "slices" => Scheme::Slices(self.options.slices(Some(share), 0, true)?),
                    _ => Scheme::Blocks(self.options.blocks(Budget::Pooled(share))?),
                };
                strategies.push(Strategy { scheme, share: Some(share) });
            }
        }
        if self.schemes.iter().any(|scheme| scheme == "dense") {
            strategies.push(Strategy { scheme: Scheme::Dense, share: None });
        }
        Ok(strategies)
    }

    /// Dice against voxels, and against strokes.
    fn plot(&self, outcomes: &[Outcome]) -> voxgrad::Result<()> {
        let rows = rows(outcomes);
        type Price = fn(&voxgrad::simulate::Row) -> f64;
        let plots: [(&str, &str, Price); 2] = [
            ("dice_by_voxels.png", "voxels annotated, %", |row| 100.0 * row.share),
            ("dice_by_strokes.png", "strokes", |row| row.strokes),
        ];
        for (file, price, of) in plots {
            let mut curves: BTreeMap<&str, Curve> = BTreeMap::new();
            for row in &rows {
                let empty = || Curve { name: row.scheme.clone(), points: Vec::new() };
                curves.entry(&row.scheme).or_insert_with(empty).points.push((of(row), row.dice.clone()));
            }
            let curves: Vec<Curve> = curves.into_values().collect();
            write_curves(&self.output.join(file), price, "mean Dice on complete labels", &curves)?;
        }
        Ok(())
    }
}

impl TrainingOptions {
    fn settings(&self) -> anyhow::Result<Settings> {
        let mut mirror = self.mirror.map(|axes| axes.0);
        if self.augmentation == Some(Transforms::None) {
            if mirror.unwrap_or_default() != [false; 3] {
                bail!("--augmentation none mirrors nothing: leave out --mirror, or choose another augmentation");
            }
            mirror = Some([false; 3]);
        }
        let asked = Asked {
            epochs: self.epochs,
            iterations: self.iterations,
            // There is nothing to validate with: held-out cases have no part in training.
            validation_iterations: Some(0),
            learning_rate: self.learning_rate,
            momentum: self.momentum,
            mirror,
            augmentation: self.augmentation.map(|transforms| Recipe { transforms, ..Recipe::default() }),
            precision: self.precision,
            exact: self.exact.exact.then_some(true),
            ..Asked::default()
        };
        Ok(asked.settings())
    }

    fn network(&self) -> anyhow::Result<NetworkPlan> {
        let patch_size = match self.patch_size[..] {
            [] => None,
            [z, y, x] => Some([z, y, x]),
            _ => bail!("--patch-size {:?}: give three numbers along z,y,x", self.patch_size),
        };
        Ok(NetworkPlan {
            plans: self.plans.as_deref().map(Plans::read).transpose().context("reading --plans")?,
            configuration: self.configuration.clone(),
            features: (!self.features.is_empty()).then(|| self.features.clone()),
            batch_size: self.batch_size,
            patch_size,
        })
    }
}

/// What is said while runs are made.
struct Shown {
    bar: ProgressBar,
    per_epoch: usize,
    epochs: usize,
}

impl Shown {
    fn tell(&mut self, event: Event) {
        match event {
            Event::Drawn(done, all) => {
                if done == 1 {
                    self.bar = progress_bar("annotating", all);
                }
                self.bar.set_position(done as u64);
            }
            Event::Begun { strategy, seed, place: (index, all) } => {
                print_above(&self.bar, &format!("run {index} of {all}: {strategy}, seed {seed}"));
            }
            Event::Annotated(annotated) => print_above(
                &self.bar,
                &format!(
                    "  annotated: {:.2} % of the voxels, {} strokes, in {} cases",
                    100.0 * annotated.share,
                    annotated.strokes,
                    annotated.cases.len()
                ),
            ),
            Event::Note(note) => self.bar.suspend(|| eprintln!("  note: {note}")),
            Event::Training { epoch } => {
                if epoch > 0 {
                    print_above(&self.bar, &format!("  going on after epoch {epoch}"));
                }
                self.bar.finish_and_clear();
                self.bar = progress_bar("training", self.epochs * self.per_epoch);
                self.bar.set_position((epoch * self.per_epoch) as u64);
                self.bar.reset_eta();
            }
            Event::Iteration(report) => {
                self.bar.set_position((report.epoch * self.per_epoch + report.iteration) as u64);
                if let Some(loss) = report.loss {
                    self.bar.set_message(format!("epoch {}, loss {loss:.4}", report.epoch));
                }
            }
            Event::Predicted(done, all) => {
                if done == 1 {
                    self.bar.finish_and_clear();
                    self.bar = progress_bar("predicting", all);
                }
                self.bar.set_position(done as u64);
            }
            Event::Finished(outcomes) => {
                if let Some(last) = outcomes.last() {
                    let dice = last.mean_dice.map_or_else(|| "none".into(), |dice| format!("{dice:.4}"));
                    print_above(
                        &self.bar,
                        &format!(
                            "{}, seed {}: mean Dice {dice}, {:.0} s of training",
                            last.strategy, last.seed, last.training_seconds
                        ),
                    );
                }
            }
        }
    }
}
