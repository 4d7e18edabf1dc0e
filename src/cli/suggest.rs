//! `voxgrad suggest`.

use super::ensemble::{EnsembleArguments, Watch};
use super::validation::legend;
use anyhow::{Context as _, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use voxgrad::annotate::{Ensemble, Folds, Measure, Suggestion, SuggestionSettings, Suggestions, Unit, suggest};
use voxgrad::dataset::{Dataset, list_cases};
use voxgrad::report::{Doubt, write_doubt};
use voxgrad::{Error, io};

/// Suggestions unless another number is asked for.
const COUNT: usize = 20;
/// Slices between two suggested ones of a case, unless another number is asked for.
const SPACING: usize = 3;
/// Extent of a block unless another is asked for.
const BLOCK: usize = 20;

/// What was typed.
#[derive(clap::Args)]
pub struct Suggest {
    /// The dataset that is annotated in part: dataset.json, imagesTr, labelsTr. That of -d unless given.
    #[arg(value_name = "DATASET_FOLDER")]
    annotated: Option<PathBuf>,
    /// Folder of more images, without any annotation, named as for training.
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// Folder for tables, pictures and masks.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// What is annotated in one go: slices or blocks.
    #[arg(long, value_name = "UNIT", value_parser = ["slices", "blocks"], default_value = "slices")]
    unit: String,
    /// Axis across which slices lie [z].
    #[arg(long, value_name = "AXIS", value_parser = ["z", "y", "x"])]
    axis: Option<String>,
    /// Extent of a block: a number, or three along z,y,x [20].
    #[arg(long, value_name = "VOXELS", value_delimiter = ',')]
    block: Vec<usize>,
    /// By what they are ranked: entropy (of the mean probabilities), disagreement (of folds, mirrored copies and windows) or
    /// margin (how close the next class is).
    #[arg(long, value_name = "MEASURE", value_parser = ["entropy", "disagreement", "margin"], default_value = "entropy")]
    by: String,
    /// How many slices or blocks to suggest.
    #[arg(long, value_name = "N", default_value_t = COUNT)]
    count: usize,
    /// With fewer slices (of blocks: voxels) between them, two suggestions of a case are neighbours: one comes after
    /// everything else [slices: 3, blocks: 0, which keeps them from overlapping].
    #[arg(long, value_name = "N")]
    spacing: Option<usize>,
    /// How much a case gives way to others for every suggestion that it has: scores are divided by (1 + suggestions) to this
    /// power. 0 ranks by uncertainty alone.
    #[arg(long, value_name = "POWER", default_value_t = 1.0)]
    diversity: f64,
    /// Look at each case with the folds only that were not trained on it.
    #[arg(long)]
    held_out: bool,
    /// Draw no pictures.
    #[arg(long)]
    no_pictures: bool,
    /// Replace suggestions that this command made before.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    ensemble: EnsembleArguments,
}

impl Suggest {
    /// Ranks, writes, draws.
    pub fn run(self) -> anyhow::Result<()> {
        let asked = self.asked()?;
        let trained = self.ensemble.model()?;
        let mut dataset = self.ensemble.dataset(self.annotated.as_deref())?;
        let splits = self.ensemble.splits(&trained, &dataset)?;
        if let Some(folder) = &self.images {
            add_images(&mut dataset, folder)?;
        }
        let (context, settings) = self.ensemble.settings(&trained)?;
        let ensemble = Ensemble::new(&context, &trained, settings)?;
        let watch = Watch::begin(&self.ensemble.shown, "looking", "looked at", dataset.cases.len())?;
        let made = suggest(&dataset, &self.output, &ensemble, splits.as_deref(), &asked, |event| watch.see(event))?;
        let made = watch.end(made)?;
        print(&made);
        if !self.no_pictures {
            self.draw(&dataset, &made)?;
        }
        println!("wrote {}: suggestions.csv, cases.csv, masks, uncertainty, segmentations", self.output.display());
        Ok(())
    }

    fn asked(&self) -> anyhow::Result<SuggestionSettings> {
        let blocks = self.unit == "blocks";
        let unit = match (blocks, &self.block[..], self.axis.as_deref()) {
            (true, _, Some(_)) => bail!("--axis means nothing for --unit blocks"),
            (false, [_, ..], _) => bail!("--block means nothing for --unit slices"),
            (false, [], axis) => Unit::Slices { axis: axis.map_or(0, axis_of) },
            (true, [], None) => Unit::Blocks { size: [BLOCK; 3] },
            (true, &[side], None) => Unit::Blocks { size: [side; 3] },
            (true, &[z, y, x], None) => Unit::Blocks { size: [z, y, x] },
            (true, sides, None) => bail!("--block {sides:?}: give one number, or three along z,y,x"),
        };
        Ok(SuggestionSettings {
            unit,
            measure: match self.by.as_str() {
                "disagreement" => Measure::Disagreement,
                "margin" => Measure::Margin,
                _ => Measure::Entropy,
            },
            count: self.count,
            spacing: self.spacing.unwrap_or(if blocks { 0 } else { SPACING }),
            diversity: self.diversity,
            folds: if self.held_out { Folds::HeldOut } else { Folds::All },
            overwrite: self.overwrite,
        })
    }

    /// Draws every suggestion: its slice, or the middle slice of its block.
    fn draw(&self, dataset: &Dataset, made: &Suggestions) -> anyhow::Result<()> {
        let folder = self.output.join("previews");
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let mut by_case: BTreeMap<&str, Vec<&Suggestion>> = BTreeMap::new();
        made.suggestions.iter().for_each(|one| by_case.entry(&one.case).or_default().push(one));
        let bar = self.ensemble.shown.bar("drawing", by_case.len());
        for (name, suggestions) in by_case {
            self.draw_case(dataset, made, name, &suggestions, &folder)?;
            self.ensemble.shown.done(&bar, "drew", name);
        }
        bar.finish_and_clear();
        println!("pictures in {}", folder.display());
        Ok(())
    }

    fn draw_case(
        &self,
        dataset: &Dataset,
        made: &Suggestions,
        name: &str,
        suggestions: &[&Suggestion],
        folder: &Path,
    ) -> anyhow::Result<()> {
        let case = dataset.cases.iter().find(|case| case.name == name).context("a suggestion of no case")?;
        let image = io::read_image(case.images.first().context("a case without images")?)?;
        let annotation = case.label.as_deref().map(io::read_labels).transpose()?;
        let file = format!("{name}{}", dataset.json.file_ending);
        let prediction = io::read_labels(&self.output.join("segmentations").join(&file))?;
        let uncertainty = io::read_image(&self.output.join("uncertainty").join(&file))?;
        let labels = legend(&dataset.labels);
        for Suggestion { rank, place, .. } in suggestions {
            let axis = if let Unit::Slices { axis } = made.settings.unit { axis } else { 0 };
            let slice = place.start[axis] + place.extent[axis] / 2;
            let others: Vec<usize> = (0..3).filter(|&other| other != axis).collect();
            let part = |axis: usize| place.start[axis]..place.start[axis] + place.extent[axis];
            let outline = matches!(made.settings.unit, Unit::Blocks { .. }).then(|| [part(others[0]), part(others[1])]);
            let note = format!(
                "{} {}  ·  mean {} {:.4}  ·  {:.0} % of it not annotated",
                ["z", "y", "x"][axis],
                slice,
                self.by,
                place.score,
                100.0 * place.open as f64 / place.voxels() as f64
            );
            let doubt = Doubt {
                title: &format!("{rank}. {name}"),
                note: &note,
                slice: (axis, slice),
                outline,
                image: image.data.view(),
                annotation: annotation.as_ref().map(|map| map.data.view()),
                prediction: prediction.data.view(),
                uncertainty: uncertainty.data.view(),
                ignore: dataset.labels.ignore_label(),
                labels: &labels,
                spacing: image.geometry.spacing,
            };
            write_doubt(&folder.join(format!("{rank:03}_{name}.png")), &doubt)?;
        }
        Ok(())
    }
}

fn axis_of(name: &str) -> usize {
    ["z", "y", "x"].iter().position(|axis| *axis == name).unwrap_or(0)
}

/// Adds images that nobody has annotated.
fn add_images(dataset: &mut Dataset, folder: &Path) -> anyhow::Result<()> {
    let found = list_cases(folder, None, &dataset.json)?;
    found.notes.iter().for_each(|note| eprintln!("note: {note}"));
    Error::all(found.failures)?;
    let twice: Vec<&str> = found
        .complete
        .iter()
        .map(|case| case.name.as_str())
        .filter(|name| dataset.cases.iter().any(|case| case.name == *name))
        .collect();
    anyhow::ensure!(twice.is_empty(), "--images has cases of the dataset's names: {}", twice.join(", "));
    dataset.cases.extend(found.complete);
    Ok(())
}

fn print(made: &Suggestions) {
    let width = made.cases.iter().map(|case| case.case.len()).max().unwrap_or(0).max(4);
    println!(
        "{:>4}  {:<width$}  {:>16}  {:>16}  {:>8}  {:>6}",
        "rank", "case", "from (z, y, x)", "extent", "score", "open"
    );
    for Suggestion { rank, case, place, .. } in &made.suggestions {
        println!(
            "{rank:>4}  {case:<width$}  {:>16}  {:>16}  {:>8.4}  {:>4.0} %",
            format!("{:?}", place.start),
            format!("{:?}", place.extent),
            place.score,
            100.0 * place.open as f64 / place.voxels() as f64
        );
    }
    made.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let trained = made.cases.iter().filter(|case| !case.held_out).count();
    if trained > 0 {
        println!("{trained} of {} cases were looked at by folds that trained on them too", made.cases.len());
    }
}
