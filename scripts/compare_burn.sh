#!/bin/sh
# Times convolution on Vulkan beside Burn 0.22.1, which stands on the same CubeCL, and prints a Markdown table.
#
#   sudo sh scripts/compare_burn.sh [SIDE_BY_SIDE_ROUNDS]
#
# Without a GPU both run on Debian sid's software driver (Burn crashes on Debian 12's), in turns, in one root. Building Burn
# takes ten minutes the first time. An item that Burn does not finish in BURN_PEER_LIMIT_S seconds (120) is given up.
set -eu
cd "$(dirname "$0")/.."
rounds=${1:-3}
export BURN_PEER_LIMIT_S="${BURN_PEER_LIMIT_S:-120}"

cargo build --release --bench medians
medians=$(cargo build --release --bench medians --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\/medians-[^"]*\)".*/\1/p' | tail -n 1)
peer=${CARGO_TARGET_DIR:-target}/burn-peer
CARGO_TARGET_DIR=$peer cargo build --release --no-default-features --manifest-path benches/peers/burn/Cargo.toml

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
round=1
while [ "$round" -le "$rounds" ]; do
    sh scripts/vulkan_sid.sh "$medians" conv 3 2>/dev/null | grep -E '32-32-k333-s1-32x32x32|t64-32' >>"$folder/voxgrad"
    sh scripts/vulkan_sid.sh "$peer/release/burn-peer" vulkan 32 3 2>/dev/null | grep conv >>"$folder/burn"
    round=$((round + 1))
done
printf 'voxgrad (id, seconds):\n' && cat "$folder/voxgrad"
printf 'Burn (item: seconds):\n' && cat "$folder/burn"
