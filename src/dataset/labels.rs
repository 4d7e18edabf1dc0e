//! What label values mean: classes, regions, and the ignore label.
//!
//! Two modes. *Labels*: classes exclude each other, the network has one head per class, background included. *Regions*:
//! overlapping unions of labels (whole tumour, tumour core, ...), one head each, no background head. The ignore label
//! marks voxels nobody annotated; it never has a head.

use std::fmt;

use super::json::{DatasetJson, LabelEntry};
use crate::error::{DatasetError, Error, Result};

/// One thing that is predicted and evaluated: a label, or a region made of labels.
///
/// Displays as nnU-Net's keys:
///
/// ```
/// use voxgrad::dataset::LabelGroup;
/// assert_eq!(LabelGroup::Label(3).to_string(), "3");
/// assert_eq!(LabelGroup::Region(vec![1, 2, 3]).to_string(), "(1, 2, 3)");
/// assert_eq!(LabelGroup::Region(vec![3]).to_string(), "(3,)");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LabelGroup {
    /// A single label value.
    Label(i16),
    /// A union of label values.
    Region(Vec<i16>),
}

impl LabelGroup {
    /// The label values that belong to the group.
    pub fn members(&self) -> &[i16] {
        match self {
            LabelGroup::Label(label) => std::slice::from_ref(label),
            LabelGroup::Region(labels) => labels,
        }
    }

    /// Whether a label value belongs to the group.
    pub fn contains(&self, label: i16) -> bool {
        self.members().contains(&label)
    }
}

impl fmt::Display for LabelGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LabelGroup::Label(label) => write!(f, "{label}"),
            LabelGroup::Region(labels) => {
                let list: Vec<String> = labels.iter().map(i16::to_string).collect();
                let comma = if list.len() == 1 { "," } else { "" };
                write!(f, "({}{comma})", list.join(", "))
            }
        }
    }
}

/// The label rules of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelManager {
    all_labels: Vec<i16>,
    /// Foreground labels or regions with their names, in head order.
    foreground: Vec<(String, LabelGroup)>,
    /// Label written for each region, parallel to `foreground`; `None` in label mode.
    class_order: Option<Vec<i16>>,
    ignore: Option<i16>,
}

impl LabelManager {
    /// Derives the rules, and rejects label definitions that nnU-Net rejects.
    ///
    /// # Errors
    /// One variant per rule: `Background*`, `Ignore*`, `Label*`, `Regions*`, [`DatasetError::NoForeground`],
    /// [`DatasetError::TooManyRegions`].
    pub fn new(json: &DatasetJson) -> Result<Self> {
        let path = || json.path.clone();
        let mut background = None;
        let mut ignore = None;
        for (name, entry) in &json.labels {
            match (name.as_str(), entry) {
                ("background", LabelEntry::Label(value)) => background = Some(*value),
                ("background", LabelEntry::Region(_)) => {
                    return Err(Error::Dataset(DatasetError::BackgroundIsRegion { path: path() }));
                }
                ("ignore", LabelEntry::Label(value)) => ignore = Some(*value),
                ("ignore", LabelEntry::Region(_)) => {
                    return Err(Error::Dataset(DatasetError::IgnoreIsRegion { path: path() }));
                }
                _ => {}
            }
        }
        match background {
            None => return Err(Error::Dataset(DatasetError::BackgroundMissing { path: path() })),
            Some(0) => {}
            Some(value) => {
                return Err(Error::Dataset(DatasetError::BackgroundNotZero { path: path(), value }));
            }
        }

        let mut all_labels = Vec::new();
        for (name, entry) in json.labels.iter().filter(|(name, _)| name != "ignore") {
            for &value in values(entry) {
                all_labels.push(label_value(value).ok_or_else(|| {
                    Error::Dataset(DatasetError::LabelOutOfRange { path: path(), name: name.clone(), value })
                })?);
            }
        }
        all_labels.sort_unstable();
        all_labels.dedup();
        if all_labels.len() < 2 {
            return Err(Error::Dataset(DatasetError::NoForeground { path: path() }));
        }
        let highest = all_labels[all_labels.len() - 1];
        let ignore = match ignore {
            None => None,
            Some(value) if value == i64::from(highest) + 1 => Some(highest + 1),
            Some(value) => {
                return Err(Error::Dataset(DatasetError::IgnoreNotHighest {
                    path: path(),
                    value,
                    expected: i64::from(highest) + 1,
                }));
            }
        };
        if usize::from(highest as u16) + 1 != all_labels.len() {
            return Err(Error::Dataset(DatasetError::LabelsNotConsecutive { path: path(), found: all_labels }));
        }

        let has_regions =
            json.labels.iter().any(|(_, entry)| matches!(entry, LabelEntry::Region(members) if members.len() > 1));
        let (foreground, class_order) = if has_regions {
            let regions = regions(json);
            let order = class_order(json, regions.len())?;
            (regions, Some(order))
        } else {
            (single_labels(json, &all_labels), None)
        };
        Ok(LabelManager { all_labels, foreground, class_order, ignore })
    }

