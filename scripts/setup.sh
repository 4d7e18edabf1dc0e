#!/bin/sh
# Makes this machine able to build voxgrad, and does nothing where it already is.
#
#   sh scripts/setup.sh           Rust, a C++ compiler, and LLVM for CubeCL's `cpu` and `cuda` features
#   sh scripts/setup.sh vulkan    the same, and a Vulkan driver (a software one if there is no other)
#
# Exit status: 0 ready, 2 something has to be installed by hand (the message says what).
# VOXGRAD_LLVM_CONFIG: an LLVM 22 of your own to use, as the path of its llvm-config.
set -eu

# CubeCL 0.11.3 looks for LLVM in one folder, under the name of the bundle that its build script would download.
bundle=tracel-llvm-23.1.0-4
bundle_url=https://github.com/tracel-ai/tracel-llvm/releases/download/v23.1.0-4

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 2
}
has() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif has sudo; then
        sudo "$@"
    else
        fail "root is needed for: $*"
    fi
}

# Installs Debian packages; the index is refreshed once per run, since a fresh container has none.
apt_install() {
    apt_refresh
    say "installing $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
apt_refresh() {
    [ -n "${apt_is_fresh:-}" ] && return
    # A third-party source that is out of reach must not stop the install: what is missing shows there.
    as_root apt-get update -qq || say "apt-get update had errors; going on with the package lists at hand"
    apt_is_fresh=yes
}
apt_offers() { [ -n "$(apt-cache madison "$1" 2>/dev/null)" ]; }

need_rust() {
    if ! has cargo; then
        [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] &&
            fail "cargo is installed but not on PATH: run  . \"${CARGO_HOME:-$HOME/.cargo}/env\"  and try again"
        fail "Rust 1.95 or newer is needed: install it from https://rustup.rs and try again"
    fi
    version=$(cargo --version | sed -n 's/^cargo \([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p')
    major=${version%%.*} minor=${version#*.}
    if [ "${major:-0}" -lt 1 ] || { [ "$major" = 1 ] && [ "$minor" -lt 95 ]; }; then
        has rustup && fail "cargo $version is too old, 1.95 is needed: run  rustup update stable  (and  rustup default stable)"
        fail "cargo $version is too old, 1.95 is needed: distributions lag behind, https://rustup.rs has the current one"
    fi
}

need_compiler() {
    # Cargo links with `cc`; the LLVM shims of CubeCL are C++.
    if has cc && { has c++ || has g++ || has clang++; }; then return; fi
    if has apt-get; then
        apt_install g++ libc6-dev
    else
        fail "a C and a C++ compiler are needed (Fedora: dnf install gcc-c++; Arch: pacman -S base-devel; macOS: xcode-select --install)"
    fi
}

# True if the release that CubeCL's build script downloads is within reach: only its checksum file is asked for.
bundle_is_reachable() {
    case "$(uname -m)" in
        aarch64 | arm64) architecture=AArch64 ;;
        *) architecture=x64 ;;
    esac
    case "$(uname -s)" in
        Darwin) file=macos-$architecture.checksums.json ;;
        *) file=linux-$architecture.checksums.json ;;
    esac
    if has curl; then
        curl -fsSL --connect-timeout 5 --max-time 20 -o /dev/null "$bundle_url/$file" 2>/dev/null
    elif has wget; then
        wget -q --tries=1 --timeout=20 -O /dev/null "$bundle_url/$file" 2>/dev/null
    else
        # Without either tool the question cannot be asked: where a distribution's LLVM can be had, that is the safer answer.
        if has apt-get; then return 1; fi
    fi
}

