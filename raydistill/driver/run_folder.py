"""The folder of a run: its configuration, which a resume must not change, and what the driver remembers of it."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.reading import changed, draws, get, mathematical, to_yaml
from raydistill.config.schema import Config
from raydistill.config.stages import decays
from raydistill.errors import InputError, mask
from raydistill.storage import hub, hub_sets
from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place, Remote, cause
from raydistill.storage.resolve import FILE_KEYS, HUB_KEYS, SET_KEYS, check_storage, local_path
from raydistill.storage.run_files import CONFIGURATION, NOTES, asked_of, config_of, notes_of

# What may be done where inputs.json is damaged.
CURE = "restore it, or remove it: the run is then bound to the inputs and the checkpoints that are there now"


@dataclass(frozen=True)
class RunFolder:
    """`<storage>/<run.name>/`: everything a run keeps."""

    storage: Place
    name: str

    @property
    def path(self) -> Place:
        return self.storage / self.name

    def recall(self) -> dict[str, Any]:
        """MLflow run ids and stage times of this run so far. Raises InputError: the file is damaged."""
        return notes_of(self.path, "restore it, or remove it: the run then goes on under new MLflow runs")

    def remember(self, **values: Any) -> None:
        replace_text(self.path / NOTES, json.dumps(self.recall() | values, indent=1))


def open_run_folder(config: Config, result: str | None = None) -> RunFolder:
    """Folder of this run; an existing name is resumed unless a key that decides its numbers has changed.

    Args:
        result: file that a finished run has; the error then says what can be done with such a run.
    """
    storage = check_storage(config)
    name = config.run.name or f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    run = RunFolder(storage, name)
    with as_storage_error(storage):
        run.recall()
    if (saved := saved_config(run)) is not None:
        before, now_ = mathematical(with_backend(saved, saved)), mathematical(_as_begun(config, saved, run))
        others = [f"{key}: {before[key]!r} -> {now_[key]!r}" for key in now_ if before[key] != now_[key]]
        if others:
            finished = result is not None and (run.path / result).is_file()
            state = "is finished" if finished else "exists"
            extendable = result == "summary.json" and not decays(config)
            extend = " (a larger distill.steps alone would extend it)" if extendable else ""
            raise InputError(
                f"run.name={name} {state} with other settings, and a resume must not change them: {'; '.join(others)}. "
                f"Use another run.name, or the old settings{extend if finished else ''}"
            )
    return run


def pin_models(config: Config, run: RunFolder) -> Config:
    """The configuration with the commit of each hub model whose revision it leaves open: the run's own, or what is
    fetched now. Of data sets of the hub the commit that any other revision is at, which are not fetched.

    Otherwise what is published anew would change a run when it is resumed, or on a node that joins later.

    Raises:
        InputError: a model cannot be fetched, or a data set's commit not be looked up; names the key.
    """
    if (saved := saved_config(run)) is not None:
        config = _of_revisions(config, saved, run)
    models = _pinned_sets(config)
    for key in (*HUB_KEYS, *FILE_KEYS):
        value = get(config, key)
        if key == "synthesis.teacher" and not draws(config):
            continue
        of_hub, pinned = (hub.is_hub_file, hub.pinned_file) if key in FILE_KEYS else (hub.is_hub_id, hub.pinned)
        if value is not None and of_hub(value) and not local_path(value).exists():
            try:
                models[key] = pinned(value)
            except InputError as error:
                raise InputError(f"{key}: {error}") from None
    return _with_models(config, models)


def _pinned_sets(config: Config) -> dict[str, str]:
    """By key, data sets of the hub at their commit; one data set is looked up once. Raises InputError naming the key."""
    pinned = functools.lru_cache(maxsize=None)(hub_sets.commit_of)
    found = {}
    for key in SET_KEYS:
        value = get(config, key)
        if value is None or not hub_sets.is_hub_set(value) or (key == "synthesis.teacher" and not draws(config)):
            continue
        try:
            found[key] = hub_sets.pinned_set(value, pinned)
        except (InputError, OSError) as error:
            raise InputError(f"{key}: {error}") from None
    return found


def asked_sets(config: Config, pinned: Config) -> dict[str, str]:
    """By key, how a configuration names the data sets of the hub that `pinned` names by their commit."""
    both = {key: (get(config, key), get(pinned, key)) for key in SET_KEYS}
    return {
        key: asked
        for key, (asked, now) in both.items()
        if asked is not None and asked != now and hub_sets.is_hub_set(asked)
    }


def _as_begun(config: Config, saved: Config, run: RunFolder) -> Config:
    """What the configuration leaves to the driver, as the driver decided when the run began."""
    return with_backend(_of_revisions(config, saved, run), saved)


def with_backend(config: Config, saved: Config) -> Config:
    """With teachers.backend=auto, the backend that a saved configuration names. One of before the key is of zero3."""
    if config.teachers.backend != "auto":
        return config
    return changed(config, {"teachers": {"backend": saved.teachers.decided_backend}})


def _of_revisions(config: Config, saved: Config, run: RunFolder) -> Config:
    """Hub models and data sets whose revision is left open, at the revision that the saved configuration names.

    So too data sets that are named as when the run began, by whatever branch.
    """
    named = {key: (get(config, key), get(saved, key)) for key in SET_KEYS}
    named = {key: both for key, both in named.items() if None not in both}
    asked = asked_of(run.path, CURE) if any(hub_sets.is_hub_set(now) for now, _ in named.values()) else {}
    same = {
        key: before
        for key, (now, before) in named.items()
        if (key in (*HUB_KEYS, *FILE_KEYS) and hub.same_but_for_revision(now, before))
        or hub_sets.same_but_for_commit(now, before)
        or asked.get(key) == now
    }
    return _with_models(config, same)


def _with_models(config: Config, models: Mapping[str, str]) -> Config:
    """The configuration with other values of these dotted keys."""
    sections: dict[str, dict[str, str]] = {}
    for key, model in models.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = model
    return changed(config, sections)


def saved_config(run: RunFolder) -> Config | None:
    """The configuration that the run has had; None: the run is new. Raises InputError naming the file."""
    with as_storage_error(run.storage):
        _check_kinds(run.path, run.path / CONFIGURATION)
        return config_of(run.path, "restore it, or use another run.name")


def _check_kinds(folder: Place, file: Place) -> None:
    """Raises InputError where a file stands in the place of a run's folder, or a folder in that of its configuration."""
    if isinstance(folder, Path) and folder.exists() and not folder.is_dir():
        raise InputError(f"run.name={folder.name}: {folder} is a file, not a run's folder; use another run.name")
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise InputError(
            f"{file} is a folder, and a run keeps its configuration there: remove it, or use another run.name"
        )


@contextlib.contextmanager
def as_storage_error(storage: Place) -> Iterator[None]:
    """What a bucket refuses is an error of the key `storage`."""
    try:
        yield
    except OSError as error:
        if isinstance(storage, Remote):
            raise InputError(f"storage: {storage}: {cause(error, storage.scheme)}") from error
        raise


def create_run_folder(run: RunFolder, config: Config) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    uri = config.tracking.uri and mask("uri", config.tracking.uri)
    tracking = config.tracking.model_copy(update={"uri": uri})
    shown = config.model_copy(update={"storage": str(run.storage), "tracking": tracking})
    file, text = run.path / CONFIGURATION, to_yaml(shown)
    if not file.is_file() or file.read_bytes() != text.encode():
        replace_text(file, text)
