"""What is on the screen where networks compute in mixed precision."""

from __future__ import annotations

import subprocess
import sys

NORM = """
import torch, raydistill.precision
value = torch.ones(2, 8, dtype=torch.bfloat16, device="meta")
torch.nn.functional.rms_norm(value, (8,), torch.ones(8, device="meta"))
"""


def test_a_norm_with_weights_in_float32_warns_of_nothing():
    done = subprocess.run([sys.executable, "-c", NORM], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
