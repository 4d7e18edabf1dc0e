//! Taking parts of dense labels away: classes, boxes, cases, or what mask files mark.

use std::path::{Path, PathBuf};

use ndarray::Zip;
use serde::{Deserialize, Serialize};

use super::drawn::Drawn;
use crate::dataset::{CaseFiles, LabelManager};
use crate::error::{AnnotationError, DatasetError, Error, FileError, Result};
use crate::io::{self, LabelMap};

/// What becomes ignored.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Mask {
    /// Each rule takes away the voxels that meet all of its conditions.
    pub rules: Vec<MaskRule>,
    /// A folder with a label map of the name of each case it concerns; what is not 0 there is taken away.
    pub folder: Option<PathBuf>,
}

/// Voxels to be ignored: those that meet all conditions that are given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskRule {
    /// In one of these cases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cases: Vec<String>,
    /// Of one of these classes or regions: names of `labels` in dataset.json, or label values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// In this box: first voxel and the one after the last, along (z, y, x); cut where the volume ends.
    #[serde(default, rename = "box", skip_serializing_if = "Option::is_none")]
    pub bounds: Option<[[usize; 2]; 3]>,
}

impl Mask {
    /// Reads rules: `[{"cases": ["a"], "classes": ["tumour"], "box": [[0, 10], [0, 64], [0, 64]]}, ...]`.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Json`].
    pub fn read_rules(path: &Path) -> Result<Vec<MaskRule>> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        serde_json::from_str(&text).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))
    }

    /// What is wrong with the rules for a dataset: names that it does not have, rules that would take everything or
    /// nothing, mask files of no case.
    pub(super) fn check(
        &self,
        cases: &[CaseFiles],
        classes: &[(String, Vec<i16>)],
        ending: &str,
    ) -> Result<Vec<Error>> {
        let mut failures = Vec::new();
        let case_names: Vec<String> = cases.iter().map(|case| case.name.clone()).collect();
        let unknown = |what, name: &str, available: &[String]| {
            Error::Annotation(AnnotationError::NameUnknown { what, name: name.into(), available: available.to_vec() })
        };
        for rule in &self.rules {
            if *rule == MaskRule::default() {
                failures.push(setting("mask", "a rule without conditions", "it would take everything away"));
            }
            let strangers = rule.cases.iter().filter(|case| !case_names.contains(case));
            failures.extend(strangers.map(|case| unknown("case", case, &case_names)));
            let names: Vec<String> = classes.iter().map(|(name, _)| name.clone()).collect();
            let strangers = rule.classes.iter().filter(|class| members(class, classes).is_none());
            failures.extend(strangers.map(|class| unknown("class", class, &names)));
            if rule.bounds.is_some_and(|bounds| bounds.iter().any(|[from, to]| from >= to)) {
                let bounds = format!("{:?}", rule.bounds.unwrap_or_default());
                failures.push(setting("mask box", &bounds, "every axis needs a first voxel before its end"));
            }
        }
        if let Some(folder) = &self.folder {
            let known: Vec<String> = case_names.iter().map(|case| format!("{case}{ending}")).collect();
            let mut found = 0;
            for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
                let name = entry.map_err(Error::io(folder, "list"))?.file_name().to_string_lossy().into_owned();
                match (known.contains(&name), name.ends_with(ending)) {
                    (true, _) => found += 1,
                    (false, true) => failures.push(unknown("mask file", &name, &known)),
                    _ => {}
                }
            }
            if found == 0 {
                failures.push(Error::Dataset(DatasetError::DatasetEmpty {
                    path: folder.clone(),
                    ending: ending.into(),
                    other_ending: ".nii",
                    others: 0,
                }));
            }
        }
        if self.rules.is_empty() && self.folder.is_none() {
            failures.push(setting(
                "mask",
                "empty",
                "say what to take away: classes, boxes, cases, rules or mask files",
            ));
        }
        Ok(failures)
    }

    /// Takes away what the rules and the mask file of a case say.
    ///
    /// # Errors
    /// Those of reading the mask file, or [`DatasetError::LabelShape`] if it lies on another grid.
    pub(super) fn apply(
        &self,
        map: &LabelMap,
        case: &str,
        ending: &str,
        labels: &LabelManager,
        classes: &[(String, Vec<i16>)],
        ignore: i16,
    ) -> Result<Drawn> {
        let dense = map.data.view();
        let mut sparse = dense.to_owned();
        for rule in self.rules.iter().filter(|rule| rule.cases.is_empty() || rule.cases.iter().any(|name| name == case))
        {
            let taken: Vec<i16> = match rule.classes.is_empty() {
                true => labels.all_labels().to_vec(),
                false => rule.classes.iter().filter_map(|class| members(class, classes)).flatten().collect(),
            };
            let bounds = rule.bounds.unwrap_or([[0, usize::MAX]; 3]);
            for ((z, y, x), label) in sparse.indexed_iter_mut() {
                let inside = [z, y, x].iter().zip(bounds).all(|(&at, [from, to])| (from..to).contains(&at));
                if inside && taken.contains(label) {
                    *label = ignore;
                }
            }
        }
        if let Some(folder) = &self.folder
            && let path = folder.join(format!("{case}{ending}"))
            && path.is_file()
        {
            let mask = io::read_labels(&path)?;
            let (found, expected): ([usize; 3], [usize; 3]) = (mask.data.dim().into(), dense.dim().into());
            if found != expected {
                return Err(Error::Dataset(DatasetError::LabelShape { case: case.into(), path, found, expected }));
            }
            if !mask.geometry.same_placement(&map.geometry, expected) {
                return Err(Error::Annotation(AnnotationError::LabelPlacement { case: case.into(), path }));
            }
            Zip::from(&mut sparse).and(&mask.data).for_each(|label, &mask| {
                if mask != 0 {
                    *label = ignore;
                }
            });
        }
        Ok(Drawn::whole(sparse, ignore))
    }
}

/// Label values of a class or region by its name, or by a label value.
fn members(class: &str, classes: &[(String, Vec<i16>)]) -> Option<Vec<i16>> {
    let named = classes.iter().find(|(name, _)| name == class).map(|(_, members)| members.clone());
    named.or_else(|| {
        let label: i16 = class.parse().ok()?;
        classes.iter().any(|(_, members)| members.contains(&label)).then(|| vec![label])
    })
}

fn setting(setting: &'static str, value: &str, expected: &'static str) -> Error {
    Error::Setting { setting, value: value.into(), expected }
}
