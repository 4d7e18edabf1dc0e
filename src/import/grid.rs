//! Annotations on the grid of a case's image, and what became of their voxels.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::Array3;
use serde::Serialize;

use crate::error::{AnnotationError, DatasetError, Error, Result};
use crate::io::{self, Geometry};

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

/// The grid of a case's image.
pub(super) struct ImageGrid<'a> {
    pub case: &'a str,
    pub shape: [usize; 3],
    pub geometry: &'a Geometry,
    pub by_index: bool,
}

impl ImageGrid<'_> {
    /// Reads a label map that lies on this grid.
    pub fn read(&self, path: &Path, turned: &mut Turned) -> Result<Array3<i16>> {
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
