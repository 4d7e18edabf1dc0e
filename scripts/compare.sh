#!/bin/sh
# Times voxgrad beside its peers: see benches/compare.py, which this hands its arguments to (GROUP and ROUNDS).
cd "$(dirname "$0")/.." && sh scripts/setup.sh && exec python3 benches/compare.py "$@"
