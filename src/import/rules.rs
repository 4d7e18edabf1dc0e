//! How annotations are asked for, and what each of their values means.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};

use crate::dataset::json::LabelEntry;
use crate::dataset::{DatasetJson, LabelManager};
use crate::error::{AnnotationError, Error, Result};

/// Where annotations are.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Annotations {
    /// Folders of label maps or segmentations of 3D Slicer (`.seg.nrrd`) named as their cases, one folder for each annotator. Where annotators disagree the voxel is
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

/// How segments become labels.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Segments {
    /// Segments whose names are no labels' names: the segment's name and the label's. A segment with the name of a label needs
    /// no entry.
    pub names: Vec<(String, String)>,
    /// What happens where segments of different labels overlap.
    pub overlap: Overlap,
}

impl Default for Segments {
    fn default() -> Self {
        Segments { names: Vec::new(), overlap: Overlap::Ignore }
    }
}

/// What happens where masks or segments of different classes overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// The voxel is ignored.
    Ignore,
    /// The class that comes first in `labels` has it.
    First,
    /// The class that comes last in `labels` has it.
    Last,
}

impl Overlap {
    /// In words.
    pub(super) fn rule(self) -> &'static str {
        match self {
            Overlap::Ignore => "voxels in masks of several classes are ignored",
            Overlap::First => "where masks overlap the class that comes first in `labels` counts",
            Overlap::Last => "where masks overlap the class that comes last in `labels` counts",
        }
    }
}

/// The settings beside the dataset that they are for.
pub(super) struct Rules<'a> {
    pub json: &'a DatasetJson,
    pub labels: &'a LabelManager,
    pub ignore: i16,
    pub settings: &'a Settings,
    /// What each value in a file means: a label, or the ignore label.
    pub values: BTreeMap<i16, i16>,
}

impl<'a> Rules<'a> {
    /// The rules of a dataset.
    pub fn new(json: &'a DatasetJson, labels: &'a LabelManager, settings: &'a Settings, ignore: i16) -> Result<Self> {
        Ok(Self { json, labels, ignore, settings, values: values(json, labels, settings, ignore)? })
    }

    /// The rules in words, for the dataset's description.
    pub fn in_words(&self) -> Value {
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
                rules.push(match self.labels.has_regions() {
                    true => "one mask a region, painted in the order of `labels`".into(),
                    false => format!("one mask a class; {}", overlap.rule()),
                });
                rules.push(format!("outside all masks: {}", if *outside_ignored { "ignored" } else { "background" }));
                if *missing_empty {
                    rules.push("a class without a mask file is absent from the case".into());
                }
            }
        }
        if let Annotations::LabelMaps(_) = &settings.annotations {
            let overlap = settings.segments.overlap.rule().replace("masks", "segments");
            rules.push(format!("of segmentations with segments: {overlap}"));
        }
        if settings.by_index {
            rules.push("annotations were laid on the images voxel by voxel, whatever their headers say".into());
        }
        json!({"imported_by": format!("voxgrad {}", env!("CARGO_PKG_VERSION")), "rules": rules})
    }
}

/// The label of one value that has this name.
pub(super) fn single_label(json: &DatasetJson, ignore: i16, name: &str) -> Option<i16> {
    match name {
        "ignore" => Some(ignore),
        _ => json.labels.iter().find(|(known, _)| known == name).and_then(|(_, entry)| match entry {
            LabelEntry::Label(label) => i16::try_from(*label).ok(),
            LabelEntry::Region(_) => None,
        }),
    }
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
