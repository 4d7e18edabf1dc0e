#!/bin/sh
# Times voxgrad beside PyTorch on the same cores, in turns, and prints one Markdown table.
#
#   sh scripts/compare.sh [GROUP] [ROUNDS]     ROUNDS: 3 unless given
#
# GROUP: conv, norm, loss, step or all (default); size: steps of growing patches and widths (benches/peers/cost_picture.py
# draws them); memory: peak resident memory of the steps, a process each; scaling: voxgrad on one core and on all; fusion:
# voxgrad's steps with more and more fused (src/fusion.rs), with their launches and memory.
#
# GROUP loss alone has more peers (nnU-Net eager and compiled, MONAI, exacta) and memory beside time, for several kinds of
# annotation, and for variants of the loss; its table also replaces the one of the same device in benches/RESULTS.md.
# ONLY=TEXT restricts it to ids that contain TEXT.
#
# A round runs all items of voxgrad, then all of PyTorch; each figure is the median of the rounds' medians. Run it on a
# machine that does nothing else. ratio = PyTorch's seconds / voxgrad's: above 1, voxgrad is faster.
# VOXGRAD_DEVICE chooses voxgrad's device (cpu unless set); PyTorch runs on the CPU, in GROUP loss on an NVIDIA GPU if
# there is one and voxgrad does not run on the CPU. Vulkan is a software driver where there is no GPU (see
# scripts/compare_run.sh), and then both use the same cores.
set -eu
cd "$(dirname "$0")/.."
group=${1:-all}
rounds=${2:-3}
device=${VOXGRAD_DEVICE:-cpu}

