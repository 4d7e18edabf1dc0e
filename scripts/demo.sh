#!/bin/sh
# Trains a 3D U-Net on sparsely annotated MRI that ships with the repository, and shows what it learned.
#
#   sh scripts/demo.sh [OUTPUT]      OUTPUT: folder for the results, demo/ unless given
#
# Installs what the build needs (see setup.sh). After the build it takes a few minutes on two CPU cores, fewer on a GPU.
# Ctrl-C stops it; the same command goes on where it stopped. VOXGRAD_DEVICE chooses the device, VOXGRAD_SEED the seed,
# VOXGRAD_PRECISION the type of activations: f32 (the default), f16 or bf16.
set -eu
cd "$(dirname "$0")/.."
output=${1:-demo}
data=examples/data/hippocampus

sh scripts/setup.sh
cargo build --release

# nnU-Net trains for hours, with momentum 0.99, learning rate 0.01 and its whole augmentation; in minutes, less momentum and
# augmentation learn sooner. Only left and right are mirrored: which end is the anterior one is hard to tell from a mirrored
# patch.
"${CARGO_TARGET_DIR:-target}/release/voxgrad" train "$data" --output "$output" \
    --device "${VOXGRAD_DEVICE:-auto}" --seed "${VOXGRAD_SEED:-0}" --precision "${VOXGRAD_PRECISION:-f32}" \
    --epochs 40 --iterations 100 --validation-iterations 10 \
    --learning-rate 0.05 --momentum 0.9 --augmentation mirror --mirror 2 \
    --reference "$data/labelsTr_dense" --save-every 1 --continue
