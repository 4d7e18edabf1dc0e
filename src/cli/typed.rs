//! What is typed for `voxgrad train`.

use super::options::FolderArguments;
use super::{DeviceArgument, ExactArgument};
use std::path::PathBuf;
use voxgrad::augment::{Recipe, TrainerVariant, Transforms};
use voxgrad::train::{Asked, Loading, Precision};

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
    /// A trainer class of nnU-Net (-tr) that differs in augmentation, mirroring, oversampling or epochs: nnUNetTrainerNoMirroring,
    /// nnUNetTrainer_250epochs and others; an unknown name is answered with the list.
    #[arg(long, value_name = "TRAINER", conflicts_with_all = ["augmentation", "mirror"])]
    pub trainer: Option<String>,
    /// Choose a case as often as its share of all annotated voxels, instead of all cases alike: for datasets in which some
    /// cases are annotated completely and others hardly.
    #[arg(long)]
    sample_by_annotation: bool,
    /// Threads that read and cut patches ahead of training; one for every four processor cores, up to eight, unless given.
    /// Results do not depend on them.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    loader_threads: Option<u16>,
    /// Go on without a preprocessed case that cannot be read any more, and say so. Without this option it ends training.
    #[arg(long)]
    skip_unreadable_cases: bool,
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
    pub tune: bool,
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
    pub device: DeviceArgument,
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
    /// How patches are to be loaded.
    pub fn loading(&self) -> Loading {
        let default = Loading::default();
        Loading {
            threads: self.loader_threads.map_or(default.threads, usize::from),
            skip_unreadable: self.skip_unreadable_cases,
        }
    }

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
            oversampling: trainer.as_ref().map(|trainer| trainer.oversampling),
            // A flag can be typed in one way only.
            by_annotation: self.sample_by_annotation.then_some(true),
            precision: self.precision,
            exact: self.exact.exact.then_some(true),
            seed: self.seed,
        })
    }
}
