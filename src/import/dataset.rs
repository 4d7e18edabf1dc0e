//! A dataset of images and annotations from elsewhere. All files are read and judged before anything is written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ndarray::{Array3, Zip};
use rayon::prelude::*;
use serde::Serialize;

use super::grid::{ImageGrid, Turned};
use super::masks;
use super::rules::{Annotations, Rules, Settings};
use super::segments;
use crate::dataset::{CaseFiles, DatasetJson, LabelManager, cases_in};
use crate::error::{AnnotationError, DatasetError, Error, FileError, Result};
use crate::io::{self, Geometry};
use crate::preprocess::undeclared;
use crate::sparsify::output::{NewDataset, with_ignore};
use crate::sparsify::report::{label_names, warnings};
use crate::sparsify::{CaseReport, Drawn, Transfer};

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
    let work = Rules::new(&json, &labels, settings, ignore)?;
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
    description.insert("annotation".into(), work.in_words());

    let new = NewDataset::begin(target, source, "import.json", settings.overwrite)?;
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
        report.warnings.extend(without(&new.path("splits_final.json"), &names)?);
    }
    io::write_json(&new.path("dataset.json"), &description)?;
    io::write_json(&new.path("import.json"), &report)?;
    new.commit()?;
    Ok(report)
}

/// Takes cases out of copied splits, and says so. Splits with a side that has none then are left out.
fn without(path: &Path, left_out: &[&str]) -> Result<Option<String>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(path).map_err(Error::io(path, "read"))?;
    let parsed = serde_json::from_slice::<Vec<BTreeMap<String, Vec<String>>>>(&text);
    let mut splits = parsed.map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
    let before = splits.clone();
    for side in splits.iter_mut().flat_map(BTreeMap::values_mut) {
        side.retain(|case| !left_out.contains(&case.as_str()));
    }
    if splits == before {
        return Ok(None);
    }
    if splits.iter().flat_map(BTreeMap::values).any(Vec::is_empty) {
        std::fs::remove_file(path).map_err(Error::io(path, "remove"))?;
        return Ok(Some("splits_final.json is left out: without these images a fold has no cases".into()));
    }
    io::write_json(path, &splits)?;
    Ok(Some("they are taken out of splits_final.json too".into()))
}

/// A written case.
struct Made {
    case: CaseReport,
    turned: Turned,
    transfer: Transfer,
}

impl Rules<'_> {
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
        let grid = ImageGrid { case: &case.name, shape, geometry: &image.geometry, by_index: self.settings.by_index };
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
    fn merged(&self, grid: &ImageGrid, files: &[PathBuf], turned: &mut Turned) -> Result<Array3<i16>> {
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
    fn translate(
        &self,
        grid: &ImageGrid,
        path: &Path,
        mut map: Array3<i16>,
        turned: &mut Turned,
    ) -> Result<Array3<i16>> {
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
        let annotation = Drawn::whole(labels, self.ignore);
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
}
