//! Patch placement by its rules, and batches voxel by voxel.

use ndarray::{Array3, Array4};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use voxgrad::dataset::LabelGroup;
use voxgrad::error::{DatasetError, TrainError};
use voxgrad::io::Geometry;
use voxgrad::preprocess::{ClassLocations, PreprocessedCase, Properties};
use voxgrad::sample::{Batch, Oversampling, PatchSampler, Pool, patch_with_margin};
use voxgrad::{Compat, Error};

/// Every voxel's value tells where it is: `1000 c + 100 z + 10 y + x`; its label is `(z + y + x) % 3 - 1`.
fn case(shape: [usize; 3], locations: ClassLocations) -> PreprocessedCase {
    let [d, h, w] = shape;
    PreprocessedCase {
        name: "case".into(),
        data: Array4::from_shape_fn((2, d, h, w), |(c, z, y, x)| (1000 * (c + 1) + 100 * z + 10 * y + x) as f32),
        seg: Array3::from_shape_fn((d, h, w), |(z, y, x)| ((z + y + x) % 3) as i16 - 1),
        class_locations: locations,
        properties: Properties {
            spacing: [1.0; 3],
            shape_before_cropping: shape,
            bbox: [[0, d], [0, h], [0, w]],
            shape_after_cropping: shape,
        },
        geometry: Geometry::new([1.0; 3]),
    }
}

fn at(annotated: Option<Vec<[u32; 3]>>, classes: &[&[[u32; 3]]]) -> ClassLocations {
    ClassLocations {
        foreground: classes
            .iter()
            .enumerate()
            .map(|(i, list)| (LabelGroup::Label(i as i16 + 1), list.to_vec()))
            .collect(),
        annotated,
    }
}

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(3)
}

#[test]
fn the_last_third_is_forced() {
    let forced = |size: usize| -> Vec<bool> {
        let sampler = PatchSampler::new(size, [4; 3]);
        (0..size).map(|i| sampler.is_forced(i)).collect()
    };
    assert_eq!(forced(1), [false]);
    assert_eq!(forced(2), [false, true]);
    assert_eq!(forced(3), [false, false, true]);
    assert_eq!(forced(9).iter().filter(|f| **f).count(), 3);
}

#[test]
fn patches_are_centred_on_their_voxel() {
    let sampler = PatchSampler::new(2, [4, 4, 5]);
    let case = case([20, 20, 20], at(Some(vec![[9, 10, 11]]), &[&[[5, 6, 7]]]));
    assert_eq!(sampler.start(&case, false, &mut rng()), [7, 8, 9]);
    assert_eq!(sampler.start(&case, true, &mut rng()), [3, 4, 5]);
}

#[test]
fn forced_patches_choose_among_present_classes() {
    let sampler = PatchSampler::new(2, [2; 3]);
    let mut rng = rng();
    let locations = at(Some(vec![[1; 3]]), &[&[[5; 3]], &[], &[[9; 3], [9; 3]]]);
    let chosen = case([20; 3], locations);
    let starts: Vec<isize> = (0..200).map(|_| sampler.start(&chosen, true, &mut rng)[0]).collect();
    let of = |start: isize| starts.iter().filter(|s| **s == start).count();
    // Classes are equally likely, whatever the number of their voxels.
    assert_eq!(of(4) + of(8), 200);
    assert!((70..130).contains(&of(4)), "{}", of(4));
    // No class present: any annotated voxel.
    let annotated_only = case([20; 3], at(Some(vec![[7; 3]]), &[&[]]));
    assert_eq!(sampler.start(&annotated_only, true, &mut rng), [6; 3]);
}

