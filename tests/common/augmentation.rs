//! A batch with everything done to it at once.

use super::uniform;
use voxgrad::augment::{Augmenter, Draw, Recipe};
use voxgrad::kernels::{Context, Dtype};
use voxgrad::sample::Batch;

pub const PATCH: [usize; 3] = [6, 9, 7];

/// A batch of three, of labels -1 to 3 (the ignore label).
pub fn raw(recipe: Recipe, channels: usize) -> Batch {
    let patch = recipe.geometry(PATCH).initial;
    let voxels = 3 * patch.iter().product::<usize>();
    let labels = (0..voxels).map(|i| (i / 5 % 5) as i16 - 1).collect();
    Batch { size: 3, patch, channels, image: uniform(3, voxels * channels), labels }
}

/// Everything at once.
pub fn everything(channels: usize) -> Draw {
    Draw {
        angles: Some([0.3, -0.2, 0.4]),
        scale: Some(0.9),
        noise: Some((0.05, [7, 8])),
        blur: Some((0..channels).map(|c| (c == 0).then_some([0.5, 0.7, 1.0])).collect()),
        brightness: Some(vec![0.9; channels]),
        contrast: Some(vec![1.2; channels]),
        low_resolution: Some((0..channels).map(|c| (c != 1).then_some([4, 6, 5])).collect()),
        gamma_inverted: Some(vec![1.3; channels]),
        gamma: Some(vec![0.8; channels]),
        mirror: [true, false, true],
        ..Draw::default()
    }
}

/// Every kernel of augmentation once, for the type of activations and each size of labels.
pub fn launch_everything(context: &Context, channels: usize, dtype: Dtype) {
    let raw = raw(Recipe::NNUNET, channels);
    for (recipe, largest) in [(Recipe::NNUNET, 3), (Recipe { nearest_labels: true, ..Recipe::NNUNET }, 300)] {
        let augmenter = Augmenter::new(recipe, PATCH, [true; 3], &vec![true; channels], largest, dtype);
        let moved = everything(channels);
        let cropped = Draw { angles: None, scale: None, ..moved.clone() };
        let (image, target) = augmenter.apply(context, &raw, &[moved, cropped, Draw::default()]).unwrap();
        context.finish([image.buffer(), &target]).unwrap();
    }
}
