//! `voxgrad overlay`.

use super::progress::progress_bar;
use anyhow::Context as _;
use std::path::PathBuf;
use voxgrad::dataset::{CaseFiles, DatasetJson, LabelGroup, LabelManager, list_cases};
use voxgrad::error::{EvaluateError, FileError};
use voxgrad::eval::Components;
use voxgrad::io::grid_difference;
use voxgrad::report::{Planes, write_planes};
use voxgrad::{Error, io};

/// What was typed.
#[derive(clap::Args)]
pub struct Overlay {
    /// Folder of images, named as for training: CASE_0000.nii.gz, ...
    #[arg(short, long, value_name = "FOLDER")]
    input: PathBuf,
    /// Folder of predictions, CASE.nii.gz.
    #[arg(long, value_name = "FOLDER", required_unless_present = "references")]
    predictions: Option<PathBuf>,
    /// Folder of annotations or references, CASE.nii.gz.
    #[arg(long, value_name = "FOLDER")]
    references: Option<PathBuf>,
    /// The dataset's description.
    #[arg(long, value_name = "FILE")]
    dataset_json: PathBuf,
    /// Folder for the pictures, CASE.png.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Cases to draw; all that have a prediction or an annotation unless given.
    #[arg(long, value_name = "CASE", num_args = 1..)]
    cases: Vec<String>,
    /// Class or region whose largest connected component the planes go through, in the annotation, else in the prediction;
    /// all foreground unless given.
    #[arg(long, value_name = "NAME")]
    class: Option<String>,
    /// Channel of the image. nnU-Net's -channel_idx.
    #[arg(long, value_name = "N", default_value_t = 0)]
    channel: usize,
    /// Width of the window of image values that are told apart, such as 400 for soft tissue in CT; what is usual in the
    /// slices unless given.
    #[arg(long, value_name = "VALUES", requires = "level")]
    window: Option<f32>,
    /// Middle of that window, such as 40.
    #[arg(long, value_name = "VALUE", requires = "window", allow_negative_numbers = true)]
    level: Option<f32>,
    /// Replace pictures that are there already.
    #[arg(long)]
    overwrite: bool,
}

