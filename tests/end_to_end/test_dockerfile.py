"""The Dockerfile's steps in a shell, where there is no Docker: what is copied is enough, and the command works."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from jobs_started import ROOT

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
NO_COPIES = shutil.ignore_patterns("__pycache__")


class Image:
    """Steps as Docker carries them out, below a folder, by a Python that finds this one's packages installed already."""

    def __init__(self, root: Path, device: str) -> None:
        self.root, self.python, self.here = root, root / "python", root
        # pip needs no packages then, and the index without CUDA is not asked
        subprocess.run([sys.executable, "-m", "venv", self.python], check=True)
        (packages,) = self.python.glob("lib/python*/site-packages")
        here = dict.fromkeys((sysconfig.get_path("purelib"), *site.getsitepackages()))
        (packages / "ours.pth").write_text("\n".join(here))
        own = {"PYTHONPATH", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "VIRTUAL_ENV"}
        self.environment = {name: value for name, value in os.environ.items() if name not in own}
        self.environment |= {"DEVICE": device, "PATH": f"{self.python}/bin:{os.environ['PATH']}"}

    def path(self, inside: str) -> Path:
        return self.root / inside.lstrip("/") if inside.startswith("/") else self.here / inside

    def step(self, instruction: str, value: str) -> None:
        if instruction == "RUN":
            command = re.sub(r"(?<![\w.])/(home/ray|tmp)\b", rf"{self.root}/\1", value)
            checked = ["-n"] if command.startswith("sudo ") else []  # Debian's packages are the machine's
            subprocess.run(["sh", *checked, "-c", command], cwd=self.here, env=self.environment, check=True)
        elif instruction == "WORKDIR":
            self.here = self.path(value)
            assert self.here.is_dir(), "Docker would make it root's"
        elif instruction == "COPY":
            *sources, target = [word for word in value.split() if not word.startswith("--")]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, self.path(target), ignore=NO_COPIES)
                else:
                    shutil.copy(ROOT / source, self.path(target))
        elif instruction == "ENV":
            self.environment |= dict(pair.split("=") for pair in value.split())
        elif instruction == "ARG":
            name, _, default = value.partition("=")
            self.environment.setdefault(name, default)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_steps_of_the_image_end_with_a_command_that_works(device, tmp_path):
    root = tmp_path / "root"
    for folder in ("home/ray", "tmp"):
        (root / folder).mkdir(parents=True)
    image = Image(root, device)
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    steps = DockerfileParser(str(tmp_path)).structure
    for step in steps:
        image.step(step["instruction"], step["value"])
    assert steps[-1]["instruction"] == "CMD"
    folder = root / "home" / "ray" / "raydistill"

    def run(*command):
        return subprocess.run(
            command, cwd=tmp_path, env=image.environment, capture_output=True, text=True, check=True
        ).stdout

    assert "commands:" in run(*json.loads(steps[-1]["value"]))
    where = run("python", "-c", "import raydistill; print(raydistill.__file__)").strip()
    assert where == str(folder / "raydistill" / "__init__.py")
    # as configs/kuberay.yaml starts it
    shown = run(
        "python", str(folder / "jobs/distill.py"), "--config", str(folder / "configs/sdxl_sd15.yaml"), "--print-config"
    )
    assert "stable-diffusion-xl-base-1.0" in shown
