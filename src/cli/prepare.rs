//! `voxgrad verify`, `fingerprint`, `plan`, `preprocess` and `plan-and-preprocess`.

use super::{DeviceArgument, progress_bar, summary};
use anyhow::Context as _;
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};
use voxgrad::dataset::fingerprint::Fingerprint;
use voxgrad::dataset::folders::{Folders, Located};
use voxgrad::dataset::planner::{Planner, PlannerKind};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{Dataset, splits, verify};
use voxgrad::kernels::{Context, Dtype};
use voxgrad::nn::pytorch_kept_bytes;
use voxgrad::preprocess::{Preprocessor, preprocess_folder};
use voxgrad::tape::Fusion;
use voxgrad::train::{Model, planned_memory};
use voxgrad::{Compat, Error, io};

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
#[derive(clap::Args)]
pub struct Shown {
    /// Print a line for every case that is done.
    #[arg(long)]
    verbose: bool,
    /// Show no progress bar.
    #[arg(long, visible_alias = "no_pbar")]
    no_progress_bar: bool,
}

impl Shown {
    fn bar(&self, what: &'static str, length: usize) -> ProgressBar {
        if self.no_progress_bar { ProgressBar::hidden() } else { progress_bar(what, length) }
    }

    fn done(&self, bar: &ProgressBar, what: &str, case: &str) {
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
    shown: Shown,
    /// Cases that are worked on, and kept in memory, at a time; all processor cores unless given. Fewer need less memory.
    #[arg(long, visible_alias = "np", value_name = "N")]
    workers: Option<usize>,
    /// What to do where nnU-Net 2.8 treats ignored voxels in a questionable way: `corrected` leaves them out of intensity
    /// statistics and normalisation, `nnunet` gives nnU-Net's numbers.
    #[arg(long, value_name = "WAY", default_value = "corrected", value_parser = ["corrected", "nnunet"])]
    compat: String,
    /// Start afresh instead of keeping what an earlier run has finished.
    #[arg(long)]
    clean: bool,
}

impl Reading {
    fn workers(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.filter(|&n| n > 0).unwrap_or_else(cores)
    }