    /// Whether heads are regions rather than exclusive classes.
    pub fn has_regions(&self) -> bool {
        self.class_order.is_some()
    }

    /// The label of voxels without annotation.
    pub fn ignore_label(&self) -> Option<i16> {
        self.ignore
    }

    /// All label values, sorted, background included, ignore label excluded.
    pub fn all_labels(&self) -> &[i16] {
        &self.all_labels
    }

    /// All values a label file may hold, the ignore label included.
    pub fn expected_labels(&self) -> Vec<i16> {
        self.all_labels.iter().copied().chain(self.ignore).collect()
    }

    /// What is evaluated: foreground labels, or foreground regions in the order of `labels`.
    pub fn foreground(&self) -> Vec<LabelGroup> {
        self.foreground.iter().map(|(_, g)| g.clone()).collect()
    }

    /// Names of [`foreground`](Self::foreground).
    pub fn foreground_names(&self) -> Vec<&str> {
        self.foreground.iter().map(|(n, _)| n.as_str()).collect()
    }

    /// Label value that stands for each foreground entry in a written segmentation.
    pub fn regions_class_order(&self) -> Option<&[i16]> {
        self.class_order.as_deref()
    }

    /// For every region its name, its labels, and the value that is written where it is the last one predicted; empty in
    /// label mode.
    ///
    /// Values are written in the order of `labels`, later ones over earlier ones: with whole (1, 2, 3) -> 1, core (2, 3) ->
    /// 2 and enhancing 3 -> 3, a voxel predicted as whole and core becomes 2.
    pub fn written_regions(&self) -> Vec<(&str, &LabelGroup, i16)> {
        let order = self.class_order.as_deref().unwrap_or_default();
        self.foreground.iter().zip(order).map(|((name, group), &value)| (name.as_str(), group, value)).collect()
    }

    /// What is lost between a label and the value that its regions are written as; empty in label mode.
    pub fn region_warnings(&self) -> Vec<String> {
        let Some(order) = &self.class_order else { return Vec::new() };
        let mut warnings = Vec::new();
        for &label in self.all_labels.iter().filter(|&&label| label != 0) {
            let last = self.foreground.iter().rposition(|(_, group)| group.contains(label));
            let written = last.and_then(|region| order.get(region)).copied().unwrap_or(0);
            if written == label {
                continue;
            }
            let comes_out = order.contains(&label);
            let fate = if comes_out { "is written as another label" } else { "can never come out of a prediction" };
            let why = match last {
                Some(region) => format!(
                    "region {} is the last that holds it, and is written as {written}",
                    self.foreground[region].0
                ),
                None => "no region holds it".into(),
            };
            warnings.push(format!(
                "label {label} {fate}: {why}; correct the order of `labels` or `regions_class_order` in dataset.json if \
                 that is not meant"
            ));
        }
        for &value in order.iter().filter(|value| !self.all_labels.contains(value)) {
            warnings.push(format!("`regions_class_order` writes {value}, which no entry of `labels` declares"));
        }
        warnings
    }

    /// Output channels of the network: regions, or classes with background.
    pub fn num_segmentation_heads(&self) -> usize {
        match self.class_order {
            Some(_) => self.foreground.len(),
            None => self.all_labels.len(),
        }
    }

    /// The annotated labels as class locations list them: -1 (outside the image) and every label but ignore.
    pub fn annotated(&self) -> LabelGroup {
        LabelGroup::Region([-1].iter().chain(&self.all_labels).copied().collect())
    }

    /// For every label value from 0 to the highest, and the one after it, the set of heads it belongs to, bit h for head h;
    /// the ignore label has none. `None` if there are more than 32 heads, which only label mode can have.
    ///
    /// In region mode this is all the loss kernel needs to decode targets; in label mode the set is the label itself.
    pub fn region_table(&self) -> Option<Vec<u32>> {
        let heads: Vec<LabelGroup> = match self.class_order {
            Some(_) => self.foreground(),
            None => self.all_labels.iter().map(|&l| LabelGroup::Label(l)).collect(),
        };
        if heads.len() > 32 {
            return None;
        }
        let mut table = vec![0; self.all_labels.len() + 1];
        for (bit, group) in heads.iter().enumerate() {
            for &label in group.members() {
                table[usize::from(label as u16)] |= 1 << bit;
            }
        }
        Some(table)
    }

    /// Segmentation from logits `[..., heads]`: the first maximum, or decoded regions (probability above one half is a
    /// logit above zero).
    ///
    /// # Errors
    /// [`Error::BufferLength`] if the buffer does not hold whole voxels.
    pub fn segmentation_from_logits(&self, logits: &[f32]) -> Result<Vec<u16>> {
        self.segmentation(logits, 0.0)
    }

