//! The cases that patches are cut from: how often each, and what happens to one that cannot be read any more.

use super::PatchSource;
use crate::error::{DatasetError, Error, Result, TrainError};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Cases that could not be read any more, each with the reason.
#[derive(Debug, Default)]
pub struct Unreadable(Mutex<BTreeMap<String, String>>);

impl Unreadable {
    /// Their names and the reasons, sorted by name.
    pub fn all(&self) -> BTreeMap<String, String> {
        self.lock().clone()
    }

    fn contains(&self, case: &str) -> bool {
        self.lock().contains_key(case)
    }

    fn add(&self, case: &str, reason: &Error) {
        self.lock().insert(case.into(), reason.to_string());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The cases that patches are cut from.
#[derive(Debug)]
pub struct Pool<'a, S> {
    cases: &'a [S],
    /// Weights of the cases up to each, added up; empty where all cases weigh the same.
    sums: Vec<u64>,
    /// Where unreadable cases are noted; `None` where the first ends training.
    unreadable: Option<&'a Unreadable>,
}

impl<'a, S: PatchSource> Pool<'a, S> {
    /// Cases that are chosen equally often.
    pub fn new(cases: &'a [S]) -> Self {
        Pool { cases, sums: Vec::new(), unreadable: None }
    }

    /// Cases that are chosen in proportion to their annotated voxels: those of any label from 0 on but `ignore`. Counts
    /// the labels of cases in memory.
    ///
    /// # Errors
    /// [`DatasetError::NoCases`], or [`TrainError::NothingToLearn`] if no case has an annotated voxel.
    pub fn by_annotation(cases: &'a [S], ignore: Option<i16>) -> Result<Self> {
        let mut sum = 0;
        let sums: Vec<u64> = cases
            .iter()
            .map(|case| {
                let counts = case.label_counts().into_iter();
                sum += counts
                    .filter(|&(label, _)| label >= 0 && Some(label) != ignore)
                    .map(|(_, voxels)| voxels)
                    .sum::<u64>();
                sum
            })
            .collect();
        match (sums.last(), ignore) {
            (None, _) => Err(Error::Dataset(DatasetError::NoCases)),
            (Some(0), _) => {
                Err(Error::Train(TrainError::NothingToLearn { cases: cases.len(), ignore: ignore.unwrap_or(-1) }))
            }
            _ => Ok(Pool { cases, sums, unreadable: None }),
        }
    }

    /// The same, but cases that cannot be read are noted and left out.
    pub fn without_unreadable(self, noted: &'a Unreadable) -> Self {
        Pool { unreadable: Some(noted), ..self }
    }

    /// Channels of the first case.
    pub(super) fn channels(&self) -> Result<usize> {
        Ok(self.cases.first().ok_or(Error::Dataset(DatasetError::NoCases))?.channels())
    }

    /// A random case. There must be one.
    pub(super) fn choose(&self, rng: &mut ChaCha8Rng) -> &'a S {
        match self.sums.last() {
            None => &self.cases[rng.random_range(0..self.cases.len())],
            Some(&all) => {
                let drawn = rng.random_range(0..all);
                &self.cases[self.sums.partition_point(|&sum| sum <= drawn)]
            }
        }
    }

    /// Reads from a case unless it is known as unreadable. Whether it could be read; if not, training goes on without it.
    pub(super) fn is_readable(&self, case: &S, read: impl FnOnce() -> Result<()>) -> Result<bool> {
        let known = self.unreadable.is_some_and(|noted| noted.contains(case.name()));
        if !known {
            let Err(error) = read() else { return Ok(true) };
            let Some(noted) = self.unreadable else {
                return Err(Error::Train(TrainError::CaseUnreadable {
                    case: case.name().into(),
                    source: Box::new(error),
                }));
            };
            noted.add(case.name(), &error);
        }
        let noted = self.unreadable.map(Unreadable::all).unwrap_or_default();
        let weighs = |index: usize| match (index.checked_sub(1), self.sums.get(index)) {
            (_, None) => true,
            (None, Some(&sum)) => sum > 0,
            (Some(before), Some(sum)) => self.sums.get(before) != Some(sum),
        };
        let mut others = (0..self.cases.len()).filter(|&index| weighs(index));
        match others.any(|index| !noted.contains_key(self.cases[index].name())) {
            true => Ok(false),
            false => Err(Error::Train(TrainError::NoReadableCase {
                reasons: noted.iter().map(|(case, reason)| format!("{case}: {reason}")).collect(),
            })),
        }
    }
}