impl Overlay {
    /// Draws all cases.
    pub fn run(self) -> anyhow::Result<()> {
        let json = DatasetJson::read(&self.dataset_json)?;
        let labels = LabelManager::new(&json)?;
        let class = self.class(&labels)?;
        anyhow::ensure!(
            self.channel < json.channel_names.len(),
            "--channel is {}, but {} declares {} channels, from 0",
            self.channel,
            self.dataset_json.display(),
            json.channel_names.len()
        );
        anyhow::ensure!(self.window.is_none_or(|width| width > 0.0), "--window is no width: give a positive number");
        let cases = self.cases(&json)?;
        let target = |case: &CaseFiles| self.output.join(format!("{}.png", case.name));
        if !self.overwrite {
            let there = cases.iter().map(target).filter(|path| path.symlink_metadata().is_ok());
            let exists = |path| FileError::OutputExists { path, problem: "is there already".into() }.into();
            Error::all(there.map(exists).collect())?;
        }
        std::fs::create_dir_all(&self.output).with_context(|| format!("creating {}", self.output.display()))?;
        let bar = progress_bar("drawing", cases.len());
        let mut failed = Vec::new();
        for case in &cases {
            bar.set_message(case.name.clone());
            if let Err(error) = self.draw(case, &json.file_ending, &labels, &class) {
                bar.suspend(|| eprintln!("error: drawing {}: {error}", case.name));
                failed.push(case.name.as_str());
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        println!("pictures in {}: {}", self.output.display(), cases.len() - failed.len());
        anyhow::ensure!(
            failed.is_empty(),
            "{} of {} cases could not be drawn: {}",
            failed.len(),
            cases.len(),
            failed.join(", ")
        );
        Ok(())
    }

    /// What the planes go through.
    fn class(&self, labels: &LabelManager) -> anyhow::Result<LabelGroup> {
        let names = labels.foreground_names();
        let Some(wanted) = &self.class else {
            let foreground = labels.all_labels().iter().copied().filter(|&label| label != 0);
            return Ok(LabelGroup::Region(foreground.collect()));
        };
        let place = names.iter().position(|name| name == wanted);
        let place = place.with_context(|| format!("--class {wanted} is none of {}", names.join(", ")))?;
        labels.foreground().get(place).cloned().context("a class without labels")
    }

    /// The cases to draw.
    fn cases(&self, json: &DatasetJson) -> anyhow::Result<Vec<CaseFiles>> {
        let found = list_cases(&self.input, None, json)?;
        found.notes.iter().for_each(|note| eprintln!("note: {note}"));
        Error::all(found.failures)?;
        let has_map = |case: &CaseFiles| {
            let file = format!("{}{}", case.name, json.file_ending);
            [&self.predictions, &self.references].into_iter().flatten().any(|folder| folder.join(&file).is_file())
        };
        let drawn: Vec<CaseFiles> = found.complete.into_iter().filter(has_map).collect();
        let unknown: Vec<&str> =
            self.cases.iter().map(String::as_str).filter(|name| drawn.iter().all(|case| case.name != *name)).collect();
        anyhow::ensure!(
            unknown.is_empty(),
            "no image with a prediction or an annotation: {}; cases are named without channel number and ending",
            unknown.join(", ")
        );
        let meant = |case: &CaseFiles| self.cases.is_empty() || self.cases.contains(&case.name);
        let drawn: Vec<CaseFiles> = drawn.into_iter().filter(meant).collect();
        anyhow::ensure!(
            !drawn.is_empty(),
            "{}: no image has a prediction or an annotation of its name, CASE{}",
            self.input.display(),
            json.file_ending
        );
        Ok(drawn)
    }

    fn draw(&self, case: &CaseFiles, ending: &str, labels: &LabelManager, class: &LabelGroup) -> anyhow::Result<()> {
        let file = case.images.get(self.channel).context("a case without this channel")?;
        let image = io::read_image(file)?;
        let grid = (&image.geometry, image.data.dim().into());
        let read = |folder: &Option<PathBuf>| -> anyhow::Result<Option<io::LabelMap>> {
            let Some(path) = folder.as_ref().map(|folder| folder.join(format!("{}{ending}", case.name))) else {
                return Ok(None);
            };
            if !path.is_file() {
                eprintln!("note: {} is not there; {} is drawn without it", path.display(), case.name);
                return Ok(None);
            }
            let map = io::read_labels(&path)?;
            match grid_difference((&map.geometry, map.data.dim().into()), grid) {
                None => Ok(Some(map)),
                Some(problem) => Err(Error::from(EvaluateError::ImageGrid { path, problem }).into()),
            }
        };
        let (prediction, annotation) = (read(&self.predictions)?, read(&self.references)?);
        let middle = |map: &io::LabelMap| {
            Components::of(map.data.mapv(|label| class.contains(label)).view()).middle_of_largest()
        };
        let maps = [&annotation, &prediction].into_iter().flatten();
        let at = maps.clone().find_map(middle).unwrap_or_else(|| {
            eprintln!("note: {} has nothing to go through: the planes go through its middle", case.name);
            <[usize; 3]>::from(image.data.dim()).map(|length| length / 2)
        });
        let planes = Planes {
            case: &case.name,
            image: image.data.view(),
            annotation: annotation.as_ref().map(|map| map.data.view()),
            prediction: prediction.as_ref().map(|map| map.data.view()),
            ignore: labels.ignore_label(),
            labels: &super::validation::legend(labels),
            spacing: image.geometry.spacing,
            at,
            window: self.window.zip(self.level).map(|(width, level)| [level - width / 2.0, level + width / 2.0]),
        };
        Ok(write_planes(&self.output.join(format!("{}.png", case.name)), &planes)?)
    }
}
