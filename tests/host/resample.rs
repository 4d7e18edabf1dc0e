//! References were computed by scikit-image (`resize`) and scipy (`map_coordinates`).

use ndarray::{Array3, Array4, Ix3, Ix4};
use voxgrad::Error;
use voxgrad::error::PreprocessError;
use voxgrad::preprocess::resample::{self, Grid};

use crate::common::{data, npz};

fn reference(name: &str) -> ndarray::ArrayD<f64> {
    npz::read(&data("resample/resample.npz"), name)
}

fn image(name: &str) -> Array4<f32> {
    let array = reference(name).into_dimensionality::<Ix4>().unwrap();
    array.mapv(|v| v as f32)
}

fn seg(name: &str) -> Array3<i16> {
    let array = reference(name).into_dimensionality::<Ix3>().unwrap();
    array.mapv(|v| v as i16)
}

fn assert_close(found: &Array4<f32>, expected: &Array4<f32>) {
    assert_eq!(found.dim(), expected.dim());
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let worst = worst.fold(0.0, f32::max);
    // Values reach 250: a few units in the last place of f32.
    assert!(worst <= 2e-5, "largest difference {worst}");
}

#[test]
fn volumes_match_scikit_image() {
    let grid = Grid::between([7, 12, 9], [10, 9, 14], [1.0; 3], [1.0; 3]).unwrap();
    assert_eq!(grid.separate_axis, None);
    assert_close(&resample::image(image("image"), &grid), &image("image_3d"));
    assert_close(&resample::logits(image("image"), &grid), &image("logits_3d"));
    assert_eq!(resample::segmentation(seg("seg"), &grid), seg("seg_3d"));
}

#[test]
fn separate_slices_match_scikit_image() {
    let grid = Grid::between([7, 12, 9], [12, 9, 14], [5.0, 1.0, 1.0], [3.0, 1.3, 0.7]).unwrap();
    assert_eq!(grid.separate_axis, Some(0));
    assert_close(&resample::image(image("image"), &grid), &image("image_separate"));
    assert_eq!(resample::segmentation(seg("seg"), &grid), seg("seg_separate"));
}

/// The axis of separate slices is found wherever it is.
#[test]
fn separate_slices_along_the_last_axis() {
    let grid = Grid::between([12, 9, 7], [9, 14, 12], [1.0, 1.0, 5.0], [1.3, 0.7, 3.0]).unwrap();
    let turned = image("image").permuted_axes([0, 2, 3, 1]);
    let expected = image("image_separate").permuted_axes([0, 2, 3, 1]);
    assert_close(&resample::image(turned, &grid), &expected);
}

#[test]
fn separation_needs_one_axis_more_than_three_times_coarser() {
    let axis = |spacing, target| Grid::new([10; 3], spacing, target).unwrap().separate_axis;
    assert_eq!(axis([3.0, 1.0, 1.0], [1.0; 3]), None);
    assert_eq!(axis([3.1, 1.0, 1.0], [1.0; 3]), Some(0));
    assert_eq!(axis([1.0; 3], [1.0, 4.0, 1.0]), Some(1));
    assert_eq!(axis([4.0, 4.0, 1.0], [1.0, 1.0, 1.0]), None);
    // The present spacing decides before the target does.
    assert_eq!(axis([1.0, 1.0, 3.5], [9.0, 1.0, 1.0]), Some(2));
}

#[test]
fn shapes_round_half_to_even() {
    let to = |from, ratio| Grid::new([from, 1, 1], [ratio, 1.0, 1.0], [1.0; 3]).unwrap().to[0];
    assert_eq!(to(5, 0.5), 2);
    assert_eq!(to(7, 0.5), 4);
    assert_eq!(to(100, 1.5), 150);
    assert_eq!(to(1, 0.1), 1);
}

/// Worked examples of the tie rules, along one axis.
#[test]
fn label_ties_go_to_the_larger_label_and_gaps_to_background() {
    let line = |labels: &[i16], length: usize| -> Vec<i16> {
        let seg = Array3::from_shape_vec((1, 1, labels.len()), labels.to_vec()).unwrap();
        let grid = Grid::between([1, 1, labels.len()], [1, 1, length], [1.0; 3], [1.0; 3]).unwrap();
        resample::segmentation(seg, &grid).into_iter().collect()
    };
    assert_eq!(line(&[3, 4, 3, 4], 2), [4, 4]);
    assert_eq!(line(&[4, 4, 1, 4, 4, 4], 3), [4, 4, 4]);
    let long = [0, 3, 0, 3, 1, 2, 3, 1, 2, 3, 4, 4];
    assert_eq!(line(&long, 8), [0, 0, 3, 2, 3, 2, 3, 4]);
}

#[test]
fn broken_spacing_cannot_ask_for_terabytes() {
    assert!(matches!(
        Grid::new([500; 3], [1e3; 3], [1.0; 3]),
        Err(Error::Preprocess(PreprocessError::ResampledTooLarge { .. }))
    ));
}
