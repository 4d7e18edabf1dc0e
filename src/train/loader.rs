//! Batches cut by threads of their own, ahead of the training that needs them.
//!
//! Every batch has its own generator, derived from seed, epoch and iteration: which thread cuts it, and how many there
//! are, changes no bit, and where training stands needs no generator's state.

use crate::augment::{Augmenter, Draw};
use crate::error::{Error, Result, TrainError};
use crate::sample::{Batch, PatchSampler, PatchSource, Pool};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, Scope};
use std::time::Instant;

/// Batches that wait for the trainer and that are being cut take no more than this together, unless one thread's do:
/// 2 GiB.
const PREFETCHED_BYTES: u64 = 2 << 30;
/// More threads than these read no faster.
const MOST_THREADS: usize = 8;

/// How patches are loaded. None of this changes what is trained while all cases can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loading {
    /// Threads that cut patches, at least 1.
    pub threads: usize,
    /// Whether training goes on without a case that cannot be read any more.
    pub skip_unreadable: bool,
}

impl Default for Loading {
    /// A thread for every four cores, up to eight; an unreadable case ends training.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads: (cores / 4).clamp(1, MOST_THREADS), skip_unreadable: false }
    }
}

impl Loading {
    /// How many of the threads are used for batches of `bytes`: each has two, one that is being cut, and one that waits, or that
    /// the trainer works on.
    pub fn threads_for(&self, bytes: u64) -> usize {
        let fitting = PREFETCHED_BYTES / (2 * bytes).max(1);
        self.threads.min(fitting.try_into().unwrap_or(usize::MAX)).max(1)
    }

    /// Bytes of host memory that batches take at most.
    pub fn memory(&self, bytes: u64) -> u64 {
        2 * self.threads_for(bytes) as u64 * bytes
    }
}

/// What batches are for: training and validation draw from different generators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Training,
    Validation,
}

/// The generator of one batch.
fn generator(seed: u64, purpose: Purpose, epoch: usize, iteration: usize) -> ChaCha8Rng {
    let mut key = [0; 32];
    let parts = [seed, purpose as u64, epoch as u64, iteration as u64];
    key.as_chunks_mut::<8>().0.iter_mut().zip(parts).for_each(|(bytes, part)| *bytes = part.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// What is to be cut.
pub(super) struct LoaderWork<'a, S> {
    pub pool: Pool<'a, S>,
    pub sampler: PatchSampler,
    /// Draws how patches are augmented, if they are.
    pub augmenter: Option<Augmenter>,
    pub seed: u64,
    pub purpose: Purpose,
    pub epoch: usize,
}

/// A batch and how it is to be augmented.
pub(super) struct Loaded {
    pub batch: Batch,
    pub draws: Vec<Draw>,
    /// How long a thread worked on it.
    pub seconds: f64,
}

impl<S: PatchSource> LoaderWork<'_, S> {
    /// The batch of an iteration, in the buffers of an earlier one.
    fn load(&self, iteration: usize, mut batch: Batch) -> Result<Loaded> {
        let began = Instant::now();
        let mut random = generator(self.seed, self.purpose, self.epoch, iteration);
        self.sampler.fill(&self.pool, &mut random, &mut batch)?;
        let draws = self.augmenter.as_ref().map(|augmenter| augmenter.draw(&batch, &mut random));
        Ok(Loaded { batch, draws: draws.unwrap_or_default(), seconds: began.elapsed().as_secs_f64() })
    }
}

/// The trainer's end: batches in the order of their iterations. Threads end when it is dropped.
pub(super) struct Loader {
    /// Thread `t` of `n` cuts iterations `first + t`, `first + t + n`, ...: order needs no sorting.
    threads: Vec<(Receiver<Result<Loaded>>, Sender<Batch>)>,
    next: usize,
}

impl Loader {
    /// Starts threads that cut the batches of these iterations.
    pub fn start<'scope, 'env, S: PatchSource + Sync>(
        scope: &'scope Scope<'scope, 'env>,
        work: &'env LoaderWork<'env, S>,
        iterations: Range<usize>,
        threads: usize,
    ) -> Result<Self> {
        let threads = threads.min(iterations.len()).max(1);
        let start = |thread: usize| {
            let (loaded, receiver) = sync_channel(1);
            let (give_back, spare) = channel();
            let mine = (iterations.start + thread..iterations.end).step_by(threads);
            Builder::new()
                .name(format!("patches {thread}"))
                .spawn_scoped(scope, move || {
                    // A panic would go on in the scope, past the saving of what was trained; the closed channel tells of it.
                    let _ = catch_unwind(AssertUnwindSafe(|| cut(work, mine, &loaded, &spare)));
                })
                .map_err(|error| {
                    Error::Train(TrainError::Loader { problem: format!("cannot start a thread: {error}") })
                })?;
            Ok((receiver, give_back))
        };
        Ok(Self { threads: (0..threads).map(start).collect::<Result<_>>()?, next: 0 })
    }

    /// Waits for the next batch.
    pub fn next(&mut self) -> Result<Loaded> {
        let thread = self.next % self.threads.len();
        self.next += 1;
        let ended =
            |_| Error::Train(TrainError::Loader { problem: "a thread has ended before its work was done".into() });
        self.threads[thread].0.recv().map_err(ended)?
    }

    /// Hands the buffers of the batch that came last back, to be filled again.
    pub fn give_back(&self, batch: Batch) {
        // A thread that has nothing to do any more needs no buffers.
        let _ = self.threads[(self.next + self.threads.len() - 1) % self.threads.len()].1.send(batch);
    }
}

/// Cuts one batch after the other, as soon as the one before was taken.
fn cut<S: PatchSource>(
    work: &LoaderWork<S>,
    iterations: impl Iterator<Item = usize>,
    loaded: &SyncSender<Result<Loaded>>,
    spare: &Receiver<Batch>,
) {
    for (cut, iteration) in iterations.enumerate() {
        // Two batches, and after them those that the trainer has given back; it does so before it asks for another.
        let batch = match cut {
            0 | 1 => Batch::default(),
            _ => match spare.recv() {
                Ok(batch) => batch,
                Err(_) => return,
            },
        };
        let result = work.load(iteration, batch);
        let failed = result.is_err();
        if loaded.send(result).is_err() || failed {
            return;
        }
    }
}
