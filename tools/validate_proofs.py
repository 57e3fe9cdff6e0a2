"""Reads the proofs of a release with the tools that they are made for. Run by `make proofs`, before it signs:
`.venv-proofs/bin/python tools/validate_proofs.py FOLDER`. bom.json must fit CycloneDX's JSON schema, strictly;
croissant.json must be valid for mlcroissant, and what provenance.json signs for in-toto's attestation library. Exit
code 1 if one is not, with the tool's own message. Signatures are not looked at.
"""

import base64
import json
import logging
import sys
from pathlib import Path

import mlcroissant
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage


def main(folder: Path) -> int:
    logging.getLogger("absl").setLevel(logging.ERROR)  # its warnings of optional fields
    faults = []
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str((folder / "bom.json").read_text("utf-8")):
        faults.append(f"bom.json: {error}")
    try:
        mlcroissant.Dataset(folder / "croissant.json")
    except (mlcroissant.ValidationError, ValueError) as error:
        faults.append(f"croissant.json: {error}")
    try:
        payload = base64.b64decode(json.loads((folder / "provenance.json").read_text("utf-8"))["payload"])
        Statement.copy_from_pb(json_format.Parse(payload, StatementMessage())).validate()
    except (json_format.ParseError, ValueError) as error:
        faults.append(f"provenance.json: {error}")
    for fault in faults:
        print(f"Error: {fault}", file=sys.stderr)
    if not faults:
        print("valid: bom.json (CycloneDX 1.6, strict), croissant.json (Croissant 1.0), provenance.json (in-toto v1)")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
