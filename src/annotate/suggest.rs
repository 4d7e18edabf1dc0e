//! Where annotating helps most: the slices or blocks that an ensemble is least sure of, spread over cases and places.

use std::fmt::Write;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ndarray::{Array3, ArrayView3, Zip, s};
use serde::Serialize;

use super::complete::read_annotation;
use super::{
    Assessment, Candidate, Ensemble, Event, Folds, Lookers, Unit, candidates, check_same_dataset, lookers, spread,
};
use crate::dataset::splits::Split;
use crate::dataset::{CaseFiles, Dataset};
use crate::error::{AnnotationError, DatasetError, Error, FileError, Result};
use crate::io::{self, Geometry};
use crate::preprocess::CaseHeaders;

/// Everything that is ever written into a folder of suggestions; what else lies there is somebody's work.
const OWN: [&str; 7] = ["suggestions.csv", "cases.csv", MARK, "masks", "uncertainty", "segmentations", "previews"];
/// What shows that this program made a folder.
const MARK: &str = "suggestions.json";

/// What makes a voxel uncertain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Entropy of the mean probabilities, in nats.
    Entropy,
    /// Disagreement of folds, mirrored copies and windows, in nats.
    Disagreement,
    /// One less the margin.
    Margin,
}

impl Measure {
    /// The uncertainty of each voxel.
    pub fn of(self, assessment: &Assessment) -> Array3<f32> {
        match self {
            Measure::Entropy => assessment.entropy.clone(),
            Measure::Disagreement => assessment.disagreement.clone(),
            Measure::Margin => assessment.margin.mapv(|margin| 1.0 - margin),
        }
    }
}

/// What to suggest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SuggestionSettings {
    /// Slices or blocks.
    pub unit: Unit,
    /// By what they are ranked.
    pub measure: Measure,
    /// How many are suggested.
    pub count: usize,
    /// With fewer voxels between them, two of one case are neighbours: one of them comes after everything else.
    pub spacing: usize,
    /// How much a case gives way to others for every suggestion that it has: scores are divided by (1 + suggestions) to this
    /// power; 0 ranks by score alone.
    pub diversity: f64,
    /// Which folds look at a case.
    pub folds: Folds,
    /// Replace suggestions that this program made before.
    #[serde(skip)]
    pub overwrite: bool,
}

/// A slice or block to annotate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Suggestion {
    /// From 1.
    pub rank: usize,
    /// Case identifier.
    pub case: String,
    /// Where it is, and how uncertain.
    pub place: Candidate,
    /// From 1; a later one has a neighbour in an earlier one.
    pub round: usize,
}

/// A case as a whole.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseUncertainty {
    /// Case identifier.
    pub case: String,
    /// The folds that looked at it; none if everything is annotated.
    pub folds: Vec<String>,
    /// Whether none of them trained on it.
    pub held_out: bool,
    /// Voxels.
    pub voxels: u64,
    /// Those without annotation.
    pub open: u64,
    /// Mean uncertainty of all voxels, annotated ones counting as 0: what cases are ranked by.
    pub score: f64,
    /// Mean entropy of the voxels without annotation.
    pub entropy: f64,
    /// Their mean disagreement.
    pub disagreement: f64,
    /// Their mean margin.
    pub margin: f64,
}

/// What is suggested.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Suggestions {
    /// Version of this program.
    pub voxgrad: &'static str,
    /// The dataset.
    pub source: PathBuf,
    /// The checkpoints.
    pub model: Vec<PathBuf>,
    /// What was asked for.
    pub settings: SuggestionSettings,
    /// What looks odd.
    pub warnings: Vec<String>,
    /// Cases, the most uncertain first.
    pub cases: Vec<CaseUncertainty>,
    /// Slices or blocks, the first to annotate first.
    pub suggestions: Vec<Suggestion>,
}

