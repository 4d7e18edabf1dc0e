//! voxgrad trains, runs and evaluates nnU-Net-style 3D segmentation networks on sparsely annotated volumes.
//!
//! Modules are listed in the order of the data flow; each imports only from those above it.
#![warn(missing_docs)]

pub use voxgrad_kernels as kernels;

// The network's side.
pub mod device;
pub mod error;
mod fusion;
pub mod loss;
pub mod nn;
mod normalised;
pub mod ops;
pub mod optim;
pub mod parameters;
pub mod tape;
pub mod tensor;

// The data's side.
pub mod augment;
pub mod compat;
pub mod dataset;
pub mod eval;
pub mod history;
pub mod infer;
pub mod io;
pub mod numpy_random;
mod patch;
pub mod plan;
pub mod preprocess;
#[cfg(feature = "cli")]
pub mod report;
pub mod sample;
pub mod sparsify;

pub mod import;

// Both together.
pub mod predict;
pub mod train;
pub mod tune;

// Models of other programs.
pub mod exchange;

pub use compat::Compat;
pub use error::{Error, Result};

/// The README's example is compiled and run as a test.
#[cfg(all(doctest, feature = "cpu"))]
#[doc = include_str!("../README.md")]
struct Readme;
