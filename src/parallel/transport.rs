//! What carries messages between ranks.

use crate::error::ParallelError;
use std::fmt::Debug;

/// A way between the ranks of a training. All ranks call the same functions in the same order; each call waits for all ranks.
///
/// Sums must be taken so that every rank has the same bits in the end, and the same bits in every run: the ranks then hold equal
/// weights without ever comparing them, and decide alike whether a step is taken.
pub trait Transport: Debug + Send + Sync {
    /// Which rank this is, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Overwrites `bytes` with those of rank `root`.
    ///
    /// # Errors
    /// [`ParallelError::RankLost`] with the rank that has failed, [`ParallelError::OutOfStep`] if the ranks do not ask for the
    /// same, [`ParallelError::Transport`] for what the transport reports.
    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<(), ParallelError>;

    /// Overwrites each value with its sum over all ranks.
    ///
    /// # Errors
    /// As [`Transport::broadcast`].
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), ParallelError>;

    /// The bytes of every rank, in the order of ranks. They need not be of one length.
    ///
    /// # Errors
    /// As [`Transport::broadcast`].
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, ParallelError>;

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// As [`Transport::broadcast`].
    fn barrier(&self) -> Result<(), ParallelError> {
        self.all_gather(&[]).map(drop)
    }
}

/// Values in a message of a large sum: 1 MiB. Short enough that a copy of it is nothing beside the whole, long enough that what
/// a message takes beside its bytes is little.
const BUCKET: usize = 1 << 18;

/// Sums `values` over all ranks, a bucket after the other.
///
/// # Errors
/// As [`Transport::all_reduce`].
pub fn reduce_in_buckets(transport: &dyn Transport, values: &mut [f32]) -> Result<(), ParallelError> {
    values.chunks_mut(BUCKET).try_for_each(|bucket| transport.all_reduce(bucket))
}

/// The numbers of every rank, in the order of ranks; they need not be equally many.
///
/// # Errors
/// As [`Transport::all_gather`], and [`ParallelError::Message`] for bytes that are no numbers.
pub fn gather_numbers<T: bytemuck::Pod>(transport: &dyn Transport, own: &[T]) -> Result<Vec<Vec<T>>, ParallelError> {
    let gathered = transport.all_gather(bytemuck::cast_slice(own))?;
    let numbers = |(rank, bytes): (usize, Vec<u8>)| match bytes.len().is_multiple_of(size_of::<T>()) {
        true => Ok(bytemuck::pod_collect_to_vec(&bytes)),
        false => {
            let problem = format!("{} bytes are no numbers of {} bytes", bytes.len(), size_of::<T>());
            Err(ParallelError::Message { rank, problem })
        }
    };
    gathered.into_iter().enumerate().map(numbers).collect()
}
