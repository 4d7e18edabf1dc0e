//! Behaviour against references, through the public API only. One binary: the heavy stack links once.

mod common;

/// Buffers, grids and the errors of a device.
mod context;

/// 3D convolution and its gradients.
mod conv3d;

/// Transposed convolution and its gradients.
mod conv_transpose3d;
/// Sums over rows.
mod reduce;

/// Filling, copying, converting, scaling, adding.
mod elementwise;

/// SGD, AdamW, the gradient's norm.
mod optimizer;
/// Dice and cross-entropy under an ignore mask.
mod loss;

/// Instance norm with leaky ReLU.
mod instance_norm;
