//! Patches of cases on disk: only the chunks that a patch touches are read, and those used last stay in memory.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::source::{PatchSource, overlap};
use crate::error::Result;
use crate::preprocess::{ClassLocations, PreparedCase, StoredCase};

/// Unpacked chunks of any number of cases, up to a number of bytes; the one used longest ago makes room first.
#[derive(Debug)]
pub struct ChunkCache {
    limit: usize,
    state: Mutex<State>,
}

/// A chunk by its case's number and its block.
type Key = (usize, usize);

#[derive(Debug, Default)]
struct State {
    cases: usize,
    /// Counts uses, so that the order of use is known.
    clock: u64,
    chunks: HashMap<Key, (u64, Arc<[u8]>)>,
    by_use: BTreeMap<u64, Key>,
    held: usize,
    bytes_read: u64,
}

impl ChunkCache {
    /// A cache of at most `limit` bytes of unpacked chunks. With 0 every patch is read anew.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(ChunkCache { limit, state: Mutex::default() })
    }

    /// Bytes of chunks read from disk so far, as they are stored there.
    pub fn bytes_read(&self) -> u64 {
        self.lock().bytes_read
    }

    /// Bytes of unpacked chunks that are held at present.
    pub fn bytes_held(&self) -> usize {
        self.lock().held
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chunk of a key, read if it is not there. The lock is not held meanwhile: two threads may read a chunk twice.
    fn get(&self, key: Key, read: impl FnOnce() -> Result<(Vec<u8>, u64)>) -> Result<Arc<[u8]>> {
        if let Some(found) = self.lock().used(key) {
            return Ok(found);
        }
        let (chunk, stored) = read()?;
        let chunk: Arc<[u8]> = chunk.into();
        let mut state = self.lock();
        state.bytes_read += stored;
        state.keep(key, &chunk, self.limit);
        Ok(chunk)
    }
}

impl State {
    fn used(&mut self, key: Key) -> Option<Arc<[u8]>> {
        let (last, chunk) = self.chunks.get_mut(&key)?;
        self.clock += 1;
        self.by_use.remove(last);
        *last = self.clock;
        self.by_use.insert(self.clock, key);
        Some(chunk.clone())
    }

    fn keep(&mut self, key: Key, chunk: &Arc<[u8]>, limit: usize) {
        if chunk.len() > limit || self.chunks.contains_key(&key) {
            return;
        }
        while self.held + chunk.len() > limit
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.held -= self.chunks.remove(&oldest).map_or(0, |(_, chunk)| chunk.len());
        }
        self.clock += 1;
        self.by_use.insert(self.clock, key);
        self.chunks.insert(key, (self.clock, chunk.clone()));
        self.held += chunk.len();
    }
}

/// A preprocessed case on disk from which patches are cut. In memory are its class locations, and what the cache holds.
#[derive(Debug)]
pub struct StoredPatches {
    case: StoredCase,
    locations: ClassLocations,
    cache: Arc<ChunkCache>,
    number: usize,
}

impl StoredPatches {
    /// Reads the header and the class locations of a stored case.
    ///
    /// # Errors
    /// Those of [`StoredCase::open`] and [`StoredCase::class_locations`].
    pub fn open(path: &Path, cache: &Arc<ChunkCache>) -> Result<Self> {
        Self::of(StoredCase::open(path)?, cache)
    }

    /// Takes an opened case.
    ///
    /// # Errors
    /// Those of [`StoredCase::class_locations`].
    pub fn of(case: StoredCase, cache: &Arc<ChunkCache>) -> Result<Self> {
        let locations = case.class_locations()?;
        let mut state = cache.lock();
        state.cases += 1;
        let number = state.cases;
        drop(state);
        Ok(StoredPatches { case, locations, cache: cache.clone(), number })
    }

    /// The case.
    pub fn case(&self) -> &StoredCase {
        &self.case
    }
}

