#!/bin/sh
# Runs a bench's executable on the device that VOXGRAD_DEVICE names (cpu unless set).
#
#   VOXGRAD_DEVICE=vulkan sh scripts/compare_run.sh EXECUTABLE [ARGUMENTS...]
#
# Vulkan without a GPU means a software driver: Debian sid's, in a root of its own (scripts/vulkan_sid.sh), for root where
# debootstrap is installed; else the one that the system has.
set -eu
here=$(dirname "$0")
case ${VOXGRAD_DEVICE:-cpu} in
    vulkan*)
        if ! ls /dev/dri/render* /dev/nvidia0 /dev/dxg >/dev/null 2>&1; then
            if [ "$(id -u)" = 0 ] && command -v debootstrap >/dev/null 2>&1; then
                exec sh "$here/vulkan_sid.sh" "$@"
            fi
            # The loader would else try every GPU driver that is installed beside the software one.
            for lavapipe in /usr/share/vulkan/icd.d/lvp_icd*.json; do
                [ -e "$lavapipe" ] && export VK_ICD_FILENAMES="${VK_ICD_FILENAMES:-$lavapipe}"
            done
        fi
        ;;
esac
exec "$@"
