//! Everything that a benchmark has measured, for a file.

use super::epoch::Length;
use super::profile::Profile;
use super::workload::Workload;
use crate::device::Device;
use crate::error::Result;
use crate::io::write_json;
use crate::train::EpochTimes;
use serde::Serialize;
use serde_json::json;
use std::path::Path;

/// What was measured, where, and with which versions.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The program's version.
    pub voxgrad: &'static str,
    /// The version of CubeCL that it is built with.
    pub cubecl: &'static str,
    /// The device.
    pub device: serde_json::Value,
    /// The network, patch, batch and precision.
    pub workload: serde_json::Value,
    /// Epochs on one batch of random data that is made once.
    pub without_loading: Option<EpochReport>,
    /// Epochs on real cases.
    pub with_loading: Option<EpochReport>,
    /// Where the time of a step goes.
    pub profile: Option<Profile>,
}

/// Epochs of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct EpochReport {
    /// Of each.
    pub iterations: usize,
    /// Of each.
    pub validation_iterations: usize,
    /// Seconds of the fastest: what nnU-Net's benchmark trainers report.
    pub fastest_epoch: f64,
    /// All of them.
    pub epochs: Vec<EpochTimes>,
}

impl EpochReport {
    /// Of epochs of such a length; `None` without any.
    pub fn new(length: Length, epochs: Vec<EpochTimes>) -> Option<Self> {
        let fastest_epoch = epochs.iter().map(|times| times.wall).min_by(f64::total_cmp)?;
        let Length { iterations, validation_iterations, .. } = length;
        Some(Self { iterations, validation_iterations, fastest_epoch, epochs })
    }
}

impl Report {
    /// Nothing measured yet.
    pub fn new(device: &Device, workload: &Workload) -> Self {
        let caps = device.context.caps();
        let features: Vec<usize> = workload.shape.stages.iter().map(|stage| stage.features).collect();
        Self {
            voxgrad: env!("CARGO_PKG_VERSION"),
            cubecl: env!("VOXGRAD_CUBECL"),
            device: json!({
                "device": device.found.choice.to_string(),
                "name": device.found.name,
                "cores": caps.cores,
                "f32_lanes": caps.lanes,
                "vector_registers": caps.cores.map(|_| caps.registers),
                "memory": caps.memory,
            }),
            workload: json!({
                "features": features,
                "encoder": format!("{:?}", workload.shape.encoder).to_lowercase(),
                "channels": workload.shape.channels_in,
                "heads": workload.shape.heads,
                "patch": workload.patch,
                "batch": workload.batch,
                "precision": workload.precision,
            }),
            without_loading: None,
            with_loading: None,
            profile: None,
        }
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io).
    pub fn write(&self, path: &Path) -> Result<()> {
        write_json(path, self)
    }
}
