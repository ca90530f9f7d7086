"""ONNX and OpenVINO through optimum, in an environment that the variables name; the picture is diffusers' own."""

from __future__ import annotations

import os

import pytest
from export_students import export_of

# Pythons of environments with optimum, which cannot share one with raydistill (raydistill/export/optimum.py says why).
PYTHONS = {"onnx": "RAYDISTILL_OPTIMUM_ONNX", "openvino": "RAYDISTILL_OPTIMUM_OPENVINO"}


@pytest.mark.full
@pytest.mark.parametrize(("model", "start"), [("sd15", 999), ("sd21", 625)])
@pytest.mark.parametrize("kind", PYTHONS)
def test_the_runtimes_picture_is_diffusers_own(kind, model, start, run_script, tmp_path):
    python = os.environ.get(PYTHONS[kind])
    if python is None:
        pytest.skip(f"no environment with optimum for {kind}: name its Python in {PYTHONS[kind]}")
    export = export_of(model, start, tmp_path / "mine" / "export")
    out = tmp_path / kind
    code, said, error = run_script("export", export.folder, "--format", kind, "--optimum", python, "--out", out)
    assert code == 0, error
    apart = float(said.split("'s by ")[1].split()[0])
    assert apart < 0.05
    assert "guidance_scale=0" in (out / "README.md").read_text()
    assert ("INFERENCE_PRECISION_HINT" in (out / "README.md").read_text()) == (kind == "openvino")
    assert (out / "unet").is_dir()
