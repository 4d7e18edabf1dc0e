//! voxgrad trains, runs and evaluates nnU-Net-style 3D segmentation networks on sparsely annotated volumes.
//!
//! Modules are listed in layers: each imports only from layers above its own (`tests/host/imports.rs` checks it).
#![warn(missing_docs)]

pub use voxgrad_kernels as kernels;

// What everything stands on.
pub mod compilation;
pub mod device;
pub mod error;

// Files, rules and numbers of nnU-Net.
pub mod compat;
pub mod io;
pub mod numpy_random;
pub mod parallel;

pub mod dataset;

// The network, from buffers up.
pub mod tensor;

pub mod parameters;

mod fusion;
mod normalised;

pub mod tape;

pub mod ops;
pub mod optim;

pub mod nn;

pub mod loss;

// Cases, from raw to patches.
pub mod preprocess;

pub mod sparsify;

pub mod history;
pub mod import;
mod patch;
pub mod plan;

pub mod sample;

pub mod augment;
pub mod eval;
pub mod infer;
#[cfg(feature = "cli")]
pub mod report;

// Networks and cases together.
pub mod predict;

pub mod tune;

pub mod train;

// Models of other programs.
pub mod exchange;

// Models at work on annotations.
pub mod annotate;

// Whole experiments.
pub mod benchmark;
pub mod simulate;

pub use compat::Compat;
pub use error::{Error, Result};

/// The README's example is compiled and run as a test.
#[cfg(all(doctest, feature = "cpu"))]
#[doc = include_str!("../README.md")]
struct Readme;
