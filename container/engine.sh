# Sourced by the scripts in this folder: chooses the engine that builds and runs images. Docker if its engine answers, else buildah and podman.
if docker info > /dev/null 2>&1; then
    engine=docker
    build() { docker buildx build --load "$@"; }
    save() { docker save "$@"; }
elif command -v buildah > /dev/null && command -v podman > /dev/null; then
    engine=podman
    build() { buildah bud --timestamp "$SOURCE_DATE_EPOCH" "$@"; }
    save() { podman save --format oci-archive "$@"; }  # the other format changes the image's id
else
    echo "Error: no Docker engine answers, and buildah and podman are not there. Start Docker, or install both (Debian: buildah, podman, runc)." >&2
    exit 1
fi
