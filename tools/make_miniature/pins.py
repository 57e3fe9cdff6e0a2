"""Writes the pins of the files in data/ into miniature/params.yaml; every other line of the file is left unchanged."""

import hashlib
import os
from pathlib import Path

import click

from kohaku_delta import atomic_files

FILES = {
    "database": "danbooru2023.db",
    "tars": "images/data-*.tar",
    "sdxl": "checkpoints/sdxl.safetensors",
    "gamma": "checkpoints/gamma.safetensors",
    "beta": "checkpoints/beta.safetensors",
    "tokenizer_vocab": "tokenizer/vocab.json",
    "tokenizer_merges": "tokenizer/merges.txt",
    "tokenizer_2_vocab": "tokenizer_2/vocab.json",
    "tokenizer_2_merges": "tokenizer_2/merges.txt",
    "references": "references/reference-*.png",
}


def pin(file: Path, folder: Path) -> str:
    """One pin as YAML. folder: that of params.yaml, to which the file:// paths are relative."""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return f'{{url: file://{os.path.relpath(file, folder)}, bytes: {len(content)}, sha256: "{digest}"}}'


def write(data: Path, params: Path) -> None:
    """Rewrite download.inputs of `params` from the files under `data`."""
    lines = []
    for name, pattern in FILES.items():
        pins = [pin(file, params.resolve().parent) for file in sorted(data.resolve().glob(pattern))]
        if not pins:
            raise click.ClickException(
                f"{data / pattern} does not exist: generate it first (python tools/make_miniature)."
            )
        lines += (
            [f"    {name}:", *(f"      - {entry}" for entry in pins)] if "*" in pattern else [f"    {name}: {pins[0]}"]
        )
    text = params.read_text("utf-8").splitlines()
    start = next((place for place, line in enumerate(text) if line.startswith("  inputs:")), None)
    if start is None:
        raise click.ClickException(f"{params} has no download.inputs to write the pins into.")
    end = start + 1
    while end < len(text) and text[end].startswith("    "):
        end += 1
    head = text[start].replace("{}", "  ", 1).rstrip()
    with atomic_files.atomic_write(params, "w") as file:
        file.write("\n".join([*text[:start], head, *lines, *text[end:]]) + "\n")
