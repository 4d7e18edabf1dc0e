//! From raw files to what training and inference see: crop, normalise, resample, locate the classes.

mod b2nd;
mod case;
pub(crate) mod chunks;
mod class_locations;
mod converted;
mod crop;
mod folder;
mod label_counts;
mod normalize;
mod npz;
mod parallel;
mod prepared;
mod raw;
pub mod resample;
mod stages;
pub mod store;

pub use b2nd::read_b2nd;
pub use case::{PreprocessedCase, Preprocessor, Properties};
pub use class_locations::ClassLocations;
pub use crop::{BoundingBox, crop_to_nonzero, nonzero_mask};
pub(crate) use folder::files_seen;
pub use folder::{
    CaseReport, OWN_FOLDER, case_path, cases_folder, made_with, move_stored, preprocess_folder, remove_stored,
    stored_names,
};
pub use label_counts::label_counts;
pub(crate) use label_counts::undeclared;
pub use normalize::{ChannelNormalization, Normalization};
pub use npz::read_npz;
pub use parallel::in_parallel;
pub(crate) use prepared::left_out;
pub use prepared::{Opened, Opening, PreparedCase};
pub use raw::{CaseHeaders, RawCase};
pub use stages::in_stages;
pub use store::StoredCase;
