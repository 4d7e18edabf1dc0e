//! Why the ranks of a training cannot begin, or go on, together.

/// Why the ranks of a training cannot begin, or go on, together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParallelError {
    /// A rank has ended while others waited for it.
    #[error(
        "rank {rank} of {size} has ended while the others waited for it; its own messages say why. The last checkpoint \
         stands: go on from it"
    )]
    RankLost {
        /// The rank that is gone.
        rank: usize,
        /// How many there were.
        size: usize,
    },
    /// A rank asks for another exchange than the first one.
    #[error("rank {rank} asks for {found} where rank 0 asks for {expected}: they do not run the same program")]
    OutOfStep {
        /// The rank that differs.
        rank: usize,
        /// What it asks for.
        found: String,
        /// What the first rank asks for.
        expected: String,
    },
    /// A rank has other data, plans, settings or another version than the first one.
    #[error("rank {rank} has {what}: {found}, rank 0 has {expected}; give all ranks the same")]
    Differs {
        /// The rank that differs.
        rank: usize,
        /// What differs.
        what: String,
        /// Its value.
        found: String,
        /// That of the first rank.
        expected: String,
    },
    /// More ranks than a batch has patches.
    #[error("{ranks} ranks cannot share batches of {batch} patches; use {batch} at most, or plan a larger batch")]
    TooManyRanks {
        /// Ranks.
        ranks: usize,
        /// Patches of a batch.
        batch: usize,
    },
    /// A message of a rank is not what its sender should have written.
    #[error("the message of rank {rank} cannot be read: {problem}")]
    Message {
        /// The sender.
        rank: usize,
        /// What is wrong.
        problem: String,
    },
    /// What carries messages between ranks has failed.
    #[error("rank {rank} cannot reach the others: {problem}")]
    Transport {
        /// The rank whose transport failed.
        rank: usize,
        /// The transport's own words.
        problem: String,
    },
}
