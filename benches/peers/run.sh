#!/bin/sh
# Runs a Python file with PyTorch and nnU-Net, which it installs into an environment of its own at the first call.
#
#   sh benches/peers/run.sh benches/peers/torch_peers.py all
#
# Needs Python 3.10 or newer with its venv module (Debian: python3-venv). On Linux x86-64 the package index has PyTorch
# with CUDA only, whose libraries must be there even to run on the CPU: about 3 GB are downloaded and 7 GB stored.
# The environment is ${XDG_CACHE_HOME:-~/.cache}/voxgrad/peers; delete it to start over. PYTHON chooses the interpreter.
set -eu

[ $# -ge 1 ] || {
    printf 'usage: run.sh FILE.py [ARGUMENTS...]\n' >&2
    exit 2
}
here=$(cd "$(dirname "$0")" && pwd)
requirements=$here/requirements.txt
environment=${XDG_CACHE_HOME:-$HOME/.cache}/voxgrad/peers

# The list that was installed is kept beside the packages: a changed or half-done installation is then repeated.
if ! cmp -s "$requirements" "$environment/installed.txt"; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { printf 'run: Python 3.10 or newer is needed\n' >&2 && exit 2; }
    printf 'run: installing PyTorch and nnU-Net into %s (once)\n' "$environment" >&2
    "$python" -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
    cp "$requirements" "$environment/installed.txt"
fi
exec "$environment/bin/python" "$@"
