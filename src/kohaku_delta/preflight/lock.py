"""Invariant: the lock decides the libraries; what is installed is held against it. pip checked the hashes when it installed."""

from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kohaku_delta.refusal import Refusal


def versions(path: Path) -> dict[str, str]:
    """{name: version} of a hash-locked requirements file. Refuses a line that pins nothing or has no hash."""
    try:
        lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    except (OSError, UnicodeDecodeError):
        raise Refusal(f"{path} cannot be read: it is the lock of the recipe's libraries. Restore it from the repository.") from None
    found = {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split("--hash=")
        try:
            each = Requirement(words[0].strip())
        except InvalidRequirement:
            raise Refusal(f"{path}: {words[0].strip()!r} is no requirement. Restore the file from the repository, or run `make lock`.") from None
        (only,) = each.specifier if len(each.specifier) == 1 else (None,)
        if only is None or only.operator != "==" or len(words) == 1:
            raise Refusal(f"{path}: {each.name} is not pinned by version and hash. Restore the file from the repository, or run `make lock`.")
        found[canonicalize_name(each.name)] = only.version
    return found


def version(locked: dict[str, str], *beginnings: str) -> str | None:
    """The version of the first locked library whose name begins so: NVIDIA's carry the CUDA version in theirs."""
    return next((number for beginning in beginnings for name, number in locked.items() if name.startswith(beginning)), None)
