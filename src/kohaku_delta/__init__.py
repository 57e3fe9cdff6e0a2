"""The recipe that rebuilds Kohaku XL Delta. docs/architecture.md says what each folder holds and how data flows."""

import os
import sys

# Read by numpy when it is first imported: no AVX-512 kernels, whose float64 exp and log have other bits
# (numerics/__init__.py). Here, because every stage and command imports this package before numpy.
os.environ["NPY_DISABLE_CPU_FEATURES"] = "X86_V4 AVX512_ICL AVX512_SPR"


def _one_line_for_ctrl_c(kind, error, trace) -> None:
    """Ctrl-C prints one sentence also while modules are imported, before a command runs. Other errors keep Python's own
    report.
    """
    if kind is KeyboardInterrupt:
        print("Error: Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _one_line_for_ctrl_c
