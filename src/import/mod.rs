//! Annotations as people make them, turned into a dataset with an ignore label: scribbles over an unlabelled value, files
//! of several annotators, one binary mask a class.
//!
//! What every value was turned into is counted for each case and kept in `import.json`; the rules are kept in
//! `dataset.json` under `annotation`.

mod dataset;
mod grid;
mod masks;
mod rules;
mod segments;

pub use dataset::{Report, import};
pub use grid::Turned;
pub use rules::{Annotations, Overlap, Segments, Settings};
