#!/bin/sh
# Installs what is missing, then runs all tests on the CPU and the device tests once more on Vulkan: on a GPU's driver
# if there is one, else on a software driver.
#
#   sh scripts/test.sh [FILTER]     FILTER: a part of the names of the tests to run
#
# CI in the environment makes a missing Vulkan driver a failure; elsewhere those tests are left out, and the summary
# says so.
set -eu
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

# Adds up the closing lines of all test programs of one run. A test that cannot run on a device passes, after a line
# that starts with "skipped"; it is counted as that.
counts() {
    awk '/^skipped/ { skipped++ }
         /^test result:/ { passed += $4; failed += $6; ignored += $8 }
         END { printf "%d passed, %d failed, %d skipped", passed - skipped, failed, ignored + skipped }' "$logs/$1"
}

sh scripts/setup.sh
vulkan=yes
sh scripts/setup.sh vulkan || vulkan=no

# A device that broke ends its process, and a driver's threads do not mix well with the CPU runtime's: each device
# gets a process of its own. --show-output prints what passing tests say: the device's name, and what was skipped.
run cpu env VOXGRAD_TEST_DEVICE=cpu cargo test --release --workspace -- --show-output "$@"

if [ "$vulkan" = yes ]; then
    if [ -z "${VK_ICD_FILENAMES:-}${VK_DRIVER_FILES:-}" ] && ! ls /dev/dri/render* /dev/nvidia0 /dev/dxg >/dev/null 2>&1; then
        # Without a GPU, the loader would try every GPU driver that is installed beside the software one.
        for lavapipe in /usr/share/vulkan/icd.d/lvp_icd*.json; do
            [ -e "$lavapipe" ] && export VK_ICD_FILENAMES="$lavapipe"
        done
    fi
    # Mesa complains about a missing runtime folder, which only a desktop session has.
    export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$logs}"
    run vulkan env VOXGRAD_TEST_DEVICE=vulkan cargo test --release --test tests -- --show-output --test-threads=1 "$@"
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
exit $status
