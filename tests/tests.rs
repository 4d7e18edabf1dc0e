//! Behaviour against references, through the public API only. One binary: the heavy stack links once.

mod common;

/// Buffers, grids and the errors of a device.
mod context;
