#!/bin/sh
# All checks that need an NVIDIA GPU: the tests on CUDA, the same under compute-sanitizer, and the benches beside PyTorch.
#
#   sh scripts/gpu_checks.sh pack          builds the programs, on any machine, into target/gpu_checks (stripped, compressed)
#   sh scripts/gpu_checks.sh run [PART...] runs them on this machine's GPU; parts: tests sanitizer benches peers, all of
#                                          them unless some are named
#
# `run` needs neither cargo nor a network, only what `pack` made, in a checkout of the same revision: so that the GPU may
# be in a machine that has nothing but its driver and the CUDA toolkit. Needs: nvidia-smi, $CUDA_PATH or /usr/local/cuda
# with nvvm/libdevice; compute-sanitizer and a python3 with PyTorch and nnU-Net where those parts shall run (PYTHON names
# another one). It stops after SECONDS_IN_ALL seconds (560): what there was no time for is reported, and can be asked for by
# name in another call with the same OUT.
#
# Logs go to $OUT (target/gpu_checks/logs), with a summary, and results.md for benches/RESULTS.md.
#
# Exit status: 0 everything that was asked for ran and passed, 1 something failed, 2 nothing could be run, 3 what ran passed
# but something is missing.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/target/gpu_checks

say() { printf 'gpu_checks: %s\n' "$*" >&2; }
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
    for program in "test tests" "bench medians" "bench loss"; do
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
    # All contain the same compiler: a dictionary that reaches from one program to the next stores it once.
    (cd "$folder" && tar c tests medians loss voxgrad | xz --lzma2=preset=2,dict=512MiB >programs.tar.xz && rm tests medians loss voxgrad)
    du -sh "$folder" >&2
}

failures=0
missing=0
deadline=0

# not_run NAME WHY
not_run() {
    printf '%s: not run, %s\n' "$1" "$2" | tee -a "$out/summary"
    missing=$((missing + 1))
}

# within COMMAND...: ends it when the time of its step is over.
within() { timeout -k 10 "$limit" "$@"; }

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, with its output in a log; says how it went, and goes on.
step() {
    name=$1 limit=$2
    shift 2
    start=$(date +%s)
    [ $((deadline - start)) -ge "$limit" ] || limit=$((deadline - start))
    if [ "$limit" -lt 10 ]; then
        not_run "$name" "no time was left"
        return
    fi
    status=0
    "$@" >"$out/$name.log" 2>"$out/$name.err" || status=$?
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED (stopped after $limit s)" ;;
        *) verdict="FAILED (status $status)" ;;
    esac
    printf '%s: %s, %s s\n' "$name" "$verdict" $(($(date +%s) - start)) | tee -a "$out/summary"
    if [ "$verdict" != passed ]; then
        failures=$((failures + 1))
        tail -n 15 "$out/$name.log" "$out/$name.err"
    fi
}

sanitizer() { within compute-sanitizer --tool "$1" --error-exitcode 9 "$folder/tests" --test-threads=1 "$2" "$3"; }

# A sanitizer that finds nothing proves something only if it finds what is there: a planted error has to be reported.
control() {
    found=0
    sanitizer "$1" --ignored "sanitizer::planted_$1_error" || found=$?
    [ "$found" = 9 ]
}

# watched NAME COMMAND...: with the device's memory in use, in MiB, sampled into memory-NAME.mib, first before it begins.
watched() {
    samples=$out/memory-$1.mib
    shift
    used() { nvidia-smi -i 0 --query-gpu=memory.used --format=csv,noheader,nounits "$@"; }
    used >"$samples"
    used -lms 100 >>"$samples" &
    sampler=$!
    result=0
    within "$@" || result=$?
    kill "$sampler" 2>/dev/null || true
    wait "$sampler" 2>/dev/null || true
    return "$result"
}

run_tests() { step tests 240 within "$folder/tests" --show-output --test-threads=1; }

