//! Segmentations of 3D Slicer: named segments, in several layers where they overlap, often cropped to what was drawn.

use std::collections::BTreeMap;
use std::path::Path;

use super::grid::{ImageGrid, Turned};
use super::rules::{Overlap, Rules, single_label};
use crate::error::{AnnotationError, Error, FileError, Result};
use crate::io::{Nrrd, read_nrrd};
use ndarray::Array3;

/// Ending of their files.
pub(super) const ENDING: &str = ".seg.nrrd";
/// Largest distance of a voxel from one of the image's, in voxels.
const TOLERANCE: f64 = 0.1;

/// A segment of a file.
struct Segment {
    /// Its number in the file's keys.
    number: usize,
    name: String,
    layer: usize,
    value: i32,
    /// First and last voxel along x, y and z between which it lies.
    extent: Option<[[usize; 2]; 3]>,
}

/// Reads a segmentation onto the image's grid: the labels of its segments, and the label of what was not drawn, which is
/// value 0: background unless it is the unlabelled value, or mapped to another label.
pub(super) fn read(rules: &Rules, grid: &ImageGrid, path: &Path, turned: &mut Turned) -> Result<Array3<i16>> {
    let nrrd = read_nrrd(path)?;
    let undrawn = rules.values.get(&0).copied().unwrap_or(0);
    let mut labels = Array3::from_elem(grid.shape, undrawn);
    let segments = segments(path, &nrrd)?;
    let painted = painted(rules, path, &segments, turned)?;
    // 3D Slicer's way to say that nothing was drawn; the place of the voxel means nothing then.
    if nrrd.layers.iter().all(|layer| layer.len() == 1 && layer.iter().all(|&value| value == 0)) {
        return Ok(labels);
    }
    check(path, &nrrd, &segments)?;
    let place = Placement::new(grid, path, &nrrd, turned)?;
    let mut drawn = Array3::from_elem(grid.shape, false);
    let mut overlapping = Array3::from_elem(grid.shape, false);
    for (segment, label) in painted {
        let mut voxels = 0;
        for (voxel, &value) in nrrd.layers[segment.layer].indexed_iter() {
            if value != segment.value {
                continue;
            }
            voxels += 1;
            let Some(at) = place.of(voxel, grid.shape) else {
                turned.outside += 1;
                continue;
            };
            let again = drawn[at] && labels[at] != label;
            overlapping[at] |= again;
            if !(again && rules.settings.segments.overlap == Overlap::First) {
                labels[at] = label;
            }
            drawn[at] = true;
        }
        if let Some((_, counted)) = turned.segments.get_mut(&segment.name) {
            *counted += voxels;
        }
    }
    for (label, _) in labels.iter_mut().zip(&overlapping).filter(|(_, overlapping)| **overlapping) {
        turned.overlapping += 1;
        if rules.settings.segments.overlap == Overlap::Ignore {
            *label = rules.ignore;
        }
    }
    Ok(labels)
}

