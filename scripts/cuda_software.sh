#!/bin/sh
# The device tests on CUDA without a GPU: tests/cuda_driver executes the PTX of every kernel on the CPU and checks every
# access of memory. Once as an A100 (sm_80) and once as an H100 (sm_90).
#
#   sh scripts/cuda_software.sh                all device tests, file by file; hours on two cores
#   sh scripts/cuda_software.sh FILTER...      those whose names contain one of these; each runs in a process of its own
#   sh scripts/cuda_software.sh --selection    kernels of every kind at small ragged shapes: what CI has time for
#   sh scripts/cuda_software.sh --count        a step of nnU-Net's network for BraTS and losses, and the table of their counters
#
# Fails if a test fails, if a check of the driver finds anything, or if an error that is planted is not found. The
# selection names what it leaves out of the kernels that scripts/ptx_check.sh left in ${CARGO_TARGET_DIR:-target}/ptx.
# Logs, reports and counters of each launch go to ${CARGO_TARGET_DIR:-target}/cuda_software/sm_80 and sm_90.
# SM: one of the two alone. LIMIT: seconds for each filter (3600). TESTS: a test program that is built already.
#
# The library of mathematical functions that CubeCL's compiler links comes from PyPI, as in scripts/ptx_check.sh. Exit
# status 2: it cannot be installed here.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}
folder=$target/cuda_software
environment=${XDG_CACHE_HOME:-$HOME/.cache}/voxgrad/ptxas
packages='nvidia-cuda-nvcc==13.* nvidia-nvvm==13.*'

