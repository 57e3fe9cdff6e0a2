#!/usr/bin/env bash
# A base for hosts that cannot pull the pinned one: Debian bookworm with its own Python 3.11, made by debootstrap. Prints the image's name.
# Its Python is another build than the pinned base's; `make image-check` shows that the miniature's bits do not depend on it. Needs root.
set -euo pipefail
cd "$(dirname "$0")/.."
. container/engine.sh

name=localhost/kohaku-delta-base:bookworm
if ! $engine image inspect "$name" > /dev/null 2>&1; then
    command -v debootstrap > /dev/null || { echo "Error: debootstrap is not there. Install it, or name a base image that this host has: BASE=…" >&2; exit 1; }
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    debootstrap --variant=minbase --include=python3,python3-distutils,python3.11-venv bookworm "$folder/system" >&2
    rm -rf "$folder"/system/var/cache/apt/*.bin "$folder"/system/var/cache/apt/archives/*.deb "$folder"/system/var/lib/apt/lists/* "$folder"/system/var/log/*
    tar -C "$folder/system" -c . | $engine import - "$name" >&2
fi
echo "$name"