#[test]
fn without_locations_any_place_is_possible() {
    let mut rng = rng();
    for locations in [at(None, &[&[]]), at(Some(vec![]), &[&[]])] {
        let sampler = PatchSampler::new(2, [8, 8, 8]);
        let case = case([10, 8, 5], locations);
        let mut seen = [[false; 20]; 3];
        for _ in 0..300 {
            let start = sampler.start(&case, true, &mut rng);
            for axis in 0..3 {
                seen[axis][(start[axis] + 10) as usize] = true;
            }
        }
        let range =
            |axis: usize| -> Vec<isize> { (0..20).filter(|&i| seen[axis][i]).map(|i| i as isize - 10).collect() };
        assert_eq!(range(0), [0, 1, 2]);
        assert_eq!(range(1), [0]);
        // Three voxels short: the image lies in the middle, give or take one.
        assert_eq!(range(2), [-2, -1]);
    }
}

#[test]
fn borders_clamp_patches_on_both_sides_unless_upstream_is_asked_for() {
    let corner = |voxel: [u32; 3], compat: Compat| {
        let sampler = PatchSampler { compat, ..PatchSampler::new(1, [8; 3]) };
        sampler.start(&case([10; 3], at(Some(vec![voxel]), &[])), false, &mut rng())
    };
    assert_eq!(corner([0; 3], Compat::Corrected), [0; 3]);
    assert_eq!(corner([0; 3], Compat::Nnunet), [0; 3]);
    assert_eq!(corner([9; 3], Compat::Corrected), [2; 3]);
    assert_eq!(corner([9; 3], Compat::Nnunet), [5; 3]);
}

/// With a margin for augmentation the final patch stays inside, the margin may hang over.
#[test]
fn margins_may_hang_over() {
    let sampler = PatchSampler { final_patch: [8; 3], ..PatchSampler::new(1, [11; 3]) };
    let start = |voxel: u32| {
        let case = case([20; 3], at(Some(vec![[voxel; 3]]), &[]));
        sampler.start(&case, false, &mut rng())[0]
    };
    // lb = floor(-3 / 2), ub = 20 + floor(3 / 2) + 1 - 11.
    assert_eq!(start(0), -2);
    assert_eq!(start(19), 11);
    assert_eq!(start(10), 5);
}

#[test]
fn margins_for_rotation() {
    let limit = 30f64.to_radians();
    assert_eq!(patch_with_margin([128; 3], limit), [205; 3]);
    assert_eq!(patch_with_margin([128, 160, 112], limit), [224, 228, 189]);
    assert_eq!(patch_with_margin([40, 56, 40], limit), [73, 80, 64]);
    assert_eq!(patch_with_margin([64; 3], limit), [102; 3]);
}

#[test]
fn batches_hold_the_right_voxels_and_no_image_outside() {
    let sampler = PatchSampler { compat: Compat::Nnunet, ..PatchSampler::new(3, [4, 3, 5]) };
    let case = case([5, 6, 4], at(Some(vec![[4, 5, 1], [0, 0, 0], [2, 2, 2]]), &[]));
    let mut rng = rng();
    let mut batch = Batch::default();
    for _ in 0..20 {
        // Poison: everything must be written anew.
        batch.image.fill(f32::NAN);
        batch.labels.fill(77);
        let mut replay = rng.clone();
        sampler.fill(&Pool::new(std::slice::from_ref(&case)), &mut rng, &mut batch).unwrap();
        assert_eq!((batch.size, batch.patch, batch.channels), (3, [4, 3, 5], 2));
        for index in 0..3 {
            use rand::RngExt;
            replay.random_range(0..1usize);
            let start = sampler.start(&case, sampler.is_forced(index), &mut replay);
            let (image, labels) = batch.sample_mut(index);
            for (voxel, label) in labels.iter().enumerate() {
                let offset = [voxel / 15, voxel / 5 % 3, voxel % 5];
                let at: [isize; 3] = std::array::from_fn(|a| start[a] + offset[a] as isize);
                let inside = at.iter().zip([5, 6, 4]).all(|(&i, n)| (0..n).contains(&i));
                let [z, y, x] = at.map(|i| i.max(0) as usize);
                for c in 0..2 {
                    let expected = if inside { case.data[[c, z, y, x]] } else { 0.0 };
                    assert_eq!(image[2 * voxel + c], expected);
                }
                let expected = if inside { case.seg[[z, y, x]] } else { -1 };
                assert_eq!(*label, expected);
            }
        }
    }
    assert!(matches!(
        sampler.fill(&Pool::new(&[] as &[PreprocessedCase]), &mut rng, &mut batch),
        Err(Error::Dataset(DatasetError::NoCases))
    ));
}