sh scripts/setup.sh
bench=medians
[ "$group" = loss ] && bench=loss
cargo build --release --bench "$bench" 2>/dev/null || cargo build --release --bench "$bench"
program=$(cargo build --release --bench "$bench" --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\/'"$bench"'-[^"]*\)".*/\1/p' | tail -n 1)
voxgrad() { sh scripts/compare_run.sh "$program" "$@"; }
# Installs PyTorch where it is missing, outside of the timings.
sh scripts/peers.sh -c 'import torch, nnunetv2'

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

steps="step/8-16-32-64-in1-b2-40x56x40 step/32-64-128-256-in1-b2-40x56x40 step/32-64-128-in4-b2-64x64x64"

# Peak resident memory of a step, each engine in a process of its own and PyTorch in the format that needs less.
memory() {
    printf '| step | device | voxgrad MiB | torch MiB | share |\n|---|---|---:|---:|---:|\n'
    for id in $steps; do
        ours=$(voxgrad "$id" 3 2>/dev/null | sed -n 's/^# peak resident memory \([0-9.]*\).*/\1/p')
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
            taskset -c 0 sh scripts/compare_run.sh "$program" "$items" 5 2>/dev/null >>"$folder/one"
            voxgrad "$items" 5 2>/dev/null >>"$folder/all"
        done
        round=$((round + 1))
    done
    medians "$folder/one" >"$folder/one.medians"
    medians "$folder/all" >"$folder/all.medians"
    printf '| work | 1 core s | %s cores s | efficiency |\n|---|---:|---:|---:|\n' "$cores"
    join "$folder/one.medians" "$folder/all.medians" | awk -v cores="$cores" \
        '{ printf "| %s | %.5f | %.5f | %.0f %% |\n", $1, $2, $3, 100 * $2 / ($3 * cores) }'
}

# Steps with more and more fused, in turns, each in a process of its own.
fusion() {
    some=moments,bias
    round=1
    while [ "$round" -le "$rounds" ]; do
        for id in $steps; do
            for fused in nothing $some recompute,$some recompute,$some,sums; do
                printf '%s %s ' "$id" "$fused"
                VOXGRAD_FUSION=$fused voxgrad "$id" 5 2>&1 | awk '
                    /launches a step/ { launches = $3 } /^step/ { seconds = $2 } /peak resident/ { mib = $5 }
                    END { print seconds, launches, mib }'
            done
        done
        round=$((round + 1))
    done >"$folder/fused"
    printf '| step | fused | s | launches | peak MiB |\n|---|---|---:|---:|---:|\n'
    # Sorted by seconds, the middle line of each step and setting is its median round.
    awk '{ if (!(($1, $2) in n)) order[++count] = $1 " " $2; n[$1, $2]++; print }
        END { for (i = 1; i <= count; i++) print order[i] > "/dev/stderr" }' "$folder/fused" 2>"$folder/order" |
        sort -k1,1 -k2,2 -k3,3g >"$folder/sorted"
    while read -r id fused; do
        awk -v id="$id" -v fused="$fused" '$1 == id && $2 == fused { line[++n] = $0 }
            END { split(line[int((n + 1) / 2)], f, " "); gsub(",", ", ", f[2])
                printf "| %s | %s | %.4f | %s | %.0f |\n", f[1], f[2], f[3], f[4], f[5] }' "$folder/sorted"
    done <"$folder/order"
}

# Losses: all figures of an id in one row.
if [ "$group" = loss ]; then
    if [ "$device" = cpu ] || ! [ -e /dev/nvidia0 ]; then
        export CUDA_VISIBLE_DEVICES=
    fi
    same=
    if [ "$device" != cpu ] && ! [ -e /dev/nvidia0 ]; then same=' of the CPU, since PyTorch has no Vulkan'; fi
    start=$(date +%s)
    round=1
    while [ "$round" -le "$rounds" ]; do
        printf 'round %s of %s\n' "$round" "$rounds" >&2
        voxgrad "${ONLY:-}" 2>>"$folder/log" | grep ^loss/ >"$folder/ids"
        cat "$folder/ids" >>"$folder/voxgrad"
        sh scripts/peers.sh benches/peers/loss.py --ids "$folder/ids" 2>>"$folder/log" | grep -E '^(# )?loss/' >>"$folder/torch"
        round=$((round + 1))
    done
    printf 'all rounds took %s s\n' $(($(date +%s) - start)) >&2
    grep '^# loss/' "$folder/torch" >&2 || true
    # Lines of one form: id, who, seconds, and voxgrad's GB/s and percent of a copy, extra bytes. Sorted by seconds, the
    # middle one of each id and peer is its median round.
    {
        awk '{ print $1, "voxgrad", $2, $5, $3, $4 }' "$folder/voxgrad"
        awk '/^loss/ { print $1, $4, $2, $3 }' "$folder/torch"
    } | sort -k1,1 -k2,2 -k3,3g >"$folder/all"
    {
        processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)
        printf '%s, rounds: %s, %s cores of %s. voxgrad on %s, peers on %s%s.\n\n' \
            "$(date +%F)" "$rounds" "$(nproc)" "${processor:-an unknown processor}" \
            "$(sed -n 's/^# device \(.*\)$/\1/p' "$folder/log" | head -n 1)" \
            "$(sed -n 's/^# torch [^,]*, \(.*\), median.*/\1/p' "$folder/log" | head -n 1)" "$same"
        printf '| work | voxgrad s | GB/s | %% of copy | extra MB'
        printf ' | nnU-Net s | ratio | extra MB | compiled s | ratio | extra MB | MONAI s | ratio | exacta s | ratio |\n'
        printf '|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n'
        awk '
            function flush() { if (n) { line = lines[int((n + 1) / 2)]; split(line, f, " "); row[f[1], f[2]] = line } }
            { if (!($1 in seen)) { seen[$1] = 1; ids[++count] = $1 } }
            $1 " " $2 != key { flush(); key = $1 " " $2; n = 0 }
            { lines[++n] = $0 }
            function megabytes(bytes) { return bytes ~ /^[0-9]+$/ ? sprintf("%.2f", bytes / 1e6) : "–" }
            function peer(id, name, memory,   f) {
                if (!((id, name) in row)) return memory ? " – | – | – |" : " – | – |"
                split(row[id, name], f, " ")
                return sprintf(" %.5f | %.1f |%s", f[3], f[3] / ours, memory ? " " megabytes(f[4]) " |" : "")
            }
            END {
                flush()
                for (i = 1; i <= count; i++) {
                    id = ids[i]
                    if (!((id, "voxgrad") in row)) continue
                    split(row[id, "voxgrad"], f, " ")
                    ours = f[3]
                    work = substr(id, 6)
                    sub(/\/forward_backward$/, "", work)
                    printf "| %s | %.5f | %s | %s | %s |", work, f[3], f[5], f[6], megabytes(f[4])
                    print peer(id, "nnunet", 1) peer(id, "compiled", 1) peer(id, "monai", 0) peer(id, "exacta", 0)
                }
            }' "$folder/all"
    } | tee "$folder/table"
    if [ "$device" = cpu ]; then
        sh scripts/compare_table.sh losses 'Losses on sparse annotations' <"$folder/table"
    else
        sh scripts/compare_table.sh "losses-${device%%:*}" "Losses on sparse annotations: ${device%%:*}" <"$folder/table"
    fi
    exit
fi


# The median of each id's figures, over the rounds.
medians() {
    grep / "$1" | grep -v '^#' | awk '{ print $1, $2 }' | sort -k1,1 -k2,2g | awk '
        function flush() { if (n) print id, v[int((n + 1) / 2)] }
        $1 != id { flush(); id = $1; n = 0 }
        { v[++n] = $2 }
        END { flush() }'
}

case $group in
    memory | scaling | fusion)
        "$group"
        exit
        ;;
esac
round=1
while [ "$round" -le "$rounds" ]; do
    printf 'round %s of %s\n' "$round" "$rounds" >&2
    sh scripts/peers.sh benches/peers/torch_peers.py "$group" 2>>"$folder/log" >"$folder/round"
    # What has no peer need not run: 16-bit items, say.
    awk '/\// && !/^#/ { print $1 }' "$folder/round" | while read -r id; do
        voxgrad "$id" 2>>"$folder/log" >>"$folder/voxgrad" </dev/null
    done
    cat "$folder/round" >>"$folder/torch"
    round=$((round + 1))
done

medians "$folder/voxgrad" >"$folder/ours"
medians "$folder/torch" >"$folder/theirs"

peer=$(sed -n 's/^# \(torch [^,+]*\).*/\1/p' "$folder/log" | head -n 1)
printf '| work | device | voxgrad s | peer | peer s | ratio |\n|---|---|---:|---|---:|---:|\n'
join "$folder/ours" "$folder/theirs" | awk -v device="$device" -v peer="$peer" \
    '{ printf "| %s | %s | %.5f | %s | %.5f | %.2f |\n", $1, device, $2, peer, $3, $3 / $2 }'
