//! Patches of stored cases: the same samples as from memory, for as few bytes as possible.

use ndarray::{Array3, Array4};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use std::sync::Arc;
use voxgrad::Compat;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::io::Geometry;
use voxgrad::preprocess::{ClassLocations, PreprocessedCase, Properties, case_path, store};
use voxgrad::sample::{Batch, ChunkCache, PatchSampler, PatchSource, Pool, StoredPatches};

/// Two channels; no value repeats nearby, so that a misplaced voxel is noticed. Chunks have an edge of 32.
fn case(name: &str, shape: [usize; 3]) -> PreprocessedCase {
    let json = r#"{"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "one": 1, "two": 2, "ignore": 3},
                   "numTraining": 1, "file_ending": ".nii.gz"}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    let [depth, height, width] = shape;
    let data = Array4::from_shape_fn((2, depth, height, width), |(c, z, y, x)| {
        ((c * 7919 + z * 104_729 + y * 1299 + x * 15) % 10_007) as f32 - 5000.0
    });
    let seg = Array3::from_shape_fn((depth, height, width), |(z, y, x)| ((z / 5 + y / 7 + x / 3) % 5) as i16 - 1);
    PreprocessedCase {
        name: name.into(),
        class_locations: ClassLocations::sample(seg.view(), &labels),
        data,
        seg,
        properties: Properties {
            spacing: [1.0; 3],
            shape_before_cropping: shape,
            bbox: shape.map(|n| [0, n]),
            shape_after_cropping: shape,
        },
        geometry: Geometry::new([1.0; 3]),
    }
}

fn stored(case: &PreprocessedCase, folder: &Path, cache: &Arc<ChunkCache>) -> StoredPatches {
    let path = case_path(folder, &case.name);
    store::write(&path, case, "").unwrap();
    StoredPatches::open(&path, cache).unwrap()
}

#[test]
fn samples_are_those_of_cases_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [case("a", [70, 40, 65]), case("b", [9, 33, 32]), case("c", [64, 20, 31])];
    // No cache, one that holds a few chunks, one that holds everything.
    for limit in [0, 300_000, 1 << 30] {
        let cache = ChunkCache::new(limit);
        let on_disk: Vec<StoredPatches> = cases.iter().map(|case| stored(case, folder.path(), &cache)).collect();
        for compat in [Compat::Corrected, Compat::Nnunet] {
            let sampler = PatchSampler { compat, ..PatchSampler::new(3, [24, 40, 18]) };
            let (mut a, mut b) = (ChaCha8Rng::seed_from_u64(5), ChaCha8Rng::seed_from_u64(5));
            let (mut expected, mut found) = (Batch::default(), Batch::default());
            for _ in 0..40 {
                sampler.fill(&Pool::new(&cases), &mut a, &mut expected).unwrap();
                found.image.fill(f32::NAN);
                found.labels.fill(77);
                sampler.fill(&Pool::new(&on_disk), &mut b, &mut found).unwrap();
                assert!(found == expected, "limit {limit}");
                assert!(cache.bytes_held() <= limit);
            }
        }
    }
}

/// What is read are the chunks that a patch touches, once.
#[test]
fn a_patch_costs_the_bytes_of_its_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let case = case("a", [128, 128, 128]);
    let cache = ChunkCache::new(1 << 30);
    let source = stored(&case, folder.path(), &cache);
    let whole = std::fs::metadata(case_path(folder.path(), "a")).unwrap().len();
    let (mut image, mut labels) = (vec![0.0; 2 * 16 * 16 * 16], vec![0; 16 * 16 * 16]);
    let mut copy = |start: [isize; 3]| {
        let before = cache.bytes_read();
        source.copy_patch(start, [16; 3], &mut image, &mut labels).unwrap();
        cache.bytes_read() - before
    };
    // One of 64 chunks of image and labels; all chunks compress about equally well.
    let inside_one = copy([34, 66, 98]);
    assert!(inside_one > 0 && inside_one < whole / 50, "{inside_one} of {whole} bytes");
    assert_eq!(copy([48, 80, 98]), 0, "the chunk is in memory");
    let around_a_corner = copy([24, 24, 24]);
    assert!(around_a_corner > 6 * inside_one && around_a_corner < 9 * inside_one, "{around_a_corner}");
    assert_eq!(copy([128, 0, 0]), 0, "outside the volume nothing is read");
    assert_eq!(cache.bytes_held(), 9 * 32 * 32 * 32 * (2 * 4 + 2));
}

#[test]
fn the_chunk_used_longest_ago_makes_room() {
    let folder = tempfile::tempdir().unwrap();
    let chunk = 32 * 32 * 32 * (2 * 4 + 2);
    let cache = ChunkCache::new(2 * chunk);
    let source = stored(&case("a", [128, 32, 32]), folder.path(), &cache);
    let read = |z: isize| {
        let before = cache.bytes_read();
        source.copy_patch([z, 0, 0], [1; 3], &mut [0.0; 2], &mut [0]).unwrap();
        cache.bytes_read() > before
    };
    assert!(read(0) && read(32) && !read(0));
    assert!(read(64), "takes the place of the second chunk");
    assert!(!read(0) && read(32) && read(64));
    assert_eq!(cache.bytes_held(), 2 * chunk);
}

#[test]
fn damage_is_reported_when_the_patch_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ChunkCache::new(0);
    let source = stored(&case("a", [64, 32, 32]), folder.path(), &cache);
    let path = case_path(folder.path(), "a");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1; // the labels of the second chunk
    std::fs::write(&path, bytes).unwrap();
    let (mut image, mut labels) = ([0.0; 2], [0]);
    source.copy_patch([0; 3], [1; 3], &mut image, &mut labels).unwrap();
    let error = source.copy_patch([40, 0, 0], [1; 3], &mut image, &mut labels).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
}
