# Which engine builds and runs images here, for the scripts beside this file: Docker where its engine answers, else buildah and podman, which need none.
if docker info > /dev/null 2>&1; then
    engine=docker
    build() { docker buildx build --load "$@"; }
    save() { docker save "$@"; }
elif command -v buildah > /dev/null && command -v podman > /dev/null; then
    engine=podman
    build() { buildah bud --timestamp "$SOURCE_DATE_EPOCH" "$@"; }
    save() { podman save --format oci-archive "$@"; }  # its other format writes the image anew, under another id
else
    echo "Error: no Docker engine answers, and buildah and podman are not there. Start Docker, or install both (Debian: buildah, podman, runc)." >&2
    exit 1
fi
