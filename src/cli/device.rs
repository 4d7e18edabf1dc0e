//! Where, and with which algorithms, to compute.

use voxgrad::device::{self, Device, DeviceChoice};

/// Where to compute.
#[derive(clap::Args)]
pub(super) struct DeviceArgument {
    /// auto, cpu, vulkan, vulkan:N, cuda or cuda:N. auto takes CUDA, else a Vulkan GPU, else the CPU.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub(super) device: String,
}

/// With which algorithms to compute.
#[derive(clap::Args)]
pub(super) struct ExactArgument {
    /// Convolve by adding up the products of the definition only, without Winograd's algorithm: slower, and rounded a
    /// little less. What was trained so is continued, validated and predicted so.
    #[arg(long)]
    pub(super) exact: bool,
}

impl DeviceArgument {
    pub(super) fn open(&self) -> anyhow::Result<Device> {
        let choice: DeviceChoice = self.device.parse()?;
        let device = device::open(choice)?;
        println!("device: {} ({})", device.found.choice, device.found.name);
        Ok(device)
    }
}
