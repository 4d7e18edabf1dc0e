//! Hand-written [CubeCL](https://docs.rs/cubecl) kernels for training 3D segmentation networks: on the
//! CPU (in-process JIT), on Vulkan and on CUDA, from one source.
//!
//! # Conventions
//!
//! * Activations are contiguous and channels-last: `[batch, depth, height, width, channels]`.
//! * Convolution weights are `[kernel depth, kernel height, kernel width, channels in, channels out]`.
//! * A [`Buffer`] is flat; the `Problem` of each operation holds the shapes, and checks them once on the
//!   host. Kernels carry tail guards only.
//! * Storage may be f32 or, where the device has them, f16 and bf16. Sums, statistics, parameters and
//!   their gradients are f32.
//! * No float atomics: every reduction runs in a fixed order, so results are equal bit for bit from run
//!   to run on the same device.
//! * Outputs are overwritten unless a function says that it adds.
//!
//! Every kernel is written over a *plan* that is chosen on the host from the device's [`Caps`]. On
//! CubeCL's CPU runtime the units of a cube are the threads, so a plan there has as many units as the
//! machine has cores, each with a long strip or a large register tile; on a GPU strips are short and
//! units are many.
//!
//! How to call them from another engine: [`embedding`].
#![warn(missing_docs)]
#![allow(
    clippy::manual_div_ceil,
    clippy::manual_memcpy,
    clippy::needless_range_loop,
    reason = "kernels have neither iterators over slices nor copies of them"
)]

pub mod augment;
pub mod average_pool;
mod bf16;
mod block;
mod caps;
mod ceiling;
mod context;
pub mod conv3d;
pub mod conv_transpose3d;
mod dry;
mod dtype;
pub mod elementwise;
#[doc = include_str!("../EMBEDDING.md")]
pub mod embedding {}
mod error;
mod held;
pub mod instance_norm;
pub mod loss;
mod loss_scale;
pub mod optimizer;
mod profile;
pub mod reduce;
pub mod vector_math;
pub mod window;
mod work;

pub use caps::{Caps, TensorCoreTile};
pub use ceiling::{copy_rate, multiply_add_rate};
pub use context::{Buffer, Context};
pub use dtype::Dtype;
pub use error::KernelError;
pub use loss_scale::{LossScale, LossScaleState, Scale};
pub use profile::Launched;
pub use work::{Declared, Work};
