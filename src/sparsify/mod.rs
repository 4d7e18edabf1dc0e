//! From dense labels to sparse annotations with an ignore label: scribbles, slices, blocks, masks, and mixtures of them.

mod blocks;
mod check;
mod dataset;
mod drawn;
mod mask;
pub(crate) mod output;
mod plane;
pub(crate) mod report;
mod scheme;
mod scribbles;
pub mod slices;

pub use blocks::{Blocks, Budget};
pub use dataset::{Report, Settings, sparsify_dataset};
pub use drawn::Drawn;
pub use mask::{Mask, MaskRule};
pub use output::Transfer;
pub use report::{CaseReport, ClassReport, report_dense, table};
pub use scheme::{Mix, Scheme, draw};
pub use scribbles::Scribbles;
pub use slices::{PlaneList, Selection, Slices};
