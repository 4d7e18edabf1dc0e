//! Why a network cannot be built, filled or run on a device.

use std::path::PathBuf;

/// Why a network cannot be built, filled or run on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The network that the plans describe cannot be built, or not be run on such a patch.
    #[error("plans, architecture.arch_kwargs.{field}: {problem}; correct the plans or plan again")]
    Architecture {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Training would not fit into the device.
    #[error(
        "{what} needs {needed} bytes, this device has room for {limit}; use a smaller patch size or batch size, or another \
         device"
    )]
    DeviceMemory {
        /// What is too large.
        what: &'static str,
        /// Its bytes.
        needed: u64,
        /// The largest number of bytes possible.
        limit: u64,
    },
    /// A file of measurements cannot be used.
    #[error("{path}: not usable for tuning: {problem}; delete the file to measure again")]
    Tuning {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A saved state does not fit the network.
    #[error("parameter {name} {problem}; the checkpoint belongs to other plans")]
    State {
        /// The parameter.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A checkpoint of a later version.
    #[error(
        "{path}: a checkpoint of version {version}, a later one than this program knows; use the program that wrote it"
    )]
    CheckpointVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: String,
    },
    /// A checkpoint cannot be read.
    #[error("{path}: not a usable checkpoint: {problem}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}
