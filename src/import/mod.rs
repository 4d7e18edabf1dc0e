//! Annotations as people make them, turned into a dataset with an ignore label: scribbles over an unlabelled value, files
//! of several annotators, one binary mask a class.
//!
//! What every value was turned into is counted for each case and kept in `import.json`; the rules are kept in
//! `dataset.json` under `annotation`. All files are read and judged before anything is written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ndarray::{Array3, Zip};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

mod masks;
mod segments;

pub use masks::Overlap;
pub use segments::Segments;

use crate::dataset::{CaseFiles, DatasetJson, LabelManager, cases_in};
use crate::error::{AnnotationError, DatasetError, Error, Result};
use crate::io::{self, Geometry};
use crate::preprocess::undeclared;
use crate::sparsify::output::NewDataset;
use crate::sparsify::report::{label_names, warnings};
use crate::sparsify::{Annotation, CaseReport, Transfer, with_ignore};

/// Where annotations are.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Annotations {
    /// Folders of label maps or of segmentations of 3D Slicer (`.seg.nrrd`) named as their cases, one folder for each annotator. Where annotators disagree the voxel is
    /// ignored; where only some labelled it, theirs counts.
    LabelMaps(Vec<PathBuf>),
    /// A folder with one folder for each case that holds one binary mask a class: `case/class.nii.gz`, or
    /// `case/segmentations/class.nii.gz` as TotalSegmentator writes them. What is not 0 belongs to the class.
    Masks {
        /// The folder.
        folder: PathBuf,
        /// What happens where masks overlap.
        overlap: Overlap,
        /// Whether voxels in no mask are ignored instead of being background.
        outside_ignored: bool,
        /// Whether a class without a mask file is taken to be absent from the case.
        missing_empty: bool,
    },
}

/// How to import.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    /// Where annotations are.
    pub annotations: Annotations,
    /// The value of voxels that nobody labelled.
    pub unlabelled: Option<i16>,
    /// Values that stand for another label: value and the label's name in `labels`.
    pub map: Vec<(i16, String)>,
    /// How the segments of 3D Slicer's segmentations become labels.
    pub segments: Segments,
    /// Take annotations voxel by voxel although their headers place them elsewhere than the images.
    pub by_index: bool,
    /// Give images bytes of their own instead of a second name.
    #[serde(skip)]
    pub copy_images: bool,
    /// Replace a dataset that was imported before.
    #[serde(skip)]
    pub overwrite: bool,
    /// Cases that are worked on at a time.
    #[serde(skip)]
    pub workers: usize,
}

/// What became of the voxels of a case.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Turned {
    /// Annotators who labelled the case, or masks.
    pub files: usize,
    /// Voxels that nobody labelled; they are ignored.
    pub unlabelled: u64,
    /// Voxels on which annotators disagree; they are ignored.
    pub disagreeing: u64,
    /// Voxels in masks or segments of more than one class.
    pub overlapping: u64,
    /// Voxels of segments that lie outside the image; they are left out.
    pub outside: u64,
    /// Voxels of each mapped value, over all files.
    pub mapped: BTreeMap<i16, u64>,
    /// The label that each segment was turned into, and its voxels, over all files.
    pub segments: BTreeMap<String, (String, u64)>,
    /// Mask files and segments of classes that `labels` does not declare; they were not used.
    pub unused: Vec<String>,
    /// Whether the headers place annotations elsewhere than the image.
    pub placed_by_index: bool,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of this program.
    pub voxgrad: &'static str,
    /// Where images and description come from.
    pub source: PathBuf,
    /// How it was asked for.
    pub settings: Settings,
    /// The ignore label.
    pub ignore: i16,
    /// How images came along.
    pub images: Transfer,
    /// From what nothing can be learned, and what was left out.
    pub warnings: Vec<String>,
    /// What became of the voxels of each case.
    pub turned: BTreeMap<String, Turned>,
    /// What is annotated, in the order of names. The voxels of a class are those that are annotated.
    pub cases: Vec<CaseReport>,
}

