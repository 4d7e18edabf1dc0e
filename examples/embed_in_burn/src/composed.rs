//! The same loss from Burn's own operations and its autodiff.

use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Int, Tensor};

/// Dice + cross-entropy as nnU-Net has it without batch Dice, the background left out of the Dice term: of shape `[1]`.
///
/// * `logits`: `[batch, depth, height, width, class]`.
/// * `labels`: `[batch, depth, height, width]` of Burn's default integers, `ignore` where nobody annotated.
pub fn composed_loss(logits: Tensor<5>, labels: Tensor<4, Int>, ignore: i32) -> Tensor<1> {
    let [batch, _, _, _, classes] = logits.dims();
    let numbers = Tensor::<1, Int>::arange(0..classes as i64, &labels.device()).reshape([1, 1, 1, 1, classes]);
    let annotated = labels.clone().not_equal_elem(ignore).float().unsqueeze_dim::<5>(4);
    // Ignored voxels belong to no class: their row is zero.
    let one_hot = labels.unsqueeze_dim::<5>(4).equal(numbers).float();

    let probabilities = softmax(logits.clone(), 4) * annotated.clone();
    let over_voxels = |x: Tensor<5>| x.sum_dim(1).sum_dim(2).sum_dim(3);
    let hit = over_voxels(probabilities.clone() * one_hot.clone());
    let predicted = over_voxels(probabilities);
    let present = over_voxels(one_hot.clone());
    let dice = (hit * 2.0 + 1e-5) / (present + predicted + 1e-5);
    let dice = dice.slice([0..batch, 0..1, 0..1, 0..1, 1..classes]).mean();

    let entropy = (log_softmax(logits, 4) * one_hot).sum().neg() / annotated.sum();
    entropy - dice
}
