//! Choosing and opening a device. The only module that names CubeCL's runtimes.

use crate::kernels::{Caps, Context};
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig as _, streaming::StreamPolicy};
use cubecl::device::WgpuDeviceKind;
use std::sync::Once;

/// What a user may ask for: `auto`, `cpu`, `vulkan[:n]` or `cuda[:n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA if there is one, else a Vulkan GPU, else the CPU runtime. A software Vulkan driver is never taken.
    Auto,
    /// CubeCL's CPU runtime: needs no driver.
    Cpu,
    /// The n-th Vulkan device as `voxgrad devices` lists them.
    Vulkan(usize),
    /// The n-th CUDA device.
    Cuda(usize),
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The text names no device.
    #[error("{text}: unknown device; use auto, cpu, vulkan, vulkan:N, cuda or cuda:N")]
    Unknown {
        /// What was asked for.
        text: String,
    },
    /// The device is not there, or this build has no code for it.
    #[error("device {wanted}: {reason}; found here: {found}")]
    NotFound {
        /// What was asked for.
        wanted: String,
        /// The runtime's reason.
        reason: String,
        /// The devices that are there.
        found: String,
    },
}

impl std::str::FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown { text: text.to_string() };
        let (name, index) = match text.split_once(':') {
            Some((name, index)) => (name, Some(index.parse::<usize>().map_err(|_| unknown())?)),
            None => (text, None),
        };
        match (name, index) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("vulkan", index) => Ok(Self::Vulkan(index.unwrap_or(0))),
            ("cuda", index) => Ok(Self::Cuda(index.unwrap_or(0))),
            _ => Err(unknown()),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Vulkan(index) => write!(f, "vulkan:{index}"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// A device that is there, and how to ask for it.
#[derive(Clone, Debug)]
pub struct Found {
    /// The `--device` that opens it.
    pub choice: DeviceChoice,
    /// The driver's name of it.
    pub name: String,
    /// Vulkan on the CPU (lavapipe, SwiftShader): only used when asked for.
    pub software: bool,
    /// What it can do.
    pub caps: Caps,
}

/// An opened device: where to launch, and what to call it.
#[derive(Clone, Debug)]
pub struct Device {
    /// Where kernels are launched.
    pub context: Context,
    /// How it was found.
    pub found: Found,
}

/// All devices that this build can use on this machine, in the order in which `auto` prefers them.
pub fn list() -> Vec<Found> {
    candidates(Software::Taken).map(|device| device.found).collect()
}

/// Opens a device.
///
/// # Errors
/// [`DeviceError::NotFound`] if it is not there, with the list of those that are.
pub fn open(choice: DeviceChoice) -> Result<Device, DeviceError> {
    match choice {
        // Without looking at drivers: the default must work where one is broken.
        DeviceChoice::Cpu => cpu().ok_or_else(|| not_found(choice, "this build has no cpu feature")),
        DeviceChoice::Auto => candidates(Software::Left)
            .next()
            .ok_or_else(|| not_found(choice, "no CUDA device, no Vulkan GPU and no cpu feature")),
        DeviceChoice::Vulkan(_) => vulkan(Software::Taken)
            .find(|device| device.found.choice == choice)
            .ok_or_else(|| not_found(choice, "no such Vulkan device")),
        DeviceChoice::Cuda(index) => cuda(index).ok_or_else(|| not_found(choice, "no such CUDA device")),
    }
}

fn not_found(wanted: DeviceChoice, reason: &str) -> DeviceError {
    let found: Vec<String> = list().iter().map(|f| format!("{} ({})", f.choice, f.name)).collect();
    let found = if found.is_empty() { "none".to_string() } else { found.join(", ") };
    DeviceError::NotFound { wanted: wanted.to_string(), reason: reason.to_string(), found }
}

/// Whether Vulkan devices that are software are opened too.
#[derive(Clone, Copy, PartialEq)]
enum Software {
    Taken,
    Left,
}

/// The devices in the order of preference, each opened when the iterator comes to it: no device is touched behind the one
/// that is taken.
fn candidates(software: Software) -> impl Iterator<Item = Device> {
    (0..).map_while(cuda).chain(vulkan(software)).chain(std::iter::once_with(cpu).flatten())
}

fn opened(choice: DeviceChoice, device: cubecl::Device, software: bool) -> Device {
    static ONE_STREAM: Once = Once::new();
    ONE_STREAM.call_once(|| {
        // Each host thread would else get a stream and a memory pool of its own.
        let mut config = CubeClRuntimeConfig::default();
        config.streaming.policy = StreamPolicy::Single;
        CubeClRuntimeConfig::set(config);
    });
    let client = device.client();
    let name = client.properties().identity.name.clone();
    let context = Context::new(client);
    let caps = context.caps().clone();
    Device { context, found: Found { choice, name, software, caps } }
}

fn cpu() -> Option<Device> {
    cubecl::Device::cpu().ok().map(|device| opened(DeviceChoice::Cpu, device, false))
}

fn cuda(index: usize) -> Option<Device> {
    let device = cubecl::Device::cuda(index).ok()?;
    Some(opened(DeviceChoice::Cuda(index), device, false))
}

fn vulkan(software: Software) -> impl Iterator<Item = Device> {
    let all = |kind: fn(usize) -> WgpuDeviceKind| (0..).map_while(move |n| cubecl::Device::vulkan(kind(n)).ok());
    let gpus = all(WgpuDeviceKind::DiscreteGpu)
        .chain(all(WgpuDeviceKind::IntegratedGpu))
        .chain(all(WgpuDeviceKind::VirtualGpu))
        .map(|device| (device, false));
    let on_cpu =
        move || (software == Software::Taken).then(|| cubecl::Device::vulkan(WgpuDeviceKind::Cpu).ok()).flatten();
    let kinds = gpus.chain(std::iter::once_with(on_cpu).flatten().map(|device| (device, true)));
    kinds.enumerate().map(|(index, (device, software))| opened(DeviceChoice::Vulkan(index), device, software))
}

/// Bytes of this machine's memory, or of the control group's share of it; `None` where the system does not tell.
pub fn host_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let total = system.cgroup_limits().map_or(system.total_memory(), |limits| limits.total_memory);
    (total > 0).then_some(total)
}

/// Bytes of memory that no program uses; 16 GiB where the system does not tell.
pub fn free_memory() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let free = system.cgroup_limits().map_or(system.available_memory(), |limits| limits.free_memory);
    if free > 0 { free } else { 16 << 30 }
}
