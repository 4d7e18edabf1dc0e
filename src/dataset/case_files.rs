//! The files of a case.

use std::path::PathBuf;

/// Files of one case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseFiles {
    /// Case identifier: the file name without channel number and ending.
    pub name: String,
    /// One image per channel, in channel order.
    pub images: Vec<PathBuf>,
    /// The label map; absent for test cases.
    pub label: Option<PathBuf>,
}
