"""What is evaluated: a one-step student, a multi-step student or a teacher, and the pictures it draws.

A picture depends on the model, its prompt, its prompt's number and its seed, and has the noise that `jobs/sample.py`
gives it: another order draws the same pictures, another batch size the same up to the last bits of arithmetic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL.PngImagePlugin import PngInfo

from raydistill.diffusion.noise import normal
from raydistill.errors import InputError, NonFiniteError
from raydistill.evaluation.promptsets import Item
from raydistill.export.source import Export, find_export, open_one_step
from raydistill.pictures.grids import to_pil
from raydistill.spaces import load_space
from raydistill.spaces.one_step import one_step_x0
from raydistill.storage.atomic import replacing
from raydistill.storage.fingerprint import content_hash
from raydistill.storage.place import Place
from raydistill.storage.resolve import resolve, to_place
from raydistill.storage.staging import on_this_machine

DEFAULT_STEPS = 28  # of a multi-step model
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Subject:
    """A model, and how it is sampled; nothing is loaded.

    Attributes:
        name: for people.
        folder: the diffusers pipeline.
        unet: a one-step student's weights that replace the pipeline's UNet; None: its own.
        start_timestep: of the single step; None: `steps` steps of the folder's own scheduler.
        guidance_scale: of classifier-free guidance, or embedded; 1 is none.
        run_id: MLflow run that made the model, where known.
        tracking_uri: store that the configuration of that run names; None: none.
    """

    name: str
    folder: str
    unet: str | None
    start_timestep: int | None
    steps: int
    guidance_scale: float
    run_id: str | None = None
    tracking_uri: str | None = None

    @property
    def title(self) -> str:
        if self.start_timestep is not None:
            return f"{self.name}, one step from t = {self.start_timestep}"
        return f"{self.name}, {self.steps} steps, guidance {self.guidance_scale:g}"

    def fingerprint(self) -> str:
        """Hash of the network's files: results of other weights in the same folder are never taken for these."""
        folder = Path(self.unet) if self.unet else Path(self.folder, load_space(self.folder).network_name)
        return content_hash(folder)


def find_subject(
    model: str,
    storage: Place,
    tracking_uri: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    unet: str | None = None,
    start_timestep: int | None = None,
) -> Subject:
    """The model that `model` names, and how to sample it.

    Args:
        model: run's name or folder, an export or any diffusers folder, a URI of one, a hub model in the cache, or an MLflow run id.
        storage, tracking_uri: as `find_export` takes them.
        steps: None: 1 where the folder is a one-step export, else 28.
        guidance_scale: None: none for a single step, else the family's own.
        unet: one-step weights (`student.unet`) for the pipeline's UNet.
        start_timestep: of `unet`; None: what the checkpoint says of itself.

    Raises:
        InputError: there is no such model, or it cannot be sampled so.
    """
    export = _find(model, storage, tracking_uri)
    space = load_space(export.folder)
    run = (_run_of(export, model), _store_of(export))
    folder = str(Path(export.folder).resolve())
    if unet is not None:
        from raydistill.spaces.published_students import open_student

        weights = resolve(unet)
        space = load_space(export.folder, "StableDiffusionPipeline")
        found = open_student(space, weights)
        start = start_timestep or found.start_timestep
        if start is None:
            raise InputError(f"--unet {unet}: does not say at which timestep it starts; name --start-timestep")
        if not 0 < start < space.path.num_train_timesteps:
            raise InputError(f"--start-timestep {start}: must be 1 … {space.path.num_train_timesteps - 1}")
        _one_step_only(steps, guidance_scale)
        name = unet.removeprefix("shapes:") if unet.startswith("shapes:") else weights.stem
        return Subject(name, folder, str(weights.resolve()), start, 1, 1.0)  # no run of MODEL made these weights
    start = _start_of(export) if steps in (None, 1) else None
    if start is not None:
        _one_step_only(steps, guidance_scale)
        return Subject(export.name, folder, None, start, 1, 1.0, *run)
    scale = space.default_guidance_scale if guidance_scale is None else guidance_scale
    return Subject(export.name, folder, None, None, steps or DEFAULT_STEPS, scale, *run)


