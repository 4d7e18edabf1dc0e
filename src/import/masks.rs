//! One binary mask a class.

use std::path::{Path, PathBuf};

use ndarray::{Array3, Zip};

use super::grid::{ImageGrid, Turned};
use super::rules::{Overlap, Rules};
use crate::error::{AnnotationError, Error, Result};

/// Reads the masks of a case onto one label map that begins as `outside` everywhere.
///
/// Where the dataset has regions a mask is a region's: regions are painted in the order of `labels`, each with its label of
/// `regions_class_order`, which is how nnU-Net writes predicted regions; their overlaps are meant.
pub(super) fn paint(
    rules: &Rules,
    grid: &ImageGrid,
    folder: &Path,
    overlap: Overlap,
    outside: i16,
    missing_empty: bool,
    turned: &mut Turned,
) -> Result<Array3<i16>> {
    let nested = folder.join("segmentations");
    let folder = if nested.is_dir() { nested } else { folder.to_owned() };
    let ending = &rules.json.file_ending;
    let names = rules.labels.foreground_names();
    let order = rules.labels.regions_class_order();
    let groups = rules.labels.foreground();
    let mut classes: Vec<(&str, i16)> = (0..names.len())
        .map(|index| (names[index], order.map_or_else(|| groups[index].members()[0], |order| order[index])))
        .collect();
    if order.is_none() {
        // Labels come sorted by value; "first" and "last" are meant as the file has them.
        let position = |name: &str| rules.json.labels.iter().position(|(known, _)| known == name);
        classes.sort_by_key(|(name, _)| position(name));
    }
    turned.unused = unused(&folder, ending, &names)?;

    let mut labels = Array3::from_elem(grid.shape, outside);
    let mut painted = Array3::from_elem(grid.shape, false);
    let mut overlapping = Array3::from_elem(grid.shape, false);
    let mut failures = Vec::new();
    for (name, label) in classes {
        let path: PathBuf = folder.join(format!("{name}{ending}"));
        if !path.is_file() {
            if !missing_empty {
                failures.push(Error::Annotation(AnnotationError::MaskMissing {
                    case: grid.case.into(),
                    name: name.into(),
                    path,
                }));
            }
            continue;
        }
        let mask = match grid.read(&path, turned) {
            Ok(mask) => mask,
            Err(failure) => {
                failures.push(failure);
                continue;
            }
        };
        turned.files += 1;
        Zip::from(&mut labels).and(&mut painted).and(&mut overlapping).and(&mask).for_each(
            |voxel, painted, overlapping, &mask| {
                if mask == 0 {
                    return;
                }
                *overlapping |= *painted;
                if !(*painted && order.is_none() && overlap == Overlap::First) {
                    *voxel = label;
                }
                *painted = true;
            },
        );
    }
    Error::all(failures)?;
    if order.is_none() {
        turned.overlapping = overlapping.iter().filter(|&&voxel| voxel).count() as u64;
        if overlap == Overlap::Ignore {
            Zip::from(&mut labels).and(&overlapping).for_each(|label, &overlapping| {
                if overlapping {
                    *label = rules.ignore;
                }
            });
        }
    }
    if outside == rules.ignore {
        turned.unlabelled = painted.iter().filter(|&&voxel| !voxel).count() as u64;
    }
    Ok(labels)
}

/// Mask files of no declared class.
fn unused(folder: &Path, ending: &str, names: &[&str]) -> Result<Vec<String>> {
    let mut unused = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let name = entry.map_err(Error::io(folder, "list"))?.file_name().to_string_lossy().into_owned();
        if name.strip_suffix(ending).is_some_and(|class| !names.contains(&class)) {
            unused.push(name);
        }
    }
    unused.sort();
    Ok(unused)
}
