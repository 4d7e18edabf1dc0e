//! Models that nnU-Net has trained, read without running any code of theirs, and models for nnU-Net: checkpoints, model
//! folders, archives of models.

mod archive;
mod bundle;
pub mod checkpoint;
mod folder;
pub mod pickle;
mod postprocessing;
mod pretrained;
mod properties;
pub mod state;
pub mod torch;

pub use bundle::{Bundle, Installed, export_zip, install_zip};
pub use folder::{CHECKPOINTS, Format, TrainedFold, TrainedModel, folds_in};
pub use postprocessing::{read_postprocessing, write_postprocessing};
pub use pretrained::load_pretrained;
pub use properties::write_properties;
