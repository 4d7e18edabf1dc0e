//! nnU-Net's postprocessing: of the foreground, or of single classes or regions, only the largest connected component is
//! kept, where that made cross-validation better.

use std::fs;
use std::path::{Path, PathBuf};

use ndarray::Array3;
use rayon::prelude::*;
use serde_json::Value;

use super::classes::Classes;
use super::components::Components;
use super::confusion::JointHistogram;
use super::json::{Json, parse};
use super::summary::{CaseResult, Summary, evaluate_classes, files, read_pair};
use crate::dataset::{LabelGroup, LabelManager};
use crate::error::{Error, EvaluateError, FileError, Result};
use crate::io;

/// The function in nnU-Net that does the same.
pub const KEEP_LARGEST: &str = "remove_all_but_largest_component_from_segmentation";

/// What is done to segmentations, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Postprocessing {
    /// Labels or regions of which only the largest component is kept.
    pub keep_largest: Vec<LabelGroup>,
}

/// One operation that was tried on all cases.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// Of what the largest component was kept.
    pub group: LabelGroup,
    /// The Dice that decided, without the operation: the foreground's mean for the foreground, else the class's.
    pub before: f64,
    /// The same with it.
    pub after: f64,
    /// Whether the operation was taken.
    pub accepted: bool,
}

/// What was decided on, and what it changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Determined {
    /// The operations taken.
    pub postprocessing: Postprocessing,
    /// All that were tried.
    pub trials: Vec<Trial>,
    /// Scores without postprocessing.
    pub before: Summary,
    /// Scores with it.
    pub after: Summary,
    /// References without a prediction: decisions should see all cases.
    pub missing: usize,
}

/// Sets all voxels of a label or region to background that do not belong to its largest component, of 26 neighbours. If
/// several are the largest, all of them stay, as in nnU-Net. Returns how many voxels that changed.
pub fn keep_largest(labels: &mut Array3<i16>, group: &LabelGroup) -> u64 {
    let mask = labels.mapv(|label| group.contains(label));
    let components = Components::of(mask.view());
    let smaller = components.smaller();
    let mut changed = 0;
    for (label, &number) in labels.iter_mut().zip(&components.numbers) {
        if smaller[number as usize] {
            *label = 0;
            changed += 1;
        }
    }
    changed
}

impl Postprocessing {
    /// Does all of it to a segmentation.
    pub fn apply(&self, labels: &mut Array3<i16>) {
        self.keep_largest.iter().for_each(|group| _ = keep_largest(labels, group));
    }

    /// Reads `postprocessing.json`, nnU-Net's or this program's.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Json`]; [`FileError::Field`] for functions that are not known, and for labels that
    /// are none.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let json = parse(&text).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
        let wrong = |field: &str, problem: String| {
            Error::File(FileError::Field { path: path.into(), field: field.into(), problem })
        };
        let list = |field: &str| {
            json.get(field).and_then(Value::as_array).ok_or_else(|| wrong(field, "expected a list".into()))
        };
        let (functions, arguments) = (list("postprocessing_fns")?, list("postprocessing_kwargs")?);
        if functions.len() != arguments.len() {
            let problem = format!("{} entries for {} functions", arguments.len(), functions.len());
            return Err(wrong("postprocessing_kwargs", problem));
        }
        let mut keep_largest = Vec::with_capacity(functions.len());
        for (function, arguments) in functions.iter().zip(arguments) {
            if function != KEEP_LARGEST {
                return Err(wrong("postprocessing_fns", format!("{function} is not known, only {KEEP_LARGEST}")));
            }
            let group = arguments.get("labels_or_regions").and_then(group_of_json);
            keep_largest.push(group.ok_or_else(|| {
                wrong("postprocessing_kwargs", "expected `labels_or_regions` with labels, and nothing else".into())
            })?);
            if let Some((name, _)) =
                arguments.as_object().into_iter().flatten().find(|(name, _)| *name != "labels_or_regions")
            {
                return Err(wrong("postprocessing_kwargs", format!("`{name}` is not known")));
            }
        }
        Ok(Postprocessing { keep_largest })
    }

    /// Does it to all label maps of a folder with this ending, and writes them to another one in the voxel type of the
    /// originals. Returns how many that were. `observe` is called after each with their number.
    ///
    /// # Errors
    /// [`EvaluateError::NothingToEvaluate`]; [`FileError::OutputExists`] if one of the files is there and `overwrite` is not
    /// given, before anything is written; the errors of reading and writing NIfTI, all of them together, when all others are
    /// written.
    pub fn apply_to_folder(
        &self,
        input: &Path,
        output: &Path,
        file_ending: &str,
        overwrite: bool,
        observe: &(dyn Fn(usize) + Sync),
    ) -> Result<usize> {
        let (names, _) = files(input, file_ending)?;
        if names.is_empty() {
            return Err(EvaluateError::NothingToEvaluate { path: input.into(), ending: file_ending.into() }.into());
        }
        let there = names.iter().map(|name| output.join(name)).filter(|path| path.symlink_metadata().is_ok());
        let exists = |path| FileError::OutputExists { path, problem: "is there already".into() }.into();
        if !overwrite {
            Error::all(there.map(exists).collect())?;
        }
        fs::create_dir_all(output).map_err(Error::io(output, "create"))?;
        let one = |name: &String| -> Result<()> {
            let mut map = io::read_labels(&input.join(name))?;
            self.apply(&mut map.data);
            io::write_labels_as_stored(&output.join(name), map.data.view(), &map.geometry)
        };
        let names: Vec<String> = names.into_iter().collect();
        let done: Vec<Result<()>> = names
            .par_iter()
            .map(|name| {
                let done = one(name);
                observe(names.len());
                done
            })
            .collect();
        Error::all(done.into_iter().filter_map(Result::err).collect())?;
        Ok(names.len())
    }
}