/// Ranks what is not annotated in the `cases` of a dataset (those without a label file are not annotated at all), and
/// writes into the folder `target`: `suggestions.csv`, `cases.csv`, `suggestions.json`; for every case the uncertainty of
/// its voxels (`uncertainty/CASE`, annotated ones too) and the labels predicted (`segmentations/CASE`); and for every case
/// with suggestions `masks/CASE`, the rank of a suggestion in the voxels that it asks to annotate. `None`, and nothing in
/// `target`, if `observe` breaks off.
///
/// # Errors
/// [`AnnotationError::NothingToSuggest`], [`AnnotationError::OtherDataset`], [`AnnotationError::NotHeldOut`],
/// [`FileError::OutputExists`], [`Error::Setting`], all that is wrong with label files; those of
/// [`Ensemble::assess_files`].
pub fn suggest(
    dataset: &Dataset,
    target: &Path,
    ensemble: &Ensemble,
    splits: Option<&[Split]>,
    settings: &SuggestionSettings,
    mut observe: impl FnMut(Event) -> ControlFlow<()>,
) -> Result<Option<Suggestions>> {
    check_same_dataset(&ensemble.model.model, &dataset.json, &dataset.labels)?;
    check_settings(settings)?;
    let mut failures = Vec::new();
    let mut open = Vec::new();
    for case in &dataset.cases {
        match annotated(case, dataset) {
            Ok((annotated, _)) if annotated.iter().any(|&annotated| !annotated) => open.push(case),
            Ok(_) => {}
            Err(failure) => failures.push(failure),
        }
    }
    Error::all(failures)?;
    if open.is_empty() {
        let path = dataset.json.path.clone();
        return Err(Error::Annotation(AnnotationError::NothingToSuggest { path }));
    }
    let names: Vec<String> = open.iter().map(|case| case.name.clone()).collect();
    let looking = lookers(ensemble.model, splits, &names, settings.folds)?;
    let parent = check_target(target, settings.overwrite)?;
    io::in_scratch(&parent, |scratch| {
        let place = scratch.join("suggestions");
        fs::create_dir(&place).map_err(Error::io(&place, "create"))?;
        let work = Work { dataset, place: &place, ensemble, settings };
        let Some(made) = work.run(&open, &looking, &mut observe)? else { return Ok(None) };
        put(&place, target, &scratch.join("replaced"))?;
        Ok(Some(made))
    })
}

fn check_settings(settings: &SuggestionSettings) -> Result<()> {
    let mut faults = Vec::new();
    let mut demand = |fine: bool, setting: &'static str, value: String, expected: &'static str| {
        if !fine {
            faults.push(Error::Setting { setting, value, expected });
        }
    };
    // Ranks are voxels of 16 bits.
    let count = (1..=usize::from(u16::MAX)).contains(&settings.count);
    demand(count, "count", settings.count.to_string(), "expected 1 to 65535 suggestions");
    let diversity = settings.diversity.is_finite() && settings.diversity >= 0.0;
    demand(diversity, "diversity", settings.diversity.to_string(), "expected a power of 0 or more");
    match settings.unit {
        Unit::Slices { axis } => demand(axis < 3, "axis", axis.to_string(), "expected 0, 1 or 2 for z, y or x"),
        Unit::Blocks { size } => {
            demand(!size.contains(&0), "block", format!("{size:?}"), "a block needs voxels along every axis");
        }
    }
    Error::all(faults)
}

/// Whether suggestions may be written to a folder; the folder above it, which is made if it is not there.
fn check_target(target: &Path, overwrite: bool) -> Result<PathBuf> {
    let refused = |problem: String| Error::File(FileError::OutputExists { path: target.into(), problem });
    if target.file_name().is_none() {
        return Err(refused("it has no name; name a new folder".into()));
    }
    if target.symlink_metadata().is_ok() {
        let mut names = Vec::new();
        for entry in fs::read_dir(target).map_err(Error::io(target, "list"))? {
            names.push(entry.map_err(Error::io(target, "list"))?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let strangers: Vec<&String> = names.iter().filter(|name| !OWN.contains(&name.as_str())).collect();
        if !names.is_empty() && !overwrite {
            return Err(refused("it exists; name another folder, or ask for it to be replaced".into()));
        }
        if !strangers.is_empty() {
            return Err(refused(format!("it also holds {strangers:?}, which would be lost; move them away first")));
        }
        if !names.is_empty() && !names.iter().any(|name| name == MARK) {
            return Err(refused("it is nothing that this command made; delete it yourself if it may go".into()));
        }
    }
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).map_err(Error::io(&parent, "create"))?;
    Ok(parent)
}

/// Moves a finished folder to its place, and what is there to where it is removed.
fn put(place: &Path, target: &Path, replaced: &Path) -> Result<()> {
    let there = target.exists();
    if there {
        fs::rename(target, replaced).map_err(Error::io(target, "replace"))?;
    }
    fs::rename(place, target).map_err(|error| {
        if there {
            // Best effort: the error that matters is the first one.
            let _ = fs::rename(replaced, target);
        }
        Error::io(target, "write")(error)
    })
}

/// Which voxels of a case are annotated, on which grid.
fn annotated(case: &CaseFiles, dataset: &Dataset) -> Result<(Array3<bool>, Geometry)> {
    if case.label.is_some() {
        let map = read_annotation(case, &dataset.labels)?;
        let ignore = dataset.labels.ignore_label();
        return Ok((map.data.mapv(|label| Some(label) != ignore), map.geometry));
    }
    let headers = CaseHeaders::read(case);
    Error::all(headers.failures)?;
    let (geometry, shape) = headers.grid.ok_or(Error::Dataset(DatasetError::NoCases))?;
    Ok((Array3::from_elem(shape, false), geometry))
}

struct Work<'a> {
    dataset: &'a Dataset,
    /// Where files are written for now.
    place: &'a Path,
    ensemble: &'a Ensemble<'a>,
    settings: &'a SuggestionSettings,
}

