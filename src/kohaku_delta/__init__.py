"""The recipe that rebuilds Kohaku XL Delta: one room a folder, data flows from `hub` to `checkpoint`."""

import os

# Read by numpy when it is first imported: no AVX-512 kernels, whose float64 exp and log have other bits (numerics/__init__.py). Here, because every
# stage and command imports this package before numpy.
os.environ["NPY_DISABLE_CPU_FEATURES"] = "X86_V4 AVX512_ICL AVX512_SPR"
