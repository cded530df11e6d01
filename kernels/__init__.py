"""
One file an op, each read from the top: the formula, the definition in plain PyTorch (`<op>_reference`), the Triton
kernels, and last the one name that callers import. CUDA tensors take the kernel; others take the definition, or the
faster CPU form where there is one. TRITON_INTERPRET=1 sends CPU tensors through the kernels, as the tests do.

decoder.py is no op: it puts them together into one decoder for every model family.
"""