impl Work<'_> {
    fn run(
        &self,
        open: &[&CaseFiles],
        looking: &[Lookers],
        observe: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Option<Suggestions>> {
        for folder in ["masks", "uncertainty", "segmentations"] {
            let folder = self.place.join(folder);
            fs::create_dir(&folder).map_err(Error::io(folder, "create"))?;
        }
        let model = self.ensemble.model;
        let mut made = Suggestions {
            voxgrad: env!("CARGO_PKG_VERSION"),
            source: self.dataset.folder.clone(),
            model: model.folds.iter().map(|fold| fold.path.clone()).collect(),
            settings: self.settings.clone(),
            warnings: Vec::new(),
            cases: Vec::with_capacity(open.len()),
            suggestions: Vec::new(),
        };
        let mut places = Vec::with_capacity(open.len());
        for (case, lookers) in open.iter().zip(looking) {
            let (annotated, geometry) = annotated(case, self.dataset)?;
            let Some((assessment, warnings)) = self.ensemble.assess_files(case, &lookers.folds, observe)? else {
                return Ok(None);
            };
            made.warnings.extend(warnings);
            let uncertainty = self.settings.measure.of(&assessment);
            if annotated.dim() != uncertainty.dim() {
                let path = case.label.clone().unwrap_or_default();
                let (found, expected) = (annotated.dim().into(), uncertainty.dim().into());
                return Err(
                    crate::error::DatasetError::LabelShape { case: case.name.clone(), path, found, expected }.into()
                );
            }
            io::write_image(&self.file("uncertainty", &case.name), uncertainty.view(), &geometry)?;
            io::write_segmentation(&self.file("segmentations", &case.name), assessment.labels.view(), &geometry)?;
            let all = candidates(self.settings.unit, uncertainty.view(), annotated.view());
            places.push((case.name.clone(), spread(all, self.settings.count, self.settings.spacing)));
            let folds = lookers.folds.iter().map(|&fold| model.folds[fold].fold.to_string()).collect();
            let means = Means::of(&assessment, uncertainty.view(), annotated.view());
            made.cases.push(means.report(&case.name, folds, lookers.held_out));
            if observe(Event::Case(&case.name)).is_break() {
                return Ok(None);
            }
        }
        made.cases.sort_by(|a, b| b.score.total_cmp(&a.score));
        made.suggestions = rank(places, self.settings.count, self.settings.diversity);
        self.write_masks(open, &made.suggestions)?;
        io::write_atomically(&self.place.join("suggestions.csv"), suggestions_csv(&made.suggestions).as_bytes())?;
        io::write_atomically(&self.place.join("cases.csv"), cases_csv(&made.cases).as_bytes())?;
        io::write_json(&self.place.join(MARK), &made)?;
        Ok(Some(made))
    }

    fn file(&self, folder: &str, case: &str) -> PathBuf {
        self.place.join(folder).join(format!("{case}{}", self.dataset.json.file_ending))
    }

    /// Writes the rank of every suggestion into the voxels of it that are not annotated, the earliest where they overlap.
    fn write_masks(&self, open: &[&CaseFiles], suggestions: &[Suggestion]) -> Result<()> {
        for case in open {
            let mine: Vec<&Suggestion> = suggestions.iter().filter(|suggestion| suggestion.case == case.name).collect();
            if mine.is_empty() {
                continue;
            }
            let (annotated, geometry) = annotated(case, self.dataset)?;
            let mut mask: Array3<u16> = Array3::zeros(annotated.dim());
            for suggestion in mine.iter().rev() {
                let Candidate { start: [z, y, x], extent: [depth, height, width], .. } = suggestion.place;
                let part = s![z..z + depth, y..y + height, x..x + width];
                Zip::from(mask.slice_mut(part)).and(annotated.slice(part)).for_each(|mask, &annotated| {
                    if !annotated {
                        *mask = suggestion.rank as u16;
                    }
                });
            }
            io::write_segmentation(&self.file("masks", &case.name), mask.view(), &geometry)?;
        }
        Ok(())
    }
}

