//! What was typed, and which verb does it.

mod advice;
mod complete;
mod devices;
mod ensemble;
mod evaluate;
mod exchange;
mod import;
mod interrupt;
mod job;
mod model;
mod options;
mod predict;
mod prepare;
mod records;
mod sparsify;
mod spelling;
mod steps;
mod suggest;
mod summary;
mod train;
mod tuning;
mod typed;
mod validation;
mod verify;

pub use advice::advice;
pub use interrupt::Interrupted;

use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::OnceLock;
use std::time::Instant;
use voxgrad::device::{self, Device, DeviceChoice};

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
    /// Fill in what is not annotated, with a trained network: a densely labelled dataset that keeps every annotated voxel.
    Complete(Box<complete::Complete>),
    /// Rank the slices or blocks where annotating helps most, by what a trained network is unsure of.
    Suggest(Box<suggest::Suggest>),
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

/// Where to compute.
#[derive(clap::Args)]
struct DeviceArgument {
    /// auto, cpu, vulkan, vulkan:N, cuda or cuda:N. auto takes CUDA, else a Vulkan GPU, else the CPU.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: String,
}

/// With which algorithms to compute.
#[derive(clap::Args)]
struct ExactArgument {
    /// Convolve by adding up the products of the definition only, without Winograd's algorithm: slower, and rounded a
    /// little less. What was trained so is continued, validated and predicted so.
    #[arg(long)]
    exact: bool,
}

/// The moment at which the program began.
static BEGAN: OnceLock<Instant> = OnceLock::new();

impl DeviceArgument {
    fn open(&self) -> anyhow::Result<Device> {
        let choice: DeviceChoice = self.device.parse()?;
        let device = device::open(choice)?;
        println!("device: {} ({})", device.found.choice, device.found.name);
        Ok(device)
    }
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
        Verb::Complete(complete) => complete.run(),
        Verb::Suggest(suggest) => suggest.run(),
        Verb::Train(train) => train.run(),
        Verb::Predict(predict) => predict.run(),
        Verb::Evaluate(evaluate) => evaluate.run(),
        Verb::Export(export) => export.run(),
        Verb::ExportZip(export) => export.run(),
        Verb::InstallZip(install) => install.run(),
    }
}

/// A bar for `length` pieces of work; invisible where the output is no terminal.
fn progress_bar(what: &'static str, length: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:<11} [{bar:32}] {pos}/{len}  {msg}  {elapsed} done, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::new(length as u64).with_style(style).with_prefix(what)
}
