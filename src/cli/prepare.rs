//! `voxgrad fingerprint`, `plan`, `preprocess` and `plan-and-preprocess`.

use super::device::DeviceArgument;
use super::options::{Configurations, Measuring, Planning, Reading, Which};
use super::steps::{Target, check_if, fingerprint, plan, preprocess, print_memory};
use anyhow::Context as _;
use voxgrad::dataset::plans::Plans;
use voxgrad::io::is_file_name;
use voxgrad::plan::fingerprint::{Age, Fingerprint, Measured};

/// `voxgrad fingerprint`.
#[derive(clap::Args)]
pub struct MakeFingerprint {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    measuring: Measuring,
    #[command(flatten)]
    reading: Reading,
    /// Check the dataset first and report everything that is wrong with it.
    #[arg(long)]
    verify_dataset_integrity: bool,
}

/// `voxgrad plan`.
#[derive(clap::Args)]
pub struct Plan {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    planning: Planning,
    /// Also print the memory that a training step of each 3-D configuration takes on the device.
    #[arg(long)]
    memory: bool,
    #[command(flatten)]
    device: DeviceArgument,
}

/// `voxgrad preprocess`.
#[derive(clap::Args)]
pub struct Preprocess {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    configurations: Configurations,
    #[command(flatten)]
    reading: Reading,
    /// Name of the plans to follow.
    #[arg(long, default_value = "nnUNetPlans", value_name = "NAME")]
    plans_name: String,
}

/// `voxgrad plan-and-preprocess`.
#[derive(clap::Args)]
pub struct PlanAndPreprocess {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    planning: Planning,
    #[command(flatten)]
    configurations: Configurations,
    #[command(flatten)]
    measuring: Measuring,
    #[command(flatten)]
    reading: Reading,
    /// Check the dataset first and report everything that is wrong with it.
    #[arg(long)]
    verify_dataset_integrity: bool,
    /// Stop after planning.
    #[arg(long)]
    no_preprocessing: bool,
}

impl MakeFingerprint {
    /// Measures all datasets.
    pub fn run(self) -> anyhow::Result<()> {
        for located in self.which.located()? {
            check_if(self.verify_dataset_integrity, &located, &self.which, &self.reading)?;
            let target = Target::new(&self.which, &located)?;
            fingerprint(&target, &self.reading)?;
        }
        Ok(())
    }
}

impl Plan {
    /// Plans all datasets.
    pub fn run(self) -> anyhow::Result<()> {
        let planner = self.planning.planner()?;
        for located in self.which.located()? {
            let target = Target::new(&self.which, &located)?;
            let file = target.folder.join("dataset_fingerprint.json");
            let measured = Fingerprint::read(&file).context("run `voxgrad fingerprint` first")?;
            match Measured::age(&target.dataset, None, &file)? {
                Age::Current => {}
                Age::Stale => anyhow::bail!(
                    "{} was measured before the raw files changed; run `voxgrad fingerprint` again",
                    file.display()
                ),
                Age::Unknown => eprintln!("note: {} does not say from which files it was measured", file.display()),
            }
            let plans = plan(&target, &planner, &measured)?;
            if self.memory {
                print_memory(&target, &plans, &self.device.open()?.context)?;
            }
        }
        Ok(())
    }
}

impl Preprocess {
    /// Preprocesses all datasets.
    pub fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            is_file_name(&self.plans_name),
            "--plans-name is {:?}: give the name of plans, without `/`",
            self.plans_name
        );
        for located in self.which.located()? {
            let target = Target::new(&self.which, &located)?;
            let file = target.folder.join(format!("{}.json", self.plans_name));
            let plans = Plans::read(&file).context("run `voxgrad plan` first, or name the plans with --plans-name")?;
            preprocess(&target, &plans, &self.configurations, &self.reading)?;
        }
        Ok(())
    }
}

impl PlanAndPreprocess {
    /// All three steps for all datasets.
    pub fn run(self) -> anyhow::Result<()> {
        let planner = self.planning.planner()?;
        for located in self.which.located()? {
            check_if(self.verify_dataset_integrity, &located, &self.which, &self.reading)?;
            let target = Target::new(&self.which, &located)?;
            let measured = fingerprint(&target, &self.reading)?;
            let plans = plan(&target, &planner, &measured)?;
            if !self.no_preprocessing {
                preprocess(&target, &plans, &self.configurations, &self.reading)?;
            }
        }
        Ok(())
    }
}
