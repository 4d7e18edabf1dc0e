//! Why ways of annotating cannot be compared.

use std::path::PathBuf;

/// Why ways of annotating cannot be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimulateError {
    /// Cases to evaluate on that do not leave a comparison.
    #[error("cases held out for evaluation: {problem}")]
    HeldOut {
        /// What is wrong with them.
        problem: String,
    },
    /// What is to be compared does not make a comparison.
    #[error("{what} `{name}` is named twice; name each once")]
    Twice {
        /// Strategy or seed.
        what: &'static str,
        /// Which.
        name: String,
    },
    /// Another process works in the folder.
    #[error("{folder}: another process is making this comparison; wait for it, or name another folder")]
    InUse {
        /// Folder of the comparison.
        folder: PathBuf,
    },
    /// A folder has runs that were made with other settings.
    #[error(
        "{folder} holds runs that were made otherwise: {}. Use the same settings, another folder, or have these runs made \
         again",
        differences.join("; ")
    )]
    OtherSettings {
        /// Folder of the comparison.
        folder: PathBuf,
        /// Each run with what differs, both values.
        differences: Vec<String>,
    },
    /// The annotation that was drawn is not as much as was asked for.
    #[error(
        "{strategy}, seed {seed}: {:.3} % of the voxels were asked for, {:.3} % is what was drawn; ask for a share that \
         the scheme can meet, or pool the budget over all cases",
        100.0 * asked, 100.0 * reached
    )]
    ShareMissed {
        /// Name of the strategy.
        strategy: String,
        /// Seed of the draw.
        seed: u64,
        /// The share asked for.
        asked: f64,
        /// The share drawn.
        reached: f64,
    },
    /// A prediction and the reference of its case lie on different grids.
    #[error("{reference} does not lie on the grid of its image: {problem}; export it on the image's grid")]
    Grid {
        /// The reference.
        reference: PathBuf,
        /// What differs.
        problem: String,
    },
}