# Files of device tests, without that which plants errors.
device_files() { basename -s .rs tests/device/*.rs | sed 's/$/::/' | grep -v '^sanitizer::$'; }

# The selection: what computes is compared with references.
selection='reduce:: vector_math:: context:: elementwise:: instance_norm:: average_pool:: residual_norm:: optimizer::
    fused_norm:: augment:: window:: loss:: loss_edges:: conv3d:: conv_half:: conv_transpose3d::'

# Kernels that are wrong on purpose: a test, and what stands for what in PTX. A rounding, the barriers, the layout of a tile.
broken='elementwise::f16_and_bf16_are_rounded_once|cvt.rn.f16=>cvt.rz.f16
loss_edges::edge_06|bar.sync=>membar.cta; //
conv_half::plain_shapes|wmma.load.b.sync.aligned.row=>wmma.load.b.sync.aligned.col'

case "${1:-}" in
    --selection) filters=$selection ;;
    --count) filters=ptx::a_step_and_losses_are_counted broken= ;;
    "") filters=$(device_files) ;;
    -*)
        printf 'cuda_software: unknown argument %s; there are: --selection, --count\n' "$1" >&2
        exit 2
        ;;
    *) filters=$(printf '%s\n' "$@") ;;
esac

sh scripts/setup.sh
if [ "$(cat "$environment/installed.txt" 2>/dev/null)" != "$packages" ]; then
    printf 'cuda_software: installing NVIDIA'"'"'s libraries into %s (once)\n' "$environment" >&2
    # shellcheck disable=SC2086  # a list of words
    { "${PYTHON:-python3}" -m venv "$environment" &&
        "$environment/bin/pip" install --quiet --disable-pip-version-check $packages; } || {
        printf 'cuda_software: they cannot be installed\n' >&2
        exit 2
    }
    printf '%s\n' "$packages" >"$environment/installed.txt"
fi
# Not exported: Cargo would build CubeCL anew for it.
toolkit=$(dirname "$(dirname "$(find "$environment/lib" -path '*/bin/ptxas' | head -n 1)")")

# With the instructions of this machine, a fused multiply-add and vectors above all.
(cd tests/cuda_driver && RUSTFLAGS="${RUSTFLAGS:-} -C target-cpu=native" cargo build --release --target-dir "$folder/build")
[ "${1:-}" != --count ] || export CUDA_SOFTWARE_COUNT=yes
tests=${TESTS:-$(cargo test --release --test tests --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/tests-[^"]*\)".*/\1/p' | tail -n 1)}
[ -n "$tests" ] || exit 1
mkdir -p "$folder/driver" "$folder/run"
cp "$folder/build/release/libcuda.so" "$folder/driver/libcuda.so.1"
# CubeCL reads this where a program is started: each buffer an allocation of its own, not a part of a pool.
printf '[memory]\npersistent_memory = "enforced"\n' >"$folder/run/cubecl.toml"

# on_driver SM REPORTS ARGUMENTS...: the test program on the software driver.
on_driver() {
    sm=$1 reports=$2
    shift 2
    (cd "$folder/run" && CUDA_PATH=$toolkit LD_LIBRARY_PATH=$folder/driver VOXGRAD_TEST_DEVICE=cuda CUDA_SOFTWARE_SM=$sm \
        CUDA_SOFTWARE_REPORT=$reports timeout "${LIMIT:-3600}" "$tests" "$@" --show-output --test-threads=1)
}

# architecture SM: all of it on one of the two; fails if anything is found.
architecture() {
    sm=$1 status=0 out=$folder/sm_$1
    rm -rf "$out"
    mkdir -p "$out"
    for filter in $filters; do
        log=$out/$(printf '%s' "$filter" | sed 's/:*$//; s/::/./g').txt
        start=$(date +%s)
        verdict=passed
        CUDA_SOFTWARE_COUNTERS=$out/counters.json on_driver "$sm" "$out/reports.txt" "$filter" >"$log" 2>&1 || verdict=FAILED
        [ "$verdict" = passed ] || status=1
        grep -q '^test result' "$log" || verdict="$verdict (no result: stopped)"
        awk -v sm="$sm" -v filter="$filter" -v verdict="$verdict" -v seconds=$(($(date +%s) - start)) '
            /^---- / { counted = 0 }
            /^skipped/ && !counted { skipped++; counted = 1 }
            /^test result:/ { passed += $4; failed += $6 }
            END { printf "sm_%s %s %s: %d passed, %d of them not or not wholly possible here, %d failed, %d s\n", sm, filter,
                verdict, passed, skipped, failed, seconds }' "$log" | tee -a "$out/summary.txt"
    done
    if [ -s "$out/reports.txt" ]; then
        printf 'sm_%s: %s findings, in %s; the first ones:\n' "$sm" "$(wc -l <"$out/reports.txt")" "$out/reports.txt"
        head -n 20 "$out/reports.txt"
        status=1
    fi
    # A driver that stays silent on these proves nothing by staying silent elsewhere.
    for planted in 'memcheck:access out of bounds.*write_far_outside' 'racecheck:race in shared memory.*exchange_without_barrier'; do
        on_driver "$sm" "$out/planted.txt" "sanitizer::planted_${planted%%:*}_error" --ignored >"$out/planted.log" 2>&1 || true
        if grep -q "^${planted#*:}" "$out/planted.txt"; then
            printf 'sm_%s: the planted %s error is found\n' "$sm" "${planted%%:*}"
        else
            printf 'sm_%s: the planted %s error is NOT found\n' "$sm" "${planted%%:*}"
            status=1
        fi
    done
    unseen=0
    while IFS='|' read -r filter change; do
        [ -n "$filter" ] || continue
        if CUDA_SOFTWARE_BREAK=$change on_driver "$sm" "$out/broken.txt" "$filter" >"$out/broken.log" 2>&1 </dev/null; then
            printf 'sm_%s: %s passes with %s\n' "$sm" "$filter" "$change"
            unseen=1
        fi
    done <<END
$broken
END
    if [ "$unseen" = 1 ]; then
        status=1
    elif [ -n "$broken" ]; then
        printf 'sm_%s: what is broken on purpose is found\n' "$sm"
    fi
    return "$status"
}

# left_out: kernels of whole networks, by the names of their files without what tells variants of one name apart, that
# neither architecture launched.
left_out() {
    cat "$folder"/sm_*/counters.json | sed -n 's/^{"kernel":"\([^"]*\)_[0-9a-f]*".*/\1/p' | sort -u >"$folder/launched.txt"
    find "${CARGO_TARGET_DIR:-target}"/ptx/sm_* -name '*.ptx' | sed 's/.*\///; s/_[0-9a-f]*\.ptx$//' | sort -u >"$folder/listed.txt"
    comm -13 "$folder/launched.txt" "$folder/listed.txt"
}

# Most of the time goes into compiling kernels, on one core each.
status=0 running=
for sm in ${SM:-80 90}; do
    architecture "$sm" &
    running="$running $!"
done
for process in $running; do wait "$process" || status=1; done

if [ "${1:-}" = --selection ] && [ -z "${SM:-}" ]; then
    if [ ! -d "${CARGO_TARGET_DIR:-target}/ptx/sm_80" ]; then
        printf 'whether a kernel is left out is not known: sh scripts/ptx_check.sh lists them\n'
    elif [ -n "$(left_out)" ]; then
        printf 'kernels that the selection leaves out:\n'
        left_out
    else
        printf 'all %s kernels by name are launched\n' "$(wc -l <"$folder/listed.txt")"
    fi
fi
if [ "${1:-}" = --count ]; then
    for sm in ${SM:-80 90}; do
        printf '\nsm_%s\n\n' "$sm"
        python3 scripts/cuda_counters.py "$folder/sm_$sm/counters.json" || status=1
    done
fi
exit $status
