//! nnU-Net's training: epochs of SGD iterations on random patches, a validation of random patches after each, and a
//! state that can be saved between any two iterations and continued to the same bits.

mod asked;
mod checkpoint;
mod compile;
mod data;
mod loader;
mod memory;
mod precision;
mod progress;
pub mod run;
mod settings;
mod step;
mod trainer;

pub use crate::history::EpochTimes;
pub use asked::Asked;
pub use checkpoint::{Checkpoint, Model, Stored, TrainingCases};
pub use compile::compile;
pub use data::{Case, DataSource, TrainingData};
pub use loader::Loading;
pub use memory::{MemoryPlan, planned_memory};
pub use precision::Precision;
pub use progress::{Outcome, Progress, Report};
pub use settings::Settings;
pub use step::Step;
pub(crate) use trainer::ITERATIONS_PER_READ;
pub use trainer::Trainer;
