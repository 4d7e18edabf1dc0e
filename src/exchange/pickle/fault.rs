//! What can be wrong with a pickle.

/// Why a pickle is not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It names a class or function that is not among the known ones.
    Global(String),
    /// It is damaged, or does what checkpoints do not.
    Damaged(String),
}

pub(super) fn damaged(problem: String) -> Fault {
    Fault::Damaged(problem)
}
