"""Reads bom.json and croissant.json of a release with the tools that they are made for. Run by `make proofs`:
`.venv-proofs/bin/python tools/validate_proofs.py FOLDER`. bom.json must fit CycloneDX's JSON schema, strictly;
croissant.json must be valid for mlcroissant. Exit code 1 if one does not, with the tool's own message.
"""

import logging
import sys
from pathlib import Path

import mlcroissant
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator


def main(folder: Path) -> int:
    logging.getLogger("absl").setLevel(logging.ERROR)  # its warnings of optional fields
    faults = []
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str((folder / "bom.json").read_text("utf-8")):
        faults.append(f"bom.json: {error}")
    try:
        mlcroissant.Dataset(folder / "croissant.json")
    except (mlcroissant.ValidationError, ValueError) as error:
        faults.append(f"croissant.json: {error}")
    for fault in faults:
        print(f"Error: {fault}", file=sys.stderr)
    if not faults:
        print("bom.json: valid CycloneDX 1.6 (strict); croissant.json: valid Croissant 1.0")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
