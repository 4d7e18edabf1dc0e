#!/bin/sh
# Compiles every kernel that two whole networks launch (nnU-Net's for BraTS, and the demo's) for NVIDIA GPUs without having
# one, assembles them with NVIDIA's assembler, and prints what each of them needs.
#
#   sh scripts/ptx_check.sh [FOLDER]     FOLDER: receives the PTX and the tables, target/ptx unless given
#
# Fails if a kernel does not compile or assemble, breaks a limit of the GPU, or has to spill registers to memory. The
# assembler also spills a few bytes by choice, where one more cube then fits on a multiprocessor: a kernel that spills is
# assembled once more with that choice taken away (.minnctapersm 1). What is spilled even then is `forced`, of which not a
# byte is allowed; of what was chosen, 32 bytes.
#
# The last column is the share of a multiprocessor's 2048 units that are resident, as far as registers, shared memory and
# the size of the cube allow; `low` marks less than a quarter.
#
# The assembler and the library of mathematical functions come from PyPI (nvidia-cuda-nvcc, nvidia-nvvm) into
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
    # From 9.0 on CubeCL writes for the architecture with its own additions. Shared memory of a multiprocessor in bytes.
    if [ "$sm" = 80 ]; then
        target=sm_80 shared=$((164 * 1024))
    else
        target=sm_${sm}a shared=$((228 * 1024))
    fi
    for kernel in "$out"/*.ptx; do
        "$ptxas" -v -arch="$target" "$kernel" -o "${kernel%.ptx}.cubin" >"${kernel%.ptx}.resources" 2>&1 ||
            printf 'REFUSED\n' >>"${kernel%.ptx}.resources"
        if grep -q '[1-9][0-9]* bytes spill stores' "${kernel%.ptx}.resources"; then
            sed 's/^\(\.reqntid .*\)$/\1\n.minnctapersm 1/' "$kernel" >"$out/unpressed.s"
            "$ptxas" -v -arch="$target" "$out/unpressed.s" -o "$out/unpressed.cubin" 2>&1 |
                sed -n 's/.* \([0-9]*\) bytes spill stores.*/FORCED \1/p' >>"${kernel%.ptx}.resources"
        fi
    done
    rm -f "$out"/unpressed.*
    printf '\nsm_%s: %s kernels\n' "$sm" "$(find "$out" -name '*.ptx' | wc -l)"
    # One line a kernel: units of a cube, registers of a unit, bytes of shared memory of a cube, bytes spilled of a unit.
    awk -v launches="$out/launches.txt" -v shared_memory="$shared" '
        BEGIN {
            while ((getline line < launches) > 0) {
                split(line, word, " ")
                units[word[1]] = word[2]
                if (word[3] > shared[word[1]]) shared[word[1]] = word[3]
                if (line ~ /REFUSED/) broken[word[1]] = 1
            }
            printf "%-58s %6s %9s %8s %6s %6s %9s\n", "kernel", "units", "registers", "shared", "spills", "forced", "resident"
        }
        function least(a, b) { return a < b ? a : b }
        # Percent of 2048 units: registers are dealt out by 256 to each warp, shared memory with 1 KiB more for each cube.
        function resident(units, registers, shared,   warps, cubes) {
            if (!units) return 0
            warps = int((units + 31) / 32)
            cubes = least(least(32, int(64 / warps)), int(65536 / (warps * 256 * int((registers * 32 + 255) / 256))))
            return 100 * least(cubes, int(shared_memory / (shared + 1024))) * warps / 64
        }
        function close_kernel() {
            if (name == "") return
            bad = forced > 0 || spills > 32 || refused || broken[name] || registers == ""
            percent = resident(units[name], registers, static + shared[name])
            printf "%-58s %6s %9s %8d %6d %6d %7.1f %%%s%s\n", name, units[name], registers, static + shared[name], spills,
                forced, percent, percent < 25 ? "  low" : "", refused ? "  refused" : broken[name] ? "  beyond a limit" : ""
            failed += bad
            chosen += spills > forced
            low += percent < 25
        }
        FNR == 1 {
            close_kernel()
            name = FILENAME
            sub(/.*\//, "", name)
            sub(/\.resources$/, "", name)
            registers = ""; static = spills = forced = refused = 0
        }
        /bytes spill stores/ { spills = value($0, "bytes spill stores") }
        /Used [0-9]+ registers/ { registers = value($0, "registers"); static = value($0, "bytes smem") }
        /^FORCED/ { forced = $2 }
        /REFUSED/ { refused = 1 }
        # The number before some words.
        function value(line, words) {
            return match(line, "[0-9]+ " words) ? substr(line, RSTART, RLENGTH) + 0 : 0
        }
        END {
            close_kernel()
            printf "%d kernels spill by the choice of the assembler, %d are resident below a quarter\n", chosen, low
            if (failed) printf "FAILED: %d kernels spill too much, were refused, or break a limit\n", failed
        }' "$out"/*.resources | tee "$out/table.txt"
    ! grep -q '^FAILED' "$out/table.txt" || status=1
done
exit $status
