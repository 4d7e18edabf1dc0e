//! The options that put an error right. The library's messages name none, since a program that embeds it has none.

use voxgrad::Error;
use voxgrad::error::{
    AnnotationError, DatasetError, ExchangeError, FileError, PlanError, PredictError, PreprocessError, SimulateError,
    TrainError,
};

/// The options of the command line that an error is about, in words; of several errors each option once.
pub fn advice(error: &anyhow::Error) -> Option<String> {
    let mut options = Vec::new();
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<Error>() {
            collect(error, &mut options);
        }
    }
    (!options.is_empty()).then(|| options.join("; "))
}

fn collect(error: &Error, options: &mut Vec<&'static str>) {
    let option = match error {
        Error::Several { faults } => return faults.iter().for_each(|fault| collect(fault, options)),
        Error::File(FileError::OutputExists { .. }) => "--overwrite replaces what this command made before",
        Error::Dataset(DatasetError::DatasetNotFound { .. } | DatasetError::FolderUnknown { .. }) => {
            "--raw, --preprocessed and --results name these folders"
        }
        Error::Annotation(AnnotationError::BudgetUnmet { .. }) => "--fraction sets the budget",
        Error::Annotation(AnnotationError::NotHeldOut { .. }) => {
            "--splits names the splits; `complete --all-folds` lets folds complete cases that they were trained on, \
             `suggest` without --held-out looks with all folds"
        }
        Error::Plan(PlanError::ImagesTooSmall { .. }) => "--overwrite-target-spacing sets the spacing",
        Error::Preprocess(PreprocessError::StoredCases { .. }) => {
            "`voxgrad preprocess` redoes what is not up to date; its --compat chooses between the two kinds of numbers"
        }
        Error::Annotation(AnnotationError::SegmentsUnknown { .. }) => {
            "--map SEGMENT=LABEL says which segment is which label"
        }
        Error::Simulate(SimulateError::OtherSettings { .. }) => "--overwrite makes these runs again",
        Error::Simulate(SimulateError::ShareMissed { .. }) => "--shares sets the shares",
        Error::Simulate(SimulateError::HeldOut { .. }) => "--fold chooses whose validation cases are held out",
        Error::Train(TrainError::SplitUnknown { .. } | TrainError::FoldUnknown { .. }) => "--fold names the fold",
        Error::Train(TrainError::CaseUnreadable { .. }) => {
            "--continue goes on from the saved state, with --skip-unreadable-cases without such cases"
        }
        Error::Train(TrainError::Continuation { .. }) => "leave these out, and they are what they were",
        Error::Train(TrainError::Loader { .. }) => "--loader-threads sets how many threads cut patches",
        Error::Train(TrainError::MemoryBudget { .. }) => "--memory-budget allows more",
        Error::Predict(PredictError::PredictionMemory { .. }) => "--precision f16 or bf16 takes 16 bits",
        Error::Predict(PredictError::NonFiniteLogits { .. }) => "--precision f32",
        Error::Exchange(ExchangeError::FoldMissing { .. }) => "-f names folds, -chk the checkpoint",
        Error::Exchange(ExchangeError::FilesThere { .. }) => "--overwrite replaces files",
        Error::Device(_) => "--device chooses the device",
        _ => return,
    };
    if !options.contains(&option) {
        options.push(option);
    }
}
