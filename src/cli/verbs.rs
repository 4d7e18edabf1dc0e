//! What was typed, and which verb does it.

use super::progress::BEGAN;
use super::{devices, evaluate, exchange, import, predict, prepare, sparsify, spelling, typed, verify};
use clap::{Parser, Subcommand};
use std::time::Instant;

/// Train, run and evaluate nnU-Net-style 3D segmentation networks on sparse annotations.
#[derive(Parser)]
#[command(name = "voxgrad", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the devices of this machine and what they can do.
    Devices,
    /// Read every file of a dataset and report everything that is wrong with it.
    Verify(verify::Verify),
    /// Measure a dataset: sizes, spacings and intensities of its cases, which planning needs.
    Fingerprint(prepare::MakeFingerprint),
    /// Decide spacing, patch size, network and batch size for a dataset from its fingerprint.
    Plan(prepare::Plan),
    /// Crop, normalise and resample all cases as the plans say, and store them for training.
    Preprocess(prepare::Preprocess),
    /// Fingerprint, plan and preprocess in one go: what to run on a new dataset.
    PlanAndPreprocess(prepare::PlanAndPreprocess),
    /// Make sparse annotations from dense ones: scribbles, slices, blocks, masks, with an ignore label.
    Sparsify(Box<sparsify::Sparsify>),
    /// Make a dataset of annotations as people draw them: unlabelled values, several annotators, one mask a class.
    Import(import::Import),
    /// Train a network on one fold of a dataset, then predict and score its validation cases.
    Train(Box<typed::Train>),
    /// Segment images with a trained network.
    Predict(Box<predict::Predict>),
    /// Score segmentations against references, on annotated voxels only; writes nnU-Net's summary.json.
    Evaluate(evaluate::Evaluate),
    /// Write a trained model for nnU-Net, or one of nnU-Net's for voxgrad.
    Export(exchange::Export),
    /// Pack a trained model into an archive, in nnU-Net's layout.
    ExportZip(exchange::ExportZip),
    /// Unpack an archive of trained models, voxgrad's or nnU-Net's, into the folder of results.
    InstallZip(exchange::InstallZip),
}

/// Parses the command line and does what it says.
pub fn run() -> anyhow::Result<()> {
    BEGAN.get_or_init(Instant::now);
    match Arguments::parse_from(spelling::long_flags(std::env::args_os())).verb {
        Verb::Devices => devices::run(),
        Verb::Verify(verify) => verify.run(),
        Verb::Fingerprint(fingerprint) => fingerprint.run(),
        Verb::Plan(plan) => plan.run(),
        Verb::Preprocess(preprocess) => preprocess.run(),
        Verb::PlanAndPreprocess(both) => both.run(),
        Verb::Sparsify(sparsify) => sparsify.run(),
        Verb::Import(import) => import.run(),
        Verb::Train(train) => train.run(),
        Verb::Predict(predict) => predict.run(),
        Verb::Evaluate(evaluate) => evaluate.run(),
        Verb::Export(export) => export.run(),
        Verb::ExportZip(export) => export.run(),
        Verb::InstallZip(install) => install.run(),
    }
}