/// Makes a dataset of the images in `source` and annotations from elsewhere (or from its `labelsTr`). Images without
/// annotation are left out, and named in the warnings. `on_case` is called after each case, from several threads.
///
/// # Errors
/// [`Error::Several`] with all that is wrong with the files; [`FileError::OutputExists`](crate::error::FileError::OutputExists); those of reading a dataset and NIfTI
/// files. Nothing is left in `target` then.
pub fn import(source: &Path, target: &Path, settings: &Settings, on_case: impl Fn(&str) + Sync) -> Result<Report> {
    let json = DatasetJson::read(&source.join("dataset.json"))?;
    let labels = LabelManager::new(&json)?;
    let images = cases_in(&source.join("imagesTr"), None, &json)?;
    let ignore = labels.all_labels().last().copied().unwrap_or(0) + 1;
    let work =
        Work { json: &json, labels: &labels, ignore, settings, values: values(&json, &labels, settings, ignore)? };
    let found = work.find(&images)?;
    let (cases, left_out): (Vec<&CaseFiles>, Vec<&CaseFiles>) =
        images.iter().partition(|case| found.contains_key(&case.name));
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(settings.workers).build().map_err(|error| Error::Setting {
            setting: "workers",
            value: format!("{}: {error}", settings.workers),
            expected: "as many threads as the system gives",
        })?;

    // First all files are judged; a second reading is cheap beside half a dataset that has to be thrown away.
    let judged: Vec<Result<()>> =
        pool.install(|| cases.par_iter().map(|case| work.annotation(case, &found[&case.name]).map(drop)).collect());
    let failures: Vec<Error> = judged.into_iter().filter_map(Result::err).collect();
    Error::all(failures)?;
    let mut description = with_ignore(&json, ignore)?;
    description.insert("numTraining".into(), cases.len().into());
    description.insert("annotation".into(), work.rules());

    let new = NewDataset::begin(target, source, settings.overwrite)?;
    let made: Vec<Result<Made>> = pool.install(|| {
        let work_on = |case: &&CaseFiles| {
            let made = work.make(case, &found[&case.name], &new);
            on_case(&case.name);
            made
        };
        cases.par_iter().map(work_on).collect()
    });
    let mut report = Report {
        voxgrad: env!("CARGO_PKG_VERSION"),
        source: source.into(),
        settings: settings.clone(),
        ignore,
        images: new.take_the_rest(source, settings.copy_images)?,
        warnings: Vec::new(),
        turned: BTreeMap::new(),
        cases: Vec::with_capacity(cases.len()),
    };
    let mut failures = Vec::new();
    for result in made {
        match result {
            Ok(Made { case, turned, transfer }) => {
                report.images += transfer;
                report.turned.insert(case.case.clone(), turned);
                report.cases.push(case);
            }
            Err(failure) => failures.push(failure),
        }
    }
    Error::all(failures)?;
    report.warnings = warnings(&report.cases);
    for (segment, _) in &settings.segments.names {
        if !report.turned.values().any(|turned| turned.segments.contains_key(segment)) {
            report.warnings.push(format!("no segmentation has a segment {segment}"));
        }
    }
    if !left_out.is_empty() {
        let names: Vec<&str> = left_out.iter().map(|case| case.name.as_str()).collect();
        report.warnings.push(format!("images without annotation are left out: {}", names.join(", ")));
    }
    io::write_json(&new.path("dataset.json"), &description)?;
    io::write_json(&new.path("import.json"), &report)?;
    new.commit()?;
    Ok(report)
}

/// What each value in a file means: a label, or the ignore label.
fn values(json: &DatasetJson, labels: &LabelManager, settings: &Settings, ignore: i16) -> Result<BTreeMap<i16, i16>> {
    let mut values: BTreeMap<i16, i16> = labels.expected_labels().into_iter().map(|label| (label, label)).collect();
    let names = || json.labels.iter().map(|(name, _)| name.clone()).chain(["ignore".to_owned()]);
    let single = |name: &str| single_label(json, ignore, name);
    let mut failures = Vec::new();
    for (value, name) in &settings.map {
        let label = name.parse().ok().filter(|label| labels.all_labels().contains(label)).or_else(|| single(name));
        match label {
            Some(label) => drop(values.insert(*value, label)),
            None => failures.push(Error::Annotation(AnnotationError::NameUnknown {
                what: "label of one value",
                name: name.clone(),
                available: names().collect(),
            })),
        }
    }
    for (_, name) in settings.segments.names.iter().filter(|(_, name)| single(name).is_none()) {
        let (name, available) = (name.clone(), names().collect());
        failures.push(AnnotationError::NameUnknown { what: "label of one value", name, available }.into());
    }
    if let Some(unlabelled) = settings.unlabelled {
        if settings.map.iter().any(|(value, _)| *value == unlabelled) {
            failures.push(Error::Setting {
                setting: "unlabelled",
                value: unlabelled.to_string(),
                expected: "the value is mapped to a label too; it can mean one thing only",
            });
        }
        values.insert(unlabelled, ignore);
    }
    Error::all(failures)?;
    Ok(values)
}

/// The label of one value that has this name.
fn single_label(json: &DatasetJson, ignore: i16, name: &str) -> Option<i16> {
    match name {
        "ignore" => Some(ignore),
        _ => json.labels.iter().find(|(known, _)| known == name).and_then(|(_, entry)| match entry {
            crate::dataset::json::LabelEntry::Label(label) => i16::try_from(*label).ok(),
            crate::dataset::json::LabelEntry::Region(_) => None,
        }),
    }
}

