//! What is scored: labels or regions with their names, and which voxels nobody annotated.

use crate::dataset::{LabelGroup, LabelManager};
use crate::error::{Error, Result};

/// Labels or regions that are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classes {
    /// Names for people, parallel to `groups`.
    pub names: Vec<String>,
    /// The labels or regions.
    pub groups: Vec<LabelGroup>,
    /// Reference voxels of this label are not looked at.
    pub ignore: Option<i16>,
    /// Labels that may occur; `None` if nobody declared any.
    declared: Option<Vec<i16>>,
}

impl Classes {
    /// The foreground of a dataset.
    pub fn of(labels: &LabelManager) -> Self {
        Classes {
            names: labels.foreground_names().into_iter().map(String::from).collect(),
            groups: labels.foreground(),
            ignore: labels.ignore_label(),
            declared: Some(labels.all_labels().to_vec()),
        }
    }

    /// Labels or regions that somebody listed, without a dataset's description: their names are their values.
    ///
    /// # Errors
    /// [`Error::Setting`] if none is listed, one twice, or the ignore label among them.
    pub fn listed(groups: Vec<LabelGroup>, ignore: Option<i16>) -> Result<Self> {
        let wrong = |value: String, expected| Error::Setting { setting: "labels", value, expected };
        if groups.is_empty() {
            return Err(wrong("empty".into(), "expected at least one label"));
        }
        for (place, group) in groups.iter().enumerate() {
            if groups[..place].contains(group) {
                return Err(wrong(format!("{group} twice"), "expected each label once"));
            }
            if ignore.is_some_and(|ignore| group.contains(ignore)) {
                return Err(wrong(
                    group.to_string(),
                    "expected no label that is ignored: its voxels are not looked at",
                ));
            }
        }
        let names = groups.iter().map(LabelGroup::to_string).collect();
        Ok(Classes { names, groups, ignore, declared: None })
    }

    /// Whether a prediction may hold a label. The ignore label is for annotations: nothing predicts it.
    pub(super) fn may_be_predicted(&self, label: i16) -> bool {
        self.declared.as_ref().is_none_or(|declared| declared.contains(&label))
    }

    /// Whether a reference may hold a label.
    pub(super) fn may_be_true(&self, label: i16) -> bool {
        Some(label) == self.ignore || self.may_be_predicted(label)
    }

    /// What may be predicted, for a message.
    pub(super) fn declared(&self) -> &[i16] {
        self.declared.as_deref().unwrap_or_default()
    }
}
