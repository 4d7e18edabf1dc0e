//! The validation cases of a trained network: predicted as whole images, scored, drawn.

use super::job::Job;
use super::typed::Train;
use super::{evaluate, predict, scores};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::{CaseFiles, LabelManager};
use voxgrad::preprocess::StoredCase;
use voxgrad::report::{Overlay, write_overlay};
use voxgrad::train::Trainer;
use voxgrad::{io, predict as inference};

/// The labels that validation cases are scored with.
pub enum References {
    /// Files named after their cases.
    Folder(PathBuf),
    /// Files of any name, each with the name that its case gives it.
    Files(Vec<(PathBuf, PathBuf)>),
}

impl References {
    /// Where the labels are that the validation cases are scored with; `None` if neither raw nor preprocessed files say
    /// enough. Everything that validation will read is looked for now: training takes long.
    pub fn find(given: Option<&Path>, job: &Job) -> anyhow::Result<Option<Self>> {
        let files = job.files(&job.split.val);
        let ending = &job.model.dataset.file_ending;
        // Copies that preprocessing makes, for when the raw files are gone.
        let copies = job.prepared.join("gt_segmentations");
        let raw_gone = files.iter().all(|case| case.images.is_empty());
        if raw_gone && (given.is_none() && !copies.is_dir() || files.iter().any(|case| !job.stored(case).is_file())) {
            eprintln!(
                "note: the validation cases cannot be scored after training: that needs their raw images, or cases \
                 preprocessed by voxgrad and the labels in {}",
                copies.display()
            );
            return Ok(None);
        }
        let raw = job.dataset.folder.join("labelsTr");
        let expected = |folder: &Path, case: &CaseFiles| folder.join(format!("{}{ending}", case.name));
        let references = match given {
            Some(folder) => References::Folder(folder.into()),
            None if raw_gone => References::Folder(copies),
            None if files.iter().all(|case| case.label.as_ref() == Some(&expected(&raw, case))) => {
                References::Folder(raw)
            }
            None => {
                let labels = files.iter().filter_map(|case| Some((expected(Path::new(""), case), case.label.clone()?)));
                References::Files(labels.collect())
            }
        };
        let labels: Vec<PathBuf> = match &references {
            References::Folder(folder) => files.iter().map(|case| expected(folder, case)).collect(),
            References::Files(files) => files.iter().map(|(_, label)| label.clone()).collect(),
        };
        let images = files.iter().flat_map(|case| case.images.iter().cloned());
        let missing: Vec<String> = labels
            .iter()
            .cloned()
            .chain(images)
            .filter(|path| !path.is_file())
            .map(|path| path.display().to_string())
            .collect();
        anyhow::ensure!(missing.is_empty(), "validation will need files that are not there: {}", missing.join(", "));
        let other: Vec<String> = labels
            .iter()
            .filter(|path| !path.to_string_lossy().ends_with(ending.as_str()))
            .map(|path| path.display().to_string())
            .collect();
        anyhow::ensure!(
            other.is_empty(),
            "labels of validation cases must end in {ending}, which `file_ending` in dataset.json says: {}",
            other.join(", ")
        );
        Ok(Some(references))
    }

    /// A folder in which they are named after their cases: a copy in the output folder if there is none yet.
    fn folder(&self, output: &Path) -> anyhow::Result<PathBuf> {
        let files = match self {
            References::Folder(folder) => return Ok(folder.clone()),
            References::Files(files) => files,
        };
        let folder = output.join("validation_references");
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        for (name, label) in files {
            let bytes = std::fs::read(label).with_context(|| format!("reading {}", label.display()))?;
            io::write_atomically(&folder.join(name), &bytes)?;
        }
        Ok(folder)
    }
}

/// What is validated, and on what.
pub struct Validation<'a> {
    /// The cases and the output folder.
    pub job: &'a Job,
    /// The trained network.
    pub trainer: &'a Trainer,
    /// What to score with.
    pub references: References,
    /// What was typed.
    pub typed: &'a Train,
}

