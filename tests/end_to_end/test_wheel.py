"""The package as it is installed: a wheel, or an editable checkout, used in an empty folder."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from jobs_started import ROOT, SMALL

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
LEFT_OUT = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__", "mlruns", "mlflow.db")


class Installed:
    """A virtual environment that sees the packages of this one, and raydistill as `arguments` of pip install it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.bin, self.empty = folder / "venv" / "bin", folder / "empty"
        self.empty.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        python = [str(self.bin / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(python, capture_output=True, text=True, check=True).stdout.strip())
        # below its own packages; .pth files there, such as an editable raydistill's, are not read
        (packages / "ours.pth").write_text(
            "\n".join(dict.fromkeys((sysconfig.get_path("purelib"), *site.getsitepackages())))
        )
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *arguments], check=True, cwd=folder)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        own = {"PYTHONPATH", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"}
        ours = {name: value for name, value in os.environ.items() if name not in own}
        program, *arguments = command
        return subprocess.run(
            [str(self.bin / program), *arguments], cwd=self.empty, env=ours, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout: a build writes into its folder."""
    folder = tmp_path_factory.mktemp("source") / "raydistill"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    return folder


def test_the_wheel_plans_and_distils_in_an_empty_folder(source, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {
        str(Path("raydistill", file.relative_to(ROOT))) for file in (ROOT / "configs").rglob("*") if file.is_file()
    }
    assert shipped <= set(names)
    assert "raydistill/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "jobs/", "configs/"))]
    installed = Installed(tmp_path, str(wheel))
    where = installed.run("python", "-c", "import raydistill; print(raydistill.__file__)").stdout
    assert where.startswith(str(tmp_path / "venv"))

    plan = installed.run("raydistill", "plan", "--config", "shapes_sd3_sd15")
    assert plan.returncode == 0, plan.stderr
    assert "shapes:sd3" in plan.stdout
    run = installed.run("raydistill", "distill", "run.name=two", *SMALL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (installed.empty / "outputs" / "two" / "export" / "model_index.json").is_file()
    drawn = installed.run("raydistill", "sample", "two", "--prompt", "a red circle", "--out", "pictures")
    assert drawn.returncode == 0, drawn.stderr
    assert (installed.empty / "pictures" / "grid.png").is_file()


def test_an_editable_installation_finds_configurations_by_name_from_anywhere(source, tmp_path):
    installed = Installed(tmp_path, "--editable", str(source))
    (installed.empty / "mine.yaml").write_text("extends: [paper, teachers/sdxl]\nrun: {name: mine}\n")
    for name in ("sd35_medium_sd15", "mine.yaml"):
        shown = installed.run("raydistill", "distill", "--config", name, "--print-config")
        assert shown.returncode == 0, shown.stderr
    assert "stabilityai/stable-diffusion-xl-base-1.0" in shown.stdout
