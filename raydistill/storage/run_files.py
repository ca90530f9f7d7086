"""run.json, config.yaml and inputs.json, which a run keeps of itself: read by the run, and by whoever uses its student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.config.yaml_text import parse
from raydistill.errors import InputError
from raydistill.storage.atomic import read_json
from raydistill.storage.place import Place

NOTES, CONFIGURATION, INPUTS = "run.json", "config.yaml", "inputs.json"


def notes_of(run: Place, cure: str) -> dict[str, Any]:
    """MLflow run ids and stage times of a run so far; {}: none yet.

    Raises:
        InputError: the file is damaged. The message ends with `cure`, as those of the functions below.
    """
    file = run / NOTES
    if not file.is_file():
        return {}
    found = read_json(file, cure)
    for key, kinds in (("mlflow", (str,)), ("seconds", (int, float))):
        section = found.get(key, {})
        if not isinstance(section, dict) or any(type(value) not in kinds for value in section.values()):
            raise InputError(f"{file} is damaged ({key}: {str(section)[:40]}): {cure}")
    return found


def asked_of(run: Place, cure: str) -> dict[str, str]:
    """By key, how the run's first configuration named data sets of the hub; {}: it named none. Raises InputError: damaged."""
    file = run / INPUTS
    found = read_json(file, cure).get("asked", {}) if file.is_file() else {}
    if not isinstance(found, dict) or any(type(value) is not str for value in found.values()):
        raise InputError(f"{file} is damaged (asked: {str(found)[:40]}): {cure}")
    return found


def config_of(run: Place, cure: str) -> Config | None:
    """The run's configuration; None: it has none. Raises InputError: damaged, or this version cannot read it."""
    with _read(run, cure) as tree:
        return None if tree is None else validate(tree)


def tracking_uri_of(run: Place, cure: str) -> str | None:
    """`tracking.uri` of the run's configuration, which may be another version's. Raises InputError: damaged."""
    with _read(run, cure) as tree:
        section = (tree or {}).get("tracking") or {}
        uri = section.get("uri") if isinstance(section, dict) else section
        if not isinstance(uri, str | None):
            raise InputError("tracking.uri is no text")
        return uri


@contextmanager
def _read(run: Place, cure: str) -> Iterator[dict[str, Any] | None]:
    """The configuration as a plain tree; None: there is none. What is wrong with it names the file."""
    file = run / CONFIGURATION
    data = file.read_bytes() if file.is_file() else None
    try:
        tree = None if data is None else parse(data.decode(), "configuration")
        if data is not None and not isinstance(tree, dict):
            raise InputError("it holds no sections")
        yield tree
    except ValueError as error:  # of the text, or an InputError
        why = " ".join(str(error).split())
        raise InputError(f"{file} is damaged, or of another version ({why}): {cure}") from error
