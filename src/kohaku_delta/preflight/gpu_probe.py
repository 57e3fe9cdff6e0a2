"""Invariant: one JSON object on the last line of stdout, whatever is broken: what torch and bitsandbytes say of this
host, and the model's sizes.

A process of its own, because `numerics.hold` must come before torch and a library that fails may take its process with
it: python probe.py PARAMS
"""

import json
import os
import sys
from dataclasses import asdict

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

from kohaku_delta import numerics
from kohaku_delta import params as recipes
from kohaku_delta.errors import UserError
from kohaku_delta.preflight import parameter_counts


def main(params: Path) -> None:
    recipe = recipes.load(params)
    found = {
        "numerics": "",
        "bitsandbytes": "",
        "cards": [],
        "architectures": [],
        "cuda": "",
        "nccl": "",
        "numbers": None,
    }
    try:
        numerics.enforce(recipe.train.device)
    except UserError as refusal:
        found["numerics"] = refusal.message
    except Exception as error:  # whatever a broken installation of torch raises
        print(
            json.dumps(
                found
                | {"numerics": f"torch cannot be imported ({type(error).__name__})", "bitsandbytes": "it needs torch"}
            )
        )
        return
    import torch

    found["cuda"] = torch.version.cuda or ""
    if torch.cuda.is_available():
        found["architectures"] = torch.cuda.get_arch_list()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            seen = {"name": card.name, "memory": card.total_memory, "architecture": f"{card.major}.{card.minor}"}
            found["cards"].append(seen | {"multiprocessors": card.multi_processor_count})
    found["bitsandbytes"] = bitsandbytes_error(recipe.train.device)
    try:
        found["numbers"] = (
            asdict(numbers) if (numbers := parameter_counts.count_parameters(recipe, params.parent)) else None
        )
    except (ImportError, AttributeError):  # of libraries that do not fit together: their line names them
        pass
    print(json.dumps(found))


def bitsandbytes_error(device: str) -> str:
    """Why bitsandbytes cannot compute on `device`; "" when it can. A version that does not find its library imports
    well and fails at the first step.
    """
    try:
        from bitsandbytes import cextension
    except Exception as error:  # whatever a broken installation raises
        return f"it cannot be imported ({type(error).__name__})"
    if type(cextension.lib).__name__.startswith("ErrorHandlerMock"):
        return "its native library did not load"
    return "" if device == "cpu" or cextension.lib.compiled_with_cuda else "its native library is the CPU's"


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as refusal:
        print(json.dumps({"refusal": refusal.message}))
