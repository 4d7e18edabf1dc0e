//! Which folds of a model look at a case, and whether the model is of the case's dataset at all.

use serde::Serialize;

use crate::dataset::splits::{Fold, Split};
use crate::dataset::{DatasetJson, LabelManager};
use crate::error::{AnnotationError, Error, Result};
use crate::exchange::TrainedModel;
use crate::train::Model;

/// Which folds look at a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Folds {
    /// Those that did not train on it; a case without such a fold is an error.
    HeldOut,
    /// Those that did not train on it, or without such a fold all.
    HeldOutOrAll,
    /// All.
    All,
}

/// The folds that look at a case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookers {
    /// Their places in [`TrainedModel::folds`]; at least one.
    pub folds: Vec<usize>,
    /// Whether none of them trained on the case.
    pub held_out: bool,
}

/// The folds that look at each of the `cases`. A checkpoint of this program knows the cases that it was trained on; for
/// those of nnU-Net, which do not, `splits` are what `splits_final.json` was when they were trained. A fold of which neither
/// says so is taken to have trained on every case.
///
/// # Errors
/// [`AnnotationError::NotHeldOut`] with all cases that no fold held out, if that is asked for.
pub fn lookers(model: &TrainedModel, splits: Option<&[Split]>, cases: &[String], asked: Folds) -> Result<Vec<Lookers>> {
    let mut training = Vec::with_capacity(model.folds.len());
    let mut unknown = Vec::new();
    for fold in &model.folds {
        let own = fold.checkpoint.cases.as_ref().map(|cases| cases.split.train.clone());
        let kept = match (fold.fold, splits) {
            (Fold::Index(index), Some(splits)) => splits.get(index).map(|split| split.train.clone()),
            _ => None,
        };
        let train = own.or(kept);
        if train.is_none() && fold.fold != Fold::All {
            unknown.push(fold.path.display().to_string());
        }
        training.push(train);
    }
    let all: Vec<usize> = (0..training.len()).collect();
    let mut without = Vec::new();
    let look = |case: &String| {
        let trained = |fold: usize| training[fold].as_ref().is_none_or(|train| train.contains(case));
        let held_out: Vec<usize> = all.iter().copied().filter(|&fold| !trained(fold)).collect();
        if held_out.is_empty() {
            without.push(case.clone());
        }
        match (asked, held_out.is_empty()) {
            (Folds::All, _) => Lookers { held_out: held_out.len() == all.len(), folds: all.clone() },
            (_, true) => Lookers { held_out: false, folds: all.clone() },
            (_, false) => Lookers { held_out: true, folds: held_out },
        }
    };
    let found = cases.iter().map(look).collect();
    if asked == Folds::HeldOut && !without.is_empty() {
        let folds = model.folds.iter().map(|fold| fold.fold.to_string()).collect();
        return Err(Error::Annotation(AnnotationError::NotHeldOut { cases: without, folds, unknown }));
    }
    Ok(found)
}

/// Whether a model predicts the labels of a dataset from its channels. Whether either has an ignore label is of no matter.
///
/// # Errors
/// [`AnnotationError::OtherDataset`] with all that differs.
pub fn check_same_dataset(model: &Model, json: &DatasetJson, labels: &LabelManager) -> Result<()> {
    let mut differences = Vec::new();
    let mut compare = |what: &str, ours: String, theirs: String| {
        if ours != theirs {
            differences.push(format!("{what}: the model has {ours}, the dataset {theirs}"));
        }
    };
    let (ours, theirs) = (&model.dataset.channel_names, &json.channel_names);
    compare("channels", format!("{ours:?}"), format!("{theirs:?}"));
    let meaning = |labels: &LabelManager| {
        let groups = labels.foreground();
        let named = labels.foreground_names().into_iter().zip(&groups);
        named.map(|(name, group)| format!("{name} {group}")).collect::<Vec<_>>().join(", ")
    };
    compare("labels", meaning(&model.labels), meaning(labels));
    let values = |labels: &LabelManager| format!("{:?}", labels.all_labels());
    compare("label values", values(&model.labels), values(labels));
    let order = |labels: &LabelManager| labels.regions_class_order().map(<[i16]>::to_vec).unwrap_or_default();
    let [ours, theirs] = [&model.labels, labels].map(order);
    compare("regions_class_order", format!("{ours:?}"), format!("{theirs:?}"));
    if let Some(value) = theirs.iter().find(|value| !labels.all_labels().contains(value)) {
        differences.push(format!("regions_class_order: {value} is written for a region, but no label has that value"));
    }
    match differences.is_empty() {
        true => Ok(()),
        false => Err(Error::Annotation(AnnotationError::OtherDataset { path: json.path.clone(), differences })),
    }
}
