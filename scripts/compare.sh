#!/bin/sh
# Times voxgrad beside PyTorch on the same cores, in turns, and prints one Markdown table.
#
#   sh scripts/compare.sh [GROUP] [ROUNDS]     GROUP: conv, norm, loss, step or all (default); ROUNDS: 3 unless given
#
# A round runs all items of voxgrad, then all of PyTorch; each figure is the median of the rounds' medians. Run it on a
# machine that does nothing else. ratio = PyTorch's seconds / voxgrad's: above 1, voxgrad is faster.
# VOXGRAD_DEVICE chooses voxgrad's device (cpu unless set); PyTorch runs on the CPU.
set -eu
cd "$(dirname "$0")/.."
group=${1:-all}
rounds=${2:-3}
device=${VOXGRAD_DEVICE:-cpu}

sh scripts/setup.sh
cargo build --release --bench medians 2>/dev/null || cargo build --release --bench medians
# Installs PyTorch where it is missing, outside of the timings.
sh scripts/peers.sh -c 'import torch, nnunetv2'

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
round=1
while [ "$round" -le "$rounds" ]; do
    printf 'round %s of %s\n' "$round" "$rounds" >&2
    cargo bench --bench medians -- "$group" 2>"$folder/log" >>"$folder/voxgrad"
    sh scripts/peers.sh benches/peers/torch_peers.py "$group" 2>>"$folder/log" >>"$folder/torch"
    round=$((round + 1))
done

# The median of each id's figures, over the rounds.
medians() {
    grep / "$1" | grep -v '^#' | awk '{ print $1, $2 }' | sort -k1,1 -k2,2g | awk '
        function flush() { if (n) print id, v[int((n + 1) / 2)] }
        $1 != id { flush(); id = $1; n = 0 }
        { v[++n] = $2 }
        END { flush() }'
}
medians "$folder/voxgrad" >"$folder/ours"
medians "$folder/torch" >"$folder/theirs"

peer=$(sed -n 's/^# \(torch [^,+]*\).*/\1/p' "$folder/log" | head -n 1)
printf '| work | device | voxgrad s | peer | peer s | ratio |\n|---|---|---:|---|---:|---:|\n'
join "$folder/ours" "$folder/theirs" | awk -v device="$device" -v peer="$peer" \
    '{ printf "| %s | %s | %.5f | %s | %.5f | %.2f |\n", $1, device, $2, peer, $3, $3 / $2 }'
