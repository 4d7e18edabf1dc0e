//! A dataset folder in nnU-Net's layout: `dataset.json`, `imagesTr`, `labelsTr`.

mod case_files;
mod cases;
pub mod folders;
pub mod json;
pub mod labels;
mod opened;
pub mod plans;
pub mod splits;
mod support;

pub use case_files::CaseFiles;
pub use cases::{Cases, cases_in, list_cases};
pub use json::DatasetJson;
pub use labels::{LabelGroup, LabelManager};
pub use opened::Dataset;
