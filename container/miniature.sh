#!/bin/sh
# Rebuilds the miniature in a copy of the repository whose dvc.lock has no valid hashes, and compares the result with the committed dvc.lock.
# The image's default command; needs no network. A container that is stopped and started again continues from the last saved state.
set -eu
recipe=$(cd "$(dirname "$0")/.." && pwd)
copy=${1:-/tmp/miniature}
trap 'echo "Stopped. Start this container again to continue."; exit 130' INT

if [ ! -d "$copy" ]; then
    aside=$copy.$$
    mkdir -p "$aside/.dvc" "$aside/miniature"
    cp "$recipe/.dvc/config" "$aside/.dvc/"
    printf '[core]\n    no_scm = true\n' > "$aside/.dvc/config.local"
    cp -R "$recipe/.dvcignore" "$recipe/data.dvc" "$recipe/dvc.yaml" "$recipe/params.yaml" "$recipe/requirements" "$recipe/src" "$recipe/stages" "$aside/"
    cp -RP "$recipe/miniature/dvc.yaml" "$recipe/miniature/params.yaml" "$recipe/miniature/remote" "$aside/miniature/"
    sed -E 's/md5: [0-9a-f]{32}/md5: ffffffffffffffffffffffffffffffff/' "$recipe/miniature/dvc.lock" > "$aside/miniature/dvc.lock"
    mv "$aside" "$copy"
fi
cd "$copy"
dvc pull --quiet --remote embedded data.dvc
cd miniature
dvc repro --quiet || { echo "Error: DVC failed. If no line above says why, \`dvc repro\` in $copy/miniature shows it." >&2; exit 1; }
if diff "$recipe/miniature/dvc.lock" dvc.lock; then
    echo "equal: miniature/dvc.lock is the committed one, bit for bit"
else
    echo "different: the lines above differ (<: committed, >: here). Look at the first stage in dvc.lock that differs."
    exit 1
fi
