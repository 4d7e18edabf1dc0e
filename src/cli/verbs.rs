//! What was typed, and which verb does it.

use super::progress::BEGAN;
use super::{
    benchmark, best, complete, crossval, devices, evaluate, exchange, import, inspect, overlay, postprocess, predict,
    prepare, simulate, sparsify, spelling, suggest, typed, verify,
};
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
    /// Show what is in a dataset and what of it is annotated, on one page of HTML.
    Inspect(inspect::Inspect),
    /// Compare ways of annotating on dense labels: make them sparse, train, predict, score on complete held-out labels.
    Simulate(Box<simulate::Simulate>),
    /// Fill in what is not annotated, with a trained network: a densely labelled dataset that keeps every annotated voxel.
    Complete(Box<complete::Complete>),
    /// Rank the slices or blocks where annotating helps most, by what a trained network is unsure of.
    Suggest(Box<suggest::Suggest>),
    /// Train a network on one fold of a dataset, then predict and score its validation cases.
    Train(Box<typed::Train>),
    /// Time epochs of training and say where the time of a step goes, for plans or for a network of one's own.
    Benchmark(benchmark::Benchmark),
    /// Segment images with a trained network.
    Predict(Box<predict::Predict>),
    /// Score segmentations against references, on annotated voxels only; writes nnU-Net's summary.json.
    #[command(visible_alias = "evaluate-folder")]
    Evaluate(evaluate::Evaluate),
    /// Score labels that are listed, without a dataset.json; writes nnU-Net's summary.json.
    EvaluateSimple(evaluate::EvaluateSimple),
    /// Draw cases: three planes through the largest lesion, each as image, annotation, prediction and errors.
    Overlay(Box<overlay::Overlay>),
    /// Collect the validation predictions of all folds of a model, and score them as one.
    #[command(visible_alias = "accumulate-crossval-results")]
    AccumulateCrossval(crossval::AccumulateCrossval),
    /// Average the probabilities of several models.
    Ensemble(crossval::Ensemble),
    /// Compare the models of a dataset and their ensembles by cross-validation, and say how to predict with the best.
    FindBestConfiguration(best::FindBestConfiguration),
    /// Find out whether keeping only the largest component makes the predictions of a cross-validation better.
    DeterminePostprocessing(postprocess::DeterminePostprocessing),
    /// Keep the largest components that determine-postprocessing, or nnU-Net, has decided on.
    ApplyPostprocessing(postprocess::ApplyPostprocessing),
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
        Verb::Inspect(inspect) => inspect.run(),
        Verb::Simulate(simulate) => simulate.run(),
        Verb::Complete(complete) => complete.run(),
        Verb::Suggest(suggest) => suggest.run(),
        Verb::Train(train) => train.run(),
        Verb::Benchmark(benchmark) => benchmark.run(),
        Verb::Predict(predict) => predict.run(),
        Verb::Evaluate(evaluate) => evaluate.run(),
        Verb::EvaluateSimple(evaluate) => evaluate.run(),
        Verb::Overlay(overlay) => overlay.run(),
        Verb::AccumulateCrossval(accumulate) => accumulate.run(),
        Verb::Ensemble(ensemble) => ensemble.run(),
        Verb::FindBestConfiguration(find) => find.run(),
        Verb::DeterminePostprocessing(determine) => determine.run(),
        Verb::ApplyPostprocessing(apply) => apply.run(),
        Verb::Export(export) => export.run(),
        Verb::ExportZip(export) => export.run(),
        Verb::InstallZip(install) => install.run(),
    }
}
