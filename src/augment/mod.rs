//! Random changes to training patches.

mod mirror;

pub use mirror::{flip, mirror};
