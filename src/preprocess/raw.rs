//! One case as stored: its files read, and checked against each other.

use std::path::{Path, PathBuf};

use ndarray::{Array3, Array4, ArrayView3, Axis};
use rayon::prelude::*;

use super::label_counts::undeclared;
use crate::dataset::{CaseFiles, LabelManager};
use crate::error::{DatasetError, Error, PreprocessError, Result, ValueSummary};
use crate::io::{self, Geometry, Overview};

/// Images and labels of a case as stored, on one grid.
#[derive(Debug, Clone)]
pub struct RawCase {
    /// Case identifier.
    pub name: String,
    /// Channels in (channel, z, y, x) order.
    pub data: Array4<f32>,
    /// Labels, if the case has them.
    pub labels: Option<Array3<i16>>,
    /// The grid, taken from the first channel.
    pub geometry: Geometry,
    /// What looks odd but does not stop anything, such as a label map placed elsewhere than its image.
    pub warnings: Vec<String>,
}

/// What the headers of a case's files say, without any voxel.
#[derive(Debug, Default)]
pub struct CaseHeaders {
    /// Grid and extent of the case, those of its first readable channel.
    pub grid: Option<(Geometry, [usize; 3])>,
    /// Files that cannot be read, or lie on another grid than the first channel.
    pub failures: Vec<Error>,
    /// What looks odd but does not stop anything.
    pub warnings: Vec<String>,
    /// Files whose header is not one; their voxels cannot be looked at.
    unreadable: Vec<PathBuf>,
}

impl CaseHeaders {
    /// Reads the headers of a case and compares the grids.
    pub fn read(files: &CaseFiles) -> Self {
        let mut headers = CaseHeaders::default();
        for (channel, path) in files.images.iter().enumerate() {
            let Some(image) = headers.overview(path) else { continue };
            let Some((grid, expected)) = headers.grid.clone() else {
                headers.grid = Some((image.geometry, image.shape));
                continue;
            };
            let case = || files.name.clone();
            if image.shape != expected {
                let (path, found) = (path.clone(), image.shape);
                headers.failures.push(Error::Dataset(DatasetError::ChannelShape {
                    case: case(),
                    path,
                    found,
                    expected,
                }));
            } else if !close(image.geometry.spacing, grid.spacing) {
                let (found, expected) = (image.geometry.spacing, grid.spacing);
                headers.failures.push(Error::Dataset(DatasetError::ChannelSpacing {
                    case: case(),
                    path: path.clone(),
                    found,
                    expected,
                }));
            } else if !image.geometry.same_placement(&grid, expected) {
                headers.warnings.push(format!(
                    "case {}: {} (channel {channel}) lies elsewhere in the world than the first channel",
                    files.name,
                    path.display()
                ));
            }
        }
        if let Some(path) = &files.label {
            headers.label(files, path);
        }
        headers
    }

    fn label(&mut self, files: &CaseFiles, path: &Path) {
        let Some(label) = self.overview(path) else { return };
        let Some((grid, expected)) = self.grid.clone() else { return };
        let (case, path) = (files.name.clone(), path.to_path_buf());
        if label.shape != expected {
            self.failures.push(Error::Dataset(DatasetError::LabelShape { case, path, found: label.shape, expected }));
        } else if !close(label.geometry.spacing, grid.spacing) {
            let (found, expected) = (label.geometry.spacing, grid.spacing);
            self.failures.push(Error::Dataset(DatasetError::LabelSpacing { case, path, found, expected }));
        } else if !label.geometry.same_placement(&grid, expected) {
            self.warnings.push(format!(
                "case {case}: label map {} lies elsewhere in the world than the image; is an axis flipped?",
                path.display()
            ));
        }
    }

    fn overview(&mut self, path: &Path) -> Option<Overview> {
        match io::read_overview(path) {
            Ok(mut overview) => {
                self.warnings.append(&mut overview.warnings);
                Some(overview)
            }
            Err(error) => {
                self.failures.push(error);
                self.unreadable.push(path.into());
                None
            }
        }
    }
}

