//! What is decided from a whole dataset before any case is preprocessed: what is wrong with it, its fingerprint, and nnU-Net's
//! plans for it.

mod budget;
pub mod fingerprint;
pub mod planner;
pub mod topology;
pub mod verify;
