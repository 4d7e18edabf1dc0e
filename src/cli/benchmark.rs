//! `voxgrad benchmark`.

use super::device::{DeviceArgument, ExactArgument};
use super::job::cases_beside;
use super::progress::progress_bar;
use anyhow::Context as _;
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use voxgrad::Error;
use voxgrad::benchmark::{EpochReport, Length, Profile, Report, Workload, with_loading, without_loading};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::{Fold, Split};
use voxgrad::dataset::{Dataset, DatasetJson};
use voxgrad::error::FileError;
use voxgrad::kernels::Context;
use voxgrad::kernels::conv3d::Policy;
use voxgrad::train::{DataSource, EpochTimes, Model, Precision, Settings, Trainer};

/// What was typed.
#[derive(clap::Args)]
pub struct Benchmark {
    /// nnU-Net's plans, with dataset.json beside them, and beside it raw or preprocessed cases.
    plans: Option<PathBuf>,
    /// Configuration of the plans; 3d_fullres unless given.
    #[arg(conflicts_with = "features")]
    configuration: Option<String>,
    /// In place of plans, the channels of each stage of a PlainConvUNet, such as 32,64,128.
    #[arg(long, value_name = "N,...", value_delimiter = ',', requires = "patch", conflicts_with = "plans")]
    features: Vec<usize>,
    /// With --features, the extent of a patch along z,y,x.
    #[arg(long, value_name = "Z,Y,X", value_delimiter = ',', requires = "features")]
    patch: Vec<usize>,
    /// With --features, patches of a step; 2 unless given.
    #[arg(long, value_name = "N", requires = "features")]
    batch_size: Option<usize>,
    /// With --features, channels of the image; 1 unless given.
    #[arg(long, value_name = "N", requires = "features")]
    channels: Option<usize>,
    /// With --features, classes, background among them; 3 unless given.
    #[arg(long, value_name = "N", requires = "features")]
    classes: Option<usize>,
    /// Epochs, of which the fastest counts; 0 for a profile alone.
    #[arg(long, value_name = "N", default_value_t = Length::default().epochs)]
    epochs: usize,
    /// SGD iterations of an epoch.
    #[arg(long, value_name = "N", default_value_t = Length::default().iterations)]
    iterations: usize,
    /// Validation batches after them.
    #[arg(long, value_name = "N", default_value_t = Length::default().validation_iterations)]
    validation_iterations: usize,
    /// Time epochs on random data that is made once only, not also on the cases beside the plans.
    #[arg(long, visible_alias = "no_data_loading")]
    no_data_loading: bool,
    /// Also say where the time of a training step goes, kernel by kernel, and its memory by kind.
    #[arg(long)]
    profile: bool,
    /// Type of activations and gradients: f32, f16 or bf16.
    #[arg(long, default_value_t)]
    precision: Precision,
    #[command(flatten)]
    exact: ExactArgument,
    /// Write everything that is measured to this file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Replace a file that is there.
    #[arg(long, requires = "json")]
    overwrite: bool,
    #[command(flatten)]
    device: DeviceArgument,
}

impl Benchmark {
    /// Measures, prints, writes.
    pub fn run(self) -> anyhow::Result<()> {
        if let Some(path) = self.json.as_ref().filter(|path| path.exists() && !self.overwrite) {
            let problem = "it exists; name another file, or ask for it to be replaced".into();
            return Err(Error::File(FileError::OutputExists { path: path.clone(), problem }).into());
        }
        if let Some(folder) =
            self.json.as_ref().and_then(|path| path.parent()).filter(|folder| !folder.as_os_str().is_empty())
        {
            anyhow::ensure!(folder.is_dir(), "--json: there is no folder {}", folder.display());
        }
        let length = self.length()?;
        let (workload, model) = self.workload()?;
        // What is missing is told before anything is measured.
        let cases = match &model {
            Some((model, folder)) if length.epochs > 0 && !self.no_data_loading => {
                Some(cases_beside(folder, model).context("--no-data-loading times epochs without cases")?)
            }
            _ => None,
        };
        let device = self.device.open()?;
        let mut report = Report::new(&device, &workload);
        println!("voxgrad {}, CubeCL {}", report.voxgrad, report.cubecl);
        println!("workload: {}", report.workload);
        let context = &Policy::default().with_exact(self.exact.exact).on(&device.context);
        // First: it tells what compiling takes.
        if self.profile {
            let profile = Profile::measure(context, &workload, |stage| eprintln!("{stage}"))?;
            print_profile(&profile);
            report.profile = Some(profile);
        }
        if length.epochs > 0 {
            let mut shown = Shown::new("random data", length);
            let epochs = without_loading(context, &workload, length, |_| shown.after())?;
            report.without_loading = shown.done(epochs);
        }
        let loading = match (&model, &cases) {
            (Some((model, folder)), Some(cases)) => self.on_cases(context, model, folder, cases, length),
            _ => Ok(None),
        };
        let failed = loading.map(|epochs| report.with_loading = epochs).err();
        // What was measured is not lost with what could not be.
        if let Some(path) = &self.json {
            report.write(path)?;
            println!("wrote {}", path.display());
        }
        failed.map_or(Ok(()), Err)
    }

