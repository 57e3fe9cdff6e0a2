#!/usr/bin/env bash
# Builds the image of HEAD: `LOCK=cpu container/build.sh --no-cache`. The context is a clean copy of the commit, so the label says what is inside.
# LOCK: cuda or cpu. BASE: another base image than the Dockerfile's. WHEELS: a folder with every wheel (`make wheels`); then no network is used.
set -euo pipefail
cd "$(dirname "$0")/.."
. container/engine.sh

lock=${LOCK:-cuda}
export SOURCE_DATE_EPOCH=315532800  # the Dockerfile's: 1980, the earliest time that every archive format can hold; constant, so a lock gives one layer
[ -f "requirements/$lock.txt" ] || { echo "Error: requirements/$lock.txt is not there. Use LOCK=cuda or LOCK=cpu." >&2; exit 1; }
git diff --quiet HEAD || echo "Note: uncommitted changes will not be in the image." >&2

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git archive HEAD | tar -x -C "$context"

arguments=(--build-arg LOCK="$lock" --build-arg LOCK_SHA256="$(sha256sum < "$context/requirements/$lock.txt" | cut -d' ' -f1)")
arguments+=(--build-arg REVISION="$(git rev-parse HEAD)")
[ -z "${BASE:-}" ] || arguments+=(--build-arg BASE="$BASE")
for index in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
    [ -z "${!index:-}" ] || arguments+=(--build-arg "$index=${!index}")
done
if [ -n "${WHEELS:-}" ]; then
    [ -d "$WHEELS" ] || { echo "Error: the folder of wheels $WHEELS is not there. \`make wheels LOCK=$lock\` fills it." >&2; exit 1; }
    arguments+=(--build-context wheels="$(cd "$WHEELS" && pwd)" --build-arg PIP_NO_INDEX=1 --network none)
elif [ "$engine" = podman ]; then
    arguments+=(--network host)
fi
build "${arguments[@]}" --tag "${IMAGE:-kohaku-delta:$lock}" "$@" "$context"
