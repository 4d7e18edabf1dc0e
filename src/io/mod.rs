//! Files in, arrays out: NIfTI images and label maps in (z, y, x) order.

mod atomic;
mod geometry;
mod header;
mod nifti;
mod stream;

pub use atomic::{write_atomically, write_json};
pub use geometry::Geometry;
pub use nifti::{
    Image, LabelMap, LabelVoxel, read_channels, read_image, read_labels, write_labels, write_labels_as_stored,
};