/// A label, or a list of labels.
fn group_of_json(json: &Value) -> Option<LabelGroup> {
    let label = |value: &Value| value.as_i64().and_then(|label| i16::try_from(label).ok());
    match json {
        Value::Array(labels) => {
            // nnU-Net lets labels and regions stand in one list: together they are one mask.
            let flat =
                labels.iter().flat_map(|entry| entry.as_array().map_or(std::slice::from_ref(entry), Vec::as_slice));
            Some(LabelGroup::Region(flat.map(label).collect::<Option<_>>()?))
        }
        other => Some(LabelGroup::Label(label(other)?)),
    }
}

/// Decides on the postprocessing by the predictions of a cross-validation, as nnU-Net 2.8 does. First of all foreground
/// labels together: taken if the mean foreground Dice rises and no class falls. Then, if there are several, of each class
/// or region in their order, after what was taken before: taken if its own mean Dice rises. Where a mean is NaN nothing is
/// taken. With an ignore label, annotated voxels decide alone.
///
/// `observe` is called after each case of each trial with the number of them all.
///
/// # Errors
/// Those of [`evaluate_classes`].
pub fn determine(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    labels: &LabelManager,
    observe: &(dyn Fn(usize) + Sync),
) -> Result<Determined> {
    let classes = Classes::of(labels);
    let passes = if classes.groups.len() > 1 { 2 + classes.groups.len() } else { 2 };
    let each = |cases: usize| observe(passes * cases);
    let before = evaluate_classes(references, predictions, file_ending, &classes, true, &each)?;
    let (known, _) = files(references, file_ending)?;
    let missing = known.len() - before.cases.len();
    let (mut taken, mut trials, mut best) = (Postprocessing::default(), Vec::new(), before.clone());

    let foreground: Vec<i16> = labels.all_labels().iter().copied().filter(|&label| label != 0).collect();
    let together = LabelGroup::Region(foreground);
    let after = with_one_more(&taken, &together, &best, &each)?;
    let groups = 0..classes.groups.len();
    let some_class_falls = groups.clone().any(|group| after.mean(group)[0] < best.mean(group)[0]);
    let accepted = after.foreground_dice() > best.foreground_dice() && !some_class_falls;
    trials.push(Trial {
        group: together.clone(),
        before: best.foreground_dice(),
        after: after.foreground_dice(),
        accepted,
    });
    if accepted {
        taken.keep_largest.push(together);
        best = after;
    }
    for index in groups.filter(|_| classes.groups.len() > 1) {
        let group = &classes.groups[index];
        let after = with_one_more(&taken, group, &best, &each)?;
        let [without, with] = [&best, &after].map(|summary| summary.mean(index)[0]);
        trials.push(Trial { group: group.clone(), before: without, after: with, accepted: with > without });
        if with > without {
            taken.keep_largest.push(group.clone());
            best = after;
        }
    }
    Ok(Determined { postprocessing: taken, trials, before, after: best, missing })
}

/// The scores of the same cases with one operation after those that were taken.
fn with_one_more(
    taken: &Postprocessing,
    group: &LabelGroup,
    best: &Summary,
    observe: &(dyn Fn(usize) + Sync),
) -> Result<Summary> {
    let classes = &best.classes;
    let one = |case: &CaseResult| -> Result<CaseResult> {
        let [mut prediction, reference] = read_pair(&case.prediction_file, &case.reference_file)?;
        taken.apply(&mut prediction.data);
        if keep_largest(&mut prediction.data, group) == 0 {
            return Ok(case.clone());
        }
        let joint = JointHistogram::count(prediction.data.view(), reference.data.view());
        let counts = classes.groups.iter().map(|group| joint.confusion(group, classes.ignore)).collect();
        Ok(CaseResult { counts, ..case.clone() })
    };
    let cases: Vec<Result<CaseResult>> = best
        .cases
        .par_iter()
        .map(|case| {
            let result = one(case);
            observe(best.cases.len());
            result
        })
        .collect();
    let cases = cases.into_iter().collect::<Result<Vec<CaseResult>>>()?;
    Ok(Summary { cases, ..best.clone() })
}

impl Determined {
    /// The text of nnU-Net's `postprocessing.json`.
    pub fn to_json(&self) -> String {
        let label = |label: &i16| Json::Integer(u64::from(label.unsigned_abs()));
        let arguments = self.postprocessing.keep_largest.iter().map(|group| {
            let labels = match group {
                LabelGroup::Label(one) => label(one),
                LabelGroup::Region(labels) => Json::List(labels.iter().map(label).collect()),
            };
            Json::object([("labels_or_regions", labels)])
        });
        let functions = self.postprocessing.keep_largest.iter().map(|_| KEEP_LARGEST);
        Json::object([
            ("input_folder", Json::object(self.before.means())),
            ("postprocessed", Json::object(self.after.means())),
            ("postprocessing_fns", Json::texts(functions)),
            ("postprocessing_kwargs", Json::List(arguments.collect())),
        ])
        .to_text()
    }

    /// The scores with postprocessing, of files of the same names in the folder where they were written.
    pub fn after_in(&self, folder: &Path) -> Summary {
        let mut after = self.after.clone();
        for case in &mut after.cases {
            case.prediction_file = folder.join(case.prediction_file.file_name().map_or(PathBuf::new(), PathBuf::from));
        }
        after
    }
}
