"""What torch and bitsandbytes find on this host, and the model's sizes: one JSON object on the last line of stdout.

    python -m kohaku_delta.preflight.gpu_probe PARAMS

A process of its own, because the numerics must be fixed before torch is imported, and because a broken library may end
the process that imports it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from kohaku_delta import numerics
from kohaku_delta import params as recipes
from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.preflight import parameter_counts


def probe(recipe: Recipe, folder: Path) -> dict:
    """The facts of host_facts.Host that need torch, as JSON: numerics, bitsandbytes, network_weights ("" or None if
    there is nothing to say), gpus (a Gpu each, memory in bytes), architectures, cuda, nccl, model (ParameterCounts).
    """
    found: dict = {"numerics": "", "gpus": [], "architectures": [], "cuda": "", "nccl": ""}
    found |= {"model": None, "network_weights": None}
    try:
        numerics.enforce(recipe.train.device)
    except UserError as error:
        found["numerics"] = error.message
    except Exception as error:  # a broken installation of torch may raise anything
        reason = f"torch cannot be imported ({type(error).__name__})"
        return found | {"numerics": reason, "bitsandbytes": "it needs torch"}
    import torch

    found["cuda"] = torch.version.cuda or ""
    if torch.cuda.is_available():
        found["architectures"] = torch.cuda.get_arch_list()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            found["gpus"].append(
                {
                    "name": gpu.name,
                    "memory": gpu.total_memory,
                    "architecture": f"{gpu.major}.{gpu.minor}",
                    "multiprocessors": gpu.multi_processor_count,
                }
            )
    found["bitsandbytes"] = bitsandbytes_error(recipe.train.device)
    try:
        model = parameter_counts.count_parameters(recipe, folder)
        found["model"] = asdict(model) if model else None
        found["network_weights"] = parameter_counts.network_weights_error(recipe, folder)
    except (ImportError, AttributeError):
        pass  # libraries that do not fit together: the check of the libraries names them
    return found


def bitsandbytes_error(device: str) -> str:
    """Why bitsandbytes cannot compute on `device`; "" if it can. Without its native library it imports all the same,
    and fails at the first step.
    """
    try:
        from bitsandbytes import cextension
    except Exception as error:  # a broken installation may raise anything
        return f"it cannot be imported ({type(error).__name__})"
    if type(cextension.lib).__name__.startswith("ErrorHandlerMock"):
        return "its native library did not load"
    return "" if device == "cpu" or cextension.lib.compiled_with_cuda else "its native library is the CPU's"


if __name__ == "__main__":
    params = Path(sys.argv[1])
    try:
        print(json.dumps(probe(recipes.load(params), params.parent)))
    except UserError as error:
        print(json.dumps({"error": error.message}))
