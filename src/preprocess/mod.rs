//! From raw files to what training and inference see: crop, normalise, resample, locate the classes.

mod b2nd;
mod case;
mod class_locations;
mod crop;
mod folder;
mod normalize;
mod npz;
pub mod resample;
pub mod store;

pub use b2nd::read_b2nd;
pub use case::{PreprocessedCase, Preprocessor, Properties, RawCase};
pub use class_locations::ClassLocations;
pub use crop::{BoundingBox, crop_to_nonzero, nonzero_mask};
pub use folder::{CaseReport, case_path, made_with, preprocess_folder};
pub use normalize::{ChannelNormalization, Normalization};
pub use npz::read_npz;
pub use store::{StoredCase, label_counts};
