//! voxgrad trains, runs and evaluates nnU-Net-style 3D segmentation networks on sparsely annotated volumes.
#![warn(missing_docs)]

pub use voxgrad_kernels as kernels;

pub mod device;