impl Validation<'_> {
    /// Predicts and scores the validation cases, and draws those whose raw images are there. Returns the mean foreground
    /// Dice.
    pub fn run(&self) -> anyhow::Result<f64> {
        let (job, trainer) = (self.job, self.trainer);
        let files: Vec<CaseFiles> = job.files(&job.split.val).into_iter().cloned().collect();
        let folder = job.output.join("validation");
        let mirror = if self.typed.disable_tta { [false; 3] } else { trainer.settings().mirror };
        let dtype = trainer.settings().precision.dtype();
        let settings = inference::Settings { mirror, dtype, ..Default::default() };
        let networks = std::slice::from_ref(trainer.network());
        let going = predict::Going { probabilities: self.typed.npz, ..Default::default() };
        let (context, model) = (trainer.context(), trainer.model());
        let raw_gone = files.iter().all(|case| case.images.is_empty());
        match raw_gone {
            false => predict::predict_cases(context, networks, model, &files, &folder, &settings, &going)?,
            true => {
                let prepare = |case: &CaseFiles| -> voxgrad::Result<_> {
                    Ok((StoredCase::open(&job.stored(case))?.read()?, Vec::new()))
                };
                predict::predict_prepared(context, networks, model, &files, &folder, &settings, &going, prepare)?;
            }
        }
        let (labels, ending) = (&trainer.model().labels, &job.dataset.json.file_ending);
        let references = self.references.folder(&job.output)?;
        // In nnU-Net's layout the scores lie beside the predictions.
        let summary = if self.typed.output.is_some() { &job.output } else { &folder }.join("summary.json");
        // The references may hold more cases than this fold's.
        let result = evaluate::score(&references, &folder, ending, labels, true, &summary)?;
        scores::print(&result, None);
        if raw_gone {
            println!("scores in {}; no pictures: the raw images are not there", summary.display());
            return Ok(result.foreground_dice());
        }
        let pictures = job.output.join("overlays");
        std::fs::create_dir_all(&pictures).with_context(|| format!("creating {}", pictures.display()))?;
        for case in &files {
            self.draw(case, &folder, ending, labels, &pictures)?;
        }
        println!("pictures in {}, scores in {}", pictures.display(), summary.display());
        Ok(result.foreground_dice())
    }

    fn draw(
        &self,
        case: &CaseFiles,
        predictions: &Path,
        ending: &str,
        labels: &LabelManager,
        pictures: &Path,
    ) -> anyhow::Result<()> {
        let file = format!("{}{ending}", case.name);
        let first = case.images.first().context("a case without images")?;
        let image = io::read_image(first)?;
        let prediction = io::read_labels(&predictions.join(&file))?;
        let annotation = case.label.as_deref().map(io::read_labels).transpose()?;
        let reference = self.typed.reference.as_ref().map(|folder| io::read_labels(&folder.join(&file))).transpose()?;
        write_overlay(
            &pictures.join(format!("{}.png", case.name)),
            &Overlay {
                case: &case.name,
                image: image.data.view(),
                annotation: annotation.as_ref().map(|labels| labels.data.view()),
                prediction: prediction.data.view(),
                reference: reference.as_ref().map(|labels| labels.data.view()),
                ignore: labels.ignore_label(),
                labels: &legend(labels),
                spacing: image.geometry.spacing,
            },
        )?;
        Ok(())
    }
}

/// What the label values of a segmentation mean: for regions, the region that is decoded to the value.
pub fn legend(labels: &LabelManager) -> Vec<(i16, String)> {
    let names = labels.foreground_names();
    let values: Vec<i16> = match labels.regions_class_order() {
        Some(order) => order.to_vec(),
        None => labels.foreground().iter().flat_map(|group| group.members().to_vec()).collect(),
    };
    values.into_iter().zip(names.into_iter().map(String::from)).collect()
}
