#!/bin/sh
# Downloads every archive of requirements/LOCK.txt, of container/init.txt and of requirements/uv.txt into build/wheels-LOCK, verified by sha256.
# If pip, as it is configured, does not find the lock's torch, uv names PyTorch's own index. Run by `make wheels`, after the setup.
set -eu
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
name=${LOCK:-cuda}
folder=build/wheels-$name
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip > /dev/null  # uv's environments have no pip; Python brings one
download() { "$venv/bin/python" -m pip download --disable-pip-version-check --no-deps --require-hashes --no-build-isolation -d "$folder" "$@"; }
sed -n '/^torch==/,/[^\\]$/p' "requirements/$name.txt" > "$work/torch.txt"
if ! download --retries 1 -r "$work/torch.txt" 2> "$work/errors"; then
    for uv in "${UV:-uv}" "$venv-uv/bin/uv"; do ! command -v "$uv" > /dev/null || break; done
    sed 's/ .*//; /^$/d' "$work/torch.txt" > "$work/torch.in"
    backend=$([ "$name" = cpu ] && echo cpu || echo auto)
    "$uv" pip compile --quiet --no-deps --no-header --python-version 3.11 --torch-backend "$backend" --emit-index-annotation "$work/torch.in" > "$work/index" \
        || { echo "Error: neither pip ($(tail -n 1 "$work/errors")) nor uv finds the lock's torch. Check the network, or set PIP_EXTRA_INDEX_URL to an index that has it." >&2; exit 1; }
    index=$(sed -n 's/^ *# from //p' "$work/index")
    echo "wheels: pip does not find the lock's torch; asking $index, which uv names"
    download --extra-index-url "$index" -r "$work/torch.txt"
fi
download --quiet --find-links "$folder" -r "requirements/$name.txt" -r container/init.txt -r requirements/uv.txt
echo "wheels: $(ls "$folder" | wc -l) archives in $folder"
