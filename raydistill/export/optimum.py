"""ONNX and OpenVINO through Hugging Face's optimum, which needs an environment of its own.

optimum-onnx 0.1.0 needs transformers < 4.58 and optimum-intel 2.2.0 needs transformers < 5.6 and huggingface_hub < 1.22.
raydistill needs transformers >= 5.23, and diffusers 0.42 needs huggingface_hub >= 1.32. They cannot be installed together.
So the user names the Python of an environment with optimum. Its own exporter runs there, and so does the check: one
picture by the runtime and one by diffusers, from the same folder and noise.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from raydistill.errors import InputError
from raydistill.export.cards import outside_card
from raydistill.export.one_picture import PROMPT
from raydistill.export.source import Export, open_one_step
from raydistill.export.tensors import locate, read_tensor, write_safetensors

TOLERANCE = 0.05  # 255ths: other kernels, in float32


@dataclass(frozen=True)
class Runtime:
    """One of optimum's runtimes."""

    module: str  # has the pipelines
    probe: str  # one that it has where it is complete
    packages: str  # for pip, in an environment of its own
    clash: str  # why it has to be one of its own
    options: dict[str, dict[str, str]]  # of `from_pretrained`, for float32


RUNTIMES = {
    "onnx": Runtime(
        "optimum.onnxruntime",
        "ORTStableDiffusionPipeline",
        "'optimum-onnx[onnxruntime]' diffusers",
        "optimum-onnx 0.1.0 needs transformers<4.58, raydistill transformers>=5.23",
        {},
    ),
    "openvino": Runtime(
        "optimum.intel",
        "OVStableDiffusionPipeline",
        "'optimum-intel[openvino]' diffusers",
        "optimum-intel 2.2.0 needs transformers<5.6 and huggingface_hub<1.22, raydistill transformers>=5.23",
        # on processors that have bfloat16 OpenVINO computes in it, which shows in the picture of a single step
        {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
    ),
}


def check_environment(kind: str, python: str | None) -> str:
    """The Python of an environment with optimum.

    Raises:
        InputError: none is named, or it lacks the runtime. One line, with the command that makes one.
    """
    runtime = RUNTIMES[kind]
    make = f"python3 -m venv optimum-{kind} && optimum-{kind}/bin/pip install {runtime.packages}"
    if python is None:
        raise InputError(
            f"--format {kind}: {runtime.clash}; make another environment ({make}) and add --optimum "
            f"optimum-{kind}/bin/python"
        )
    found = shutil.which(python)
    if found is None:
        raise InputError(f"--optimum {python}: no such program")
    done = _run(found, "-c", f"from {runtime.module} import {runtime.probe}")
    if done.returncode != 0:
        raise InputError(f"--optimum {python}: {_last_line(done)}; install with: {make}")
    return found


def write_optimum(export: Export, kind: str, python: str, folder: Path) -> float:
    """Write the runtime's folder and README.md, and compare a picture.

    Args:
        kind: of RUNTIMES.
        python: what `check_environment` returned.
        folder: an empty one.

    Returns the mean difference of a picture from diffusers' own, in 255ths.

    Raises:
        InputError: no one-step student.
        RuntimeError: the exporter failed, or its picture is another one.
    """
    space, start = open_one_step(export, f"--format {kind}")
    if kind not in space.runtimes:
        raise InputError(
            f"--format {kind}: {export.folder} is a {space.pipeline_class}, which is not written; take the folder"
        )
    runtime, pipeline = RUNTIMES[kind], space.runtimes[kind]
    with tempfile.TemporaryDirectory(prefix="raydistill-") as scratch:
        own = _for_older_transformers(Path(space.folder), Path(scratch, "export"))
        command = ("export", kind, "--model", str(own), "--task", "text-to-image", str(folder))
        done = _run(python, "-c", "from optimum.commands.optimum_cli import main; main()", *command)
        if done.returncode != 0:
            raise RuntimeError(f"optimum-cli export {kind}: {_last_line(done)}")
        asked = {"own": str(own), "other": str(folder), "prompt": PROMPT, "shape": list(space.latent_shape)}
        asked["options"] = runtime.options
        done = _run(python, "-c", _COMPARE, runtime.module, pipeline, space.pipeline_class, json.dumps(asked))
    if done.returncode != 0:
        raise RuntimeError(f"{pipeline}: {_last_line(done)}")
    found = float(done.stdout.splitlines()[-1])
    if not found <= TOLERANCE:
        raise RuntimeError(f"{kind}: draws another picture than {space.folder} (mean difference {found:.3g} / 255)")
    usage = _USAGE.format(kind=kind, module=runtime.module, pipeline=pipeline, start=start, apart=found,
                          packages=runtime.packages,
                          options="".join(f", {name}={value!r}" for name, value in runtime.options.items()))  # fmt: skip
    (folder / "README.md").write_text(outside_card(Path(space.folder), usage), encoding="utf-8")
    return found


def _for_older_transformers(export: Path, target: Path) -> Path:
    """The export as transformers before 5.6 reads it: links, and what these versions know under another name.

    They read a tokenizer's vocabulary and merges from files of their own, and want `text_model.` before every tensor of
    a text encoder. Exports of published models mostly have both.
    """
    target.mkdir()
    for entry in export.iterdir():
        if entry.name not in ("tokenizer", "text_encoder"):
            (target / entry.name).symlink_to(entry.resolve())
    tokenizer = Path(shutil.copytree(export / "tokenizer", target / "tokenizer"))
    if not (tokenizer / "vocab.json").is_file():
        model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (target / "text_encoder").mkdir()
    shutil.copyfile(export / "text_encoder" / "config.json", target / "text_encoder" / "config.json")
    tensors = locate(export / "text_encoder")
    named = {f"text_model.{name.removeprefix('text_model.')}": name for name in tensors}
    write_safetensors(
        target / "text_encoder" / "model.safetensors",
        {name: tensors[own][1] for name, own in named.items()},
        lambda name: read_tensor(tensors[named[name]][0], named[name]),
    )
    return target


def _run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Isolated from this environment: neither PYTHONPATH nor the working directory is seen."""
    return subprocess.run([python, "-I", *arguments], capture_output=True, text=True, check=False)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


# Runs in the other environment, which has no raydistill.
_COMPARE = """
import importlib, json, sys
import diffusers, numpy, torch
module, name, plain, asked = *sys.argv[1:4], json.loads(sys.argv[4])
noise = torch.randn(1, *asked["shape"], generator=torch.Generator().manual_seed(0))
def draw(pipe, latents):
    return numpy.asarray(pipe(asked["prompt"], latents=latents, num_inference_steps=1, guidance_scale=0,
                              output_type="np").images, dtype="float64")
own = draw(getattr(diffusers, plain).from_pretrained(asked["own"], torch_dtype=torch.float32, use_safetensors=True), noise)
pipe = getattr(importlib.import_module(module), name).from_pretrained(asked["other"], **asked["options"])
print(abs(own - draw(pipe, noise)).mean() * 255)
"""

_USAGE = """# One-step text-to-image student, {kind}

**Draw with 1 step and guidance off.** The defaults (50 steps, guidance 7.5) draw grey or broken pictures.

```python
from {module} import {pipeline}  # pip install {packages}

pipe = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER"{options})
image = pipe("a prompt", num_inference_steps=1, guidance_scale=0).images[0]
```

Start timestep: {start}. One picture differs from diffusers' own by {apart:.2g} / 255 on average, in float32.
"""
