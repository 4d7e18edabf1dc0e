//! What is in a dataset and how much of it is annotated, measured for a page.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::{ArrayView3, Axis};

use super::montage;
use crate::dataset::{CaseFiles, Dataset};
use crate::error::{DatasetError, Error, Result};
use crate::preprocess::{RawCase, in_parallel};

/// What to show, and how to work.
#[derive(Debug, Clone, PartialEq)]
pub struct InspectSettings {
    /// Cases of which pictures are drawn: spread evenly over the cases by name.
    pub pictures: usize,
    /// Cases that are in memory at a time.
    pub workers: usize,
}

/// A dataset, measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// Name of its folder.
    pub name: String,
    /// Names of its channels.
    pub channels: Vec<String>,
    /// Label values and their names, background first; the ignore label is not among them.
    pub labels: Vec<(i16, String)>,
    /// The ignore label.
    pub ignore: Option<i16>,
    /// Its cases by name.
    pub cases: Vec<Inspected>,
    /// What looks odd.
    pub warnings: Vec<String>,
}

/// A case, measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspected {
    /// Case identifier.
    pub name: String,
    /// Extent (z, y, x).
    pub shape: [usize; 3],
    /// Millimetres between voxels (z, y, x).
    pub spacing: [f64; 3],
    /// Of every channel.
    pub intensities: Vec<Intensities>,
    /// Annotated voxels of each label, in the order of [`Inspection::labels`].
    pub voxels: Vec<u64>,
    /// Slices across z with annotated voxels of each label.
    pub slices: Vec<u64>,
    /// The picture of its annotation, as PNG, if one was asked for.
    pub picture: Option<Vec<u8>>,
}

impl Inspected {
    /// All voxels.
    pub fn all(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }

    /// Share of the voxels that are annotated.
    pub fn share(&self) -> f64 {
        self.voxels.iter().sum::<u64>() as f64 / self.all().max(1) as f64
    }
}

/// Finite intensities of a channel of a case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Intensities {
    /// Smallest, 0.5th percentile, median, 99.5th percentile, largest.
    pub quantiles: [f64; 5],
    /// Mean.
    pub mean: f64,
    /// Population standard deviation.
    pub deviation: f64,
}

impl Intensities {
    /// Of an image; NaN throughout if no value is finite.
    pub fn of(image: ArrayView3<f32>) -> Self {
        let mut values: Vec<f32> = image.iter().copied().filter(|value| value.is_finite()).collect();
        values.sort_unstable_by(f32::total_cmp);
        let at = |share: f64| {
            let index = (share * values.len().saturating_sub(1) as f64).round() as usize;
            values.get(index).map_or(f64::NAN, |&value| f64::from(value))
        };
        let count = values.len() as f64;
        let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
        let squares: f64 = values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum();
        Intensities { quantiles: [0.0, 0.005, 0.5, 0.995, 1.0].map(at), mean, deviation: (squares / count).sqrt() }
    }
}

/// Reads every case of a dataset. `on_case` is called after each, from several threads.
///
/// # Errors
/// Those of opening the dataset and of reading its files, all of them; [`FileError::Figure`](crate::error::FileError::Figure).
pub fn inspect(folder: &Path, settings: &InspectSettings, on_case: impl Fn(&str) + Sync) -> Result<Inspection> {
    let (dataset, mut failures) = Dataset::inspect(folder)?;
    let labels = crate::sparsify::report::label_names(&dataset.labels);
    let (count, wanted) = (dataset.cases.len(), settings.pictures);
    let drawn =
        |index: usize| (index + 1) * wanted.min(count) / count.max(1) > index * wanted.min(count) / count.max(1);
    let numbered: Vec<(usize, &CaseFiles)> = dataset.cases.iter().enumerate().collect();
    let measured = in_parallel(&numbered, settings.workers, |(index, files)| {
        let case = measure(&dataset, files, &labels, drawn(*index));
        on_case(&files.name);
        case
    });
    let (mut cases, mut warnings) = (Vec::with_capacity(measured.len()), dataset.notes.clone());
    for case in measured {
        match case {
            Ok((case, odd)) => {
                cases.push(case);
                warnings.extend(odd);
            }
            Err(failure) => failures.push(failure),
        }
    }
    Error::all(failures)?;
    warnings.extend(unannotated(&cases, &labels));
    Ok(Inspection {
        name: folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned(),
        channels: dataset.json.channel_names.clone(),
        labels,
        ignore: dataset.labels.ignore_label(),
        cases,
        warnings,
    })
}

fn measure(
    dataset: &Dataset,
    files: &CaseFiles,
    labels: &[(i16, String)],
    drawn: bool,
) -> Result<(Inspected, Vec<String>)> {
    // Read as for training: labels that nobody declared and contradicting headers are errors there too.
    let raw = RawCase::read(files, &dataset.labels)?;
    let path = files.label.clone().unwrap_or_else(|| dataset.folder.join("labelsTr"));
    let Some(map) = &raw.labels else {
        return Err(DatasetError::LabelMissing { case: files.name.clone(), path }.into());
    };
    let mut voxels: BTreeMap<i16, u64> = BTreeMap::new();
    let mut slices: BTreeMap<i16, u64> = BTreeMap::new();
    for slice in map.outer_iter() {
        let mut here: BTreeMap<i16, u64> = BTreeMap::new();
        slice.iter().for_each(|&label| *here.entry(label).or_default() += 1);
        for (label, count) in here {
            *voxels.entry(label).or_default() += count;
            *slices.entry(label).or_default() += 1;
        }
    }
    let of = |counts: &BTreeMap<i16, u64>| -> Vec<u64> {
        labels.iter().map(|(label, _)| counts.get(label).copied().unwrap_or(0)).collect()
    };
    let channel = |index: usize| raw.data.index_axis(Axis(0), index);
    let picture = match drawn {
        true => {
            let shown = montage::Shown { image: channel(0), labels: map.view(), spacing: raw.geometry.spacing };
            Some(montage::draw(&path, &shown, dataset.labels.ignore_label())?)
        }
        false => None,
    };
    let case = Inspected {
        name: files.name.clone(),
        shape: map.dim().into(),
        spacing: raw.geometry.spacing,
        intensities: (0..raw.data.len_of(Axis(0))).map(|index| Intensities::of(channel(index))).collect(),
        voxels: of(&voxels),
        slices: of(&slices),
        picture,
    };
    Ok((case, raw.warnings))
}

/// Cases and labels from which nothing can be learned.
fn unannotated(cases: &[Inspected], labels: &[(i16, String)]) -> Vec<String> {
    let bare: Vec<&str> = cases
        .iter()
        .filter(|case| case.voxels.iter().all(|&voxels| voxels == 0))
        .map(|case| case.name.as_str())
        .collect();
    let mut found = Vec::new();
    if !bare.is_empty() {
        found.push(format!("nothing is annotated in {}: {}", plural(bare.len()), bare.join(", ")));
    }
    for (index, (_, name)) in labels.iter().enumerate() {
        let annotated = cases.iter().filter(|case| case.voxels[index] > 0).count();
        if annotated == 0 {
            found.push(format!("{name} is annotated nowhere: it cannot be learned"));
        }
    }
    found
}

fn plural(cases: usize) -> String {
    if cases == 1 { "1 case".into() } else { format!("{cases} cases") }
}
