//! Everything that can be wrong with a user's data, typed: one enum for each room of the library, and one over them.
//!
//! A message names the file (or case), the field and what to do about it, because it is usually read by someone who did
//! not write the file. Variants are one per cause so that callers, and tests, can tell causes apart. No message names an
//! option of the command line: a program that embeds this library has none.

mod annotation;
mod dataset;
mod evaluate;
mod exchange;
mod file;
mod network;
mod overall;
mod parallel;
mod plan;
mod predict;
mod preprocess;
mod simulate;
mod train;
mod values;

pub use annotation::AnnotationError;
pub use dataset::DatasetError;
pub use evaluate::EvaluateError;
pub use exchange::ExchangeError;
pub use file::FileError;
pub use network::NetworkError;
pub use overall::{Error, Result};
pub use parallel::ParallelError;
pub use plan::PlanError;
pub use predict::PredictError;
pub use preprocess::PreprocessError;
pub use simulate::SimulateError;
pub use train::TrainError;
pub use values::ValueSummary;
