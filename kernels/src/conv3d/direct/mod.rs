//! The products of the definition, added up in f32 in a register tile of each unit: for any shape, on any device. The CPU's
//! route beside Winograd's, and the portable one of GPUs.

pub(super) mod gather;
mod rows;
mod taps;
mod tile;
pub(super) mod weight_gradient;

pub(super) use gather::moment_parts;
pub(super) use tile::Tile;
