"""Invariant: the bits of a run depend on its inputs, not on the host: `hold()` fixes what may move them, or refuses.

The one place that sets threads, flags and environment. Call it before torch is imported:

    from kohaku_delta import numerics
    numerics.hold("cpu")

CPU (any x86-64 with AVX2): one thread a rank, ATen's AVX2 kernels, MKL's portable branch (the only one that every
vendor's processor honours), no oneDNN (it picks its blocking by cache size), no NNPACK, the math form of attention,
numpy without AVX-512. MKL's vector functions heed none of this: `torch.sqrt` differs between processors, and
operators.py lists what may run instead. GPU: deterministic algorithms in strict mode (warn-only leaves attention's
backward unordered), no autotuning, no TF32, a fixed cuBLAS workspace, and a ring without NVLS in NCCL. Equal bits then
need the same library versions, architecture and number of multiprocessors.
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
    "LYCORIS_KERNEL_BACKEND": "torch",  # LyCORIS times its fused kernels and keeps the winner: other bits on every run
    "LYCORIS_KERNEL_TUNE": "off",
    "NPY_DISABLE_CPU_FEATURES": os.environ["NPY_DISABLE_CPU_FEATURES"],  # kohaku_delta/__init__.py sets it
    "OPENCV_LOG_LEVEL": "ERROR",
    "OPENCV_IPP": "disabled",  # IPP picks its code by processor
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
PYTHON = (3, 11)


def prepare() -> None:
    """Fixes the environment, for this process and those that it starts; imports nothing. Refuses where torch is already
    loaded under another one.
    """
    if sys.version_info[:2] != PYTHON:
        raise UserError(
            f"This is Python {platform.python_version()}; the recipe's libraries are locked for 3.11. Run `make repro`, which makes .venv."
        )
    differing = sorted(key for key, value in ENVIRONMENT.items() if os.environ.get(key) != value)
    if "torch" in sys.modules and differing:
        raise UserError(
            f"torch was loaded before the numerics were fixed ({', '.join(differing)}). Call numerics.prepare() before importing torch."
        )
    os.environ.update(ENVIRONMENT)
    process_facts.register("numerics", lambda device: describe(device) if "torch" in sys.modules else None)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for 4-bit kernels that nothing here uses


def enforce(device: str = "cpu") -> None:
    """Fixes the numerics of this process for `device` ("cpu" or "cuda"). Refuses what it cannot hold.

    Errors: Refusal when torch was imported under another environment, when Python is not 3.11, when the processor has
    no AVX2, or when a CUDA device is asked for and none is there.
    """
    prepare()

    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: 12 % of a step here
    torch.backends.mkldnn.enabled = False
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
        raise UserError(
            f"This processor offers {torch.backends.cpu.get_cpu_capability()}; the recipe's CPU contract needs AVX2."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "params.yaml asks for train.device cuda, and torch sees no CUDA device here. Run on a GPU host, or rebuild the miniature."
        )


def describe(device: str) -> dict[str, str]:
    """What decides the bits here besides inputs, parameters and code: goes into the journal's header and the records."""
    import torch

    held = {"python": platform.python_version(), "torch": torch.__version__, "device": device, **ENVIRONMENT}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        held |= {
            "gpu": card.name,
            "architecture": f"{card.major}.{card.minor}",
            "multiprocessors": str(card.multi_processor_count),
            "cuda": torch.version.cuda,
        }
    return held
