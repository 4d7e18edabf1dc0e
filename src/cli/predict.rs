//! `voxgrad predict`.

use super::{DeviceArgument, ExactArgument, progress_bar};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::{CaseFiles, cases_in};
use voxgrad::kernels::Context;
use voxgrad::kernels::conv3d::Policy;
use voxgrad::nn::PlainConvUNet;
use voxgrad::predict::{self, Settings};
use voxgrad::preprocess::{Preprocessor, RawCase};
use voxgrad::train::{Checkpoint, Model, Precision};
use voxgrad::{Compat, io};

/// What was typed.
#[derive(clap::Args)]
pub struct Predict {
    /// Folder of images, named as for training: CASE_0000.nii.gz, CASE_0001.nii.gz, ...
    #[arg(short, long, value_name = "FOLDER")]
    input: PathBuf,
    /// Folder for the segmentations; cases that are already there are skipped.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// The trained network.
    #[arg(short, long, value_name = "FILE")]
    checkpoint: PathBuf,
    /// Distance of neighbouring windows as a share of the patch.
    #[arg(long = "step-size", default_value_t = 0.5)]
    step_size: f64,
    /// Do not average over mirrored copies: up to 8 times as fast, a little less accurate.
    #[arg(long = "disable-tta")]
    disable_tta: bool,
    /// Type of activations: f32, f16 or bf16; that of training unless given, where the device has it.
    #[arg(long)]
    precision: Option<Precision>,
    #[command(flatten)]
    exact: ExactArgument,
    #[command(flatten)]
    device: DeviceArgument,
}

impl Predict {
    /// Predicts all cases.
    pub fn run(self) -> anyhow::Result<()> {
        let checkpoint = Checkpoint::read(&self.checkpoint)?;
        let cases = cases_in(&self.input, None, &checkpoint.model.dataset)?;
        let exact = self.exact.exact || checkpoint.settings.exact;
        let context = Policy::default().with_exact(exact).on(&self.device.open()?.context);
        let network = PlainConvUNet::new(&context, checkpoint.model.architecture()?, 0)?;
        checkpoint.load_into(&context, network.parameters())?;
        let mirror = if self.disable_tta { [false; 3] } else { checkpoint.settings.mirror };
        let precision = match self.precision {
            Some(asked) => asked,
            None if checkpoint.settings.precision.check(context.caps()).is_ok() => checkpoint.settings.precision,
            None => Precision::F32,
        };
        precision.check(context.caps())?;
        let settings = Settings { step_size: self.step_size, mirror, dtype: precision.dtype() };
        predict_cases(&context, &network, &checkpoint.model, &cases, &self.output, &settings, true)
    }
}

/// Predicts cases into a folder, each file complete or absent.
pub fn predict_cases(
    context: &Context,
    network: &PlainConvUNet,
    model: &Model,
    cases: &[CaseFiles],
    output: &Path,
    settings: &Settings,
    skip_existing: bool,
) -> anyhow::Result<()> {
    std::fs::create_dir_all(output).with_context(|| format!("creating {}", output.display()))?;
    let (patch, _) = model.configuration.three_dimensional()?;
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected)?;
    let bar = progress_bar("predicting", cases.len());
    for case in cases {
        let file = output.join(format!("{}{}", case.name, model.dataset.file_ending));
        if !(skip_existing && file.exists()) {
            bar.set_message(case.name.clone());
            let image_only = CaseFiles { label: None, ..case.clone() };
            let raw = RawCase::read(&image_only, &model.labels)?;
            let case = preprocessor.run(raw)?;
            let labels =
                predict::segmentation(context, network, &case, &preprocessor, patch, settings, |_, _| bar.tick())?;
            io::write_labels(&file, labels.view(), &case.geometry)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!("segmented {} cases into {}", cases.len(), output.display());
    Ok(())
}
