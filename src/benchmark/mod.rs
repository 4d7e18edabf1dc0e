//! How fast a device trains a network: epochs as nnU-Net's benchmark trainers time them, and where the time of a step goes.

mod epoch;
mod profile;
mod report;
mod workload;

pub use epoch::{Length, with_loading, without_loading};
pub use profile::{Ceilings, KernelTimes, LaunchTimes, MemoryUse, Profile};
pub use report::{EpochReport, Report};
pub use workload::Workload;
