#!/bin/sh
# Runs an executable (tests, benches) on the newest Mesa: the software Vulkan driver of Debian sid has explicit workgroup memory and
# cooperative matrices, which those of stable distributions lack, so shared memory and tensor-core kernels are tested
# without a GPU.
#
#   sudo sh scripts/vulkan_sid.sh EXECUTABLE [ARGUMENTS...]
#
# The first run makes a Debian sid root (about 80 s and 700 MB) in ${XDG_CACHE_HOME:-~/.cache}/voxgrad/sid; delete that
# folder for a newer Mesa. Needs root, debootstrap and a Linux host whose C library is no newer than sid's.
set -eu

say() { printf 'vulkan_sid: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 2
}

[ $# -ge 1 ] || fail "usage: vulkan_sid.sh EXECUTABLE [ARGUMENTS...]"
[ -x "$1" ] || fail "$1 is not an executable"
[ "$(id -u)" = 0 ] || fail "root is needed, for chroot and mounts"

# The mounts below live in a mount namespace of their own and vanish with it, however this script ends: nothing is left
# to unmount, and deleting the cached root can never reach what was mounted into it.
if [ -z "${VOXGRAD_SID_NAMESPACE:-}" ]; then
    VOXGRAD_SID_NAMESPACE=yes exec unshare --mount --propagation private sh "$0" "$@"
fi

repository=$(cd "$(dirname "$0")/.." && pwd -P)
executable=$(readlink -f "$1")
shift
root=${XDG_CACHE_HOME:-$HOME/.cache}/voxgrad/sid

if [ ! -d "$root" ]; then
    command -v debootstrap >/dev/null 2>&1 || fail "debootstrap is missing: apt-get install debootstrap"
    say "making a Debian sid root in $root"
    # Built aside and moved when complete, so that a run that was cut short does not pass for a root.
    rm -rf "$root.new"
    mkdir -p "$root.new"
    debootstrap --variant=minbase --include=libvulkan1,mesa-vulkan-drivers,libstdc++6,libzstd1,zlib1g \
        sid "$root.new" >"$root.log" 2>&1 || {
        tail -n 20 "$root.log" >&2
        fail "debootstrap failed; its log is $root.log"
    }
    rm -rf "$root.new/var/cache/apt/archives"
    mv "$root.new" "$root"
fi

# Tests find their data by the absolute path of the repository, and the command line's tests find its executable beside
# them, in the target folder: both appear in the root at the paths they have here, and stay unwritable.
share() {
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    mount -o remount,bind,ro "$root$1"
}
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
share "$repository"
folder=$(dirname "$executable")
# Cargo puts test programs into `deps` of the profile's folder, and the programs that they start above it.
[ "$(basename "$folder")" = deps ] && folder=$(dirname "$folder")
share "$folder"

lavapipe=
for file in "$root"/usr/share/vulkan/icd.d/lvp_icd*.json; do
    [ -e "$file" ] && lavapipe=${file#"$root"}
done
[ -n "$lavapipe" ] || fail "no software Vulkan driver in $root: delete that folder and run this again"
say "Mesa $(sed -n '/^Package: mesa-vulkan-drivers$/,/^$/s/^Version: //p' "$root/var/lib/dpkg/status") on $lavapipe"

exec chroot "$root" /usr/bin/env VK_ICD_FILENAMES="$lavapipe" VOXGRAD_TEST_DEVICE=vulkan VOXGRAD_DEVICE=vulkan \
    TMPDIR=/tmp HOME=/tmp "$executable" "$@"