    /// Segmentation from probabilities `[..., heads]`.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if the buffer does not hold whole voxels.
    pub fn segmentation_from_probabilities(&self, probabilities: &[f32]) -> Result<Vec<u16>> {
        self.segmentation(probabilities, 0.5)
    }

    /// Turns logits `[..., heads]` into probabilities in place: softmax over classes, or the sigmoid of each region.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if the buffer does not hold whole voxels.
    pub fn probabilities_from_logits(&self, logits: &mut [f32]) -> Result<()> {
        let heads = self.num_segmentation_heads();
        self.check_whole_voxels(logits.len())?;
        if self.has_regions() {
            logits.iter_mut().for_each(|logit| *logit = (1.0 / (1.0 + (-f64::from(*logit)).exp())) as f32);
            return Ok(());
        }
        for voxel in logits.chunks_exact_mut(heads) {
            let largest = f64::from(voxel[first_maximum(voxel)]);
            let exponential = |logit: f32| (f64::from(logit) - largest).exp();
            let sum: f64 = voxel.iter().map(|&logit| exponential(logit)).sum();
            voxel.iter_mut().for_each(|logit| *logit = (exponential(*logit) / sum) as f32);
        }
        Ok(())
    }

    fn check_whole_voxels(&self, scores: usize) -> Result<()> {
        let heads = self.num_segmentation_heads();
        if scores.is_multiple_of(heads) {
            return Ok(());
        }
        let expected = scores.next_multiple_of(heads);
        Err(Error::BufferLength { what: "scores of whole voxels", found: scores, expected })
    }

    fn segmentation(&self, scores: &[f32], threshold: f32) -> Result<Vec<u16>> {
        let heads = self.num_segmentation_heads();
        self.check_whole_voxels(scores.len())?;
        let voxels = scores.chunks_exact(heads);
        Ok(match &self.class_order {
            // Later regions overwrite earlier ones.
            Some(order) => voxels
                .map(|voxel| {
                    let last = voxel.iter().rposition(|&score| score > threshold);
                    last.map_or(0, |head| order[head] as u16)
                })
                .collect(),
            None => voxels.map(|voxel| first_maximum(voxel) as u16).collect(),
        })
    }
}

/// The place of the largest score, the first of several; 0 if there are none.
pub(crate) fn first_maximum(scores: &[f32]) -> usize {
    let mut best = 0;
    for (head, &score) in scores.iter().enumerate() {
        if score > scores[best] {
            best = head;
        }
    }
    best
}

/// A label's value as label maps hold it: two bytes, -1 for where there is no image, and one value more for the ignore
/// label.
fn label_value(value: i64) -> Option<i16> {
    i16::try_from(value).ok().filter(|label| (0..i16::MAX).contains(label))
}

fn values(entry: &LabelEntry) -> &[i64] {
    match entry {
        LabelEntry::Label(value) => std::slice::from_ref(value),
        LabelEntry::Region(values) => values,
    }
}

/// Foreground regions in the file's order: every entry that is not ignore and not background alone.
fn regions(json: &DatasetJson) -> Vec<(String, LabelGroup)> {
    json.labels
        .iter()
        .filter(|(name, entry)| name != "ignore" && values(entry).iter().any(|&v| v != 0))
        .map(|(name, entry)| {
            let group = match entry {
                LabelEntry::Label(value) => LabelGroup::Label(*value as i16),
                LabelEntry::Region(values) => LabelGroup::Region(values.iter().map(|&v| v as i16).collect()),
            };
            (name.clone(), group)
        })
        .collect()
}

fn class_order(json: &DatasetJson, regions: usize) -> Result<Vec<i16>> {
    let path = || json.path.clone();
    if regions > 32 {
        return Err(Error::Dataset(DatasetError::TooManyRegions { path: path(), found: regions }));
    }
    let order = json
        .regions_class_order
        .as_ref()
        .ok_or_else(|| Error::Dataset(DatasetError::RegionsClassOrderMissing { path: path() }))?;
    if order.len() != regions {
        return Err(Error::Dataset(DatasetError::RegionsClassOrderLength {
            path: path(),
            found: order.len(),
            expected: regions,
        }));
    }
    let label = |&value: &i64| {
        label_value(value).ok_or_else(|| {
            Error::Dataset(DatasetError::LabelOutOfRange { path: path(), name: "regions_class_order".into(), value })
        })
    };
    order.iter().map(label).collect()
}

/// Foreground labels in ascending order, named after the first entry that holds them.
fn single_labels(json: &DatasetJson, all_labels: &[i16]) -> Vec<(String, LabelGroup)> {
    let name_of = |label: i16| {
        json.labels
            .iter()
            .find(|(name, entry)| name != "ignore" && values(entry).contains(&i64::from(label)))
            .map_or_else(|| label.to_string(), |(name, _)| name.clone())
    };
    all_labels.iter().filter(|&&label| label != 0).map(|&label| (name_of(label), LabelGroup::Label(label))).collect()
}
