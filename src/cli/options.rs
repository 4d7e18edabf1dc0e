//! What several verbs that prepare a dataset are told.

use super::progress::progress_bar;
use indicatif::ProgressBar;
use std::path::PathBuf;
use voxgrad::Compat;
use voxgrad::dataset::folders::{Folders, Located};
use voxgrad::dataset::plans::Plans;
use voxgrad::plan::planner::{Planner, PlannerKind};

/// Which datasets, and where.
#[derive(clap::Args)]
pub struct Which {
    /// Datasets: numbers (4), names (Dataset004_Hippocampus) or paths of raw dataset folders.
    #[arg(short, long = "dataset", value_name = "DATASET", required = true, num_args = 1..)]
    datasets: Vec<String>,
    #[command(flatten)]
    pub folders: FolderArguments,
}

/// nnU-Net's folders.
#[derive(clap::Args)]
pub struct FolderArguments {
    /// Folder of raw datasets; the environment variable nnUNet_raw unless given.
    #[arg(long, value_name = "FOLDER")]
    raw: Option<PathBuf>,
    /// Folder of plans and preprocessed cases; the environment variable nnUNet_preprocessed unless given.
    #[arg(long, value_name = "FOLDER")]
    preprocessed: Option<PathBuf>,
    /// Folder of trained networks; the environment variable nnUNet_results unless given.
    #[arg(long, value_name = "FOLDER")]
    results: Option<PathBuf>,
}

impl FolderArguments {
    /// The folders given or of the environment.
    pub fn folders(&self) -> Folders {
        Folders::or_environment(self.raw.clone(), self.preprocessed.clone(), self.results.clone())
    }
}

/// What is shown while cases are worked on.
#[derive(clap::Args, Default)]
pub struct Shown {
    /// Print a line for every case that is done.
    #[arg(long)]
    verbose: bool,
    /// Show no progress bar.
    #[arg(long, visible_alias = "no_pbar")]
    no_progress_bar: bool,
}

impl Shown {
    /// A bar for so many cases.
    pub fn bar(&self, what: &'static str, length: usize) -> ProgressBar {
        if self.no_progress_bar { ProgressBar::hidden() } else { progress_bar(what, length) }
    }

    /// Counts a case, and names it if that was asked for.
    pub fn done(&self, bar: &ProgressBar, what: &str, case: &str) {
        bar.set_message(case.to_owned());
        bar.inc(1);
        if self.verbose {
            bar.suspend(|| println!("{what} {case}"));
        }
    }
}

/// How to read the cases.
#[derive(clap::Args)]
pub struct Reading {
    #[command(flatten)]
    pub shown: Shown,
    /// Cases that are worked on, and kept in memory, at a time; all processor cores unless given. Fewer need less memory.
    #[arg(long, visible_alias = "np", value_name = "N")]
    workers: Option<usize>,
    /// What to do where nnU-Net 2.8 treats ignored voxels in a questionable way: `corrected` leaves them out of intensity
    /// statistics and normalisation, `nnunet` gives nnU-Net's numbers.
    #[arg(long, value_name = "WAY", default_value = "corrected", value_parser = ["corrected", "nnunet"])]
    compat: String,
    /// Start afresh instead of keeping what an earlier run has finished. Removes voxgrad's own preprocessed cases, nothing
    /// else.
    #[arg(long)]
    pub clean: bool,
}

impl Reading {
    /// How many cases may be in memory.
    pub fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.filter(|&n| n > 0).unwrap_or_else(cores)
    }

    /// The treatment of ignored voxels.
    pub fn compat(&self) -> Compat {
        if self.compat == "nnunet" { Compat::Nnunet } else { Compat::Corrected }
    }
}

