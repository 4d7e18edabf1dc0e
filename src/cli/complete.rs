//! `voxgrad complete`.

use super::ensemble::{EnsembleArguments, Watch};
use super::sparsify::came_along;
use std::path::PathBuf;
use voxgrad::annotate::{CompletionSettings, Ensemble, Folds, complete_dataset, completion_table};

/// What was typed.
#[derive(clap::Args)]
pub struct Complete {
    /// The dataset that is annotated in part: dataset.json, imagesTr, labelsTr. That of -d unless given.
    #[arg(value_name = "DATASET_FOLDER")]
    annotated: Option<PathBuf>,
    /// Folder of the new dataset.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Leave voxels ignored where the mean probability of the label exceeds that of the next one by less than this, from 0
    /// to 1; all are completed unless given.
    #[arg(long, value_name = "MARGIN")]
    min_confidence: Option<f32>,
    /// Let all folds complete a case that none of them held out, although they were trained on it; refused unless given.
    #[arg(long)]
    all_folds: bool,
    /// Replace a dataset that this command made before.
    #[arg(long)]
    overwrite: bool,
    /// Copy images instead of giving the files a second name (hard link).
    #[arg(long)]
    copy: bool,
    #[command(flatten)]
    ensemble: EnsembleArguments,
}

impl Complete {
    /// Makes the dataset and says what is in it.
    pub fn run(self) -> anyhow::Result<()> {
        let trained = self.ensemble.model()?;
        let dataset = self.ensemble.dataset(self.annotated.as_deref())?;
        let splits = self.ensemble.splits(&trained, &dataset)?;
        let (context, settings) = self.ensemble.settings(&trained)?;
        let ensemble = Ensemble::new(&context, &trained, settings)?;
        let asked = CompletionSettings {
            least_margin: self.min_confidence,
            folds: if self.all_folds { Folds::HeldOutOrAll } else { Folds::HeldOut },
            copy_images: self.copy,
            overwrite: self.overwrite,
        };
        let watch = Watch::begin(&self.ensemble.shown, "completing", "completed", dataset.cases.len())?;
        let made =
            complete_dataset(&dataset, &self.output, &ensemble, splits.as_deref(), &asked, |event| watch.see(event))?;
        let report = watch.end(made)?;
        print!("{}", completion_table(&report));
        report.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
        println!("\n{}", came_along(report.images));
        println!("wrote {} (what was done: complete.json; margins: confidence)", self.output.display());
        Ok(())
    }
}
