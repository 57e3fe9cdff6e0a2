"""The command, without being installed: `python src/kohaku_delta preflight`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from kohaku_delta.cli.main import main

main(prog_name="kohaku-delta")