/// How to plan.
#[derive(clap::Args)]
pub struct Planning {
    /// ExperimentPlanner (nnU-Net's default), or nnUNetPlannerResEncM, nnUNetPlannerResEncL, nnUNetPlannerResEncXL.
    #[arg(long, visible_alias = "pl", default_value = "ExperimentPlanner", value_name = "PLANNER")]
    planner: String,
    /// The preprocessor that the plans name; nnU-Net's default is the only one.
    #[arg(long, value_name = "NAME", default_value = "DefaultPreprocessor", value_parser = ["DefaultPreprocessor"])]
    preprocessor_name: String,
    /// GPU memory in GB that training may use: more gives larger patches. The planner's own (8, 24 or 40) unless given.
    #[arg(long, value_name = "GB")]
    gpu_memory_target: Option<f64>,
    /// Voxel spacing in mm along z, y and x that images are resampled to, instead of the dataset's median.
    #[arg(long, num_args = 3, value_names = ["Z", "Y", "X"])]
    overwrite_target_spacing: Option<Vec<f64>>,
    /// Name of the plans, for instance to keep plans of several targets side by side.
    #[arg(long, value_name = "NAME")]
    overwrite_plans_name: Option<String>,
}

impl Planning {
    /// The planner that was asked for.
    pub fn planner(&self) -> anyhow::Result<Planner> {
        let kind: PlannerKind = self.planner.parse()?;
        if let Some(gigabytes) = self.gpu_memory_target
            && !(gigabytes.is_finite() && gigabytes > 0.0)
        {
            anyhow::bail!("--gpu-memory-target is {gigabytes}; give a positive number of gigabytes");
        }
        Ok(Planner {
            kind,
            gpu_memory_gigabytes: self.gpu_memory_target,
            target_spacing: self.overwrite_target_spacing.as_ref().and_then(|s| s.as_slice().try_into().ok()),
            plans_name: self.overwrite_plans_name.clone(),
        })
    }
}

/// What measures a dataset.
#[derive(clap::Args)]
pub struct Measuring {
    /// nnU-Net's fingerprint extractor; its default is the only one.
    #[arg(long, visible_alias = "fpe", value_name = "NAME", default_value = EXTRACTOR, value_parser = [EXTRACTOR])]
    fingerprint_extractor: String,
}

const EXTRACTOR: &str = "DatasetFingerprintExtractor";

/// Configurations to preprocess.
#[derive(clap::Args)]
pub struct Configurations {
    /// Configurations of the plans; 3d_fullres and, where the plans have it, 3d_lowres unless given.
    #[arg(short, long = "configuration", value_name = "CONFIGURATION", num_args = 1..)]
    configurations: Vec<String>,
}

impl Configurations {
    /// The configurations whose data have to be made.
    pub fn of(&self, plans: &Plans) -> anyhow::Result<Vec<String>> {
        if self.configurations.iter().any(|name| name == "2d") {
            anyhow::bail!("2d is not supported: voxgrad trains 3-D networks; use 3d_fullres or 3d_lowres");
        }
        if !self.configurations.is_empty() {
            return Ok(self.configurations.clone());
        }
        let usual = ["3d_fullres", "3d_lowres"].into_iter().filter(|name| plans.configurations.contains_key(*name));
        let usual: Vec<String> = usual.map(String::from).collect();
        if usual.is_empty() {
            anyhow::bail!("the images are 2-D, which is not supported: voxgrad needs volumes of more than one slice");
        }
        Ok(usual)
    }
}

impl Which {
    /// How many datasets were named.
    pub fn count(&self) -> usize {
        self.datasets.len()
    }

    /// The datasets named.
    pub fn located(&self) -> anyhow::Result<Vec<Located>> {
        let folders = self.folders.folders();
        Ok(self.datasets.iter().map(|wanted| folders.locate(wanted)).collect::<Result<_, _>>()?)
    }
}

/// Bytes: a number, and K, M, G or T for powers of 1024.
pub fn bytes(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[number.len()..].to_ascii_uppercase();
    let power = match unit.trim_end_matches('B').trim_end_matches('I') {
        "" => Some(0),
        unit => ["K", "M", "G", "T"].iter().position(|known| *known == unit).map(|place| place as i32 + 1),
    };
    let bytes = power.zip(number.parse::<f64>().ok()).map(|(power, number)| number * 1024f64.powi(power));
    match bytes.filter(|bytes| (1.0..1e18).contains(bytes)) {
        Some(bytes) => Ok(bytes as u64),
        None => Err("write a number of bytes such as 8G, 512M or 1500000000".into()),
    }
}
