//! The design of a comparison, and what its observer is told.

use std::path::Path;

use super::annotate::Annotated;
use super::kept::Outcome;
use super::strategy::{NetworkPlan, Strategy};
use crate::dataset::Dataset;
use crate::{predict, train};

/// What is compared, on what, and how.
#[derive(Debug, Clone)]
pub struct Study<'a> {
    /// The densely labelled dataset.
    pub dataset: &'a Dataset,
    /// Cases to evaluate on. All others are annotated and trained on.
    pub held_out: Vec<String>,
    /// Folder of the comparison.
    pub folder: &'a Path,
    /// The ways of annotating.
    pub strategies: Vec<Strategy>,
    /// Each strategy is drawn and trained with each of these seeds; all strategies with the first seed come first.
    pub seeds: Vec<u64>,
    /// The network.
    pub network: NetworkPlan,
    /// How it trains; the seed is that of the run.
    pub training: train::Settings,
    /// How it predicts.
    pub prediction: predict::Settings,
    /// A checkpoint is written after every so many epochs.
    pub save_every: usize,
    /// Cases that are read at a time.
    pub workers: usize,
    /// Whether runs that were made with other settings are made again.
    pub again: bool,
}

/// What is going on in a run.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// Annotations are drawn first: how many are, of how many.
    Drawn(usize, usize),
    /// A run begins, or goes on from its checkpoint.
    Begun {
        /// Its strategy.
        strategy: &'a str,
        /// Its seed.
        seed: u64,
        /// Its place among the runs, from 1, and how many there are.
        place: (usize, usize),
    },
    /// Its annotation has been drawn.
    Annotated(&'a Annotated),
    /// A warning about its annotation or its cases.
    Note(&'a str),
    /// Training begins at this epoch, from 0.
    Training {
        /// The epoch.
        epoch: usize,
    },
    /// An iteration has been trained.
    Iteration(train::Report),
    /// A held-out case has been predicted: how many are done, of how many.
    Predicted(usize, usize),
    /// The run is finished, now or by an earlier call: all outcomes so far.
    Finished(&'a [Outcome]),
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// All runs are done.
    Finished(Vec<Outcome>),
    /// The observer asked to stop; the same call goes on.
    Stopped,
}
