//! The error of everything: those of the rooms, and what concerns them all.

use super::annotation::AnnotationError;
use super::dataset::DatasetError;
use super::evaluate::EvaluateError;
use super::exchange::ExchangeError;
use super::file::FileError;
use super::network::NetworkError;
use super::parallel::ParallelError;
use super::plan::PlanError;
use super::predict::PredictError;
use super::preprocess::PreprocessError;
use super::simulate::SimulateError;
use super::train::TrainError;
use std::path::PathBuf;

/// Result of everything in this crate that reads user data.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What was wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Several faults at once, each on a line of its own.
    #[error("{} faults:\n  {}", .faults.len(), .faults.iter().map(Error::to_string).collect::<Vec<_>>().join("\n  "))]
    Several {
        /// All of them.
        faults: Vec<Error>,
    },
    /// What is wrong with a single file: the operating system refuses it, or its format is not what it must be.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is wrong with a raw dataset: its description, the names of its files, its volumes and labels.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// Why annotations cannot be made sparse, or not be taken over from another program.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// What is wrong with plans and splits.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// What is wrong with a case on its way to a preprocessed one, or with a stored one.
    #[error(transparent)]
    Preprocess(#[from] PreprocessError),
    /// Why a network cannot be built, filled or run on a device.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Why training cannot begin, go on or be continued.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Why the ranks of a training cannot begin, or go on, together.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
    /// Why a case cannot be predicted.
    #[error(transparent)]
    Predict(#[from] PredictError),
    /// Why ways of annotating cannot be compared.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// Why predictions cannot be compared with references.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// Why models of other programs cannot be read or written.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// A buffer has not the length that its shape says.
    #[error("{what}: {found} values where {expected} are needed")]
    BufferLength {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length its shape asks for.
        expected: usize,
    },
    /// A setting outside its valid range.
    #[error("setting `{setting}` is {value}: {expected}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// The value given.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// A kernel refused its arguments, or the device failed.
    #[error(transparent)]
    Kernel(#[from] crate::kernels::KernelError),
    /// A device could not be opened.
    #[error(transparent)]
    Device(#[from] crate::device::DeviceError),
}

impl Error {
    /// All faults as one error: the only one itself, none if there is none; of several among them each on its own.
    pub fn several(faults: Vec<Error>) -> Option<Self> {
        let single = |error| match error {
            Error::Several { faults } => faults,
            error => vec![error],
        };
        let mut faults: Vec<Error> = faults.into_iter().flat_map(single).collect();
        match faults.len() {
            0 | 1 => faults.pop(),
            _ => Some(Error::Several { faults }),
        }
    }

    /// Fails with all faults, if there are any.
    ///
    /// # Errors
    /// As [`several`](Self::several) puts them together.
    pub fn all(faults: Vec<Error>) -> Result<()> {
        Self::several(faults).map_or(Ok(()), Err)
    }

    /// Attaches a path and what was tried to an operating-system error; for `map_err`.
    pub fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| FileError::Io { path, action, source }.into()
    }
}
