#!/bin/sh
# Installs what is missing, then runs all tests on the CPU, the device tests once more on Vulkan (on a GPU's driver if
# there is one, else on a software driver), and a selection of them on a software driver of CUDA (scripts/cuda_software.sh).
#
#   sh scripts/test.sh [FILTER]     FILTER: a part of the names of the tests to run; none then run on CUDA
#
# CI in the environment makes it a failure if a driver or its pieces cannot be had; elsewhere those tests are left out,
# and the summary says so.
set -eu
filter=${1:-}
cd "$(dirname "$0")/.."

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# Runs a command so that its output is seen at once and kept; the status of a pipe would be tee's.
run() {
    log=$1
    shift
    printf '\n== %s\n' "$*"
    { "$@" 2>&1 && : >"$logs/$log.ok"; } | tee "$logs/$log"
}

# Adds up the closing lines of all test programs of one run. A test that cannot run on a device, or not all of it, passes
# after lines that start with "skipped"; it is counted once.
counts() {
    awk '/^---- / { counted = 0 }
         /^skipped/ && !counted { partly++; counted = 1 }
         /^test result:/ { passed += $4; failed += $6; ignored += $8 }
         END { printf "%d passed, %d of them not or not wholly possible on this device, %d failed, %d ignored",
                   passed, partly, failed, ignored }' "$logs/$1"
}

sh scripts/setup.sh
vulkan=yes
sh scripts/setup.sh vulkan || vulkan=no

# shellcheck disable=SC2086  # options are a list of words
# halves DEVICE COMMAND...: all of a device's tests, those of the losses in a process beside the others: most of the time
# goes into compiling kernels, on one core. With a filter, one process.
halves() {
    device=$1
    shift
    if [ -n "$filter" ]; then
        run "$device" "$@" --show-output $options "$filter"
        return
    fi
    cargo test --release --test tests -- --show-output $options device::loss >"$logs/$device-losses" 2>&1 \
        && : >"$logs/$device-losses.ok" &
    run "$device" "$@" --show-output $options --skip device::loss
    wait
    printf '\n== the losses on %s\n' "$device"
    cat "$logs/$device-losses"
    cat "$logs/$device-losses" >>"$logs/$device"
    [ -e "$logs/$device-losses.ok" ] || rm -f "$logs/$device.ok"
}

# A device that broke ends its process, and a driver's threads do not mix well with the CPU runtime's: each device
# gets processes of its own. --show-output prints what passing tests say: the device's name, and what was skipped.
cargo test --release --workspace --no-run
options=
VOXGRAD_TEST_DEVICE=cpu
export VOXGRAD_TEST_DEVICE
halves cpu cargo test --release --workspace --

if [ "$vulkan" = yes ]; then
    if [ -z "${VK_ICD_FILENAMES:-}${VK_DRIVER_FILES:-}" ] && ! ls /dev/dri/render* /dev/nvidia0 /dev/dxg >/dev/null 2>&1; then
        # Without a GPU, the loader would try every GPU driver that is installed beside the software one.
        for lavapipe in /usr/share/vulkan/icd.d/lvp_icd*.json; do
            [ -e "$lavapipe" ] && export VK_ICD_FILENAMES="$lavapipe"
        done
    fi
    # Mesa complains about a missing runtime folder, which only a desktop session has.
    export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$logs}"
    options='--test-threads=1 --skip host::'
    VOXGRAD_TEST_DEVICE=vulkan
    halves vulkan cargo test --release --test tests --
fi

# 2: a piece cannot be installed here.
cuda=2
if [ -z "$filter" ]; then
    cuda=0
    sh scripts/cuda_software.sh --selection || cuda=$?
fi

status=0
printf '\n== summary\n'
for device in cpu vulkan; do
    if [ ! -e "$logs/$device" ]; then
        printf '%s: not run, no Vulkan driver\n' "$device"
        [ -z "${CI:-}" ] || status=1
        continue
    fi
    device_name=$(sed -n 's/^device under test: //p' "$logs/$device" | head -n 1)
    [ -z "$device_name" ] || printf '%s is %s\n' "$device" "$device_name"
    printf '%s: %s\n' "$device" "$(counts "$device")"
    if [ ! -e "$logs/$device.ok" ]; then
        printf '%s: FAILED, see above\n' "$device"
        status=1
    fi
done
if [ -n "$filter" ]; then
    printf 'cuda: not run; sh scripts/cuda_software.sh %s\n' "$filter"
elif [ "$cuda" = 2 ]; then
    printf "cuda: not run, NVIDIA's libraries cannot be installed\n"
    [ -z "${CI:-}" ] || status=1
elif [ "$cuda" = 0 ]; then
    printf 'cuda: a selection passed on a driver in software, as an A100 and as an H100\n'
else
    printf 'cuda: FAILED, see above\n'
    status=1
fi
exit $status
