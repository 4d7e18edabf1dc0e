//! `voxgrad inspect`.

use super::progress::progress_bar;
use std::path::PathBuf;
use voxgrad::Error;
use voxgrad::dataset::Dataset;
use voxgrad::error::FileError;
use voxgrad::report::{InspectSettings, inspect, write_inspection};

/// What was typed.
#[derive(clap::Args)]
pub struct Inspect {
    /// The dataset: dataset.json, imagesTr, labelsTr.
    dataset: PathBuf,
    /// The page to write.
    #[arg(short, long, value_name = "FILE.html")]
    output: PathBuf,
    /// Cases of which pictures are drawn, spread evenly over the dataset.
    #[arg(long, value_name = "N", default_value_t = 12)]
    pictures: usize,
    /// Replace a page that is there.
    #[arg(long)]
    overwrite: bool,
    /// Cases that are in memory at a time; all processor cores unless given.
    #[arg(long, visible_alias = "np", value_name = "N")]
    workers: Option<usize>,
}

impl Inspect {
    /// Measures the dataset and writes the page.
    pub fn run(self) -> anyhow::Result<()> {
        if self.output.exists() && !self.overwrite {
            let problem = "it exists; name another file, or ask for it to be replaced".into();
            return Err(Error::File(FileError::OutputExists { path: self.output, problem }).into());
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let settings =
            InspectSettings { pictures: self.pictures, workers: self.workers.filter(|&n| n > 0).unwrap_or_else(cores) };
        let cases = Dataset::inspect(&self.dataset).map_or(0, |(dataset, _)| dataset.cases.len());
        let bar = progress_bar("inspecting", cases);
        let inspection = inspect(&self.dataset, &settings, |case| {
            bar.set_message(case.to_owned());
            bar.inc(1);
        })?;
        bar.finish_and_clear();
        write_inspection(&self.output, &inspection)?;
        inspection.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
        println!("{} cases, wrote {}", inspection.cases.len(), self.output.display());
        Ok(())
    }
}
