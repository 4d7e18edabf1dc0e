//! Convolution on tensor cores, as an implicit matrix product: its left factor (the patches of the input, one row an output
//! voxel) is never stored, but put together in shared memory, a few channels of one tap at a time.
//!
//! Factors are f16 or bf16, as the activations are stored, with the weights rounded to the same type; sums are f32.
//! [`gather`] serves the same operations as the direct kernel, [`weight_gradient`] the gradient of the weights.
//!
//! A cube computes a block of the product: `planes[0] * fragments[0] * m` rows, `planes[1] * fragments[1] * n` columns,
//! where `(m, n, k)` is the product that the device's tensor cores take. What of a block lies outside (the last voxels,
//! channels that are no multiple of the tile, padding) is zero in shared memory and not stored.

pub(crate) mod gather;
mod plan;
mod product;
pub(crate) mod weight_gradient;

pub(crate) use plan::BlockPlan;
