#!/bin/sh
# Compiles every kernel that two whole networks launch (nnU-Net's for BraTS, and the demo's) for NVIDIA GPUs without having
# one, assembles them with NVIDIA's assembler, and prints what each of them needs.
#
#   sh scripts/ptx_check.sh [FOLDER]     FOLDER: receives the PTX and the tables, target/ptx unless given
#
# Fails if a kernel does not compile or assemble, breaks a limit of the GPU, or spills more than 32 bytes of a unit's
# registers to memory (a few bytes also occur where registers are left: the assembler's choice). The assembler and the
# library of mathematical functions come from PyPI (nvidia-cuda-nvcc, nvidia-nvvm) into
# ${XDG_CACHE_HOME:-~/.cache}/voxgrad/ptxas; delete that to start over.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-${CARGO_TARGET_DIR:-target}/ptx}
environment=${XDG_CACHE_HOME:-$HOME/.cache}/voxgrad/ptxas
packages='nvidia-cuda-nvcc==13.* nvidia-nvvm==13.*'

sh scripts/setup.sh
if [ "$(cat "$environment/installed.txt" 2>/dev/null)" != "$packages" ]; then
    printf 'ptx_check: installing NVIDIA'"'"'s assembler into %s (once)\n' "$environment" >&2
    "${PYTHON:-python3}" -m venv "$environment"
    # shellcheck disable=SC2086  # a list of words
    "$environment/bin/pip" install --quiet --disable-pip-version-check $packages
    printf '%s\n' "$packages" >"$environment/installed.txt"
fi
ptxas=$(find "$environment/lib" -path '*/bin/ptxas' | head -n 1)
# CubeCL's compiler takes exp and log from the libdevice of this. Not exported: Cargo would build CubeCL anew for it.
toolkit=$(dirname "$(dirname "$ptxas")")

tests=$(cargo test --release --test tests --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/tests-[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$tests" ] || exit 1
rm -rf "$folder"
mkdir -p "$folder/driver"
cc -O1 -shared -fPIC -o "$folder/driver/libcuda.so.1" tests/ptx/driver.c

status=0
for sm in 80 90; do
    out=$folder/sm_$sm
    mkdir -p "$out"
    CUDA_PATH=$toolkit LD_LIBRARY_PATH=$folder/driver CUDA_STUB_SM=$sm CUDA_STUB_FOLDER=$out VOXGRAD_TEST_DEVICE=cuda \
        "$tests" ptx:: --test-threads=1 >"$out/log.txt" 2>&1 || {
        tail -n 40 "$out/log.txt"
        exit 1
    }
    # From 9.0 on CubeCL writes for the architecture with its own additions.
    [ "$sm" = 80 ] && target=sm_80 || target=sm_${sm}a
    for kernel in "$out"/*.ptx; do
        "$ptxas" -v -arch="$target" "$kernel" -o "${kernel%.ptx}.cubin" >"${kernel%.ptx}.resources" 2>&1 ||
            printf 'REFUSED\n' >>"${kernel%.ptx}.resources"
    done
    printf '\nsm_%s: %s kernels\n' "$sm" "$(find "$out" -name '*.ptx' | wc -l)"
    # One line a kernel: units of a cube, registers of a unit, bytes of shared memory of a cube, bytes spilled of a unit.
    awk -v launches="$out/launches.txt" '
        BEGIN {
            while ((getline line < launches) > 0) {
                split(line, word, " ")
                units[word[1]] = word[2]
                if (word[3] > shared[word[1]]) shared[word[1]] = word[3]
                if (line ~ /REFUSED/) broken[word[1]] = 1
            }
            printf "%-52s %6s %9s %8s %8s %6s\n", "kernel", "units", "registers", "shared", "dynamic", "spills"
        }
        function close_kernel() {
            if (name == "") return
            bad = spills > 32 || refused || broken[name] || registers == ""
            printf "%-52s %6s %9s %8d %8d %6d%s\n", name, units[name], registers, static, shared[name], spills,
                refused ? "  refused" : broken[name] ? "  beyond a limit" : ""
            failed += bad
        }
        FNR == 1 {
            close_kernel()
            name = FILENAME
            sub(/.*\//, "", name)
            sub(/\.resources$/, "", name)
            registers = ""; static = spills = refused = 0
        }
        /bytes spill stores/ { spills = value($0, "bytes spill stores") }
        /Used [0-9]+ registers/ { registers = value($0, "registers"); static = value($0, "bytes smem") }
        /REFUSED/ { refused = 1 }
        # The number before some words.
        function value(line, words) {
            return match(line, "[0-9]+ " words) ? substr(line, RSTART, RLENGTH) + 0 : 0
        }
        END {
            close_kernel()
            if (failed) printf "FAILED: %d kernels spill too much, were refused, or break a limit\n", failed
        }' "$out"/*.resources | tee "$out/table.txt"
    ! grep -q '^FAILED' "$out/table.txt" || status=1
done
exit $status
