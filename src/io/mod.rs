//! Files in, arrays out: NIfTI images and label maps in (z, y, x) order.

mod atomic;
mod geometry;
mod grid;
mod listing;
mod nifti;
mod nifti_header;
mod nifti_stream;
mod npz;
mod nrrd;

pub(crate) use atomic::{in_scratch, write_aside};
pub use atomic::{remove_if_there, remove_leftovers, write_atomically, write_json};
pub use geometry::Geometry;
pub use grid::grid_difference;
pub use listing::{Listing, is_file_name, list_folder};
pub use nifti::{
    Image, LabelMap, LabelVoxel, Overview, read_channels, read_image, read_labels, read_overview, write_image,
    write_labels, write_labels_as_stored, write_segmentation,
};
pub use npz::{read_npz_array, write_npz_array};
pub use nrrd::{Nrrd, read_nrrd};