    fn length(&self) -> anyhow::Result<Length> {
        anyhow::ensure!(
            self.epochs > 0 || self.profile,
            "--epochs 0 leaves nothing to measure: ask for epochs, or with --profile for a profile"
        );
        anyhow::ensure!(self.iterations > 0, "--iterations 0: an epoch has at least one");
        let Self { epochs, iterations, validation_iterations, .. } = *self;
        Ok(Length { epochs, iterations, validation_iterations })
    }

    /// The network; of plans also the model, and the folder that they are in.
    fn workload(&self) -> anyhow::Result<(Workload, Option<(Model, PathBuf)>)> {
        let Some(file) = &self.plans else {
            anyhow::ensure!(
                !self.features.is_empty(),
                "name PLANS, or with --features the channels of a network's stages"
            );
            let patch = <[usize; 3]>::try_from(self.patch.as_slice())
                .map_err(|_| anyhow::anyhow!("--patch is {:?}: give the extents along z,y,x", self.patch))?;
            let [batch, channels, classes] = [(self.batch_size, 2), (self.channels, 1), (self.classes, 3)]
                .map(|(typed, unless)| typed.unwrap_or(unless));
            return Ok((Workload::of_features(&self.features, channels, classes, patch, batch, self.precision)?, None));
        };
        let plans = Plans::read(file)?;
        let folder = match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let dataset = DatasetJson::read(&folder.join("dataset.json")).context("plans need dataset.json beside them")?;
        let configuration = self.configuration.as_deref().unwrap_or("3d_fullres");
        let model = Model::new(plans, configuration, dataset)?;
        Ok((Workload::of_plans(&model, self.precision)?, Some((model, folder.to_path_buf()))))
    }

    /// Epochs of a trainer on the cases beside the plans.
    fn on_cases(
        &self,
        context: &Context,
        model: &Model,
        folder: &Path,
        (dataset, split): &(Dataset, Split),
        length: Length,
    ) -> anyhow::Result<Option<EpochReport>> {
        let source =
            DataSource { dataset, prepared: folder, fold: Fold::Index(0), split, compat: None, skip_unreadable: false };
        let bar = progress_bar("reading", split.train.len() + split.val.len());
        let data = source.open(model, |_| bar.inc(1));
        bar.finish_and_clear();
        let data = data?;
        data.notes.iter().for_each(|note| eprintln!("note: {note}"));
        let Length { epochs, iterations, validation_iterations } = length;
        let (precision, exact) = (self.precision, self.exact.exact);
        let settings = Settings { epochs, iterations, validation_iterations, precision, exact, ..Settings::default() };
        let mut trainer = Trainer::new(context, model.clone(), settings)?;
        let mut shown = Shown::new("real cases", length);
        let epochs = with_loading(&mut trainer, [&data.training, &data.validation], |_| shown.after())?;
        Ok(shown.done(epochs))
    }
}

/// The progress of epochs, and what they took.
struct Shown {
    what: &'static str,
    length: Length,
    bar: ProgressBar,
}

impl Shown {
    fn new(what: &'static str, length: Length) -> Self {
        let bar = progress_bar("timing", length.epochs * (length.iterations + length.validation_iterations));
        bar.set_message(what);
        Self { what, length, bar }
    }

