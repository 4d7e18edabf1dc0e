//! Which part of the work is whose.

use crate::error::ParallelError;

/// The patches of a batch that a rank has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The first of them.
    pub first: usize,
    /// How many they are, at least 1.
    pub len: usize,
    /// Patches of the whole batch.
    pub batch: usize,
}

impl Share {
    /// The whole batch.
    pub fn whole(batch: usize) -> Self {
        Self { first: 0, len: batch, batch }
    }

    /// The share of a rank, as nnU-Net's: batch / size each, and one more for the first ranks where that leaves some over.
    ///
    /// # Errors
    /// [`ParallelError::TooManyRanks`] if there is not a patch for every rank.
    pub fn of_batch(batch: usize, rank: usize, size: usize) -> Result<Self, ParallelError> {
        if size == 0 || size > batch {
            return Err(ParallelError::TooManyRanks { ranks: size, batch });
        }
        let (each, over) = (batch / size, batch % size);
        Ok(Self { first: rank * each + rank.min(over), len: each + usize::from(rank < over), batch })
    }

    /// Whether a patch of the batch is one of them.
    pub fn contains(&self, index: usize) -> bool {
        (self.first..self.first + self.len).contains(&index)
    }
}

/// Which of some items are a rank's: every `size`-th from its own number on, as nnU-Net shares out validation cases.
pub fn shared_out<T: Clone>(items: &[T], rank: usize, size: usize) -> Vec<T> {
    items.iter().skip(rank).step_by(size.max(1)).cloned().collect()
}
