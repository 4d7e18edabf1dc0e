//! `dataset_fingerprint.json`: what planning needs to know about a dataset.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::{Array3, Axis, s};
use serde::{Deserialize, Serialize};

use crate::compat::Compat;
use crate::dataset::Dataset;
use crate::dataset::plans::IntensityProperties;
use crate::error::{DatasetError, Error, FileError, Result};
use crate::io;
use crate::numpy_random::NumpyRandom;
use crate::preprocess::{OWN_FOLDER, RawCase, crop_to_nonzero, files_seen, in_parallel, nonzero_mask};

const SEED: u32 = 1234;
/// Intensities drawn per channel over all cases.
const INTENSITY_SAMPLES: usize = 100_000_000;

/// Shapes, spacings and intensities of the training cases, after cropping to non-zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Foreground intensities by channel index.
    pub foreground_intensity_properties_per_channel: BTreeMap<String, IntensityProperties>,
    /// Median over cases of the share of voxels that cropping keeps.
    pub median_relative_size_after_cropping: f64,
    /// Shape of each case.
    pub shapes_after_crop: Vec<[usize; 3]>,
    /// Spacing of each case.
    pub spacings: Vec<[f64; 3]>,
}

/// What one case contributes.
struct CaseFingerprint {
    spacing: [f64; 3],
    shape: [usize; 3],
    relative_size: f64,
    /// Per channel the drawn values in ascending order and how often each was drawn.
    intensities: Vec<Vec<(f32, u32)>>,
}

impl Fingerprint {
    /// Reads every training case and draws its intensities as nnU-Net does, from foreground voxels with replacement.
    /// At most `workers` cases are in memory at a time. `on_case` is called after each case, from several threads.
    ///
    /// With [`Compat::Nnunet`] ignored voxels count as foreground.
    ///
    /// # Errors
    /// [`DatasetError::NoCases`], and the errors of [`RawCase::read`].
    pub fn extract(dataset: &Dataset, compat: Compat, workers: usize, on_case: impl Fn(&str) + Sync) -> Result<Self> {
        let ignore = match compat {
            Compat::Corrected => dataset.labels.ignore_label(),
            Compat::Nnunet => None,
        };
        let samples = INTENSITY_SAMPLES / dataset.cases.len().max(1);
        let cases = in_parallel(&dataset.cases, workers, |files| {
            let raw = RawCase::read(files, &dataset.labels)?;
            let case = fingerprint_of(&raw, ignore, samples);
            on_case(&files.name);
            Ok(case)
        });
        let cases: Vec<CaseFingerprint> = cases.into_iter().collect::<Result<_>>()?;
        if cases.is_empty() {
            return Err(Error::Dataset(DatasetError::NoCases));
        }
        let relative: Vec<f64> = cases.iter().map(|case| case.relative_size).collect();
        let channels = 0..dataset.json.channel_names.len();
        let intensities = channels.filter_map(|channel| {
            let drawn = cases.iter().flat_map(|case| &case.intensities[channel]);
            Some((channel.to_string(), properties(drawn.copied().collect())?))
        });
        Ok(Fingerprint {
            foreground_intensity_properties_per_channel: intensities.collect(),
            median_relative_size_after_cropping: percentile(&relative, 50.0),
            shapes_after_crop: cases.iter().map(|case| case.shape).collect(),
            spacings: cases.iter().map(|case| case.spacing).collect(),
        })
    }

    /// Reads a fingerprint.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Json`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        serde_json::from_str(&text).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))
    }

    /// Writes the fingerprint.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        io::write_json(path, self)
    }
}

/// From what a fingerprint was measured: kept beside it, because its own file is nnU-Net's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Treatment of ignored voxels.
    compat: Compat,
    ignore: Option<i16>,
    channels: usize,
    /// Name, size and time of change of every file of every case.
    files: Vec<String>,
    /// CRC-32 of the fingerprint's file.
    fingerprint: u32,
}

/// Whether a fingerprint is still good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// Measured from these files with these settings.
    Current,
    /// Measured from other files, or with other settings.
    Stale,
    /// Somebody else's, who does not say from what it was measured.
    Unknown,
}