def _find(model: str, storage: Place, tracking_uri: str | None) -> Export:
    try:
        return find_export(model, storage, tracking_uri)
    except InputError as error:
        from raydistill.storage.hub import is_hub_id

        if is_hub_id(model):
            return Export(resolve(model), model)
        folder = to_place(model)
        if (folder / "unet" / "config.json").is_file():
            raise InputError(
                f"{model}: a UNet alone; name the pipeline that it belongs to and the UNet with --unet "
                f"(evaluate.py shapes:sd15 --unet {model} --start-timestep 999)"
            ) from None
        raise error


def _one_step_only(steps: int | None, guidance_scale: float | None) -> None:
    if steps not in (None, 1) or guidance_scale not in (None, 1.0):
        raise InputError("--steps, --guidance: a one-step student takes one step, without guidance")


def _start_of(export: Export) -> int | None:
    """Start timestep of a one-step export; None for any other pipeline."""
    if json.loads((Path(export.folder) / "model_index.json").read_text()).get("_class_name") != (
        "StableDiffusionPipeline"
    ):
        return None
    try:
        return open_one_step(export)[1]
    except InputError:
        return None


def _run_of(export: Export, model: str) -> str | None:
    """MLflow id of the run that made the export."""
    if export.run is not None and (export.run / "run.json").is_file():
        return json.loads((export.run / "run.json").read_text()).get("mlflow", {}).get("pipeline")
    return model if _RUN_ID.fullmatch(model) else None


def _store_of(export: Export) -> str | None:
    """`tracking.uri` of the run that made the export; its configuration may be another version's."""
    file = export.run / "config.yaml" if export.run is not None else None
    tree = yaml.safe_load(file.read_text()) if file is not None and file.is_file() else None
    return ((tree or {}).get("tracking") or {}).get("uri")


class Painter:
    """Draws the pictures of a subject."""

    def __init__(self, subject: Subject, device: torch.device | str, dtype: torch.dtype) -> None:
        """Load the networks. Noise always comes from the CPU; latents stay float32."""
        self.subject, self.device = subject, torch.device(device)
        self.space = load_space(subject.folder)
        self.text = self.space.load_text(dtype).to(self.device)
        if subject.unet is not None:
            from raydistill.spaces.published_students import load_student

            network = load_student(self.space, on_this_machine(subject.unet)).to(dtype)
        else:
            network = self.space.load_network(dtype)
        self.network = network.to(self.device)
        self.vae = self.space.load_vae(dtype).to(self.device)
        self._empty = None

    @torch.no_grad()
    def draw(self, items: Sequence[Item]) -> torch.Tensor:
        """[B, 3, S, S] in [-1, 1] on the CPU.

        Raises:
            NonFiniteError: naming the first picture concerned.
        """
        space, subject = self.space, self.subject
        noise = torch.cat([normal(i.seed, [i.prompt_id], space.latent_shape, "sample") for i in items]).to(self.device)
        conditioning = space.encode_prompts(self.text, [item.prompt for item in items])
        if subject.start_timestep is not None:
            latents = one_step_x0(space, self.network, noise, conditioning, subject.start_timestep)
        else:
            if self._empty is None:
                self._empty = space.unconditional(space.encode_prompts(self.text, [""]))
            latents = space.sample(
                self.network, noise, conditioning, self._empty, subject.steps, subject.guidance_scale
            )
        for item, finite in zip(items, latents.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:
                raise NonFiniteError(f"{item.file_name} ({item.prompt!r}): the latents are not finite")
        return space.decode(self.vae, latents).cpu()


def save_picture(file: Path, image: torch.Tensor, item: Item, model: str) -> None:
    """One PNG that says how it was made, written in one move."""
    facts = PngInfo()
    entries = {"prompt": item.prompt, "prompt_number": item.prompt_id, "seed": item.seed, "model": model}
    for key, value in entries.items():
        facts.add_itxt(key, str(value))
    with replacing(file) as fresh:
        to_pil(image).save(fresh, format="PNG", pnginfo=facts)
