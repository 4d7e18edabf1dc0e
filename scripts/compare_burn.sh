#!/bin/sh
# Times voxgrad beside Burn 0.22.1, which stands on the same CubeCL: convolution, transposed convolution, instance norm
# and the loss, on Vulkan beside Burn's Vulkan, on the CPU beside Burn's `flex`. Prints one Markdown table, and puts it
# into benches/RESULTS.md.
#
#   sudo sh scripts/compare_burn.sh [ROUNDS]     2 unless given
#
# In turns, on a machine that does nothing else; each figure is the median of the rounds' medians. ratio = Burn's seconds /
# voxgrad's: above 1, voxgrad is faster. Where there is no GPU both run on Debian sid's software driver (Burn crashes on
# Debian 12's), which needs root. Building Burn takes ten minutes and more the first time. What Burn has not done after
# BURN_PEER_LIMIT_S seconds (150) is given up, and not tried again in later rounds: most of an item's time goes into
# choosing among Burn's kernels, which each process does anew.
set -eu
cd "$(dirname "$0")/.."
rounds=${1:-2}
limit=${BURN_PEER_LIMIT_S:-150}
target=${CARGO_TARGET_DIR:-target}
items='conv/32-32-k333-s1-32x32x32/forward
conv/32-32-k333-s1-32x32x32/forward_backward
conv/t64-32-k222-s2-16x16x16/forward
conv/t64-32-k222-s2-16x16x16/forward_backward
norm/32-32x32x32/forward_backward
loss/dice_ce-b2-c4-32x32x32-f32-scattered/forward_backward'

sh scripts/setup.sh
cargo build --release --bench medians
medians=$(cargo build --release --bench medians --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\/medians-[^"]*\)".*/\1/p' | tail -n 1)
CARGO_TARGET_DIR=$target/burn cargo build --release --manifest-path benches/peers/burn/Cargo.toml
peer=$target/burn/release/burn-peer

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
touch "$folder/voxgrad" "$folder/burn" "$folder/reasons" "$folder/log"

# What runs a program on Vulkan. Run once for nothing: the driver's root may have to be made.
vulkan='env VOXGRAD_DEVICE=vulkan sh scripts/compare_run.sh'
$vulkan "$medians" conv/none >/dev/null 2>"$folder/log" || true
driver=$(sed -n 's/^# device [^ ]* \(.*\)$/\1/p; s/^vulkan_sid: \(Mesa [^ ]*\) .*/\1/p' "$folder/log" | paste -s -d ' ')

# Runs one item of one program (voxgrad or burn) and notes `device id seconds rate`, or why not.
#   measure PROGRAM DEVICE ID COMMAND...
measure() {
    program=$1 item="$2 $3" id=$3
    shift 3
    grep -q "^$program $item " "$folder/reasons" && return
    status=0
    timeout "$limit" "$@" >"$folder/out" 2>>"$folder/log" || status=$?
    # id, seconds, `#`, and a rate if the amount of work is in FLOPs.
    result=$(awk -v id="$id" '$1 == id { print $2 ($5 ~ /^GFLOP/ ? " (" $4 " GFLOP/s)" : "") }' "$folder/out")
    if [ -n "$result" ]; then
        printf '%s %s\n' "$item" "$result" >>"$folder/$program"
    elif [ "$status" = 124 ]; then
        printf '%s %s not done after %s s\n' "$program" "$item" "$limit" >>"$folder/reasons"
    else
        printf '%s %s failed with status %s\n' "$program" "$item" "$status" >>"$folder/reasons"
    fi
}

start=$(date +%s)
round=1
# shellcheck disable=SC2086  # $vulkan is a list of words
while [ "$round" -le "$rounds" ]; do
    for id in $items; do
        printf 'round %s of %s: %s\n' "$round" "$rounds" "$id" >&2
        measure voxgrad vulkan "$id" $vulkan "$medians" "$id" 3
        measure burn vulkan "$id" $vulkan "$peer" vulkan "$id" 3
        measure voxgrad cpu "$id" env VOXGRAD_DEVICE=cpu "$medians" "$id" 11
        measure burn cpu "$id" "$peer" flex "$id" 3
    done
    round=$((round + 1))
done
printf 'all rounds took %s s\n' $(($(date +%s) - start)) >&2

# Seconds and rate of one item, of its median round; empty if there are none: median PROGRAM DEVICE ID.
median() {
    awk -v device="$2" -v id="$3" '$1 == device && $2 == id { sub(/^[^ ]+ [^ ]+ /, ""); print }' "$folder/$1" | sort -g |
        awk '{ v[NR] = $0 } END { if (NR) print v[int((NR + 1) / 2)] }'
}
reason() { sed -n "s|^$1 $2 $3 ||p" "$folder/reasons"; }

{
    processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)
    printf '%s, rounds: %s, %s cores of %s; Vulkan on %s.\n\n' \
        "$(date +%F)" "$rounds" "$(nproc)" "${processor:-an unknown processor}" "$driver"
    printf '| work | device | voxgrad s | peer | peer s | ratio |\n|---|---|---:|---|---:|---:|\n'
    for device in vulkan cpu; do
        [ "$device" = cpu ] && backend="Burn 0.22.1 flex" || backend="Burn 0.22.1"
        for id in $items; do
            ours=$(median voxgrad "$device" "$id")
            theirs=$(median burn "$device" "$id")
            ratio=$(printf '%s\n%s\n' "$ours" "$theirs" |
                awk 'NF { v[NR] = $1 } END { if (v[1] && v[2]) printf "%.2f", v[2] / v[1]; else print "–" }')
            printf '| %s | %s | %s | %s | %s | %s |\n' "$id" "$device" "${ours:-$(reason voxgrad "$device" "$id")}" \
                "$backend" "${theirs:-$(reason burn "$device" "$id")}" "$ratio"
        done
    done
} | tee "$folder/table"
sh scripts/compare_table.sh burn 'Beside Burn' <"$folder/table"
if grep -q 'failed' "$folder/reasons"; then
    printf '\nThe end of the log:\n' >&2
    tail -n 20 "$folder/log" >&2
fi
