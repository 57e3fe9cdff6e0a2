"""Names of files that several rooms have to know."""

from pathlib import Path


def stamps_path(inputs: Path) -> Path:
    """Where the stamps of the verified inputs are kept: beside inputs.json, as inputs.verified.json."""
    return inputs.with_name(f"{inputs.stem}.verified.json")