impl RawCase {
    /// Reads a case and checks that its files belong together.
    ///
    /// # Errors
    /// Everything that is wrong with the files, in one error: [`DatasetError::ChannelShape`], [`DatasetError::ChannelSpacing`],
    /// [`DatasetError::NonFiniteVoxel`], [`DatasetError::LabelShape`], [`DatasetError::LabelSpacing`], [`DatasetError::UnexpectedLabel`],
    /// [`DatasetError::LabelIsImage`], and the errors of reading NIfTI.
    pub fn read(files: &CaseFiles, labels: &LabelManager) -> Result<Self> {
        let (raw, failures) = Self::inspect(files, labels);
        Error::all(failures)?;
        raw.ok_or_else(|| {
            Error::Preprocess(PreprocessError::ChannelCount { case: files.name.clone(), found: 0, expected: 1 })
        })
    }

    /// As [`read`](Self::read), but with everything that is wrong with the files as a list. The case is there if nothing
    /// is.
    pub fn inspect(files: &CaseFiles, labels: &LabelManager) -> (Option<Self>, Vec<Error>) {
        let headers = CaseHeaders::read(files);
        let mut failures = headers.failures;
        // What is wrong with a header has been said; what is wrong with the voxels of the other files has not.
        let readable = |path: &Path| !headers.unreadable.iter().any(|unreadable| unreadable == path);
        let read: Vec<_> = files
            .images
            .par_iter()
            .filter(|path| readable(path))
            .map(|path| io::read_image(path).map(|image| (path, image.data)))
            .collect();
        let mut channels = Vec::with_capacity(read.len());
        for image in read {
            match image {
                Ok((path, data)) => {
                    let case = || files.name.clone();
                    if let Some((voxel, value)) = find(data.view(), |v| !v.is_finite()) {
                        failures.push(Error::Dataset(DatasetError::NonFiniteVoxel {
                            case: case(),
                            path: path.clone(),
                            value,
                            voxel,
                        }));
                    }
                    channels.push(data);
                }
                Err(error) => failures.push(error),
            }
        }
        let mut map = None;
        if let Some(path) = files.label.as_deref().filter(|path| readable(path)) {
            match label_map(&files.name, path, labels) {
                Ok(labels) => map = Some(labels),
                Err(error) => failures.push(error),
            }
        }
        let Some((geometry, [depth, height, width])) = headers.grid.filter(|_| failures.is_empty()) else {
            return (None, failures);
        };
        let mut data = Array4::zeros((channels.len(), depth, height, width));
        for (mut to, from) in data.axis_iter_mut(Axis(0)).zip(channels) {
            to.assign(&from);
        }
        let raw = RawCase { name: files.name.clone(), data, labels: map, geometry, warnings: headers.warnings };
        (Some(raw), failures)
    }
}

/// Reads a label map of which every value is declared.
fn label_map(case: &str, path: &Path, labels: &LabelManager) -> Result<Array3<i16>> {
    let map = io::read_labels(path)?.data;
    let expected = labels.expected_labels();
    // A look into a table for every voxel, however many labels there are.
    let mut is_expected = vec![false; 1 << 16];
    expected.iter().for_each(|&label| is_expected[usize::from(label as u16)] = true);
    let unexpected = find(map.view(), |label: i16| !is_expected[usize::from(label as u16)]);
    let Some((voxel, value)) = unexpected else { return Ok(map) };
    let found = undeclared(map.view(), &expected);
    let (case, path) = (case.to_owned(), path.to_path_buf());
    if found.len() >= ValueSummary::FEW {
        let values = ValueSummary::of(map.iter().map(|&label| f64::from(label)));
        return Err(Error::Dataset(DatasetError::LabelIsImage { case, path, values, expected }));
    }
    Err(Error::Dataset(DatasetError::UnexpectedLabel {
        case,
        path,
        value,
        voxel,
        expected: expected.into(),
        found: found.into(),
    }))
}

/// numpy's `allclose` with its default tolerances.
fn close(a: [f64; 3], b: [f64; 3]) -> bool {
    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-8 + 1e-5 * b.abs())
}

/// First voxel (z, y, x) with a property.
fn find<T: Copy>(data: ArrayView3<T>, wanted: impl Fn(T) -> bool) -> Option<([usize; 3], T)> {
    // Usually there is none: a plain walk finds that out sooner than one that keeps its place.
    if !data.iter().any(|&value| wanted(value)) {
        return None;
    }
    data.indexed_iter().find(|(_, value)| wanted(**value)).map(|((z, y, x), value)| ([z, y, x], *value))
}
