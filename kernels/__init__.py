"""
One file an op, each read from the top: the formula, the definition in plain PyTorch
(`<op>_reference`), the Triton kernels, and last the one name that callers import. CUDA tensors take
the kernel; others take the definition, or a faster form for the CPU where there is one.
TRITON_INTERPRET=1 sends CPU tensors through the kernels, as the tests do.

decoder.py is no op: it puts the ops together into one decoder for every model family.
"""

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton build for this platform: PyTorch serves every call
    triton = None
    tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as @triton.jit does