whole_networks='golden|memory|predict|ptx|sanitizer|train|tune'
run_sanitizer() {
    for tool in memcheck racecheck; do
        if ! has compute-sanitizer; then
            not_run "$tool" "compute-sanitizer is missing"
            continue
        fi
        step "$tool-control" 60 control "$tool"
        # Every file of device tests but those that train whole networks, which takes too long under a sanitizer: a new file
        # is in unless it is named here.
        for tests in $("$folder/tests" --list | sed -n 's/^device::\([a-z0-9_]*::\).*: test$/\1/p' | sort -u |
            grep -vE "^($whole_networks)::"); do
            step "$tool-${tests%::}" 100 sanitizer "$tool" --show-output "device::$tests"
        done
    done
}

large=step/32-64-128-256-320-320-in4-b2-128x128x128

run_benches() {
    step medians 150 within "$folder/medians" all 11
    step losses 60 within "$folder/loss" "" 11
    # A process each, for its memory.
    for dtype in "" -f16 -bf16; do
        step "voxgrad-large$dtype" 60 watched "voxgrad-large$dtype" "$folder/medians" "$large$dtype" 3
    done
}

run_peers() {
    python=${PYTHON:-python3}
    if ! "$python" -c 'import torch, nnunetv2, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        not_run peers "no python3 with PyTorch, CUDA and nnunetv2"
        return
    fi
    step peers 150 within "$python" benches/peers/torch_peers.py all --json --device cuda --large --repeats 11
    step peer-losses 120 within "$python" benches/peers/loss.py --peers nnunet,monai --repeats 11
    for format in contiguous channels_last_3d; do
        step "pytorch-large-$format" 60 watched "pytorch-large-$format" "$python" benches/peers/torch_peers.py step --json \
            --device cuda --large --only "$large" --format "$format" --repeats 3
    done
    step peers-compiled 150 within "$python" benches/peers/torch_peers.py step --json --device cuda --large --compile --repeats 7
    # A second round, so that both stood at the start and at the end.
    step medians-again 150 within "$folder/medians" all 11
}

run() {
    for part; do
        case $part in tests | sanitizer | benches | peers) ;; *) fail "there is no part $part" ;; esac
    done
    [ $# -gt 0 ] || set -- tests sanitizer benches peers
    [ -e "$folder/built_in" ] || fail "$folder is empty: run  sh scripts/gpu_checks.sh pack  first, here or elsewhere"
    nvidia-smi >/dev/null 2>&1 || fail "nvidia-smi finds no GPU"
    deadline=$(($(date +%s) + ${SECONDS_IN_ALL:-560}))
    out=${OUT:-$folder/logs}
    mkdir -p "$out"
    [ -e "$folder/tests" ] || tar xJf "$folder/programs.tar.xz" -C "$folder" || fail "programs.tar.xz cannot be unpacked"
    built_in=$(cat "$folder/built_in")
    if [ ! -e "$built_in" ]; then
        mkdir -p "$(dirname "$built_in")"
        ln -s "$PWD" "$built_in"
    fi
    # The command line's tests start the program that cargo built beside them.
    mkdir -p "$built_in/target/release"
    [ -e "$built_in/target/release/voxgrad" ] || cp "$folder/voxgrad" "$built_in/target/release/voxgrad"
    {
        printf 'revision %s, %s\n' "$(cat "$folder/revision" 2>/dev/null || echo unknown)" "$(date -u +%Y-%m-%d)"
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    } | tee -a "$out/summary"
    export VOXGRAD_TEST_DEVICE=cuda VOXGRAD_DEVICE=cuda

    for part; do "run_$part"; done

    if has "${PYTHON:-python3}"; then
        "${PYTHON:-python3}" benches/compare.py gpu "$out" >"$out/results.md" || not_run results.md "compare.py failed"
    else
        not_run results.md "python3 is missing"
    fi
    printf '\n'
    cat "$out/summary"
    [ "$failures" = 0 ] || exit 1
    [ "$missing" = 0 ] || exit 3
}

case "${1:-}" in
    pack) pack ;;
    run)
        shift
        run "$@"
        ;;
    *) fail "usage: gpu_checks.sh pack | run [PART...]" ;;
esac
