//! What is typed for `voxgrad train`.

use super::device::{DeviceArgument, ExactArgument};
use super::options::{FolderArguments, bytes};
use std::path::PathBuf;
use voxgrad::Compat;
use voxgrad::augment::{Recipe, TrainerVariant, Transforms};
use voxgrad::train::run::Saving;
use voxgrad::train::{Asked, Loading, Precision};

/// What was typed.
#[derive(clap::Args)]
pub struct Train {
    /// Number or name of a prepared dataset, as with -d; or, with -o, a dataset folder in nnU-Net's layout: dataset.json,
    /// imagesTr, labelsTr, and plans.
    #[arg(required_unless_present = "id", conflicts_with = "id")]
    pub dataset: Option<PathBuf>,
    /// Configuration, as with -c.
    #[arg(value_name = "CONFIGURATION", conflicts_with_all = ["id", "configuration"])]
    configuration_in_place: Option<String>,
    /// Fold, as with -f.
    #[arg(value_name = "FOLD", conflicts_with_all = ["id", "fold"])]
    fold_in_place: Option<String>,
    /// Number or name of a dataset that plan-and-preprocess has prepared: its plans, splits and preprocessed cases are
    /// used.
    #[arg(short = 'd', long = "dataset", id = "id", value_name = "DATASET")]
    pub id: Option<String>,
    #[command(flatten)]
    pub folders: FolderArguments,
    /// Folder for checkpoints, pictures, predictions and scores. With -d, unless given, nnU-Net's place in the folder of
    /// results: DATASET/voxgradTrainer__PLANS__CONFIGURATION/fold_FOLD.
    #[arg(short, long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,
    /// nnU-Net's plans: a file, or with -d the name of plans beside the preprocessed cases; nnUNetPlans unless given.
    #[arg(short, long, value_name = "PLANS")]
    pub plans: Option<PathBuf>,
    /// Configuration of the plans; 3d_fullres unless given.
    #[arg(short, long)]
    pub configuration: Option<String>,
    /// Fold of splits_final.json in the dataset folder, or of nnU-Net's own five folds without such a file; or `all`. 0
    /// unless given.
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
    /// What to do where nnU-Net 2.8 has what looks like a defect: `corrected`, or `nnunet` for patches that hang over the
    /// image's far border and a moving average that an epoch without foreground ends; cases must then have been
    /// preprocessed with --compat nnunet too. corrected unless given.
    #[arg(long, value_name = "WAY", value_parser = ["corrected", "nnunet"])]
    compat: Option<String>,
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
    /// measurements only; by default a fixed rule chooses. --continue does as the training did that it goes on with.
    #[arg(long, conflicts_with = "exact")]
    tune: bool,
    /// Seed of weights and patches; 0 unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Go on where an earlier run in the same folder was stopped, with its plans, fold and settings; without one, begin.
    /// --epochs and --learning-rate may change then, everything else that is typed must be as it was.
    #[arg(long = "continue", visible_alias = "c")]
    pub resume: bool,
    /// Train nothing: predict and score the validation cases with checkpoint_final.
    #[arg(long, conflicts_with = "resume")]
    pub val: bool,
    /// Predict and score the validation cases with checkpoint_best, after training or, with --val, at once.
    #[arg(long = "val-best", conflicts_with = "disable_checkpointing")]
    pub val_best: bool,
    /// Begin, unless with --continue there is something to go on with, with the weights of this checkpoint, but for the layers that make the segmentation. All others must be of the
    /// same shapes.
    #[arg(long = "pretrained-weights", value_name = "FILE", conflicts_with = "val")]
    pub pretrained_weights: Option<PathBuf>,
    /// Write checkpoint_latest after every so many epochs; 50 unless given. It is written when training is stopped, too.
    #[arg(long, value_name = "EPOCHS", conflicts_with = "disable_checkpointing")]
    save_every: Option<std::num::NonZeroUsize>,
    /// Write no checkpoints, not even the final one.
    #[arg(long = "disable-checkpointing", conflicts_with_all = ["resume", "val"])]
    disable_checkpointing: bool,
    /// Bytes of the device's memory that a step may take, such as 8G: where it would take more, convolutions are computed again
    /// for backward, of as few stages as needed, which takes longer and changes no bit. Unless given, none is.
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with = "val")]
    pub memory_budget: Option<u64>,
    /// Devices to train one network on: 1 only.
    #[arg(long, value_name = "N", default_value_t = 1)]
    num_gpus: usize,
    /// Write the probabilities of the validation cases beside their segmentations, as `predict --save-probabilities` does.
    #[arg(long)]
    pub npz: bool,
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
pub struct Axes(pub [bool; 3]);

/// Some of 0,1,2, or `none`.
pub fn axes(text: &str) -> Result<Axes, String> {
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

    /// nnU-Net's places and names become this program's options; what is not offered is refused by name.
    pub fn settled(mut self) -> anyhow::Result<Self> {
        anyhow::ensure!(
            self.num_gpus == 1,
            "-num_gpus is {}: a network is trained on one device; train a fold on each, with --device cuda:0, cuda:1, ...",
            self.num_gpus
        );
        self.configuration = self.configuration.or(self.configuration_in_place.take());
        self.fold = self.fold.or(self.fold_in_place.take());
        // Only with an output folder of its own is a folder trained on as it is.
        if let Some(dataset) = self.dataset.take_if(|dataset| self.output.is_none() || !dataset.is_dir()) {
            self.id = Some(dataset.to_string_lossy().into_owned());
        }
        Ok(self)
    }

    /// What to do where nnU-Net has what looks like a defect, if that was typed.
    pub fn compat(&self) -> Option<Compat> {
        self.compat.as_deref().map(|way| if way == "nnunet" { Compat::Nnunet } else { Compat::Corrected })
    }

    /// Which checkpoints to write.
    pub fn saving(&self) -> Saving {
        match (self.disable_checkpointing, self.save_every) {
            (true, _) => Saving::Never,
            (false, Some(epochs)) => Saving::Every(epochs.get()),
            (false, None) => Saving::default(),
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
            compat: self.compat(),
            precision: self.precision,
            exact: self.exact.exact.then_some(true),
            tuned: self.tune.then_some(true),
            seed: self.seed,
        })
    }
}
