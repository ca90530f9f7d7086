"""An evaluation whose input was checked, and the folder that it goes on in.

<out>/evaluation.json   what decides the results; an evaluation of other settings is never mixed into a folder
      items.jsonl       the pictures, in order
      pictures/         PNG files with their prompt inside
      parts/            scores as they come, a small file a batch and metric
      scores.parquet    one row a picture
      results.json      means, in all and by category
      grid.png          the first pictures
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raydistill.errors import InputError
from raydistill.evaluation.folder import SETTINGS_FILE
from raydistill.evaluation.metrics import SET_METRICS, Metric
from raydistill.evaluation.promptsets import CategorisedPrompts
from raydistill.evaluation.subject import Subject
from raydistill.pictures.picture import Picture
from raydistill.storage.place import Place


@dataclass(frozen=True)
class Resources:
    """Of the actors."""

    dtype: str = "float32"
    actors: int = 1
    gpus: float | None = None  # share of each actor; None: `divided` decides
    threads: int | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def divided(self, metrics: int, gpus: float) -> Resources:
        """One of the cluster's `gpus` for all actors, which run at once: those that draw, and one a metric."""
        return replace(self, gpus=int(100 / (metrics + self.actors)) / 100 if gpus else 0.0)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation that has passed its checks."""

    subject: Subject
    prompts: CategorisedPrompts
    pictures: list[Picture]
    metrics: list[Metric]
    reference: Path | None  # folder of picture files
    resources: Resources
    folder: Path
    settings: dict[str, Any]


def open_folder(
    out: Path | None,
    storage: Place,
    *,
    subject: Subject,
    prompts: CategorisedPrompts,
    pictures: Sequence[Picture],
    metrics: Sequence[Metric],
    reference: Path | None,
    dtype: str,
    batch_size: int,
) -> tuple[Path, dict[str, Any]]:
    """(folder, settings) of this evaluation, or of the same one begun before; nothing is written.

    Without `out` the folder's name tells what decides the pictures, so that the same command goes on in the same folder.

    Raises:
        InputError: the folder holds an evaluation of other settings, or something else.
    """
    decides = {
        "model": {k: v for k, v in asdict(subject).items() if k not in ("name", "run_id", "tracking_uri")},
        "weights": subject.fingerprint(),
        "dtype": dtype,
        "items": _digest([asdict(picture) for picture in pictures], 12),
        "count": len(pictures),
        "seed": pictures[0].seed,
    }
    if out is None and not isinstance(storage, Path):
        raise InputError(f"--storage {storage}: pictures go to a folder that every node sees; name it with --out")
    if out is None:
        name = f"{_plain(subject.name)}-{_plain(prompts.name)}-{_digest(decides, 4)}"
        out = storage / "evaluations" / name
    settings = decides | {"prompts": prompts.name, "batch_size": batch_size, "metrics": {}}
    file = out / SETTINGS_FILE
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [
            f"{key} was {before.get(key)!r}, now {value!r}"
            for key, value in decides.items()
            if before.get(key) != value
        ]
        if changed:
            raise InputError(
                f"--out {out}: holds an evaluation of other settings ({'; '.join(changed)}); use another folder"
            )
        settings |= {"batch_size": before["batch_size"], "metrics": before["metrics"]}
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is no evaluation's folder")
    for metric in metrics:
        now = metric.settings | ({"reference": str(reference)} if metric.name in SET_METRICS else {})
        known = settings["metrics"].get(metric.name, now)
        if known != now and metric.name not in SET_METRICS:  # a set metric is computed anew each time
            raise InputError(f"--out {out}: {metric.name} was computed with {known}, now {now}; use another folder")
        settings["metrics"] = settings["metrics"] | {metric.name: now}
    return out.absolute(), settings


def _digest(value: Any, size: int) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=isinstance(value, dict)).encode(), digest_size=size).hexdigest()


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "model"