/// The segments that the header describes, in its order.
fn segments(path: &Path, nrrd: &Nrrd) -> Result<Vec<Segment>> {
    let fault =
        |field: String, problem: String| Error::File(FileError::NrrdField { path: path.into(), field, problem });
    if let Some(kind) =
        nrrd.pairs.get("Segmentation_SourceRepresentation").or(nrrd.pairs.get("Segmentation_MasterRepresentation"))
        && kind != "Binary labelmap"
    {
        let problem = format!("{kind}: a binary labelmap is needed");
        return Err(fault("Segmentation_SourceRepresentation".into(), problem));
    }
    let mut numbers: Vec<usize> =
        nrrd.pairs.keys().filter_map(|key| key.strip_prefix("Segment")?.strip_suffix("_ID")?.parse().ok()).collect();
    numbers.sort_unstable();
    let mut found = Vec::with_capacity(numbers.len());
    for number in numbers {
        let pair = |key: &str| {
            let field = format!("Segment{number}_{key}");
            (nrrd.pairs.get(&field).map(String::as_str), field)
        };
        let numeral = |key: &str, unless_given: usize| {
            let (value, field) = pair(key);
            match value.map(|value| (value, value.trim().parse::<usize>())) {
                None => Ok(unless_given),
                Some((_, Ok(value))) => Ok(value),
                Some((value, Err(_))) => Err(fault(field, format!("{value} is no number from 0"))),
            }
        };
        // Earlier versions gave every segment a layer of its own, in which it is 1.
        let layer = numeral("Layer", if nrrd.layers.len() > 1 { found.len() } else { 0 })?;
        if layer >= nrrd.layers.len() {
            return Err(fault(pair("Layer").1, format!("{layer}: the file has {} layers", nrrd.layers.len())));
        }
        let value = numeral("LabelValue", 1)?;
        let value = i32::try_from(value).ok().filter(|&value| value > 0);
        let value = value.ok_or_else(|| fault(pair("LabelValue").1, "a positive number is needed".into()))?;
        let extent = match pair("Extent") {
            (None, _) => None,
            (Some(text), field) => {
                let numbers: Option<Vec<i64>> = text.split_whitespace().map(|number| number.parse().ok()).collect();
                let six = numbers.and_then(|numbers| <[i64; 6]>::try_from(numbers).ok());
                let six = six.ok_or_else(|| fault(field, format!("{text}: six whole numbers are needed")))?;
                // An empty segment ends before it begins.
                let whole = six.map(|number| usize::try_from(number).ok());
                match whole {
                    [Some(a), Some(b), Some(c), Some(d), Some(e), Some(f)] => Some([[a, b], [c, d], [e, f]]),
                    _ => None,
                }
            }
        };
        let name = pair("Name").0.or(pair("ID").0).unwrap_or_default().to_owned();
        found.push(Segment { number, name, layer, value, extent });
    }
    Ok(found)
}

/// The labels of the segments, in the order in which `labels` declares them; segments that are no label are named.
fn painted<'s>(
    rules: &Rules,
    path: &Path,
    segments: &'s [Segment],
    turned: &mut Turned,
) -> Result<Vec<(&'s Segment, i16)>> {
    let named: BTreeMap<&str, &str> =
        rules.settings.segments.names.iter().map(|(segment, label)| (segment.as_str(), label.as_str())).collect();
    let mut painted = Vec::new();
    for segment in segments {
        let name = named.get(segment.name.as_str()).copied().unwrap_or(&segment.name);
        match single_label(rules.json, rules.ignore, name) {
            Some(label) => {
                turned.segments.entry(segment.name.clone()).or_insert_with(|| (name.to_owned(), 0));
                painted.push((segment, label));
            }
            None => turned.unused.push(segment.name.clone()),
        }
    }
    if painted.is_empty() && !segments.is_empty() {
        return Err(Error::Annotation(AnnotationError::SegmentsUnknown {
            path: path.into(),
            segments: segments.iter().map(|segment| segment.name.clone()).collect(),
            labels: rules.json.labels.iter().map(|(name, _)| name.clone()).collect(),
        }));
    }
    let position = |label: i16| {
        let of = |(name, _): &(String, _)| single_label(rules.json, rules.ignore, name) == Some(label);
        rules.json.labels.iter().position(of)
    };
    painted.sort_by_key(|(_, label)| position(*label));
    Ok(painted)
}

/// Whether every value is a segment's, and within the segment's extent: what is said and what is stored must agree.
fn check(path: &Path, nrrd: &Nrrd, segments: &[Segment]) -> Result<()> {
    let fault =
        |field: String, problem: String| Error::File(FileError::NrrdField { path: path.into(), field, problem });
    for (index, layer) in nrrd.layers.iter().enumerate() {
        let here: BTreeMap<i32, &Segment> =
            segments.iter().filter(|segment| segment.layer == index).map(|segment| (segment.value, segment)).collect();
        for ((z, y, x), &value) in layer.indexed_iter().filter(|(_, value)| **value != 0) {
            let Some(segment) = here.get(&value) else {
                let problem = format!(
                    "no segment of layer {index} has value {value}, which voxel (z, y, x) = {:?} holds",
                    [z, y, x]
                );
                return Err(fault("SegmentN_LabelValue".into(), problem));
            };
            let outside = |extent: &[[usize; 2]; 3]| {
                extent.iter().zip([x, y, z]).any(|([first, last], at)| at < *first || at > *last)
            };
            if segment.extent.as_ref().is_some_and(outside) {
                let problem = format!(
                    "segment {} has a voxel outside of it, at (z, y, x) = {:?}; save the file again",
                    segment.name,
                    [z, y, x]
                );
                return Err(fault(format!("Segment{}_Extent", segment.number), problem));
            }
        }
    }
    Ok(())
}

