//! From raw files to what training and inference see: crop, normalise, resample, locate the classes.

mod case;
mod class_locations;
mod crop;
mod normalize;
pub mod resample;

pub use case::{PreprocessedCase, Preprocessor, Properties, RawCase};
pub use class_locations::ClassLocations;
pub use crop::{BoundingBox, crop_to_nonzero, nonzero_mask};
pub use normalize::{ChannelNormalization, Normalization};