    fn compat(&self) -> Compat {
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
    fn planner(&self) -> anyhow::Result<Planner> {
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
    fn of(&self, plans: &Plans) -> anyhow::Result<Vec<String>> {
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

/// `voxgrad verify`.
#[derive(clap::Args)]
pub struct Verify {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    shown: Shown,
}

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

impl Verify {
    /// Checks all datasets before it complains about any.
    pub fn run(self) -> anyhow::Result<()> {
        let mut bad = 0;
        for located in self.which.located()? {
            bad += usize::from(check(&located, &self.shown)? > 0);
        }
        anyhow::ensure!(bad == 0, "{bad} of {} datasets cannot be used as they are", self.which.datasets.len());
        Ok(())
    }
}

impl MakeFingerprint {
    /// Measures all datasets.
    pub fn run(self) -> anyhow::Result<()> {
        for located in self.which.located()? {
            check_if(self.verify_dataset_integrity, &located, &self.reading.shown)?;
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
            check_if(self.verify_dataset_integrity, &located, &self.reading.shown)?;
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

impl Which {
    fn located(&self) -> anyhow::Result<Vec<Located>> {
        let folders = self.folders.folders();
        Ok(self.datasets.iter().map(|wanted| folders.locate(wanted)).collect::<Result<_, _>>()?)
    }
}

/// A raw dataset and the folder of what is made from it.
struct Target {
    name: String,
    dataset: Dataset,
    folder: PathBuf,
}

impl Target {
    fn new(which: &Which, located: &Located) -> anyhow::Result<Self> {
        let folder = which.folders.folders().preprocessed_of(&located.name)?;
        let dataset = Dataset::open(located.raw()?)
            .context("`voxgrad verify` lists everything that is wrong with a dataset at once")?;
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        Ok(Target { name: located.name.clone(), dataset, folder })
    }
}

fn check_if(wanted: bool, located: &Located, shown: &Shown) -> anyhow::Result<()> {
    anyhow::ensure!(!wanted || check(located, shown)? == 0, "{} cannot be used as it is", located.name);
    Ok(())
}

/// Prints what is wrong with a dataset and returns how much that is.
fn check(located: &Located, shown: &Shown) -> anyhow::Result<usize> {
    let bar = shown.bar("verifying", 0);
    bar.set_length(Dataset::inspect(located.raw()?).map_or(0, |(dataset, _)| dataset.cases.len() as u64));
    let result = verify::verify(located.raw()?, |case| shown.done(&bar, "read", case));
    bar.finish_and_clear();
    let found = match result {
        Ok(found) => found,
        Err(error) => {
            eprintln!("{}: {error}", located.name);
            return Ok(1);
        }
    };
    found.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    found.failures.iter().for_each(|failure| eprintln!("{}: {failure}", located.name));
    match found.failures.len() {
        0 => println!("{}: {} cases, nothing wrong", located.name, found.cases),
        failures => println!("{}: {failures} failures, {} complete cases", located.name, found.cases),
    }
    Ok(found.failures.len())
}

/// Measures a dataset unless an earlier run has.
fn fingerprint(target: &Target, reading: &Reading) -> anyhow::Result<Fingerprint> {
    let file = target.folder.join("dataset_fingerprint.json");
    if !reading.clean
        && let Ok(earlier) = Fingerprint::read(&file)
        && earlier.spacings.len() == target.dataset.cases.len()
    {
        println!("{}: using the fingerprint in {} (--clean measures again)", target.name, file.display());
        return Ok(earlier);
    }
    let bar = reading.shown.bar("measuring", target.dataset.cases.len());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(reading.workers()).build().context("starting threads")?;
    let done = |case: &str| reading.shown.done(&bar, "measured", case);
    let measured = pool.install(|| Fingerprint::extract(&target.dataset, reading.compat(), done))?;
    bar.finish_and_clear();
    measured.write(&file)?;
    println!("{}: wrote {}", target.name, file.display());
    Ok(measured)
}

/// Plans, and puts dataset.json and the splits beside the plans.
fn plan(target: &Target, planner: &Planner, measured: &Fingerprint) -> anyhow::Result<Plans> {
    let mut plans = planner.plan(&target.name, &target.dataset, measured)?;
    let file = target.folder.join(format!("{}.json", plans.plans_name));
    // Configurations that somebody has added by hand outlive planning again.
    if file.exists() {
        for (name, configuration) in Plans::read(&file)?.configurations {
            plans.configurations.entry(name).or_insert(configuration);
        }
    }
    plans.write(&file)?;
    io::write_json(&target.folder.join("dataset.json"), target.dataset.json.source())?;
    write_splits(target)?;
    println!("{}: wrote {}", target.name, file.display());
    Ok(plans)
}

/// The memory of a training step on a device, as a dry run counts it, and what PyTorch would keep for its backward pass.
fn print_memory(target: &Target, plans: &Plans, context: &Context) -> anyhow::Result<()> {
    let gibibytes = |bytes: u64| format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64);
    for name in plans.configurations.keys().filter(|name| name.starts_with("3d")) {
        let model = Model::new(plans.clone(), name, target.dataset.json.clone())?;
        let (shape, batch) = (model.architecture()?, model.configuration.batch_size);
        let (patch, _) = model.configuration.three_dimensional()?;
        println!("{} {name}: a training step on {batch} patches of {patch:?} voxels takes", target.name);
        for (precision, dtype) in [("f32", Dtype::F32), ("f16", Dtype::F16)] {
            let plan = match planned_memory(context, &model.labels, &shape, batch, patch, dtype, Fusion::default()) {
                Ok(plan) => plan,
                Err(error) => {
                    println!("  {precision}: {error}");
                    continue;
                }
            };
            println!(
                "  {precision}: {} ({} parameters, {} kept for backward, {} temporaries); PyTorch keeps {} for backward",
                gibibytes(plan.total),
                gibibytes(plan.parameters),
                gibibytes(plan.activations),
                gibibytes(plan.temporaries),
                gibibytes(pytorch_kept_bytes(&shape, batch, patch, dtype.size())),
            );
        }
    }
    Ok(())
}

/// The splits of the raw dataset, those that are there, or nnU-Net's five folds.
fn write_splits(target: &Target) -> anyhow::Result<()> {
    let names = target.dataset.case_names();
    let (given, file) = (target.dataset.folder.join("splits_final.json"), target.folder.join("splits_final.json"));
    let present = if file.exists() { Some(splits::read(&file, &names)?) } else { None };
    if given.exists() {
        let given_splits = splits::read(&given, &names)?;
        return match present {
            Some(present) if present != given_splits => {
                Err(Error::SplitsDiffer { raw: given, preprocessed: file }.into())
            }
            Some(_) => Ok(()),
            None => Ok(splits::write(&file, &given_splits)?),
        };
    }
    if present.is_none() {
        match splits::k_fold(&names) {
            Ok(folds) => splits::write(&file, &folds)?,
            Err(error) => eprintln!("warning: {error}"),
        }
    }
    Ok(())
}

/// Preprocesses the configurations, copies the labels, and says what there is to learn from.
fn preprocess(
    target: &Target,
    plans: &Plans,
    configurations: &Configurations,
    reading: &Reading,
) -> anyhow::Result<()> {
    for name in configurations.of(plans)? {
        let configuration = plans.configuration(&name)?;
        let preprocessor =
            Preprocessor::from_plans(plans, &configuration, target.dataset.labels.clone(), reading.compat())?;
        let folder = target.folder.join(&configuration.data_identifier);
        if reading.clean && folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        }
        let bar = reading.shown.bar("preprocessing", target.dataset.cases.len());
        let reports = preprocess_folder(&target.dataset, &preprocessor, &folder, reading.workers(), |case| {
            reading.shown.done(&bar, "preprocessed", case);
        })?;
        bar.finish_and_clear();
        let (mut good, mut failures) = (Vec::new(), 0);
        for report in reports {
            match report {
                Ok(report) => good.push(report),
                Err(error) => {
                    failures += 1;
                    eprintln!("{}: {error}", target.name);
                }
            }
        }
        summary::print(&format!("{} {name}", target.name), &target.dataset, &configuration, &good);
        anyhow::ensure!(
            failures == 0,
            "{failures} cases could not be preprocessed; the others are in {}",
            folder.display()
        );
        println!("  in {}", folder.display());
    }
    copy_labels(target)
}

/// Copies the raw labels to where evaluation looks for them, newer files only.
fn copy_labels(target: &Target) -> anyhow::Result<()> {
    let folder = target.folder.join("gt_segmentations");
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let modified = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    for case in &target.dataset.cases {
        let Some(label) = &case.label else { continue };
        let copy = folder.join(format!("{}{}", case.name, target.dataset.json.file_ending));
        if modified(&copy).is_none_or(|copied| modified(label).is_none_or(|original| original > copied)) {
            let bytes = std::fs::read(label).with_context(|| format!("reading {}", label.display()))?;
            io::write_atomically(&copy, &bytes)?;
        }
    }
    Ok(())
}
