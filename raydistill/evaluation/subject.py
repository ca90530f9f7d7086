"""What is evaluated: a one-step student, a multi-step student or a teacher. `jobs/sample.py` gives it the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from raydistill.diffusion.guidance import is_guided
from raydistill.errors import InputError
from raydistill.export.few_steps import steps_of_folder
from raydistill.export.sampling import Painter, in_steps
from raydistill.export.source import RUN_ID, Export, find_export, open_student_export
from raydistill.spaces import FAMILIES, load_space, load_student_space
from raydistill.spaces.published_students import load_student, open_student
from raydistill.storage.fingerprint import content_hash
from raydistill.storage.hub import is_hub_id
from raydistill.storage.place import Place
from raydistill.storage.resolve import resolve, to_place
from raydistill.storage.run_files import NOTES, notes_of, tracking_uri_of
from raydistill.storage.staging import on_this_machine

DEFAULT_STEPS = 28  # of a multi-step model
CURE = "restore it, or copy the export to another folder and name that"  # of a damaged file of the model's run


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and how it is sampled; nothing is loaded.

    Attributes:
        name: for people.
        folder: the diffusers pipeline.
        unet: a one-step student's weights that replace the pipeline's network; None: its own.
        start_timestep: of a student, with its `steps`; None: `steps` steps of the folder's own scheduler.
        guidance_scale: of classifier-free guidance, or embedded; 0 to 1 are none.
        run_id: MLflow run that made the model, where known.
        tracking_uri: store that the configuration of that run names; None: none.
    """

    name: str
    folder: str
    unet: str | None = None
    start_timestep: int | None = None
    steps: int = 1
    guidance_scale: float = 1.0
    run_id: str | None = None
    tracking_uri: str | None = None

    @property
    def title(self) -> str:
        if self.start_timestep is not None:
            return f"{self.name}, {in_steps(self.steps, self.start_timestep)}"
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
        steps: None: a student's own where the folder, or `unet`, is its export; 1 with other `unet`; else 28.
        guidance_scale: None: none for a student, else the family's own.
        unet: one-step weights (`student.unet`) for the pipeline's network.
        start_timestep: of `unet`; None: what the checkpoint says of itself.

    Raises:
        InputError: there is no such model, or it cannot be sampled so.
    """
    guided = _is_guided(guidance_scale)
    export = _find(model, storage, tracking_uri)
    space = load_space(export.folder)
    uri = tracking_uri_of(export.run, CURE) if export.run is not None else None
    made_by = {"run_id": _run_of(export, model), "tracking_uri": uri}
    folder = str(Path(export.folder).resolve())
    if unet is not None:
        weights = resolve(unet)
        space = load_student_space(export.folder)
        found = open_student(space, weights)
        start = start_timestep or found.start_timestep
        if start is None:
            raise InputError(f"--unet {unet}: does not say at which timestep it starts; name --start-timestep")
        if not 0 < start < space.path.num_train_timesteps:
            raise InputError(f"--start-timestep {start}: must be 1 … {space.path.num_train_timesteps - 1}")
        own = steps_of_folder(weights) if (weights / "scheduler").is_dir() else 1  # of a student's export, its own
        _its_own_alone(own, steps, guided)
        name = unet.removeprefix("shapes:") if unet.startswith("shapes:") else weights.stem
        # no run of MODEL made these weights
        return Subject(name=name, folder=folder, unet=str(weights.resolve()), start_timestep=start, steps=own)
    start, own = _student_of(export) or (None, 1)
    if start is not None and (steps in (None, own) or own > 1):
        _its_own_alone(own, steps, guided)
        return Subject(name=export.name, folder=folder, start_timestep=start, steps=own, **made_by)
    scale = space.default_guidance_scale if guidance_scale is None else guidance_scale
    return Subject(name=export.name, folder=folder, steps=steps or DEFAULT_STEPS, guidance_scale=scale, **made_by)


def _find(model: str, storage: Place, tracking_uri: str | None) -> Export:
    try:
        return find_export(model, storage, tracking_uri)
    except InputError as error:
        if is_hub_id(model):
            return Export(resolve(model), model)
        folder = to_place(model)
        if any((folder / family.network_name / "config.json").is_file() for family in FAMILIES.values()):
            raise InputError(
                f"{model}: a network alone; name the pipeline that it belongs to and the network with --unet "
                f"(evaluate.py shapes:sd15 --unet {model} --start-timestep 999)"
            ) from None
        raise error


def _is_guided(guidance_scale: float | None) -> bool:
    """Whether guidance is asked for. Raises InputError: a scale out of range."""
    try:
        return guidance_scale is not None and is_guided(guidance_scale)
    except InputError as error:
        raise InputError(f"--guidance: {error}") from None


def _its_own_alone(own: int, steps: int | None, guided: bool) -> None:
    """Raises InputError where a student is asked for other steps than its own, or for guidance."""
    if steps not in (None, own) or guided:
        takes = "a one-step student takes one step" if own == 1 else f"this student takes {own} steps"
        raise InputError(f"--steps, --guidance: {takes}, without guidance (0 to 1)")


def _student_of(export: Export) -> tuple[int, int] | None:
    """(start timestep, steps) of a student's export; None for any other pipeline."""
    try:
        return open_student_export(export)[1:]
    except InputError:
        return None


def _run_of(export: Export, model: str) -> str | None:
    """MLflow id of the run that made the export."""
    if export.run is not None and (export.run / NOTES).is_file():
        return notes_of(export.run, CURE).get("mlflow", {}).get("pipeline")
    return model if RUN_ID.fullmatch(model) else None


def load_painter(subject: Subject, device: torch.device | str, dtype: torch.dtype) -> Painter:
    """Load the networks of a subject."""
    space = load_space(subject.folder)
    sampling = {key: getattr(subject, key) for key in ("steps", "guidance_scale")}
    if subject.unet is not None:
        network = load_student(space, on_this_machine(subject.unet))
        sampling["start_timestep"] = subject.start_timestep
    else:  # of an export of one step, the scheduler's own step is the student's x0
        network = space.load_network(dtype)
        if subject.start_timestep is not None and subject.steps > 1:  # the noise of later steps is the picture's own
            sampling["start_timestep"] = subject.start_timestep
    return Painter(space, network, **sampling, device=device, dtype=dtype)