struct Work<'a> {
    json: &'a DatasetJson,
    labels: &'a LabelManager,
    ignore: i16,
    settings: &'a Settings,
    values: BTreeMap<i16, i16>,
}

/// A written case.
struct Made {
    case: CaseReport,
    turned: Turned,
    transfer: Transfer,
}

impl Work<'_> {
    /// The annotation files or folders of each case.
    fn find(&self, images: &[CaseFiles]) -> Result<BTreeMap<String, Vec<PathBuf>>> {
        let known: BTreeSet<&str> = images.iter().map(|case| case.name.as_str()).collect();
        let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        let (mut strangers, mut twice) = (Vec::new(), Vec::new());
        let folders = match &self.settings.annotations {
            Annotations::LabelMaps(folders) => folders.clone(),
            Annotations::Masks { folder, .. } => vec![folder.clone()],
        };
        let masks = matches!(self.settings.annotations, Annotations::Masks { .. });
        for folder in &folders {
            for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
                let path = entry.map_err(Error::io(folder, "list"))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let stem = name.strip_suffix(&self.json.file_ending).or_else(|| name.strip_suffix(segments::ENDING));
                let case = match (masks, stem) {
                    (true, _) if path.is_dir() => name,
                    (false, Some(case)) if path.is_file() => case.to_owned(),
                    _ => continue,
                };
                if found.get(&case).is_some_and(|files| files.iter().any(|file| file.parent() == path.parent())) {
                    twice.push(Error::Annotation(AnnotationError::AnnotatedTwice { case, folder: folder.clone() }));
                    continue;
                }
                match known.contains(case.as_str()) {
                    true => found.entry(case).or_default().push(path),
                    false => strangers.push(case),
                }
            }
        }
        strangers.sort();
        let failures: Vec<Error> = strangers
            .into_iter()
            .map(|name| {
                Error::Annotation(AnnotationError::NameUnknown {
                    what: "image for the annotated case",
                    name,
                    available: known.iter().map(|&name| name.into()).collect(),
                })
            })
            .collect();
        Error::all(failures.into_iter().chain(twice).collect())?;
        if found.is_empty() {
            let path = folders.first().cloned().unwrap_or_default();
            return Err(Error::Annotation(AnnotationError::NothingToImport {
                path,
                ending: self.json.file_ending.clone(),
            }));
        }
        Ok(found)
    }

    /// Reads what was annotated in a case; the image tells where the grid lies.
    fn annotation(&self, case: &CaseFiles, files: &[PathBuf]) -> Result<(Array3<i16>, Geometry, Turned)> {
        let image = case.images.first().ok_or(Error::Dataset(DatasetError::NoCases))?;
        let image = io::read_image(image)?;
        let shape: [usize; 3] = image.data.dim().into();
        let mut turned = Turned::default();
        let grid = Grid { case: &case.name, shape, geometry: &image.geometry, by_index: self.settings.by_index };
        let labels = match &self.settings.annotations {
            Annotations::LabelMaps(_) => self.merged(&grid, files, &mut turned)?,
            Annotations::Masks { overlap, outside_ignored, missing_empty, .. } => {
                let outside = if *outside_ignored { self.ignore } else { 0 };
                masks::paint(self, &grid, &files[0], *overlap, outside, *missing_empty, &mut turned)?
            }
        };
        Ok((labels, image.geometry, turned))
    }

    /// The label maps of all annotators as one.
    fn merged(&self, grid: &Grid, files: &[PathBuf], turned: &mut Turned) -> Result<Array3<i16>> {
        let ignore = self.ignore;
        let mut merged = Array3::from_elem(grid.shape, ignore);
        let mut disputed = Array3::from_elem(grid.shape, false);
        let mut failures = Vec::new();
        for path in files {
            let map = match path.to_string_lossy().ends_with(segments::ENDING) {
                true => segments::read(self, grid, path, turned),
                false => grid.read(path, turned).and_then(|map| self.translate(grid, path, map, turned)),
            };
            let map = match map {
                Ok(map) => map,
                Err(failure) => {
                    failures.push(failure);
                    continue;
                }
            };
            turned.files += 1;
            Zip::from(&mut merged).and(&mut disputed).and(&map).for_each(|merged, disputed, &label| {
                if label == ignore {
                    return;
                }
                *disputed |= *merged != ignore && *merged != label;
                *merged = label;
            });
        }
        Error::all(failures)?;
        turned.unused.sort();
        turned.unused.dedup();
        turned.unlabelled = merged.iter().filter(|&&label| label == ignore).count() as u64;
        Zip::from(&mut merged).and(&disputed).for_each(|label, &disputed| {
            if disputed {
                *label = ignore;
                turned.disagreeing += 1;
            }
        });
        Ok(merged)
    }

    /// Values of a file as labels.
    fn translate(&self, grid: &Grid, path: &Path, mut map: Array3<i16>, turned: &mut Turned) -> Result<Array3<i16>> {
        let mapped: BTreeSet<i16> = self.settings.map.iter().map(|(value, _)| *value).collect();
        let unknown = map.indexed_iter().find(|(_, value)| !self.values.contains_key(value));
        if let Some(((z, y, x), &value)) = unknown {
            let (case, path) = (grid.case.into(), path.into());
            let expected: Vec<i16> = self.values.keys().copied().collect();
            let found = undeclared(map.view(), &expected);
            return Err(Error::Dataset(DatasetError::UnexpectedLabel {
                case,
                path,
                value,
                voxel: [z, y, x],
                expected: expected.into(),
                found: found.into(),
            }));
        }
        let mut counts: BTreeMap<i16, u64> = BTreeMap::new();
        for voxel in &mut map {
            let value = *voxel;
            if let Some(&label) = self.values.get(&value) {
                *voxel = label;
            }
            if mapped.contains(&value) {
                *counts.entry(value).or_default() += 1;
            }
        }
        counts.into_iter().for_each(|(value, count)| *turned.mapped.entry(value).or_default() += count);
        Ok(map)
    }

    fn make(&self, case: &CaseFiles, files: &[PathBuf], new: &NewDataset) -> Result<Made> {
        let (labels, geometry, turned) = self.annotation(case, files)?;
        let annotation = Annotation::whole(labels, self.ignore);
        let names = label_names(self.labels);
        let report = CaseReport::new(&case.name, "import", annotation.labels.view(), &annotation, &names);
        let ending = &self.json.file_ending;
        let path = new.path(&format!("labelsTr/{}{ending}", case.name));
        // The grid is the image's, the type one of label maps.
        match self.ignore < 255 {
            true => io::write_labels(&path, annotation.labels.mapv(|label| label as u8).view(), &geometry)?,
            false => io::write_labels(&path, annotation.labels.mapv(|label| label as u16).view(), &geometry)?,
        }
        let transfer = new.take_images(case, ending, self.settings.copy_images)?;
        Ok(Made { case: report, turned, transfer })
    }

    /// The rules in words, for the dataset's description.
    fn rules(&self) -> Value {
        let settings = self.settings;
        let mut rules: Vec<String> =
            settings.unlabelled.iter().map(|value| format!("value {value} is unlabelled: ignored")).collect();
        rules.extend(settings.map.iter().map(|(value, name)| format!("value {value} is {name}")));
        let named = settings.segments.names.iter();
        rules.extend(named.map(|(segment, label)| format!("segment {segment} is {label}")));
        match &settings.annotations {
            Annotations::LabelMaps(folders) if folders.len() > 1 => rules.push(format!(
                "{} annotators: a voxel has the label of those who labelled it, and is ignored where they disagree",
                folders.len()
            )),
            Annotations::LabelMaps(_) => {}
            Annotations::Masks { overlap, outside_ignored, missing_empty, .. } => {
                rules.push(format!("one mask a class; {}", overlap.rule()));
                rules.push(format!("outside all masks: {}", if *outside_ignored { "ignored" } else { "background" }));
                if *missing_empty {
                    rules.push("a class without a mask file is absent from the case".into());
                }
            }
        }
        if settings.by_index {
            rules.push("annotations were laid on the images voxel by voxel, whatever their headers say".into());
        }
        json!({"imported_by": format!("voxgrad {}", env!("CARGO_PKG_VERSION")), "rules": rules})
    }
}

/// The grid of a case's image.
struct Grid<'a> {
    case: &'a str,
    shape: [usize; 3],
    geometry: &'a Geometry,
    by_index: bool,
}

impl Grid<'_> {
    /// Reads a label map that lies on this grid.
    fn read(&self, path: &Path, turned: &mut Turned) -> Result<Array3<i16>> {
        let map = io::read_labels(path)?;
        let found: [usize; 3] = map.data.dim().into();
        if found != self.shape {
            let (case, path, expected) = (self.case.into(), path.into(), self.shape);
            return Err(Error::Dataset(DatasetError::LabelShape { case, path, found, expected }));
        }
        if !map.geometry.same_placement(self.geometry, self.shape) {
            if !self.by_index {
                return Err(Error::Annotation(AnnotationError::LabelPlacement {
                    case: self.case.into(),
                    path: path.into(),
                }));
            }
            turned.placed_by_index = true;
        }
        Ok(map.data)
    }
}
