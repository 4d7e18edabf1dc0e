//! Mutated NIfTI files: no panic, no hang, no more memory than the file justifies.
//!
//! Runs for `VOXGRAD_FUZZ_SECONDS` (default 5). Every run begins elsewhere unless `VOXGRAD_FUZZ_SEED` says where; what
//! fails is shrunk and printed. The corpus is tests/data/hostile_nifti.

use crate::common::data;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use voxgrad::io::{read_channels, read_image, read_labels};

/// The system's allocator, which counts for each thread what it holds and the most it has held.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + change);
        PEAK.try_with(|peak| peak.set(peak.get().max(held.get())))
    });
}

// SAFETY: every call is the system allocator's with the same arguments; counting touches two cells and never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Most bytes held at a time by this thread during `work`, beyond what it held before.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = HELD.get();
    PEAK.set(before);
    work();
    (PEAK.get() - before).max(0) as usize
}

/// A change of a file.
#[derive(Debug, Clone)]
enum Change {
    /// A byte, anywhere.
    Byte(prop::sample::Index, u8),
    /// A byte of the header.
    Header(usize, u8),
    /// One of the eight `dim` fields.
    Dim(usize, i16),
    /// `vox_offset`, a `pixdim`, `scl_slope` or `scl_inter`.
    Float(usize, f32),
    /// Type and its bits, consistent with each other.
    Datatype(i16, i16),
    /// The rest falls away.
    Cut(prop::sample::Index),
    /// A run of equal bytes is put in.
    Insert(prop::sample::Index, u8, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    let extreme = prop_oneof![Just(0i16), Just(1), Just(-1), Just(i16::MAX), Just(i16::MIN), any::<i16>(), 1i16..40];
    let floats = prop_oneof![Just(0f32), Just(f32::NAN), Just(f32::INFINITY), Just(-1.0), Just(1e30), any::<f32>()];
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, value)| Change::Byte(at, value)),
        (0usize..352, any::<u8>()).prop_map(|(at, value)| Change::Header(at, value)),
        (0usize..8, extreme).prop_map(|(axis, value)| Change::Dim(axis, value)),
        (prop::sample::select(vec![76usize, 80, 84, 88, 92, 108, 112, 116]), floats)
            .prop_map(|(at, value)| Change::Float(at, value)),
        prop::sample::select(vec![
            (2i16, 8i16),
            (4, 16),
            (8, 32),
            (16, 32),
            (64, 64),
            (256, 8),
            (1024, 64),
            (1792, 128)
        ])
        .prop_map(|(code, bits)| Change::Datatype(code, bits)),
        index().prop_map(Change::Cut),
        (index(), any::<u8>(), 0usize..5000).prop_map(|(at, value, count)| Change::Insert(at, value, count)),
    ]
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    if let Some(old) = bytes.get_mut(at..at + new.len()) {
        old.copy_from_slice(new);
    }
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Change::Byte(at, value) if !bytes.is_empty() => {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            Change::Byte(..) => {}
            Change::Header(at, value) => put(bytes, *at, &[*value]),
            Change::Dim(axis, value) => put(bytes, 40 + 2 * axis, &value.to_le_bytes()),
            Change::Float(at, value) => put(bytes, *at, &value.to_le_bytes()),
            Change::Datatype(code, bits) => put(bytes, 70, &[code.to_le_bytes(), bits.to_le_bytes()].concat()),
            Change::Cut(at) => bytes.truncate(at.index(bytes.len() + 1)),
            Change::Insert(at, value, count) => {
                let at = at.index(bytes.len() + 1);
                bytes.splice(at..at, std::iter::repeat_n(*value, *count));
            }
        }
    }
}

/// A file of the corpus, changed before it is compressed, and after.
#[derive(Debug, Clone)]
struct Mutant {
    seed: usize,
    inner: Vec<Change>,
    /// Compressed once more, followed by this many MiB of zeros: a bomb.
    gzip: Option<usize>,
    outer: Vec<Change>,
}

fn mutant(corpus: usize) -> impl Strategy<Value = Mutant> {
    let changes = |most| prop::collection::vec(change(), 0..most);
    let gzip = prop_oneof![10 => Just(None), 20 => Just(Some(0)), 1 => (1usize..8).prop_map(Some)];
    (0..corpus, changes(6), gzip, changes(3)).prop_map(|(seed, inner, gzip, outer)| Mutant { seed, inner, gzip, outer })
}

impl Mutant {
    fn bytes(&self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.seed].clone();
        self.inner.iter().for_each(|change| change.apply(&mut bytes));
        if let Some(bomb) = self.gzip {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&bytes).unwrap();
            (0..bomb).for_each(|_| encoder.write_all(&[0; 1 << 20]).unwrap());
            bytes = encoder.finish().unwrap();
        }
        self.outer.iter().for_each(|change| change.apply(&mut bytes));
        bytes
    }
}

/// Bytes of voxels that a file of this length can hold at most: as many as it has, or deflate's limit.
fn content(bytes: &[u8]) -> usize {
    if bytes.starts_with(&[0x1f, 0x8b]) { 1032 * bytes.len() } else { bytes.len() }
}

/// Reads a file in every way. Memory may hold its content twice, growing, and one f32 or label for each byte of it.
fn judge(path: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(path, bytes).unwrap();
    let allowed = 6 * content(bytes) + (1 << 18);
    let started = Instant::now();
    let mut held = 0;
    catch_unwind(AssertUnwindSafe(|| {
        held = peak_of(|| {
            let _ = read_image(path);
            let _ = read_labels(path);
            let _ = read_channels(path);
        });
    }))
    .map_err(|_| "panicked")?;
    let seconds = started.elapsed().as_secs_f64();
    if held > allowed {
        return Err(format!("held {held} bytes for a file of {} bytes, {allowed} allowed", bytes.len()));
    }
    if seconds > 20.0 {
        return Err(format!("took {seconds} s for a file of {} bytes", bytes.len()));
    }
    Ok(())
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn mutated_nifti_files() {
    let mut paths: Vec<_> =
        std::fs::read_dir(data("hostile_nifti")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.is_file() && path.extension().is_none_or(|ending| ending != "tsv"));
    paths.sort();
    let mut corpus: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    // Uncompressed files come twice as often as what is compressed or not NIfTI at all.
    corpus.extend(corpus.clone().into_iter().filter(|bytes| bytes.get(344..347) == Some(b"n+1")));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mutant.nii.gz");

    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    let seed = number("VOXGRAD_FUZZ_SEED").unwrap_or(clock);
    let end = Instant::now() + Duration::from_secs(number("VOXGRAD_FUZZ_SECONDS").unwrap_or(5));
    let (mut round, judged) = (0u64, Cell::new(0u64));
    while Instant::now() < end {
        let bytes: Vec<u8> = [seed, round, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let config = Config { cases: 200, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, random);
        let outcome = runner.run(&mutant(corpus.len()), |mutant| {
            judged.set(judged.get() + 1);
            judge(&path, &mutant.bytes(&corpus)).map_err(TestCaseError::fail)
        });
        if let Err(failure) = outcome {
            panic!("VOXGRAD_FUZZ_SEED={seed}, round {round}: {failure}");
        }
        round += 1;
    }
    println!("{} files, seed {seed}", judged.get());
}
