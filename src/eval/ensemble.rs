//! Segmentations from the mean of several models' probabilities, as nnU-Net makes them: `CASE.npz` beside `CASE.nii.gz`,
//! the array `probabilities` of the shape (heads, z, y, x) on the raw image's grid.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ndarray::{Array3, Array4, Axis, s};

use super::summary::files;
use crate::dataset::LabelManager;
use crate::error::{Error, EvaluateError, Result};
use crate::io::{self, Geometry, grid_difference, read_npz_array};

/// Ending of files with probabilities.
const ENDING: &str = ".npz";

/// The mean of several models for one case.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Mean probabilities (heads, z, y, x).
    pub probabilities: Array4<f32>,
    /// What they say: the most probable class, or the regions above one half.
    pub segmentation: Array3<u16>,
    /// The grid of the segmentations beside the probabilities.
    pub geometry: Geometry,
}

fn wrong(path: &Path, problem: String) -> Error {
    EvaluateError::Probabilities { path: path.into(), problem }.into()
}

/// For every case, by its name, the probabilities of all members in their order. A member is one folder, or the folders of
/// all folds of a model.
///
/// # Errors
/// [`EvaluateError::Probabilities`] for members without probabilities, with others than the rest have, or with a case in
/// two folders; all of them together; [`FileError::Io`](crate::error::FileError::Io).
pub fn members(folders: &[Vec<PathBuf>]) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let (mut found, mut faults): (Vec<BTreeMap<String, PathBuf>>, Vec<Error>) = (Vec::new(), Vec::new());
    for member in folders {
        let mut cases = BTreeMap::new();
        for folder in member {
            for name in files(folder, ENDING)?.0 {
                let case = name.strip_suffix(ENDING).unwrap_or(&name).to_owned();
                if let Some(other) = cases.insert(case, folder.join(&name)) {
                    faults.push(wrong(&folder.join(&name), format!("{} is of the same case", other.display())));
                }
            }
        }
        found.push(cases);
    }
    let all: BTreeSet<String> = found.iter().flat_map(|cases| cases.keys().cloned()).collect();
    for (member, cases) in folders.iter().zip(&found) {
        let missing: Vec<&str> = all.iter().filter(|case| !cases.contains_key(*case)).map(String::as_str).collect();
        let folder = member.first().map_or(Path::new(""), PathBuf::as_path);
        if cases.is_empty() {
            faults.push(wrong(folder, "no probabilities (.npz); predict again and save them".into()));
        } else if !missing.is_empty() {
            let problem = format!("no probabilities of {}, which another member has", missing.join(", "));
            faults.push(wrong(folder, problem));
        }
    }
    Error::all(faults)?;
    let of_case = |case: String| {
        let files = found.iter().filter_map(|cases| cases.get(&case).cloned()).collect();
        (case, files)
    };
    Ok(all.into_iter().map(of_case).collect())
}

/// Averages the probabilities of one case, in f32 one member after the other, as nnU-Net does.
///
/// # Errors
/// [`EvaluateError::Probabilities`] if they have not one channel for each head, are no numbers, or do not lie on the grid of
/// the first member's segmentation; the errors of reading .npz and NIfTI.
pub fn merge(probabilities: &[PathBuf], file_ending: &str, labels: &LabelManager) -> Result<Merged> {
    let mut sum: Option<(Array4<f32>, Geometry)> = None;
    for path in probabilities {
        let found = read_npz_array(path, "probabilities")?;
        let (heads, depth, height, width) = found.dim();
        let expected = labels.num_segmentation_heads();
        if heads != expected {
            return Err(wrong(path, format!("{heads} channels where the labels of the dataset ask for {expected}")));
        }
        if !found.iter().all(|value| value.is_finite()) {
            return Err(wrong(path, "a probability is no number; predict the case again".into()));
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let beside = path.with_file_name(format!("{stem}{file_ending}"));
        let overview = io::read_overview(&beside)?;
        let shape = [depth, height, width];
        let (reference, of) = match &sum {
            None => (&overview.geometry, overview.shape),
            Some((first, geometry)) => (geometry, [first.dim().1, first.dim().2, first.dim().3]),
        };
        let differs = match shape == overview.shape {
            true => grid_difference((&overview.geometry, overview.shape), (reference, of)),
            false => Some(format!("shape (z, y, x) {shape:?} instead of {:?}", overview.shape)),
        };
        if let Some(difference) = differs {
            let problem =
                format!("does not lie on the grid of the other members, or of the segmentation: {difference}");
            return Err(wrong(path, problem));
        }
        match &mut sum {
            None => sum = Some((found, overview.geometry)),
            Some((sum, _)) => *sum += &found,
        }
    }
    let (mut mean, geometry) = sum.ok_or_else(|| wrong(Path::new(""), "no members".into()))?;
    mean /= probabilities.len() as f32;
    let segmentation = segment(&mean, labels)?;
    Ok(Merged { probabilities: mean, segmentation, geometry })
}

/// The segmentation of probabilities (heads, z, y, x), slice by slice: classes lie side by side there.
fn segment(probabilities: &Array4<f32>, labels: &LabelManager) -> Result<Array3<u16>> {
    let (_, depth, height, width) = probabilities.dim();
    let mut segmentation = Array3::zeros((depth, height, width));
    for (z, mut target) in segmentation.axis_iter_mut(Axis(0)).enumerate() {
        let slice = probabilities.slice(s![.., z, .., ..]).permuted_axes([1, 2, 0]);
        let voxels: Vec<f32> = slice.iter().copied().collect();
        let decoded = labels.segmentation_from_probabilities(&voxels)?;
        target.iter_mut().zip(decoded).for_each(|(target, label)| *target = label);
    }
    Ok(segmentation)
}