    fn after(&mut self) -> ControlFlow<()> {
        self.bar.inc(1);
        ControlFlow::Continue(())
    }

    fn done(self, epochs: Vec<EpochTimes>) -> Option<EpochReport> {
        self.bar.finish_and_clear();
        let report = EpochReport::new(self.length, epochs)?;
        let seconds: Vec<String> = report.epochs.iter().map(|times| format!("{:.2}", times.wall)).collect();
        println!(
            "{}: fastest of {} epochs of {} and {} iterations {:.2} s ({})",
            self.what,
            report.epochs.len(),
            report.iterations,
            report.validation_iterations,
            report.fastest_epoch,
            seconds.join(", ")
        );
        let fastest = report.epochs.iter().min_by(|a, b| a.wall.total_cmp(&b.wall));
        if let Some(times) = fastest.filter(|times| times.load > 0.0) {
            println!("  of it {times}");
        }
        Some(report)
    }
}

/// The table by kernel, and the memory by kind.
fn print_profile(profile: &Profile) {
    let Profile { ceilings, kernels, step, between, .. } = profile;
    let (ms, giga) = (|seconds: f64| 1e3 * seconds, |rate: f64| rate / 1e9);
    println!("multiply-add peak {:.1} GFLOP/s, copy bandwidth {:.1} GB/s", giga(ceilings.flops), giga(ceilings.copy));
    let width = kernels.iter().map(|times| times.operation.len()).max().unwrap_or(0).max(9);
    let place = kernels.iter().map(|times| times.kernel.len()).max().unwrap_or(0).max(6);
    println!(
        "{:<width$}  {:<place$}  {:>5}  {:>9}  {:>5}  {:>7}  {:>5}  {:>6}  {:>5}  {:>5}  {:>9}",
        "operation", "kernel", "calls", "ms", "step", "GFLOP/s", "peak", "GB/s", "copy", "forms", "compile s"
    );
    for times in kernels {
        let share = |rate: f64, most: f64| format!("{:.0} %", 100.0 * rate / most);
        let (flops, bytes) = (times.flops as f64 / times.seconds, times.bytes as f64 / times.seconds);
        let (rate, of_peak) = match times.flops {
            0 => ("-".into(), "-".into()),
            _ => (format!("{:.1}", giga(flops)), share(flops, ceilings.flops)),
        };
        println!(
            "{:<width$}  {:<place$}  {:>5}  {:>9.3}  {:>5}  {rate:>7}  {of_peak:>5}  {:>6.1}  {:>5}  {:>5}  {:>9}",
            times.operation,
            times.kernel,
            times.calls,
            ms(times.seconds),
            share(times.seconds, *step),
            giga(bytes),
            share(bytes, ceilings.copy),
            times.forms,
            times.compile.map_or("-".into(), |seconds| format!("{seconds:.2}")),
        );
    }
    println!(
        "a step whose launches are waited for takes {:.3} ms, {:.3} of it between {} launches; in training it takes {:.3} ms",
        ms(*step),
        ms(*between),
        profile.launches.len(),
        ms(profile.unrecorded_step),
    );
    let compiling: f64 = kernels.iter().filter_map(|times| times.compile).sum();
    let forms: usize = kernels.iter().map(|times| times.forms).sum();
    println!(
        "the first step took {:.2} s, {compiling:.2} of it compiling {forms} forms of kernels",
        profile.first_step
    );
    let memory = &profile.memory;
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
    println!(
        "memory: {} parameters, their gradients and momenta; {} batch; {} activations; {} gradients; {} scratch: {} planned, {} \
         held; {} pool overhead",
        mebibytes(memory.parameters),
        mebibytes(memory.batch),
        mebibytes(memory.activations),
        mebibytes(memory.gradients),
        mebibytes(memory.scratch),
        mebibytes(memory.planned),
        mebibytes(memory.held),
        mebibytes(memory.pool_overhead),
    );
    println!(
        "FLOP/s count the products of a convolution's definition, whatever the algorithm; GB/s count each buffer of a kernel \
         once, scratch too, and exceed 100 % of copying where caches hold them"
    );
}
