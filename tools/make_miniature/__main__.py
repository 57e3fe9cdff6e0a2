"""tools/make_miniature: writes data/, the miniature's inputs, byte for byte the same on every x86-64 host with AVX2.

python tools/make_miniature                      everything, then the pins (the checkpoints take about twenty
                                                 minutes on one core)
python tools/make_miniature --part collection    database, tars and tokenizers (seconds)
python tools/make_miniature --part checkpoints   the three models; needs the tokenizers
python tools/make_miniature --part references    a drawing for each of preview.prompts in miniature/params.yaml
python tools/make_miniature --part pins          size and sha256 of the files in data/ into miniature/params.yaml
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE.parents[1] / "src")]

from make_miniature import portable_products

portable_products.fix_openblas()

import click

from kohaku_delta import numerics
from kohaku_delta.cli.stage_command import StageCommand, print_summary

PARTS = ("collection", "checkpoints", "references", "pins")


@click.command(cls=StageCommand)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=HERE.parents[1] / "data",
    help="Folder that is written.  [default: data/ of the repository]",
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(PARTS),
    multiple=True,
    default=PARTS,
    help="What to write; may be repeated.  [default: all]",
)
@click.option(
    "--params",
    type=click.Path(path_type=Path),
    default=HERE.parents[1] / "miniature" / "params.yaml",
    help="File whose prompts are drawn and whose pins are rewritten.  [default: miniature/params.yaml]",
)
def main(out: Path, parts: tuple[str, ...], params: Path):
    """Generate the miniature's inputs."""
    numerics.enforce("cpu")
    for part in PARTS:  # each part needs the one before it
        if part == "collection" and part in parts:
            from make_miniature import collection

            collection.write(out)
        if part == "checkpoints" and part in parts:
            from make_miniature import checkpoints

            portable_products.replace_torch_functions()
            checkpoints.write(out)
        if part == "references" and part in parts:
            from kohaku_delta.params import load
            from make_miniature import references

            preview = load(params).preview
            references.write(preview.prompts, preview.width, preview.height, out / "references")
        if part == "pins" and part in parts:
            from make_miniature import pins

            pins.write(out, params)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print_summary("make_miniature", f"{', '.join(parts)} in {out}; {size / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
