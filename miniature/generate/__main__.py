"""miniature/generate: writes data/, the miniature's inputs, byte for byte the same on every x86-64 host with AVX2.

    python miniature/generate                      everything (the checkpoints take about twenty minutes on one core), then the pins
    python miniature/generate --part collection    database, tars and tokenizers (seconds)
    python miniature/generate --part checkpoints   the three models; needs the tokenizers
    python miniature/generate --part references    a drawing of each of preview.prompts in miniature/params.yaml (seconds)
    python miniature/generate --part pins          bytes and sha256 of what lies in data/ into miniature/params.yaml
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE.parent.parent / "src")]

from generate import products

products.hold()

import click

from kohaku_delta import numerics
from kohaku_delta.stage import Stage, summary

PARTS = ("collection", "checkpoints", "references", "pins")


@click.command(cls=Stage)
@click.option("--out", type=click.Path(path_type=Path), default=HERE.parent.parent / "data", help="Folder that is written.  [default: data/ of the repository]")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, help="What to write; may be repeated.  [default: all]")
@click.option("--params", type=click.Path(path_type=Path), default=HERE.parent / "params.yaml", help="File whose prompts are drawn and whose pins are rewritten.  [default: miniature/params.yaml]")
def main(out: Path, parts: tuple[str, ...], params: Path):
    """Generates the miniature's inputs."""
    numerics.hold("cpu")
    for part in PARTS:  # each needs the one before
        if part == "collection" and part in parts:
            from generate import collection

            collection.write(out)
        if part == "checkpoints" and part in parts:
            from generate import checkpoints

            products.take_over()
            checkpoints.write(out)
        if part == "references" and part in parts:
            from generate import references
            from kohaku_delta.params import load

            preview = load(params).preview
            references.write(preview.prompts, preview.width, preview.height, out / "references")
        if part == "pins" and part in parts:
            from generate import pins

            pins.write(out, params)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    summary("generate", f"{', '.join(parts)} in {out}; {size / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
