#!/usr/bin/env bash
# `make image-check`: builds the CPU image twice without a cache and compares the file systems; moves it through an archive, as an offline host would;
# rebuilds the miniature in it (another user, no network) and compares dvc.lock with the committed one. STOP=1: stops it during training.
# BASE, WHEELS: as in build.sh; without them the wheels are fetched first, and without a Docker engine the base is made here (base.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
. container/engine.sh

image=localhost/kohaku-delta-check
user=12345:12345
training=/tmp/miniature/miniature/work
limits=(--ulimit nofile=1024:4096 --ulimit nproc=4096:4096)  # podman's defaults are more than some hosts allow
work=$(mktemp -d)
finish() {
    $engine rm --force miniature-check listing-check > /dev/null 2>&1 || true
    $engine rmi --force "$image:first" "$image:second" > /dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT
say() { echo "$(date -u +%T) $*"; }
id() { $engine image inspect --format '{{.Id}}' "$image:$1"; }

if [ "$engine" = podman ] && [ -z "${BASE:-}" ]; then
    BASE=$(container/base.sh)
    export BASE
fi

if [ -z "${WHEELS:-}" ]; then
    make --no-print-directory wheels LOCK=cpu
    export WHEELS=build/wheels-cpu
fi

for each in first second; do
    say "building the image, without a cache: $each"
    LOCK=cpu IMAGE=$image:$each container/build.sh --no-cache --quiet
    $engine create --name listing-check "$image:$each" > /dev/null
    $engine export listing-check | python3 container/listing.py > "$work/$each.txt"
    $engine rm listing-check > /dev/null
done
diff "$work/first.txt" "$work/second.txt" || { say "different: the lines above differ between two builds"; exit 1; }
say "equal: $(wc -l < "$work/first.txt") files and folders of two builds, listing's sha256 $(sha256sum < "$work/first.txt" | cut -c-16)…"
if grep -P '^(opt/)?recipe/.*(\.pyc|\.egg-info|/pip)\t' "$work/first.txt"; then say "left over: the files above belong to the build stage"; exit 1; fi
[ "$(id first)" != "$(id second)" ] || say "equal: both are the image $(id first)"

say "through an archive: save, remove, load"
saved=$(id first)
save --output "$work/image.tar" "$image:first"
$engine rmi --force "$image:first" "$image:second" > /dev/null
$engine load --quiet --input "$work/image.tar"
rm "$work/image.tar"
[ "$(id first)" = "$saved" ] || { say "different: the image that was loaded is not the one that was saved"; exit 1; }

say "the miniature, as user $user, without a network"
$engine run --detach --name miniature-check --network none --user "$user" "${limits[@]}" "$image:first" > /dev/null
if [ -n "${STOP:-}" ]; then
    while steps=$($engine exec miniature-check sh -c "cat $training/*/log.csv 2> /dev/null | wc -l") && [ "$steps" -lt 14 ]; do sleep 0.3; done
    say "stopping it during training"
    $engine stop --time 600 miniature-check > /dev/null
    $engine cp "miniature-check:$training" "$work/stopped"
    last=$(tail -n 1 "$work"/stopped/*/log.csv | cut -d, -f1)
    ls -d "$work"/stopped/*/"$(printf 'step-%08d' $((last + 1)))" > /dev/null || { say "lost: the last step, $last, was not saved"; exit 1; }
    say "saved: all $((last + 1)) computed steps. Starting again"
    $engine start miniature-check
fi
$engine logs --follow miniature-check &
code=$($engine wait miniature-check)
wait
$engine cp miniature-check:/tmp/miniature/miniature/dvc.lock "$work/dvc.lock"
{ [ "$code" = 0 ] && cmp "$work/dvc.lock" miniature/dvc.lock; } || { say "different: the container's dvc.lock is not the committed one"; exit 1; }
say "equal: the dvc.lock that the container wrote is the committed one"
if [ -n "${STOP:-}" ]; then
    $engine cp "miniature-check:$training" "$work/ended"
    [ "$(cut -d, -f1 "$work"/ended/*/log.csv | sort | uniq -d | wc -l)" = 0 ] || { say "lost: some steps were computed twice"; exit 1; }
    say "saved: no step was computed twice"
fi