# Puts an LLVM that is already on the system where CubeCL looks. Only a wrapper is written: the system's LLVM stays as
# it is, and deleting the folder undoes it.
adopt_llvm() {
    llvm_config=$1
    [ -x "$llvm_config" ] || fail "$llvm_config is not an executable"
    case "$("$llvm_config" --version)" in
        22.*) ;;
        *) fail "$llvm_config is LLVM $("$llvm_config" --version), but CubeCL 0.11.3 needs LLVM 22" ;;
    esac
    "$llvm_config" --link-static --libs >/dev/null 2>&1 ||
        fail "$llvm_config belongs to an LLVM without static libraries, which CubeCL links"
    mkdir -p "$llvm/bin"
    # llvm-config also lists libxml2 and Z3 as system libraries, which nothing that CubeCL links refers to.
    cat >"$llvm/bin/llvm-config" <<END
#!/bin/sh
'$llvm_config' "\$@" | sed -E 's#(/[^ ]*/lib(z3|xml2)\.(so|a)|-l(z3|xml2))##g'
END
    chmod +x "$llvm/bin/llvm-config"
    # The marker comes last: a run that was cut short is then repeated.
    touch "$marker"
    say "CubeCL will link LLVM $("$llvm_config" --version) of $("$llvm_config" --prefix)"
}

need_llvm() {
    case "$(uname -s)" in
        Darwin) data="$HOME/Library/Application Support" ;;
        *) data="${XDG_DATA_HOME:-$HOME/.local/share}" ;;
    esac
    llvm=$data/tracel/$bundle
    marker=$llvm/.tracel-llvm-installed
    if [ -e "$marker" ]; then
        # A home folder can outlive the packages that a wrapper in it points to.
        "$llvm/bin/llvm-config" --link-static --libs 2>/dev/null | grep -q . && return
        say "the LLVM in $llvm no longer works; replacing it"
        rm -rf "$llvm"
    fi
    if [ -n "${VOXGRAD_LLVM_CONFIG:-}" ]; then
        adopt_llvm "$VOXGRAD_LLVM_CONFIG"
        return
    fi
    bundle_is_reachable && return

    debian_llvm=/usr/lib/llvm-22/bin/llvm-config
    if has apt-get; then
        packages="llvm-22-dev libpolly-22-dev zlib1g-dev libzstd-dev"
        # shellcheck disable=SC2086  # a list of words
        if ! dpkg -s $packages >/dev/null 2>&1; then
            apt_refresh
            apt_offers llvm-22-dev || fail "CubeCL's own LLVM ($bundle_url) is out of reach, and this release has no package
llvm-22-dev (Debian 12 has it in its security updates; newer releases may, under the same name). Either
  - let this machine reach that address once, and run this again; or
  - install LLVM 22 with static libraries from https://apt.llvm.org, and run this again with
    VOXGRAD_LLVM_CONFIG=/usr/lib/llvm-22/bin/llvm-config; or
  - build for Vulkan alone, which needs no LLVM:  cargo build --release --no-default-features --features cli,vulkan"
            # shellcheck disable=SC2086
            apt_install $packages
        fi
        adopt_llvm "$debian_llvm"
        return
    fi
    fail "CubeCL's own LLVM ($bundle_url) is out of reach. Either
  - let this machine reach that address once, and run this again; or
  - install LLVM 22 with its static libraries, Polly, and the development files of zlib and zstd, and run this again with
    VOXGRAD_LLVM_CONFIG=/path/to/llvm-config; or
  - build for Vulkan alone, which needs no LLVM:  cargo build --release --no-default-features --features cli,vulkan"
}

need_vulkan() {
    for driver in /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json; do
        if [ -e "$driver" ] && ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1'; then return; fi
    done
    if has apt-get; then
        apt_install libvulkan1 mesa-vulkan-drivers
    else
        fail "no Vulkan driver was found. Install one (a software driver will do: Fedora: dnf install vulkan-loader mesa-vulkan-drivers;
Arch: pacman -S vulkan-icd-loader vulkan-swrast)"
    fi
}

need_rust
need_compiler
need_llvm
case "${1:-}" in
    "") ;;
    vulkan) need_vulkan ;;
    *) fail "unknown argument $1; the only one is: vulkan" ;;
esac
