#!/bin/sh
# All checks that need an NVIDIA GPU, in one call: the tests on CUDA, the same under compute-sanitizer, and the benches
# beside PyTorch.
#
#   sh scripts/gpu-checks.sh pack       builds the programs, on any machine, into target/gpu-checks (stripped, compressed)
#   sh scripts/gpu-checks.sh run [OUT]  runs them on this machine's GPU; logs go to OUT (target/gpu-checks/logs)
#
# `run` needs neither cargo nor a network, only what `pack` made, in a checkout of the same revision: so that the GPU may
# be in a machine that has nothing but its driver and the CUDA toolkit. Needs: nvidia-smi, $CUDA_PATH or /usr/local/cuda
# with nvvm/libdevice; compute-sanitizer and a python3 with PyTorch and nnU-Net where those parts shall run (PYTHON names
# another one). What is missing is reported as not run.
#
# Exit status: 0 all that ran passed, 1 something failed, 2 nothing could be run.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/target/gpu-checks

say() { printf 'gpu-checks: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 2
}
has() { command -v "$1" >/dev/null 2>&1; }

pack() {
    sh scripts/setup.sh
    rm -rf "$folder"
    mkdir -p "$folder"
    cargo build --release --bin voxgrad
    for program in "test tests" "bench medians"; do
        # shellcheck disable=SC2086  # two words
        set -- $program
        built=$(cargo "$1" --release --"$1" "$2" --no-run --message-format=json |
            sed -n 's/.*"executable":"\([^"]*\/'"$2"'-[^"]*\)".*/\1/p' | tail -n 1)
        [ -n "$built" ] || fail "cargo named no executable for $2"
        strip -o "$folder/$2" "$built"
    done
    strip -o "$folder/voxgrad" "${CARGO_TARGET_DIR:-target}/release/voxgrad"
    # The programs look for their data where they were built.
    pwd -P >"$folder/built_in"
    git rev-parse HEAD >"$folder/revision" 2>/dev/null || true
    xz -T0 -f "$folder/tests" "$folder/medians" "$folder/voxgrad"
    du -sh "$folder" >&2
}

# step NAME COMMAND...: runs it with its output in a log; says how it went, and goes on.
failures=0
step() {
    name=$1
    shift
    start=$(date +%s)
    if "$@" >"$out/$name.log" 2>&1; then verdict=passed; else
        verdict="FAILED (status $?)"
        failures=$((failures + 1))
    fi
    printf '%s: %s, %s s\n' "$name" "$verdict" $(($(date +%s) - start)) | tee -a "$out/summary"
    case $verdict in passed) ;; *) tail -n 15 "$out/$name.log" ;; esac
}

# A sanitizer that finds nothing proves something only if it finds what is there: a planted error has to be reported.
control() {
    ! compute-sanitizer --tool "$1" --error-exitcode 9 "$folder/tests" --ignored --exact "sanitizer::planted_$1_error"
}

run() {
    [ -e "$folder/built_in" ] || fail "$folder is empty: run  sh scripts/gpu-checks.sh pack  first, here or elsewhere"
    nvidia-smi >/dev/null 2>&1 || fail "nvidia-smi finds no GPU"
    out=${1:-$folder/logs}
    mkdir -p "$out"
    : >"$out/summary"
    for program in tests medians voxgrad; do
        [ -e "$folder/$program" ] || xz -dk "$folder/$program.xz"
        chmod +x "$folder/$program"
    done
    built_in=$(cat "$folder/built_in")
    if [ ! -e "$built_in" ]; then
        mkdir -p "$(dirname "$built_in")"
        ln -s "$PWD" "$built_in"
    fi
    # The command line's tests start the program that cargo built beside them.
    mkdir -p "$built_in/target/release"
    [ -e "$built_in/target/release/voxgrad" ] || cp "$folder/voxgrad" "$built_in/target/release/voxgrad"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$out/summary"
    export VOXGRAD_TEST_DEVICE=cuda VOXGRAD_DEVICE=cuda VOXGRAD_BENCH_LARGE=1

    step tests "$folder/tests" --show-output --test-threads=1
    if has compute-sanitizer; then
        for tool in memcheck racecheck; do
            step "$tool-control" control "$tool"
            # The kernels' own tests: what trains whole networks takes too long under a sanitizer.
            step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/tests" --test-threads=1 \
                conv3d:: conv_transpose3d:: elementwise:: instance_norm:: loss:: optimizer:: reduce::
        done
    else
        say "compute-sanitizer is missing: memcheck and racecheck were not run"
    fi
    step benches "$folder/medians" all 11
    python=${PYTHON:-python3}
    if "$python" -c 'import torch, nnunetv2, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        step peers "$python" benches/peers/torch_peers.py all --device cuda --large --repeats 11
        step peers-compiled "$python" benches/peers/torch_peers.py step --device cuda --large --compile --repeats 11
        step benches-again "$folder/medians" all 11
    else
        say "no python3 with PyTorch, CUDA and nnunetv2: the benches ran without their peers"
    fi
    cat "$out/summary"
    [ "$failures" = 0 ]
}

case "${1:-}" in
    pack) pack ;;
    run) run "${2:-}" ;;
    *) fail "usage: gpu-checks.sh pack | run [OUT]" ;;
esac