/// nnU-Net's variant: every patch by itself, with the share that it forces otherwise, or another one.
#[test]
fn patches_are_forced_by_chance_where_that_is_asked_for() {
    // Foreground is in one corner, annotation in the other.
    let case = case([8; 3], at(Some(vec![[7; 3]]), &[&[[0; 3]]]));
    let pool = Pool::new(std::slice::from_ref(&case));
    let share = |batch_size: usize, oversampling: Oversampling| {
        let sampler = PatchSampler { oversampling, ..PatchSampler::new(batch_size, [1; 3]) };
        let (mut rng, mut batch, mut forced) = (rng(), Batch::default(), vec![0; batch_size]);
        for _ in 0..2000 {
            sampler.fill(&pool, &mut rng, &mut batch).unwrap();
            // The corner's first channel is 1000, the other's 1777.
            (0..batch_size).for_each(|index| forced[index] += usize::from(batch.image[2 * index] == 1000.0));
        }
        forced.iter().map(|&n| n as f64 / 2000.0).collect::<Vec<_>>()
    };
    let assert_near = |found: Vec<f64>, expected: f64| {
        // Four standard errors.
        let tolerance = 4.0 * (expected * (1.0 - expected) / 2000.0).sqrt();
        assert!(found.iter().all(|share| (share - expected).abs() < tolerance), "{found:?}, expected {expected}");
    };
    assert_eq!(share(2, Oversampling::LastThird), [0.0, 1.0]);
    assert_near(share(2, Oversampling::SameShare), 0.5);
    assert_near(share(3, Oversampling::SameShare), 1.0 / 3.0);
    assert_near(share(2, Oversampling::Probability(0.1)), 0.1);
}

#[test]
fn cases_can_be_weighed_by_their_annotated_voxels() {
    let with = |name: &str, labels: [i16; 4]| {
        let mut case = case([1, 1, 4], at(None, &[]));
        case.name = name.into();
        case.seg = Array3::from_shape_vec((1, 1, 4), labels.to_vec()).unwrap();
        case.data.fill(f32::from(name.as_bytes()[0]));
        case
    };
    // Label 2 is ignored, -1 is no image: 3, 0 and 1 annotated voxels.
    let cases = [with("a", [0, 1, 1, 2]), with("b", [2, 2, -1, -1]), with("c", [2, 2, 1, -1])];
    let sampler = PatchSampler::new(1, [1; 3]);
    let count = |pool: &Pool<PreprocessedCase>| {
        let (mut rng, mut batch, mut counts) = (rng(), Batch::default(), [0; 3]);
        for _ in 0..2000 {
            sampler.fill(pool, &mut rng, &mut batch).unwrap();
            counts[batch.image[0] as usize - usize::from(b'a')] += 1;
        }
        counts
    };
    let [a, b, c] = count(&Pool::by_annotation(&cases, Some(2)).unwrap());
    assert!(b == 0 && (1420..1580).contains(&a) && a + c == 2000, "{a} {b} {c}");
    let alike = count(&Pool::new(&cases));
    assert!(alike.iter().all(|n| (580..760).contains(n)), "{alike:?}");
    let nothing = Pool::by_annotation(&cases[1..2], Some(2)).unwrap_err();
    assert!(matches!(nothing, Error::Train(TrainError::NothingToLearn { cases: 1, ignore: 2 })), "{nothing}");
}
