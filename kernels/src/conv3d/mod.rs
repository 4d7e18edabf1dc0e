//! 3D convolution with "same" padding, as nnU-Net's blocks use it: kernels of 1 and 3 per axis in any mix,
//! strides of 1 and 2 per axis in any mix, with bias; forward, and the gradients of input, weights and bias.
//!
//! The input may be the concatenation of two tensors along the channels, which is then never written.
//!
//! A pass of a [`Problem`] goes by a [`Route`], chosen in one place by what the device can do and by a [`Policy`]; each route
//! has a folder of kernels. They all compute the same few operations, which `gather.rs` describes. What the next instance norm
//! has to know of an output, or of a gradient, a pass can take on the way to memory.

pub(crate) mod axes;
mod direct;
pub(crate) mod gather;
mod igemm;
pub(crate) mod pack;
mod parts;
mod patch;
mod problem;
pub(crate) mod route;
pub(crate) mod run;
mod tiled;
mod winograd;

pub use problem::{Pass, Problem};
pub use route::{Policy, Route};
pub use run::{
    NormBefore, backward_data, backward_data_with_sums, backward_weight, computed, forward, forward_with_moments,
};
