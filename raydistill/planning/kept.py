"""Counts that are kept on disk: a second plan, and the check before a launch, read what was counted before.

`<cache>/counts` has one JSON file a count. Its name is a hash of all that the count depends on: keys of the configuration,
the models' configuration files, the code of this package and of families from outside, Python, and every installed
package. Whatever changes, it is counted anew. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import raydistill
from raydistill.config.reading import flatten, other_drawer
from raydistill.config.schema import Config
from raydistill.errors import InputError
from raydistill.planning import counts
from raydistill.planning.counts import FIELDS, Wanted, wanted
from raydistill.storage.atomic import remove_abandoned, replace_text
from raydistill.storage.fingerprint import files_hash
from raydistill.storage.hub import cached
from raydistill.storage.resolve import local_path
from raydistill.storage.staging import cache_folder
from raydistill.tracking.screen import duration, screen

READ = {  # keys that a count reads, and sections of which it reads any
    "trainer": (
        "run.seed", "student", "teacher", "teachers.dtype", "bridge", "fake_score", "discriminator", "vsd", "distill",
        "reward", "evaluation.weights",
    ),
    "teacher": ("student.model", "teacher", "teachers.slice", "teachers.dtype"),
    "drawer": (
        "student.model", "teacher", "teachers.slice", "teachers.dtype", "synthesis.teacher", "synthesis.guidance_scale",
    ),
    "bridge": (
        "student.model", "teacher.model", "teachers.dtype", "bridge", "bridge.steps", "bridge.lr", "distill",
        "prompts.encoder_dtype",
    ),
    "text": (
        "student.model", "teacher.model", "synthesis.teacher", "reward.metric", "reward.weight", "reward.weights",
        "evaluation.weights",
    ),
    "vae": ("student.model", "teacher.model"),
    "models": (
        "student.model", "student.unet", "student.lora_start", "teacher", "distill.batch_size", "distill.micro_batches",
        "prompts.encoder_dtype", "synthesis.teacher",
    ),
}  # fmt: skip
UNREAD = frozenset(  # of the sections, what people vary in plans and no count reads that does not name it
    {
        "teacher.sampling_steps", "bridge.pairs", "bridge.source", "bridge.shuffle", "bridge.steps", "bridge.lr", "discriminator.real_data",
        "discriminator.real_count", "discriminator.real_source", "distill.steps", "distill.warmup_steps", "distill.schedule", "distill.non_finite_share",
        "discriminator.ramp_steps", "reward.ramp_steps", "distill.overlap", "distill.in_flight", "distill.checkpoint_every",
        "distill.evaluate_every", "distill.max_failures", "distill.max_failures_without_progress", "distill.max_failures_of_node", "distill.resize_after_s",
        "distill.collective_timeout_s", "distill.network_interface", "distill.compile", "distill.stop_on_plateau", "distill.stop_on_collapse", "distill.gpus_per_worker", "distill.cpus_per_worker",
        "distill.threads", "distill.node_labels",
    }
)  # fmt: skip
TYPES = {
    "trainer": TypeAdapter(counts.Trainer),
    "teacher": TypeAdapter(counts.Teacher),
    "drawer": TypeAdapter(counts.Teacher),
    "bridge": TypeAdapter(counts.BridgeTraining),
    "text": TypeAdapter(dict[str, counts.Text]),
    "vae": TypeAdapter(dict[str, counts.Vae]),
    "models": TypeAdapter(counts.Models),
}
STEPS = {"trainer": 4}  # that `count` tells of; of other kinds one
NAMES = {  # what is shown while a field is counted
    "trainer": "a trainer",
    "small_trainer": "a trainer of fewer samples",
    "recomputing": "a trainer that recomputes",
    "least": "a trainer of the least memory",
    "keeping": "a trainer that keeps its activations",
    "small_keeping": "one of fewer samples",
    "network": "the teacher",
    "drawer": "what draws pictures",
    "bridge": "the Bridge's training",
    "text": "text encoders",
    "vae": "VAEs",
    "models": "models",
}


def find_counts(config: Config, fields: Sequence[str] = FIELDS) -> dict[str, Any]:
    """These fields of Counts: kept ones, and what is not kept is counted under a bar, and kept.

    Raises InputError: models that are unknown, or do not fit each other.
    """
    asked = wanted(config, fields)
    around = _surroundings()
    files = {name: _file(it, around) for name, it in asked.items()}
    found = {name: _read(files[name], it.kind) for name, it in asked.items()}
    lacking = [name for name, value in found.items() if value is None]
    if not lacking:
        return found
    started, total = time.monotonic(), sum(STEPS.get(asked[name].kind, 1) for name in lacking)
    done = itertools.count(1)
    with screen.bar("counting") as bar:
        bar.update(0, total, "torch and diffusers are loaded")
        from raydistill.planning.counting import count  # they take seconds, and what is kept needs neither

        for name in lacking:
            found[name] = count(
                asked[name], lambda phase, name=name: bar.update(next(done), total, f"{NAMES[name]}{phase}")
            )
            _write(files[name], asked[name].kind, found[name])
    screen.say(f"counted in {duration(time.monotonic() - started)}; kept for the next time in {_folder()}")
    return found


def _folder() -> Path:
    return cache_folder() / "counts"


# -- files ------------------------------------------------------------------------------------------------


def _read(file: Path | None, kind: str) -> Any:
    """The count of a file; None where there is none, or with a line where it is damaged."""
    if file is None:
        return None
    try:
        digest, _, value = file.read_bytes().partition(b"\n")
        if digest.decode() != hashlib.sha256(value).hexdigest():
            raise ValueError("its checksum differs")
        return TYPES[kind].validate_json(value)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pydantic's too
        screen.say(f"{file} is damaged ({str(error).splitlines()[0]}): counted anew")
        return None


def _write(file: Path | None, kind: str, value: Any) -> None:
    """Keep a count. Where that is impossible the plan goes on with a line."""
    if file is None:
        return
    text = TYPES[kind].dump_json(value).decode()
    try:
        replace_text(file, f"{_hash(text)}\n{text}", durable=False)
        remove_abandoned(file.parent, "*.json")
    except OSError as error:
        screen.say(f"{file} cannot be written ({error.strerror}): counted anew the next time")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- what a count depends on ------------------------------------------------------------------------------


def _file(it: Wanted, around: dict[str, Any] | None) -> Path | None:
    """Where a count is kept; None: it is not, since not all that it depends on can be seen."""
    if around is None:
        return None
    config, bridge = it.config, it.config.bridge.checkpoint
    drawers = [config.synthesis.teacher] if it.kind in ("drawer", "text", "models") and other_drawer(config) else []
    metric, weights = config.reward.metric, config.evaluation.weights | config.reward.weights
    rewards = [weights[metric]] if config.reward.is_on and it.kind in ("trainer", "text") and metric in weights else []
    inputs = {
        "count": [it.kind, it.batch],
        "configuration": {key: value for key, value in flatten(config).items() if reads(it.kind, key)},
        "models": [_model(model) for model in (config.student.model, config.teacher.model, *drawers)],
        "bridge": _folder_of(bridge, "bridge.json") if bridge and it.kind in ("trainer", "bridge") else None,
        "reward": [_folder_of(place, "*.json") for place in rewards],
        **around,
    }
    return _folder() / f"{it.kind}-{_hash(json.dumps(inputs, sort_keys=True))[:24]}.json"


def reads(kind: str, key: str) -> bool:
    """Whether a count may read this key of the configuration."""
    return key in READ[kind] or (key not in UNREAD and any(key.startswith(f"{section}.") for section in READ[kind]))


def _folder_of(path: str, pattern: str) -> str | None:
    folder = local_path(path)
    return files_hash(folder, pattern) if folder.exists() else None


def _model(model: str) -> str | None:
    """What a model's configuration files hold; None: the package's own are read, which belong to its code."""
    found = _folder_of(model, "*.json")
    try:
        return found or cached(model).name  # its commit
    except InputError:
        return None


def _surroundings() -> dict[str, Any] | None:
    """Code and libraries that every count depends on; None: a family of models has code that no file holds."""
    roots = {"raydistill": Path(raydistill.__file__).parent}
    spaces = sys.modules.get("raydistill.spaces")  # families that were registered in this process
    modules = [] if spaces is None else [family.__module__ for family in spaces.FAMILIES.values()]
    for module in [*modules, *(entry.module for entry in entry_points(group="raydistill.families"))]:
        root = module.partition(".")[0]
        if root in roots:
            continue
        try:
            spec = importlib.util.find_spec(root)
        except ValueError:  # __main__ of a notebook
            return None
        if spec is None or not spec.has_location:
            return None
        roots[root] = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
    code = {root: [files_hash(path, f"*.{kind}") for kind in ("py", "json")] for root, path in roots.items()}
    # any package may change how a network is built: attention, normalisation, adapters
    installed = {file.name for folder in sys.path if folder for file in Path(folder).glob("*.*-info")}
    return {"code": code, "libraries": [sys.version, platform.machine(), *sorted(installed)]}
