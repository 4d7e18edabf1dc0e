//! The cases that a network trains on and is validated with, opened for patches to be cut from.

use super::checkpoint::{Model, TrainingCases};
use crate::compat::Compat;
use crate::dataset::splits::{Fold, Split};
use crate::dataset::{CaseFiles, Dataset};
use crate::device::free_memory;
use crate::error::{Error, Result, TrainError};
use crate::preprocess::{Opening, Preprocessor, left_out};
use crate::sample::{ChunkCache, PatchSource, patches_of};
use std::path::Path;
use std::sync::Arc;

/// Unpacked chunks of preprocessed cases that are kept in memory: 512 MiB.
const CACHE_BYTES: usize = 512 << 20;

/// A case to cut patches from.
pub type Case = Arc<dyn PatchSource + Send + Sync>;

/// Where the cases of a training come from.
#[derive(Clone, Copy, Debug)]
pub struct DataSource<'a> {
    /// The cases and their raw files; those of a case that has been preprocessed may be missing.
    pub dataset: &'a Dataset,
    /// The folder of the preprocessed cases. What is not there is preprocessed from its raw files, in memory.
    pub prepared: &'a Path,
    /// The fold, for the checkpoint.
    pub fold: Fold,
    /// Its cases.
    pub split: &'a Split,
    /// How ignored voxels must have been treated by preprocessing; `None` takes what is there.
    pub compat: Option<Compat>,
    /// Whether a preprocessed case that cannot be read is left out, with a note.
    pub skip_unreadable: bool,
}

/// The opened cases.
pub struct TrainingData {
    /// What a checkpoint keeps of them.
    pub cases: TrainingCases,
    /// To train on.
    pub training: Vec<Case>,
    /// To validate with; with fold `all` the same.
    pub validation: Vec<Case>,
    /// Share of the training cases' voxels that is annotated, after preprocessing.
    pub annotated: f64,
    /// What the user should know, cases without any annotation among it.
    pub notes: Vec<String>,
}

impl DataSource<'_> {
    /// Opens all cases. `on_case` is called after each, from several threads.
    ///
    /// # Errors
    /// Those of [`Opening::open`], and [`TrainError::NothingToLearn`].
    pub fn open(&self, model: &Model, on_case: impl Fn(&str) + Sync) -> Result<TrainingData> {
        let Split { train, val } = self.split;
        // With fold `all` a case is in both.
        let names = train.iter().chain(val.iter().filter(|name| !train.contains(name)));
        let files: Vec<&CaseFiles> =
            names.filter_map(|name| self.dataset.cases.iter().find(|case| case.name == *name)).collect();
        let preprocessor = Preprocessor::from_plans(
            &model.plans,
            &model.configuration,
            model.labels.clone(),
            self.compat.unwrap_or(Compat::Corrected),
        )?;
        let opening = Opening {
            prepared: self.prepared,
            data_identifier: &model.configuration.data_identifier,
            preprocessor: &preprocessor,
            compat: self.compat,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            memory: free_memory() / 2,
            skip_unreadable: self.skip_unreadable,
        };
        let opened = opening.open(&files, on_case)?;
        let mut notes = opened.notes;
        // Found now, and not when a patch shows it, perhaps after days.
        let largest = model.labels.expected_labels().into_iter().max().unwrap_or(0);
        let beyond = opened.cases.iter().filter_map(|case| {
            // -1 is where there is no image.
            let counts = case.label_counts().into_iter();
            let found: Box<[_]> = counts.filter(|(label, _)| !(-1..=largest).contains(label)).collect();
            let case = case.name().to_owned();
            (!found.is_empty()).then_some(Error::Train(TrainError::CaseLabel { case, found, largest }))
        });
        Error::all(beyond.collect())?;
        let (mut annotated, mut all) = (0, 0);
        let ignore = model.labels.ignore_label();
        for case in opened.cases.iter().filter(|case| train.iter().any(|name| name == case.name())) {
            let counts = case.label_counts();
            let voxels: u64 = counts.values().sum();
            let here = voxels - ignore.and_then(|ignore| counts.get(&ignore)).unwrap_or(&0);
            if here == 0 {
                notes.push(format!("case {} has no annotated voxel: nothing is learned from it", case.name()));
            }
            annotated += here;
            all += voxels;
        }
        if let (0, Some(ignore)) = (annotated, ignore) {
            return Err(Error::Train(TrainError::NothingToLearn { cases: train.len(), ignore }));
        }
        let cache = ChunkCache::new(CACHE_BYTES);
        let mut cases: Vec<Case> = Vec::with_capacity(opened.cases.len());
        for case in opened.cases {
            let name = case.name().to_owned();
            match patches_of(case, &cache) {
                Ok(case) => cases.push(case),
                Err(error) if self.skip_unreadable => notes.push(left_out(&name, &error)),
                Err(error) => return Err(error),
            }
        }
        let named = |names: &[String]| -> Vec<Case> {
            names.iter().filter_map(|name| cases.iter().find(|case| case.name() == name).cloned()).collect()
        };
        Ok(TrainingData {
            training: named(train),
            validation: named(val),
            cases: TrainingCases { fold: self.fold, split: self.split.clone(), compat: opened.compat },
            annotated: annotated as f64 / all.max(1) as f64,
            notes,
        })
    }
}
