"""What is on the screen where networks compute in mixed precision."""

from __future__ import annotations

import subprocess
import sys

NORM = """
import torch
torch.nn.RMSNorm(8, eps=1e-6)(torch.ones(2, 8, dtype=torch.bfloat16))
"""


def test_a_norm_with_weights_in_float32_warns_of_nothing():
    done = subprocess.run([sys.executable, "-c", f"import raydistill.precision{NORM}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