/// Sums over a case.
struct Means {
    voxels: u64,
    open: u64,
    score: f64,
    entropy: f64,
    disagreement: f64,
    margin: f64,
}

impl Means {
    fn of(assessment: &Assessment, uncertainty: ArrayView3<f32>, annotated: ArrayView3<bool>) -> Self {
        let mut sums =
            Means { voxels: annotated.len() as u64, open: 0, score: 0.0, entropy: 0.0, disagreement: 0.0, margin: 0.0 };
        let Assessment { entropy, disagreement, margin, .. } = assessment;
        Zip::from(annotated).and(uncertainty).and(entropy).and(disagreement).and(margin).for_each(
            |&annotated, &uncertainty, &entropy, &disagreement, &margin| {
                if !annotated {
                    sums.open += 1;
                    sums.score += f64::from(uncertainty);
                    sums.entropy += f64::from(entropy);
                    sums.disagreement += f64::from(disagreement);
                    sums.margin += f64::from(margin);
                }
            },
        );
        sums
    }

    fn report(self, case: &str, folds: Vec<String>, held_out: bool) -> CaseUncertainty {
        let mean = |sum: f64| sum / self.open.max(1) as f64;
        CaseUncertainty {
            case: case.into(),
            folds,
            held_out,
            voxels: self.voxels,
            open: self.open,
            score: self.score / self.voxels.max(1) as f64,
            entropy: mean(self.entropy),
            disagreement: mean(self.disagreement),
            margin: mean(self.margin),
        }
    }
}

/// The places of all cases, each list as [`spread`] orders it, in one order: earlier rounds first, and among those of one
/// round the highest score, divided by (1 + suggestions of its case so far) to the power of `diversity`; among equal ones
/// the first case.
pub fn rank(cases: Vec<(String, Vec<(Candidate, usize)>)>, count: usize, diversity: f64) -> Vec<Suggestion> {
    let mut taken = vec![0; cases.len()];
    let mut ranked: Vec<Suggestion> = Vec::new();
    while ranked.len() < count {
        let mut best: Option<(usize, f64, usize)> = None;
        for (case, ((_, places), &taken)) in cases.iter().zip(&taken).enumerate() {
            let Some((place, round)) = places.get(taken) else { continue };
            let score = place.score / ((1 + taken) as f64).powf(diversity);
            if best.is_none_or(|(first, highest, _)| *round < first || *round == first && score > highest) {
                best = Some((*round, score, case));
            }
        }
        let Some((round, _, case)) = best else { break };
        let (name, places) = &cases[case];
        let place = places[taken[case]].0;
        taken[case] += 1;
        ranked.push(Suggestion { rank: ranked.len() + 1, case: name.clone(), place, round });
    }
    ranked
}

fn suggestions_csv(suggestions: &[Suggestion]) -> String {
    let mut text = String::from("rank,case,z,y,x,depth,height,width,score,open_voxels,voxels,round\n");
    for Suggestion { rank, case, place, round } in suggestions {
        let ([z, y, x], [depth, height, width]) = (place.start, place.extent);
        let (case, score, open, voxels) = (quoted(case), place.score, place.open, place.voxels());
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{rank},{case},{z},{y},{x},{depth},{height},{width},{score:.6},{open},{voxels},{round}");
    }
    text
}

fn cases_csv(cases: &[CaseUncertainty]) -> String {
    let mut text =
        String::from("rank,case,score,mean_entropy,mean_disagreement,mean_margin,open_voxels,voxels,folds,held_out\n");
    for (index, case) in cases.iter().enumerate() {
        let _ = writeln!(
            text,
            "{},{},{:.6},{:.6},{:.6},{:.6},{},{},{},{}",
            index + 1,
            quoted(&case.case),
            case.score,
            case.entropy,
            case.disagreement,
            case.margin,
            case.open,
            case.voxels,
            case.folds.join(" "),
            case.held_out
        );
    }
    text
}

/// A field of a CSV file.
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.into(),
    }
}
