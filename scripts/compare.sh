#!/bin/sh
# Times voxgrad beside PyTorch on the same cores, in turns, and prints one Markdown table.
#
#   sh scripts/compare.sh [GROUP] [ROUNDS]     ROUNDS: 3 unless given
#
# GROUP: conv, norm, loss, step or all (default); size: steps of growing patches and widths (benches/peers/cost_picture.py
# draws them); memory: peak resident memory of the steps, a process each; scaling: voxgrad on one core and on all.
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

steps="step/8-16-32-64-in1-b2-40x56x40 step/32-64-128-256-in1-b2-40x56x40 step/32-64-128-in4-b2-64x64x64"

# Peak resident memory of a step, each engine in a process of its own and PyTorch in the format that needs less.
memory() {
    printf '| step | device | voxgrad MiB | torch MiB | share |\n|---|---|---:|---:|---:|\n'
    for id in $steps; do
        ours=$(cargo bench --bench medians -- step 3 "$id" 2>/dev/null | sed -n 's/^# peak resident memory \([0-9.]*\).*/\1/p')
        theirs=
        for format in contiguous channels_last_3d; do
            peak=$(sh scripts/peers.sh benches/peers/torch_peers.py step --repeats 3 --only "$id" --format "$format" \
                2>/dev/null | sed -n 's/^# peak memory \([0-9.]*\).*/\1/p')
            theirs=$(printf '%s\n%s\n' "$peak" "$theirs" | sort -g | sed '/^$/d' | head -n 1)
        done
        printf '%s %s\n' "$ours" "$theirs" | awk -v id="$id" -v device="$device" \
            '{ printf "| %s | %s | %.0f | %.0f | %.2f |\n", id, device, $1, $2, $1 / $2 }'
    done
}

# Seconds on one core and on all, and the share of the ideal speed-up that is reached.
scaling() {
    cores=$(nproc)
    round=1
    while [ "$round" -le "$rounds" ]; do
        for items in step conv; do
            taskset -c 0 cargo bench --bench medians -- "$items" 5 2>/dev/null >>"$folder/one"
            cargo bench --bench medians -- "$items" 5 2>/dev/null >>"$folder/all"
        done
        round=$((round + 1))
    done
    medians "$folder/one" >"$folder/one.medians"
    medians "$folder/all" >"$folder/all.medians"
    printf '| work | 1 core s | %s cores s | efficiency |\n|---|---:|---:|---:|\n' "$cores"
    join "$folder/one.medians" "$folder/all.medians" | awk -v cores="$cores" \
        '{ printf "| %s | %.5f | %.5f | %.0f %% |\n", $1, $2, $3, 100 * $2 / ($3 * cores) }'
}

# The median of each id's figures, over the rounds.
medians() {
    grep / "$1" | grep -v '^#' | awk '{ print $1, $2 }' | sort -k1,1 -k2,2g | awk '
        function flush() { if (n) print id, v[int((n + 1) / 2)] }
        $1 != id { flush(); id = $1; n = 0 }
        { v[++n] = $2 }
        END { flush() }'
}

case $group in
    memory | scaling)
        "$group"
        exit
        ;;
esac
round=1
while [ "$round" -le "$rounds" ]; do
    printf 'round %s of %s\n' "$round" "$rounds" >&2
    cargo bench --bench medians -- "$group" 2>"$folder/log" >>"$folder/voxgrad"
    sh scripts/peers.sh benches/peers/torch_peers.py "$group" 2>>"$folder/log" >>"$folder/torch"
    round=$((round + 1))
done

medians "$folder/voxgrad" >"$folder/ours"
medians "$folder/torch" >"$folder/theirs"

peer=$(sed -n 's/^# \(torch [^,+]*\).*/\1/p' "$folder/log" | head -n 1)
printf '| work | device | voxgrad s | peer | peer s | ratio |\n|---|---|---:|---|---:|---:|\n'
join "$folder/ours" "$folder/theirs" | awk -v device="$device" -v peer="$peer" \
    '{ printf "| %s | %s | %.5f | %s | %.5f | %.2f |\n", $1, device, $2, peer, $3, $3 / $2 }'