/// Where the voxels of a file lie on the image's grid: axes may be in another order or direction, and the file may be a
/// part of the image, or more.
struct Placement {
    /// For z, y, x of the image: the axis of the file, its direction, and where the file's first voxel lies.
    axes: [(usize, i64, i64); 3],
}

impl Placement {
    fn new(grid: &ImageGrid, path: &Path, nrrd: &Nrrd, turned: &mut Turned) -> Result<Self> {
        let shape: [usize; 3] = nrrd.layers[0].dim().into();
        let elsewhere =
            || Error::Annotation(AnnotationError::LabelPlacement { case: grid.case.into(), path: path.into() });
        match Self::between(nrrd.affine, grid.geometry.affine(), shape) {
            Some(place) => Ok(place),
            None if grid.by_index && shape == grid.shape => {
                turned.placed_by_index = true;
                Ok(Placement { axes: [(0, 1, 0), (1, 1, 0), (2, 1, 0)] })
            }
            None => Err(elsewhere()),
        }
    }

    /// From one grid to another, if every voxel of the first is one of the second, inside of it or not.
    fn between(file: [[f64; 4]; 3], image: [[f64; 4]; 3], shape: [usize; 3]) -> Option<Self> {
        let inverse = inverse(image)?;
        // Index of the image from index of the file, both (x, y, z).
        let map: [[f64; 4]; 3] = std::array::from_fn(|row| {
            std::array::from_fn(|column| {
                let offset = |axis: usize| if column == 3 { image[axis][3] } else { 0.0 };
                (0..3).map(|axis| inverse[row][axis] * (file[axis][column] - offset(axis))).sum()
            })
        });
        let mut axes = [(0, 0, 0); 3];
        let mut taken = [false; 3];
        for (row, line) in map.iter().enumerate() {
            let column = (0..3).max_by(|&a, &b| line[a].abs().total_cmp(&line[b].abs()))?;
            let (direction, start) = (line[column].signum(), line[3].round());
            if std::mem::replace(&mut taken[column], true) || !start.is_finite() || start.abs() > 1e9 {
                return None;
            }
            // An affine map strays most at a corner.
            let strays: f64 = (0..3)
                .map(|axis| {
                    let wanted = if axis == column { direction } else { 0.0 };
                    (line[axis] - wanted).abs() * shape[2 - axis].saturating_sub(1) as f64
                })
                .sum();
            if (line[3] - start).abs() + strays > TOLERANCE {
                return None;
            }
            axes[2 - row] = (2 - column, direction as i64, start as i64);
        }
        Some(Placement { axes })
    }

    /// The image's voxel of the file's; `None` outside of the image.
    fn of(&self, voxel: (usize, usize, usize), shape: [usize; 3]) -> Option<[usize; 3]> {
        let voxel = [voxel.0, voxel.1, voxel.2];
        let mut at = [0; 3];
        for ((place, &(from, direction, start)), length) in at.iter_mut().zip(&self.axes).zip(shape) {
            *place = usize::try_from(start + direction * voxel[from] as i64).ok().filter(|&index| index < length)?;
        }
        Some(at)
    }
}

/// Inverse of the directions of a grid; `None` if they do not span space.
fn inverse(m: [[f64; 4]; 3]) -> Option<[[f64; 3]; 3]> {
    let minor = |r: [usize; 2], c: [usize; 2]| m[r[0]][c[0]] * m[r[1]][c[1]] - m[r[0]][c[1]] * m[r[1]][c[0]];
    let others = [[1, 2], [2, 0], [0, 1]];
    let determinant: f64 = (0..3).map(|column| m[0][column] * minor([1, 2], others[column])).sum();
    (determinant.is_finite() && determinant != 0.0).then(|| {
        std::array::from_fn(|row| std::array::from_fn(|column| minor(others[column], others[row]) / determinant))
    })
}
