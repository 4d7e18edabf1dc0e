//! `voxgrad evaluate` (or `evaluate-folder`) and `voxgrad evaluate-simple`.

use super::progress::progress_bar;
use super::scores;
use anyhow::Context as _;
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{DatasetJson, LabelGroup, LabelManager};
use voxgrad::eval::{Classes, Summary, SurfaceKind, SurfaceSettings, evaluate_classes, file_ending_of};
use voxgrad::io;

/// What was typed for `voxgrad evaluate`.
#[derive(clap::Args)]
pub struct Evaluate {
    #[command(flatten)]
    scoring: Scoring,
    /// The dataset's description: labels, regions, ignore label. nnU-Net's -djfile.
    #[arg(long = "dataset-json", value_name = "FILE")]
    dataset: PathBuf,
    /// The plans, nnU-Net's -pfile: only which label manager they name is of interest here. Need not be given.
    #[arg(long, value_name = "FILE")]
    plans: Option<PathBuf>,
}

/// What was typed for `voxgrad evaluate-simple`.
#[derive(clap::Args)]
pub struct EvaluateSimple {
    #[command(flatten)]
    scoring: Scoring,
    /// Labels to score, such as 1 2 3; a region as "(1, 2, 3)".
    #[arg(short, long = "labels", value_name = "LABEL", num_args = 1.., required = true, value_parser = group)]
    labels: Vec<LabelGroup>,
    /// Label of reference voxels that are not looked at. nnU-Net's -il.
    #[arg(long, value_name = "LABEL")]
    ignore_label: Option<i16>,
}

/// What both are told.
#[derive(clap::Args)]
pub struct Scoring {
    /// Folder of the references.
    references: PathBuf,
    /// Folder of the predictions, files of the same names.
    predictions: PathBuf,
    /// Where the summary goes; summary.json beside the predictions unless given.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Measure surface distances (HD95, ASSD, NSD) and lesions too.
    #[arg(long)]
    distances: bool,
    /// Write surface distances, volumes and lesions to this CSV file, a line for each case and class.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Tolerance of the normalised surface Dice, in millimetres; 1 unless given.
    #[arg(long, value_name = "MM")]
    tolerance: Option<f64>,
    /// What a surface is: `voxels` at the border of an object, as in MONAI, or `elements` between voxels that count by their
    /// area, as in DeepMind's surface-distance; voxels unless given.
    #[arg(long, value_name = "KIND", value_parser = ["voxels", "elements"])]
    surfaces: Option<String>,
    /// Accept references without a prediction.
    #[arg(long)]
    chill: bool,
    /// Cases that are compared at a time; all processor cores unless given. nnU-Net's -np.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Show no progress bar.
    #[arg(long)]
    no_progress_bar: bool,
}

/// A label such as `3`, or a region such as `(1, 2, 3)`.
fn group(text: &str) -> Result<LabelGroup, String> {
    let label = |text: &str| {
        let label = text.trim().parse::<i16>().ok().filter(|label| *label >= 0);
        label.ok_or_else(|| {
            format!("`{}` is no label: expected a number such as 3, or a region such as (1, 2, 3)", text)
        })
    };
    match text.trim().strip_prefix('(').and_then(|text| text.strip_suffix(')')) {
        None => Ok(LabelGroup::Label(label(text)?)),
        Some(inside) => {
            let inside = inside.trim().strip_suffix(',').unwrap_or(inside);
            Ok(LabelGroup::Region(inside.split(',').map(label).collect::<Result<_, _>>()?))
        }
    }
}

impl Evaluate {
    /// Scores and prints.
    pub fn run(self) -> anyhow::Result<()> {
        let dataset = DatasetJson::read(&self.dataset)?;
        let labels = LabelManager::new(&dataset)?;
        if let Some(path) = &self.plans {
            let manager = Plans::read(path)?.label_manager;
            anyhow::ensure!(
                manager.is_null() || manager == "LabelManager",
                "{}: `label_manager` is {manager}, which may score other labels; only LabelManager is known",
                path.display()
            );
        }
        self.scoring.run(&dataset.file_ending, &Classes::of(&labels))
    }
}

impl EvaluateSimple {
    /// Scores and prints.
    pub fn run(self) -> anyhow::Result<()> {
        let classes = Classes::listed(self.labels, self.ignore_label)?;
        let ending = file_ending_of(&self.scoring.predictions)?;
        self.scoring.run(ending, &classes)
    }
}

impl Scoring {
    fn run(self, file_ending: &str, classes: &Classes) -> anyhow::Result<()> {
        let distances = self.distances || self.csv.is_some();
        anyhow::ensure!(
            distances || self.tolerance.is_none() && self.surfaces.is_none(),
            "--tolerance and --surfaces are about surface distances: give --distances or --csv FILE too"
        );
        let kind = match self.surfaces.as_deref() {
            Some("elements") => SurfaceKind::Elements,
            _ => SurfaceKind::Voxels,
        };
        let settings = SurfaceSettings { kind, tolerance: self.tolerance.unwrap_or(1.0) };
        let output = self.output.clone().unwrap_or_else(|| self.predictions.join("summary.json"));
        on_workers(self.workers, || {
            let bar = self.bar("comparing");
            let (references, predictions) = (&self.references, &self.predictions);
            let observe = |cases| count(&bar, cases);
            let summary = evaluate_classes(references, predictions, file_ending, classes, self.chill, &observe)?;
            bar.finish_and_clear();
            tell(&summary);
            summary.write(&output).context("writing the summary")?;
            if !distances {
                scores::print(&summary, None);
                println!("wrote {}", output.display());
                return Ok(());
            }
            let bar = self.bar("measuring");
            let measures = summary.measure(settings, &|cases| count(&bar, cases))?;
            bar.finish_and_clear();
            scores::print(&summary, Some((&measures, settings)));
            println!("wrote {}", output.display());
            if let Some(file) = &self.csv {
                io::write_atomically(file, summary.csv(&measures, settings).as_bytes())?;
                println!("wrote {}", file.display());
            }
            Ok(())
        })
    }

    fn bar(&self, what: &'static str) -> ProgressBar {
        if self.no_progress_bar { ProgressBar::hidden() } else { progress_bar(what, 0) }
    }
}

/// One case more of so many.
pub fn count(bar: &ProgressBar, cases: usize) {
    bar.set_length(cases as u64);
    bar.inc(1);
}

/// Works on so many cases at a time; on as many as there are processor cores unless given.
pub fn on_workers<T: Send>(workers: Option<u16>, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    match workers {
        None => work(),
        Some(workers) => {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(workers.into()).build();
            pool.context("starting threads")?.install(work)
        }
    }
}

/// Tells what was passed over and what looks odd.
pub fn tell(summary: &Summary) {
    if !summary.passed_over.is_empty() {
        let names: Vec<String> = summary.passed_over.iter().map(|path| path.display().to_string()).collect();
        eprintln!("note: no cases, passed over: {}", names.join(", "));
    }
    summary.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
}

/// Scores a folder and writes the summary.
pub fn score(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    labels: &LabelManager,
    chill: bool,
    output: &Path,
) -> anyhow::Result<Summary> {
    let bar = progress_bar("comparing", 0);
    let observe = |cases| count(&bar, cases);
    let summary = evaluate_classes(references, predictions, file_ending, &Classes::of(labels), chill, &observe)?;
    bar.finish_and_clear();
    tell(&summary);
    summary.write(output).context("writing the summary")?;
    Ok(summary)
}
