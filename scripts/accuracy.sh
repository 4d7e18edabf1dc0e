#!/bin/sh
# Trains the same networks with voxgrad and with nnU-Net, and compares their Dice: see benches/accuracy.py, which this hands
# its arguments to. VOXGRAD names a program that is built already.
set -eu
cd "$(dirname "$0")/.."
[ -n "${VOXGRAD:-}" ] || [ "${1:-}" = table ] || {
    sh scripts/setup.sh
    cargo build --release
    # What was built, wherever that lies.
    export VOXGRAD="${CARGO_TARGET_DIR:-$PWD/target}/release/voxgrad"
}
exec python3 benches/accuracy.py "$@"