/// Patches of an opened case, wherever it is.
///
/// # Errors
/// Those of [`StoredPatches::of`].
pub fn patches_of(case: PreparedCase, cache: &Arc<ChunkCache>) -> Result<Arc<dyn PatchSource + Send + Sync>> {
    Ok(match case {
        PreparedCase::Stored(case) => Arc::new(StoredPatches::of(*case, cache)?),
        PreparedCase::InMemory(case) => Arc::new(*case),
    })
}

impl PatchSource for StoredPatches {
    fn name(&self) -> &str {
        self.case.name()
    }

    fn channels(&self) -> usize {
        self.case.channels()
    }

    fn shape(&self) -> [usize; 3] {
        self.case.shape()
    }

    fn class_locations(&self) -> &ClassLocations {
        &self.locations
    }

    fn label_counts(&self) -> BTreeMap<i16, u64> {
        self.case.label_counts()
    }

    fn copy_patch(&self, start: [isize; 3], patch: [usize; 3], image: &mut [f32], labels: &mut [i16]) -> Result<()> {
        let shape = self.shape();
        let parts: [_; 3] = std::array::from_fn(|axis| overlap(start[axis], patch[axis], shape[axis]));
        if parts.map(|(_, _, count)| count) != patch {
            image.fill(0.0);
            labels.fill(-1);
        }
        let wanted = parts.map(|(_, from, count)| from..from + count);
        // First voxel of the volume's part in the patch, minus its place in the volume.
        let offset = parts.map(|(to, from, _)| to as isize - from as isize);
        let channels = self.channels();
        for chunk in self.case.touching(&wanted) {
            let rows = ChunkRows::new(&chunk.range, &wanted, offset, patch);
            for channel in 0..channels {
                let bytes = self.chunk::<4>(&chunk, channel)?;
                rows.copy(bytes.as_chunks().0, |at, word| image[at * channels + channel] = f32::from_le_bytes(word));
            }
            let bytes = self.chunk::<2>(&chunk, channels)?;
            rows.copy(bytes.as_chunks().0, |at, word| labels[at] = i16::from_le_bytes(word));
        }
        Ok(())
    }
}

impl StoredPatches {
    fn chunk<const N: usize>(&self, chunk: &crate::preprocess::chunks::Chunk, channel: usize) -> Result<Arc<[u8]>> {
        let block = self.case.block_of(channel, chunk);
        self.cache.get((self.number, block), || self.case.chunk::<N>(channel, chunk))
    }
}

/// The rows that a chunk and a patch have in common.
struct ChunkRows {
    common: [Range<usize>; 3],
    chunk: [Range<usize>; 3],
    offset: [isize; 3],
    patch: [usize; 3],
}

impl ChunkRows {
    fn new(chunk: &[Range<usize>; 3], wanted: &[Range<usize>; 3], offset: [isize; 3], patch: [usize; 3]) -> Self {
        let common = std::array::from_fn(|axis| {
            chunk[axis].start.max(wanted[axis].start)..chunk[axis].end.min(wanted[axis].end)
        });
        ChunkRows { common, chunk: chunk.clone(), offset, patch }
    }

    /// Calls `put` with the patch's linear index of every common voxel, and its value.
    fn copy<const N: usize>(&self, values: &[[u8; N]], mut put: impl FnMut(usize, [u8; N])) {
        let [z, y, x] = self.common.clone();
        let [_, height, width] = self.chunk.clone().map(|range| range.len());
        let place = |axis: usize, at: usize| at.wrapping_add_signed(self.offset[axis]);
        for plane in z {
            for row in y.clone() {
                let from = ((plane - self.chunk[0].start) * height + row - self.chunk[1].start) * width;
                let from = from + x.start - self.chunk[2].start;
                let to = (place(0, plane) * self.patch[1] + place(1, row)) * self.patch[2] + place(2, x.start);
                for (at, &value) in (to..).zip(&values[from..from + x.len()]) {
                    put(at, value);
                }
            }
        }
    }
}
