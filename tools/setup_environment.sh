#!/bin/sh
# Installs requirements/LOCK.txt and this package into the virtual environment VENV. Run by the Makefile (`make repro`, `make environment LOCK=cuda`).
# Every archive must match a sha256 of the lock; source archives are built with the lock's own setuptools.
#   1. pip, if PYTHON is a Python 3.11 and pip, as it is configured, finds the lock's build of torch.
#   2. Otherwise uv, which knows PyTorch's own index and can download Python 3.11: the one on PATH (or UV=), or else requirements/uv.txt in VENV-uv.
# WHEELS=folder: only that folder is used, no network. `make wheels` fills one.
set -eu
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
name=${LOCK:-cpu}
python=${PYTHON:-python3.11}
wheels=${WHEELS:-}
lock=requirements/$name.txt

say() { echo "setup: $*"; }
fail() { echo "Error: $*" >&2; exit 1; }
# The first error of the last command, on one line.
reason() { { grep -m 1 'No matching distribution' "$work/errors" || grep -i -m 1 '^ *\(error\|×\)' "$work/errors" || tail -n 1 "$work/errors"; } | sed 's/^ *\(ERROR: \|error: \|× \)//' | cut -c 1-200 | sed 's/[.: ]*$//'; }
# The lock's lines of one package: version and hashes.
locked() { sed -n "/^$1==/,/[^\\\\]\$/p" "$lock"; }

[ -f "$lock" ] || fail "$lock is not there. Use LOCK=cpu or LOCK=cuda."
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "the folder of wheels $wheels is not there. \`make wheels LOCK=$name\` fills build/wheels-$name on a machine with a network."
# It would be cleared.
[ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] || fail "VENV=$venv is not a virtual environment, and all that is in it would be deleted. Name another folder, or delete it yourself."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'echo "Error: the setup was interrupted; the next \`make\` starts it again." >&2; exit 130' INT TERM
rm -f "$venv/requirements.txt"  # the last file to be written: without it `make` runs the setup again
locked setuptools > "$work/setuptools.txt"
{ locked setuptools; locked torch; } > "$work/first.txt"
torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$lock")

pip_install() { "$venv/bin/pip" install --disable-pip-version-check --no-deps "$@" 2> "$work/errors"; }
locked_by_pip() { pip_install --require-hashes --no-build-isolation --use-pep517 ${wheels:+--no-index --find-links "$wheels"} "$@"; }
install_with_pip() {
    say "$("$python" --version) and pip; looking for $torch"
    "$python" -m venv --clear "$venv" 2> "$work/errors" \
        && locked_by_pip --retries 1 --timeout 15 -r "$work/first.txt" \
        && say "installing $lock with pip" \
        && locked_by_pip -r "$lock" \
        && pip_install --quiet --no-index --no-build-isolation --editable .
}

# Sets `uv` to one that knows --torch-backend.
find_uv() {
    for uv in "${UV:-uv}" "$venv-uv/bin/uv"; do
        if "$uv" pip install --help 2> /dev/null | grep -q -e --torch-backend; then return 0; fi
    done
    for each in "$python" python3 python; do
        command -v "$each" > /dev/null || continue
        say "installing uv into $venv-uv (requirements/uv.txt), with the pip of $each"
        rm -rf "$venv-uv"
        set -- install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes ${wheels:+--no-index --find-links "$wheels"}
        if "$each" -m pip "$@" --target "$venv-uv" -r requirements/uv.txt 2> "$work/errors"; then return 0; fi
        if "$each" -m venv "$venv-uv" > /dev/null 2>&1 && "$venv-uv/bin/pip" "$@" -r requirements/uv.txt 2> "$work/errors"; then return 0; fi
    done
    return 1
}

uv_install() { "$uv" pip install --python "$venv" --no-deps --no-build-isolation "$@"; }
locked_by_uv() {
    if [ -n "$wheels" ]; then set -- --offline --no-index --find-links "$wheels" "$@"; elif [ "$name" = cpu ]; then set -- --torch-backend cpu "$@"; fi
    uv_install --require-hashes "$@"
}
install_with_uv() {
    "$uv" venv --quiet --clear --python 3.11 ${wheels:+--offline} "$venv" \
        && say "installing $lock with $("$uv" --version) and $("$venv/bin/python" --version)" \
        && locked_by_uv --quiet -r "$work/setuptools.txt" \
        && locked_by_uv -r "$lock" \
        && uv_install --quiet --offline --no-index --editable .
}

if ! "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' > /dev/null 2>&1; then
    say "$python is not a Python 3.11 with venv and pip; going on with uv"
elif install_with_pip; then
    cp "$lock" "$venv/requirements.txt"
    exit 0
elif [ -n "$wheels" ]; then
    fail "the folder $wheels does not hold all of $lock ($(reason)). \`make wheels LOCK=$name\` fills one on a machine with a network."
else
    say "pip did not do it ($(reason)); going on with uv, which has its own index for torch"
fi

find_uv || fail "uv could not be installed with the pip of $python, python3 or python ($(reason)). Install uv or a Python 3 with pip, check the network, and try again."
install_with_uv || fail "uv could not install $lock; its message is above. Check the network and try again, or name a folder of wheels: make WHEELS=folder."
cp "$lock" "$venv/requirements.txt"
