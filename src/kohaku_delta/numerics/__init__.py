"""Fixes everything on the host that could change the bits of a run: threads, kernels, flags and environment.

This is the only place that sets them. Call it before torch is imported:

    from kohaku_delta import numerics
    numerics.enforce("cpu")

CPU (any x86-64 with AVX2): one thread per rank, ATen's AVX2 kernels, MKL's portable branch (the only one that
processors of every vendor use), no oneDNN (it chooses its blocking by cache size), no NNPACK, attention in its math
form, numpy without AVX-512. MKL's vector functions ignore all of this: `torch.sqrt` differs between processors, and
operators.py lists what may run instead. GPU: deterministic algorithms in strict mode (warn-only leaves attention's
backward unordered), no autotuning, no TF32, a fixed cuBLAS workspace, and NCCL's ring without NVLS. Equal bits then
need the same library versions, GPU architecture and number of multiprocessors.
"""

import logging
import os
import platform
import sys

from kohaku_delta import process_facts
from kohaku_delta.errors import UserError

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_ALGO": "Ring",
    "LYCORIS_KERNEL_BACKEND": "torch",  # otherwise LyCORIS times its fused kernels and keeps the fastest
    "LYCORIS_KERNEL_TUNE": "off",
    "NPY_DISABLE_CPU_FEATURES": os.environ["NPY_DISABLE_CPU_FEATURES"],  # kohaku_delta/__init__.py sets it
    "OPENCV_LOG_LEVEL": "ERROR",
    "OPENCV_IPP": "disabled",  # IPP chooses its code by processor
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
PYTHON = (3, 11)


def prepare() -> None:
    """Set the environment of this process and those that it starts; imports no library.

    Raises UserError if Python is not 3.11, or if torch was already imported under another environment.
    """
    if sys.version_info[:2] != PYTHON:
        raise UserError(
            f"This is Python {platform.python_version()}; the recipe's libraries are locked for 3.11. "
            "Run `make repro`, which creates .venv."
        )
    differing = sorted(key for key, value in ENVIRONMENT.items() if os.environ.get(key) != value)
    if "torch" in sys.modules and differing:
        raise UserError(
            f"torch was loaded before the numerics were fixed ({', '.join(differing)}). "
            "Call numerics.prepare() before importing torch."
        )
    os.environ.update(ENVIRONMENT)
    process_facts.register("numerics", lambda device: describe(device) if "torch" in sys.modules else None)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses 4-bit kernels that nothing here uses


def enforce(device: str = "cpu") -> None:
    """Fix the numerics of this process for `device` ("cpu" or "cuda").

    Raises UserError as prepare() does, if the processor has no AVX2, or if a CUDA device is needed and there is none.
    """
    prepare()

    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(True, warn_only=False)
    # a debugging aid that costs 12 % of a step here
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    torch.backends.nnpack.set_flags(False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(device == "cuda")  # deterministic in strict mode
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("highest")
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        raise UserError(f"This processor offers {torch.backends.cpu.get_cpu_capability()}; the recipe needs AVX2.")
    if device == "cuda" and (reason := cuda_error()):
        raise UserError(
            f"params.yaml sets train.device to cuda, but torch finds no CUDA device here ({reason}). "
            "Run on a GPU host (docs/hosts.md has what may be wrong with one), or rebuild the miniature."
        )


def cuda_error() -> str:
    """Why torch finds no CUDA device, in its words: no card, an old driver, a build for CPUs; "" if it finds one."""
    import torch

    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, or AssertionError of a CPU build
        return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
    return "torch counts 0 devices"


def describe(device: str) -> dict[str, str]:
    """What decides the bits besides inputs, parameters and code; part of the run's key and of the stages' records. Not
    the patch release of Python: the libraries compute.
    """
    import torch

    facts = {"python": "{}.{}".format(*PYTHON), "torch": torch.__version__, "device": device, **ENVIRONMENT}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": card.name,
            "architecture": f"{card.major}.{card.minor}",
            "multiprocessors": str(card.multi_processor_count),
            "cuda": str(torch.version.cuda),
        }
    return facts
