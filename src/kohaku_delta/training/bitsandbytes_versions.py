"""The releases of bitsandbytes with wrong 8-bit optimizers. Needs no torch."""

FIRST_BROKEN, LAST_BROKEN = (0, 36, 0), (0, 41, 0)  # the release's model card names them


def is_broken(version: str) -> bool:
    """Whether the 8-bit optimizers of this release are wrong. version: as installed, for example 0.41.0."""
    return FIRST_BROKEN <= tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) <= LAST_BROKEN
