#!/bin/sh
# Breaks the machine on purpose, one fault at a time in a copy of it, and runs its tests: each fault has to turn them red.
#
#   sh tests/cuda_driver/mutations.sh        some minutes: the machine is built once for each fault
#
# Fails if a fault stays unseen, or if its place is no longer in the source.
set -eu
cd "$(dirname "$0")"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r Cargo.toml Cargo.lock src tests "$copy"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/../../target}/cuda_software/mutations"

status=0
# broken FILE FROM TO TEST WHAT: a part of a line, what stands for it, and the test program that sees it.
broken() {
    if ! grep -qF "$2" "src/$1"; then
        printf '%s: no longer in src/%s: %s\n' "$5" "$1" "$2"
        status=1
        return
    fi
    python3 - "src/$1" "$copy/src/$1" "$2" "$3" <<'PYTHON'
import sys
source, copy, this, that = sys.argv[1:]
text = open(source).read()
open(copy, "w").write(text.replace(this, that, 1))
PYTHON
    (cd "$copy" && cargo build --tests) >"$copy/build.txt" 2>&1 || {
        tail -n 20 "$copy/build.txt"
        printf '%s: does not build\n' "$5"
        status=1
    }
    if (cd "$copy" && cargo test --test "$4") >"$copy/test.txt" 2>&1; then
        printf '%s: NOT seen\n' "$5"
        status=1
    else
        printf '%s: seen by %s\n' "$5" "$(sed -n 's/^test \(.*\) \.\.\. FAILED/\1/p' "$copy/test.txt" | tr '\n' ' ')"
    fi
    cp "src/$1" "$copy/src/$1"
}

broken arithmetic.rs 'return a.mul_add(b, c);' 'return a * b + c;' exact 'an fma in f32 that rounds twice'
broken arithmetic.rs 'a.to_f64() * b.to_f64(), c.to_f64()), F16' 'f16::from_f64(a.to_f64() * b.to_f64()).to_f64(), c.to_f64()), F16' \
    exact 'an fma in f16 that rounds twice'
broken tensor_core.rs 'false => e * LANES + lane,' 'false => e * LANES + (lane + 1) % LANES,' tensor \
    'a lane of wmma off by one'
broken tensor_core.rs '(in_group * 2 + e % 2 + 8 * (e / 2), group)' '(in_group * 2 + e % 2 + 8 * (e / 2), group ^ 1)' tensor \
    'a lane of mma off by one'
broken integer.rs 'a.min(b).max(0)' 'a.min(b)' integers 'min.relu without relu'
exit $status