impl Measured {
    /// What a fingerprint that is in `file` has been measured from, if it has been measured now.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn now(dataset: &Dataset, compat: Compat, file: &Path) -> Result<Self> {
        let files = dataset.cases.iter().map(|case| Ok(format!("{}{}", case.name, files_seen(case)?)));
        let fingerprint = fs::read(file).map_err(Error::io(file, "read"))?;
        Ok(Measured {
            compat,
            ignore: dataset.labels.ignore_label(),
            channels: dataset.json.channel_names.len(),
            files: files.collect::<Result<_>>()?,
            fingerprint: crc32fast::hash(&fingerprint),
        })
    }

    /// Keeps it beside the fingerprint in `file`.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn write(&self, file: &Path) -> Result<()> {
        let path = Self::path(file);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        }
        io::write_json(&path, self)
    }

    /// How good the fingerprint in `file` is for a dataset. With `compat` only if it was measured so.
    ///
    /// # Errors
    /// [`FileError::Io`] if a file of the dataset cannot be looked at.
    pub fn age(dataset: &Dataset, compat: Option<Compat>, file: &Path) -> Result<Age> {
        let kept = fs::read_to_string(Self::path(file)).ok();
        let Some(kept) = kept.and_then(|text| serde_json::from_str::<Self>(&text).ok()) else {
            return Ok(Age::Unknown);
        };
        let now = Self::now(dataset, compat.unwrap_or(kept.compat), file)?;
        Ok(match kept {
            kept if kept == now => Age::Current,
            // The file was replaced.
            kept if kept.fingerprint != now.fingerprint => Age::Unknown,
            _ => Age::Stale,
        })
    }

    fn path(file: &Path) -> PathBuf {
        file.with_file_name(OWN_FOLDER).join("fingerprint_measured_from.json")
    }
}

fn fingerprint_of(raw: &RawCase, ignore: Option<i16>, samples: usize) -> CaseFingerprint {
    let mask = nonzero_mask(raw.data.view());
    let bbox = crop_to_nonzero(&mask);
    let [z, y, x] = bbox.map(|[start, end]| start..end);
    let shape = bbox.map(|[start, end]| end - start);
    let foreground: Array3<bool> = match &raw.labels {
        Some(labels) => {
            labels.slice(s![z.clone(), y.clone(), x.clone()]).mapv(|label| label > 0 && Some(label) != ignore)
        }
        None => Array3::from_elem(shape, false),
    };
    // One stream for all channels of a case.
    let mut random = NumpyRandom::new(SEED);
    let cropped = raw.data.slice(s![.., z, y, x]);
    let intensities = cropped
        .axis_iter(Axis(0))
        .map(|channel| {
            let voxels = channel.iter().zip(&foreground);
            let values: Vec<f32> = voxels.filter(|(_, inside)| **inside).map(|(v, _)| *v).collect();
            draw(&values, samples, &mut random)
        })
        .collect();
    CaseFingerprint {
        spacing: raw.geometry.spacing,
        shape,
        relative_size: shape.iter().product::<usize>() as f64 / mask.len() as f64,
        intensities,
    }
}

/// Draws values with replacement. Only counts are kept: a hundred million draws from a few thousand voxels are then
/// small, and their statistics exact.
fn draw(values: &[f32], samples: usize, random: &mut NumpyRandom) -> Vec<(f32, u32)> {
    let mut counts = vec![0u32; values.len()];
    random.tally(samples, &mut counts);
    let drawn = values.iter().copied().zip(counts);
    merged(drawn.filter(|(_, count)| *count > 0).collect())
}

/// Sorts by value and adds up the counts of equal values.
fn merged(mut drawn: Vec<(f32, u32)>) -> Vec<(f32, u32)> {
    drawn.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    drawn.dedup_by(|next, kept| {
        let equal = next.0 == kept.0;
        if equal {
            kept.1 += next.1;
        }
        equal
    });
    drawn
}

/// Statistics of weighted values; `None` of none.
fn properties(drawn: Vec<(f32, u32)>) -> Option<IntensityProperties> {
    let drawn = merged(drawn);
    let (min, max) = (drawn.first()?.0, drawn.last()?.0);
    let mut cumulative = Vec::with_capacity(drawn.len());
    let (mut count, mut sum) = (0u64, 0.0);
    for &(value, times) in &drawn {
        count += u64::from(times);
        sum += f64::from(value) * f64::from(times);
        cumulative.push(count);
    }
    let mean = sum / count as f64;
    let squares: f64 = drawn.iter().map(|&(value, times)| (f64::from(value) - mean).powi(2) * f64::from(times)).sum();
    // numpy's linear percentile over the values as if each stood there as often as it was drawn.
    let value_at = |rank: u64| f64::from(drawn[cumulative.partition_point(|&c| c <= rank)].0);
    let percentile = |q: f64| {
        let position = q / 100.0 * (count - 1) as f64;
        let below = position.floor();
        let low = value_at(below as u64);
        let high = value_at((below as u64 + 1).min(count - 1));
        low + (high - low) * (position - below)
    };
    Some(IntensityProperties {
        max: f64::from(max),
        mean,
        median: percentile(50.0),
        min: f64::from(min),
        percentile_00_5: percentile(0.5),
        percentile_99_5: percentile(99.5),
        std: (squares / count as f64).sqrt(),
    })
}

/// numpy's linear percentile. NaN of nothing.
pub(super) fn percentile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let position = q / 100.0 * last as f64;
    let below = position.floor() as usize;
    let (low, high) = (sorted[below], sorted[(below + 1).min(last)]);
    low + (high - low) * (position - below as f64)
}
