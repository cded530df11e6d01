"""
Without a GPU: every test_kernel_*.py once more, and the decoder, through the Triton kernels in
Triton's interpreter. In a subprocess, because TRITON_INTERPRET counts when Triton is first
imported, and the other tests want the CPU's forms.
"""
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from kernels import INTERPRETED, triton


@pytest.mark.skipif(triton is None, reason="no Triton")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(),
                    reason="this run tests the kernels directly")
@pytest.mark.parametrize("files", ["test_kernel_*.py", "test_decoder_kernels.py"])
def test_in_the_interpreter(files):
    here = pathlib.Path(__file__).resolve().parent
    files = sorted(str(path) for path in here.glob(files))
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    run = subprocess.run(command, cwd=here.parent, env={**os.environ, "TRITON_INTERPRET": "1"},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout
