//! Why models of other programs cannot be read or written.

use std::path::PathBuf;

/// Why models of other programs cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// A zip archive is damaged, or made to do harm.
    #[error("{path}: {problem}; nothing was taken from this archive")]
    Archive {
        /// The archive.
        path: PathBuf,
        /// The entry and what is wrong with it.
        problem: String,
    },
    /// A file is none of `torch.save`, or damaged.
    #[error("{path}: not a checkpoint that torch.save wrote, or damaged: {problem}; copy or save the file again")]
    TorchFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A pickle names a class or function that a checkpoint has no need of.
    #[error(
        "{path}: its pickle asks for {name}. Only tensors and plain containers are read, and nothing in a pickle is run; if \
         you trust the file, load it in Python and save it again without that object"
    )]
    PickleGlobal {
        /// The file.
        path: PathBuf,
        /// Module and name of what is asked for.
        name: String,
    },
    /// A file is no postprocessing as nnU-Net pickles it.
    #[error(
        "{path}: not a postprocessing.pkl of nnU-Net, or damaged: {problem}; postprocessing.json beside it says the same"
    )]
    Postprocessing {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Tensors are missing, misshapen, unknown, or disagree with their aliases.
    #[error("{path}: {} tensors do not fit the network of the plans:\n  {}", .faults.len(), .faults.join("\n  "))]
    StateDict {
        /// The file.
        path: PathBuf,
        /// All faults.
        faults: Vec<String>,
    },
    /// A folder is not what nnU-Net makes of a trained model, or lacks what was asked for.
    #[error("{path}: {problem}")]
    ModelFolder {
        /// The folder.
        path: PathBuf,
        /// What is wrong and what helps.
        problem: String,
    },
    /// Folds of a model are missing.
    #[error("{path}: {problem}")]
    FoldMissing {
        /// The folder.
        path: PathBuf,
        /// Which are missing, and which are there.
        problem: String,
    },
    /// An archive has files that are there already.
    #[error("{path}: nothing was unpacked, as these files are there already: {}", .files.join(", "))]
    FilesThere {
        /// The folder of results.
        path: PathBuf,
        /// The files.
        files: Vec<String>,
    },
}
